"""Packed data sets: read back to the same slices, within the sizes that can be carried."""

import json

import numpy as np
import pytest
import torch
from small_data import cached, describe, fit, read, write_case

from training import packing
from training.__main__ import main
from training.cases import find_training_cases
from training.recipe import Recipe
from training.slices import Slices

CLIP = (-400, 240)  # of the recipe slim


@pytest.fixture
def data(tmp_path):
    """Bodies in air: one of few levels, one of many, a stack, and a patient left out."""
    rng = np.random.default_rng(0)
    about = {
        "few": {"annotated_labels": [1, 2], "patient": "P", "window_hu": [-160, 240]},
        "many": {"label_quality": "model"},
        "stack": {"slices": "stack", "annotated_labels": [1]},
        "unseen": {"split": "left_out", "annotated_labels": [1]},
    }
    for name in about:
        hu = np.full((40, 50, 6), -1000.0)
        hu[12:30, 15:40] = rng.normal(0, 90, (18, 25, 6))
        if name == "few":
            hu = np.rint(hu / 8) * 8
        labels = np.zeros(hu.shape, np.uint8)
        labels[14:20, 17:30, 1:4] = 1
        labels[20:24, 30:34, 2] = 2
        write_case(tmp_path / "data", name, labels, hu.astype(np.int16))
    return describe(tmp_path / "data", **about)


def pack(data, output, *more):
    return main(["pack", "--data", str(data), "--output", str(output), *map(str, more)])


@pytest.mark.parametrize(("step", "error"), [(0, 640 / 255 / 2 + 0.5), (8, 4.5)])
@pytest.mark.parametrize("limits", [(15_000_000, 45 * 2**20), (1500, 6000)])
def test_a_packed_set_is_read_back_to_the_same_slices(
    data, tmp_path, monkeypatch, step, error, limits
):
    monkeypatch.setattr(packing, "LARGEST_FILE", limits[0])
    monkeypatch.setattr(packing, "LARGEST_PART", limits[1])
    packed = tmp_path / "packed"
    assert pack(data, packed, "--left-out", "--step", step) == 0
    parts = sorted(packed.iterdir())
    assert (len(parts) > 1) == (limits[0] == 1500)
    for part in parts:
        sizes = [path.stat().st_size for path in part.iterdir()]
        assert sum(sizes) <= limits[1]
        assert max(path.stat().st_size for path in part.glob("*.png")) <= limits[0]
    for left_out in (False, True):
        original = read(data, tmp_path / "cache", left_out=left_out).cases
        found = read(packed, tmp_path / "none", left_out=left_out).cases
        names = ("name", "patient", "stack", "window_hu", "expert")
        for case, known in zip(found, original, strict=True):
            assert case.annotated == known.annotated
            assert [getattr(case.files, name) for name in names] == [
                getattr(known.files, name) for name in names
            ]
            assert case.cached.window == pytest.approx(known.cached.window)
            assert case.cached.spacing == known.cached.spacing
    original, found = cached(data, tmp_path / "cache"), cached(packed, tmp_path / "none")
    one, other = (
        Slices(part, [], Recipe(label_balanced_fraction=0.5)) for part in (original, found)
    )
    assert original[0].cached.shape == (6, 50, 40)
    assert found[0].cached.shape == (6, 33, 26)  # 25 x 18 pixels of body and 4 of air on each side
    for position in range(20):
        whole, cropped = one.slice_at(position), other.slice_at(position)
        rows, columns = slice(6, 39), slice(6, 32)  # rows run toward posterior, columns toward left
        assert torch.equal(cropped.labels, whole.labels[rows, columns])
        difference = (cropped.hu - whole.hu.clip(*CLIP)[rows, columns]).abs()
        assert difference.max() <= error
    few = [case.cached.hu for case in (found[0], original[0])]
    if not step:
        assert np.array_equal(few[0], few[1].clip(*CLIP)[:, rows, columns])


@pytest.mark.slow
def test_a_packed_set_is_trained_on_and_scored(data, tmp_path):
    packed = tmp_path / "packed"
    assert pack(data, packed) == 0
    (packed / "part-1" / "many-1.png").write_bytes(b"")  # a damaged case costs itself alone
    run, slim = tmp_path / "run", ("--recipe", "slim")
    numbers = {"slice_size": 32, "synthetic_fraction": 0}
    assert fit(packed, run, *slim, "--held-out", "P", "--steps", 1, **numbers) == 0
    about = json.loads((run / "run.json").read_text())
    assert [case["name"] for case in about["training"]] == ["stack"]
    assert [case["name"] for case in about["held_out"]] == ["few"]
    assert (run / "held_out.csv").read_text().count("few") == 2
    with pytest.raises(SystemExit, match="2"):  # what lies outside is not in the files
        fit(packed, run, *slim, clip_hu="-500,240", **numbers)
    with pytest.raises(SystemExit, match="2"):
        pack(data, packed)
    assert main(["check", "--data", str(packed)]) == 1


def test_a_case_that_cannot_be_read_is_not_packed(data, tmp_path):
    (data / "images" / "many_0000.nii.gz").write_bytes(b"nothing")
    assert pack(data, tmp_path / "packed") == 1
    cases, _ = find_training_cases(tmp_path / "packed")
    assert [case.name for case in cases] == ["few", "stack"]

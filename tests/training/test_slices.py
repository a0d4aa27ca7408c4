"""Which slices are sampled, and how they are stacked, on the host and on the device."""

from collections import Counter

import numpy as np
import pytest
import torch
from small_data import cached, describe, labelled, write_case

from training import device_slices
from training.device_slices import DeviceSlices
from training.loss import IGNORED
from training.slices import Slice, SliceDataset, annotated_mask, collate

DRAWN = Slice(
    hu=np.full((8, 8), 999, np.int16),
    labels=np.ones((8, 8), np.uint8),
    annotated=annotated_mask((1,)),
    window=(-9.0, 9.0),
    pixel_mm=1.5,
)


def test_slices_depend_on_seed_and_position_alone(tmp_path):
    for seed, name in enumerate("abc"):
        write_case(tmp_path, name, seed=seed)
    cases = cached(tmp_path, tmp_path / "cache")
    dataset = SliceDataset(cases, seed=3, label_balanced_fraction=0.5)
    forwards = [dataset[position] for position in range(20)]
    backwards = [dataset[position] for position in range(19, -1, -1)][::-1]
    assert all(np.array_equal(a.hu, b.hu) for a, b in zip(forwards, backwards, strict=True))
    other = SliceDataset(cases, seed=4, label_balanced_fraction=0.5)
    assert any(not np.array_equal(other[p].hu, forwards[p].hu) for p in range(20))


def test_label_7_is_unmarked_where_nobody_looked_for_it(tmp_path):
    labels = labelled()
    labels[4:6, 3:6, 4] = 7
    write_case(tmp_path, "a", labels)
    describe(tmp_path, a={"annotated_labels": [1, 2]})
    dataset = SliceDataset(cached(tmp_path, tmp_path / "cache"))
    slices = [dataset[position] for position in range(40)]
    assert {int(label) for part in slices for label in np.unique(part.labels)} == {0, 1}
    assert np.flatnonzero(slices[0].annotated).tolist() == [0, 1, 2]


def test_labels_then_patients_then_slices_are_sampled(tmp_path):
    """Label 1 in three cases of P and one of Q, whose labels are a model's; 7 in Q alone."""
    for name in "abcd":
        labels = labelled()
        labels[4:6, 3:6, 4] = 7 * (name == "d")
        write_case(tmp_path, name, labels)
    about = {name: {"patient": "P", "annotated_labels": [1, 7]} for name in "abc"}
    about["d"] = {"patient": "Q", "annotated_labels": [1, 7], "label_quality": "a model"}
    cases = cached(describe(tmp_path, **about), tmp_path / "cache")
    places = [SliceDataset(cases, label_balanced_fraction=1.0).locate(p) for p in range(1200)]
    counts = Counter((cases[number].patient, index == 4) for number, index in places)
    expected = {("Q", True): 1 / 2, ("P", False): 1 / 3, ("Q", False): 1 / 6}
    assert set(counts) == set(expected)
    for key, share in expected.items():
        assert counts[key] / 1200 == pytest.approx(share, abs=0.05)
    places = [SliceDataset(cases).locate(position) for position in range(1200)]
    assert max(Counter(places).values()) < 90  # of 24 slices, 50 each


def test_drawn_slices_are_mixed_in_as_asked(tmp_path):
    write_case(tmp_path, "a")
    cases = cached(tmp_path, tmp_path / "cache")
    dataset = SliceDataset(cases, synthesise=lambda rng: DRAWN, synthetic_fraction=0.3)
    assert np.mean([dataset[p].hu[0, 0] == 999 for p in range(600)]) == pytest.approx(0.3, abs=0.06)


def test_slices_of_a_batch_share_their_middle():
    sizes = [(20, 40), (33, 17)]
    rng = np.random.default_rng(0)
    slices = [
        DRAWN._replace(hu=rng.integers(-999, 999, size, np.int16), labels=np.ones(size, np.uint8))
        for size in sizes
    ]
    batch = collate(slices, multiple=16)
    assert batch.hu.shape == (2, 1, 48, 48)
    around = [((14, 14), (4, 4)), ((7, 8), (15, 16))]
    for index, (rows, columns) in enumerate(sizes):
        padded = np.pad(slices[index].hu, around[index], mode="edge")
        assert np.array_equal(batch.hu[index, 0], padded)
        assert (batch.labels[index] == 1).sum() == rows * columns
        assert (batch.labels[index] == IGNORED).sum() == 48 * 48 - rows * columns


def test_slices_on_the_device_are_those_of_the_host(tmp_path, monkeypatch):
    """Slices of three sizes, one case annotated for less than it shows, and synthetic ones."""
    monkeypatch.setattr(device_slices, "DRAWN", 2)
    for seed, shape in enumerate([(12, 10, 6), (30, 25, 5), (9, 40, 5)]):
        labels = labelled(shape=shape)
        labels[4:6, 3:6, 4] = 7
        write_case(tmp_path, "abc"[seed], labels, seed=seed)
    describe(tmp_path, b={"annotated_labels": [1]})
    dataset = SliceDataset(
        cached(tmp_path, tmp_path / "cache"),
        label_balanced_fraction=0.5,
        synthesise=lambda rng: DRAWN,
        synthetic_fraction=0.2,
    )
    resident = DeviceSlices(dataset, torch.device("cpu"), 16)
    for start in range(0, 40, 4):
        positions = range(start, start + 4)
        expected = collate([dataset[position] for position in positions], 16)
        for found, known in zip(resident.batch(dataset, positions), expected, strict=True):
            assert found.dtype == known.dtype
            assert torch.equal(found, known)

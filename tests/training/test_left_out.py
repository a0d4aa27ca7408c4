"""Cases that are left out, stacks of slices and windowed pictures: what training does with them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_nifti

from inference.network.model import AttentionUNet
from inference.network.weights import WeightsMetadata, save_weights
from training import TrainingError, evaluation
from training.__main__ import COMMANDS, main
from training.augmentation import Intensities, prepare
from training.cache import cache_cases
from training.cases import find_training_cases
from training.evaluation import Score, mean_by_label, score_cases
from training.export import _left_out_lines
from training.recipe import Recipe
from training.slices import Batch, Slice, collate

METADATA = WeightsMetadata(
    base_channels=4,
    num_classes=15,
    intensity_mean=0.0,
    intensity_std=100.0,
    matrix_reduction=1,
    attention="none",
    trained_on="nothing",
    licence="none",
    date="2026-01-01",
    revision="none",
)


def write_case(folder: Path, name: str, labels: np.ndarray) -> None:
    hu = np.random.default_rng(0).normal(0, 300, labels.shape).astype(np.int16)
    for kind, suffix, array in (("images", "_0000", hu), ("labels", "", labels)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        save_nifti(folder / kind / f"{name}{suffix}.nii.gz", array)


def data_set(folder: Path, about: dict[str, dict]) -> Path:
    labels = np.zeros((32, 32, 3), np.uint8)
    labels[4:9, 2:8] = 1
    for name in about:
        write_case(folder, name, labels)
    (folder / "cases.json").write_text(json.dumps(about))
    return folder


def test_nobody_trains_on_a_case_that_is_left_out(tmp_path):
    folder = data_set(tmp_path, {"a": {"split": "train"}, "b": {"split": "left_out"}, "c": {}})
    assert [case.name for case in find_training_cases(folder)] == ["a", "c"]
    assert [case.name for case in find_training_cases(folder, left_out=True)] == ["b"]


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"split": "leftout"}, "split is train or left_out, not 'leftout'"),
        ({"slices": "some"}, "slices is volume or stack, not 'some'"),
        ({"window_hu": [240, -160]}, "window_hu is"),
        ({"window_hu": 7}, "not iterable"),
    ],
)
def test_a_word_that_is_not_understood_is_an_error(tmp_path, about, message):
    folder = data_set(tmp_path, {"a": about})
    with pytest.raises(TrainingError, match=message):
        find_training_cases(folder)


def test_a_stack_is_scored_without_largest_components(tmp_path, monkeypatch):
    """Two equal squares, one of them alone in its slice: a component step would drop one."""
    labels = np.zeros((32, 32, 3), np.uint8)
    labels[4:8, 4:8, 0] = labels[4:8, 4:8, 2] = 1
    for name in ("stack", "volume"):
        write_case(tmp_path, name, labels)
    looked_for = {"annotated_labels": [1, 2]}
    about = {"stack": {"slices": "stack", **looked_for}, "volume": looked_for}
    (tmp_path / "cases.json").write_text(json.dumps(about))
    cases = cache_cases(find_training_cases(tmp_path), tmp_path / "cache")

    class Oracle:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def predict(self, _: np.ndarray, **__: object) -> np.ndarray:
            return np.load(cases[0].cached.labels).copy()

    monkeypatch.setattr(evaluation, "Predictor", Oracle)
    scores = score_cases(cases, {}, METADATA, torch.device("cpu"), batch_size=1, step=3)
    stack = [score for score in scores if score.case == "stack"]
    assert [(score.label, score.dsc) for score in stack] == [(1, 1.0)]  # 2 is absent: not scored
    assert np.isnan(stack[0].nsd)
    volume = {score.label: score.dsc for score in scores if score.case == "volume"}
    assert volume == {1: pytest.approx(2 / 3, abs=1e-4), 2: 1.0}  # 16 of 32 pixels; both empty


def test_means_leave_out_the_surfaces_that_stacks_do_not_have():
    nan = float("nan")
    scores = [Score(0, "a", 1, 0.5, nan), Score(0, "b", 1, 1.0, 0.8), Score(0, "a", 2, 0.5, nan)]
    means = mean_by_label(scores)
    assert means[1] == (0.75, 0.8, 2)
    assert means[2][0] == 0.5 and np.isnan(means[2][1])


def batch_of(values: np.ndarray, count: int) -> Batch:
    part = Slice(
        hu=values.astype(np.int16),
        labels=np.zeros(values.shape, np.uint8),
        annotated=np.ones(15, bool),
        window=(-3000.0, 3000.0),
        pixel_mm=1.0,
    )
    return collate([part] * count, 16)


@pytest.mark.slow
def test_windows_are_drawn_for_a_part_of_the_slices():
    values = np.tile(np.linspace(-1000, 1000, 32), (32, 1))
    rngs = [np.random.default_rng(seed) for seed in range(64)]
    images, _ = prepare(
        batch_of(values, 64),
        torch.device("cpu"),
        Recipe(window_probability=0.5),
        Intensities(0.0, 1.0),
        rngs,
        torch.Generator(),
    )
    images = images[:, 0].numpy()
    whole = (images == np.trunc(values)).all(axis=(1, 2))
    assert 20 <= whole.sum() <= 44
    windowed = images[~whole]
    assert (windowed.max(axis=(1, 2)) >= 230).all() and (windowed.max(axis=(1, 2)) <= 300).all()
    air = np.trunc(values) < -300
    assert (windowed[:, air] == np.trunc(values)[air]).all()
    fat = windowed[:, (values > -300) & (values < -165)]
    assert (fat >= -165).all() and (fat <= -100).all()


@pytest.mark.parametrize("clip_hu", [(0, 0), (-160, 240)])
def test_a_window_leaves_a_slice_from_a_narrower_one_as_it_is(clip_hu):
    """Fat at -100, as the data sets have it below 0 HU, stays fat, and air stays air."""
    values = np.tile(np.array([-1000.0, -100.0, 0.0, 200.0]), (32, 8))
    images, _ = prepare(
        batch_of(values, 4),
        torch.device("cpu"),
        Recipe(window_probability=1.0, clip_hu=clip_hu),
        Intensities(0.0, 1.0),
        [np.random.default_rng(seed) for seed in range(4)],
        torch.Generator(),
    )
    assert (images[:, 0].numpy() == (values.clip(*clip_hu) if any(clip_hu) else values)).all()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"example: python -m training {name} " in capsys.readouterr().out


def test_left_out_cases_are_scored_by_data_set(tmp_path, capsys):
    about = {
        "a": {"split": "train"},
        "b": {"split": "left_out", "slices": "stack", "annotated_labels": [1]},
    }
    folder = data_set(tmp_path / "set", about)
    torch.manual_seed(0)
    network = AttentionUNet(base_channels=4, attention="none")
    save_weights(tmp_path / "w.safetensors", network.state_dict(), METADATA)
    report = tmp_path / "left-out.csv"
    code = main(
        ["score", str(tmp_path / "w.safetensors"), "--data", str(folder), "--output", str(report)]
    )
    assert code == 0
    with report.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["data_set"], row["case"], row["name"]) for row in rows] == [("set", "b", "liver")]
    assert "1 cases left out" in capsys.readouterr().out
    (scores,) = evaluation.read_left_out(report).values()
    assert scores[0].dsc == float(rows[0]["dsc"])
    lines = _left_out_lines({"set": [Score(0, "b", 1, 0.5, float("nan"))], "other": []})
    assert lines[-2:] == [
        "| liver | 0.500 (1) |  |",
        "| **mean of organs** | **0.500** | **nan** |",
    ]


def test_scoring_a_data_set_without_left_out_cases_is_wrong_usage(tmp_path, capsys):
    folder = data_set(tmp_path, {"a": {}})
    with pytest.raises(SystemExit) as stopped:
        main(["score", "w.safetensors", "--data", str(folder), "--output", "x.csv"])
    assert stopped.value.code == 2
    assert "no case has the split left_out" in capsys.readouterr().err

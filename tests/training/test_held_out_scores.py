"""Scores of held-out and left-out cases, their pictures, and runs side by side."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import metadata_of
from matplotlib.axes import Axes
from PIL import Image
from small_data import cached, describe, labelled, write_case

from inference.network.model import AttentionUNet
from inference.network.weights import save_weights
from training import TrainingError, evaluation, pictures
from training.__main__ import main
from training.cache import describe as describe_arrays
from training.cases import CachedVolume, Case, CaseFiles
from training.evaluation import score_cases
from training.recipe import Recipe
from training.run_folder import Metrics
from training.tables import Score, comparison_table, write_table

NAN = float("nan")
NETWORK = AttentionUNet(base_channels=4, attention="none")
METADATA = metadata_of(NETWORK, attention="none")


def test_a_stack_is_scored_without_largest_components(tmp_path, monkeypatch):
    """Two equal squares, one of them alone in its slice: a component step would drop one."""
    labels = np.zeros((32, 32, 3), np.uint8)
    labels[4:8, 4:8, 0] = labels[4:8, 4:8, 2] = 1
    for name in ("stack", "volume"):
        write_case(tmp_path, name, labels)
    looked_for = {"annotated_labels": [1, 2]}
    describe(tmp_path, stack={"slices": "stack", **looked_for}, volume=looked_for)
    cases = cached(tmp_path, tmp_path / "cache")

    class Oracle:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def predict(self, _: np.ndarray, **__: object) -> np.ndarray:
            return cases[0].cached.label_map.copy()

    monkeypatch.setattr(evaluation, "Predictor", Oracle)
    scores = [
        score
        for _, _, of_case in score_cases(cases, {}, METADATA, torch.device("cpu"))
        for score in of_case
    ]
    stack = [score for score in scores if score.case == "stack"]
    assert [(score.label, score.dsc) for score in stack] == [(1, 1.0)]  # 2 is absent: not scored
    assert np.isnan(stack[0].nsd)
    volume = {score.label: score.dsc for score in scores if score.case == "volume"}
    assert volume == {1: pytest.approx(2 / 3, abs=1e-4), 2: 1.0}  # 16 of 32 pixels; both empty


def test_left_out_cases_are_scored_by_data_set(tmp_path):
    folder = tmp_path / "set"
    for name in "ab":
        write_case(folder, name, labelled(shape=(32, 32, 6)))
    describe(folder, b={"split": "left_out", "slices": "stack", "annotated_labels": [1]})
    weights, table = tmp_path / "w.safetensors", tmp_path / "left-out.csv"
    save_weights(weights, NETWORK.state_dict(), METADATA)
    command = ["score", weights, "--data", folder, "--output", table, "--pictures", tmp_path / "p"]
    assert main([*map(str, command), "--device", "cpu"]) == 0
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["data_set"], row["case"], row["name"]) for row in rows] == [("set", "b", "liver")]
    dsc = float(rows[0]["dsc"])
    assert [path.name for path in (tmp_path / "p").iterdir()] == [f"set-{dsc:.3f}-b.png"]


@pytest.fixture
def case(tmp_path):
    """A body of tissue in the middle of much air, with a liver in it."""
    hu = np.full((3, 80, 100), -1000, np.int16)
    hu[:, 30:60, 40:80] = 50
    labels = np.zeros(hu.shape, np.uint8)
    labels[:, 35:45, 45:60] = 1
    known = CachedVolume.of(hu, labels, describe_arrays(hu, labels, (5, 1, 1), (-1000, 50)))
    return Case(CaseFiles("set", "a", tmp_path / "a", tmp_path / "b", "a"), (1,), known)


def test_an_overlay_is_cropped_to_the_body_and_names_sides_and_labels(tmp_path, case, monkeypatch):
    shown, texts = [], []
    monkeypatch.setattr(
        Axes, "imshow", lambda axes, image, *_, **__: shown.append(np.asarray(image).shape)
    )
    monkeypatch.setattr(Axes, "text", lambda axes, x, y, text, **_: texts.append((x < 0.5, text)))
    path = tmp_path / "overlay.png"
    pictures.draw_overlay(path, case, case.cached.label_map, "title")
    assert set(shown) == {(38, 48, 3)}  # 30 x 40 pixels of body, and 4 around it
    assert set(texts) == {(True, "R"), (False, "L")}  # columns run toward the patient's left
    assert Image.open(path).width > 200


@pytest.mark.slow
def test_curves_of_one_scoring_are_not_empty_and_a_failure_is_a_warning(tmp_path, capsys):
    """A single point drawn as a line leaves the picture white."""
    rows = [Metrics(50, 1.5, 0.001, 1, 1)], [Score(50, "set", "a", 1, 0.5, 0.5)]
    pictures.draw_curves(tmp_path / "curves.png", *rows)
    picture = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    colourful = picture.max(axis=2) - picture.min(axis=2) > 20  # axes and text are grey
    third = picture.shape[1] // 3
    for start in (0, third, 2 * third):
        assert colourful[:, start : start + third].sum() > 20
    pictures.or_warn(pictures.draw_curves, tmp_path / "no" / "folder.png", *rows)
    assert len(capsys.readouterr().err.splitlines()) == 1


def scored_run(folder, rows, **numbers):
    """A run with scores of (step, case, label, dsc)."""
    folder.mkdir()
    recipe = {**vars(Recipe()), **numbers}
    patients = {"a": "P", "b": "Q", "c": "Q", "d": "R"}
    held_out = [{"name": name, "patient": patient} for name, patient in patients.items()]
    (folder / "run.json").write_text(json.dumps({"recipe": recipe, "held_out": held_out}))
    scores = [Score(step, "set", case, label, dsc, 0.0) for step, case, label, dsc in rows]
    write_table(folder / "held_out.csv", Score, scores)
    return folder


def test_folds_are_set_side_by_side(tmp_path):
    """The last step of each; every case counts once in the mean of organs."""
    rows = [(10, "a", 1, 0.1), (20, "a", 1, 0.8), (20, "a", 3, 0.6), (20, "b", 1, 0.4)]
    one = scored_run(tmp_path / "one", rows, folds=3, fold=2)
    rows = [(20, "c", 1, 0.9), (20, "c", 14, 0.0)]
    two = scored_run(tmp_path / "two", rows, folds=3, fold=0)
    assert comparison_table([one, two], "fold").splitlines() == [
        "| fold | 0 | 2 | all | sd | n | difference (standard error) |",
        "|---|---|---|---|---|---|---|",
        "| liver | 0.900 | 0.600 | 0.700 | 0.265 | 3 | – |",  # of 0.9, 0.8 and 0.4
        "| spleen | – | 0.600 | 0.600 | – | 1 | – |",
        "| tumor | 0.000 | – | 0.000 | – | 1 | – |",
        "| **mean of organs** | 0.900 | 0.550 | 0.667 | 0.252 | 3 | – |",  # of 0.9, 0.7 and 0.4
    ]


def test_runs_of_the_same_cases_are_compared_by_patient(tmp_path, capsys):
    """Patients P, Q (of two cases) and R gain 0.1, 0.2 and 0.3; two seeds of the one."""
    base = [("a", 0.5), ("b", 0.4), ("c", 0.6), ("d", 0.3)]
    gained = [("a", 0.6), ("b", 0.7), ("c", 0.7), ("d", 0.6)]
    runs = [
        scored_run(tmp_path / str(n), [(9, case, 1, dsc) for case, dsc in rows], seed=n, **numbers)
        for n, (rows, numbers) in enumerate(
            [(base, {"attention": "none"}), (base, {"attention": "none"}), (gained, {})]
        )
    ]
    assert main(["compare", *map(str, runs), "--by", "attention"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert row[1:3] == ["0.450", "0.650"]
    assert row[-1] == f"+0.200 ({0.1 / 3**0.5:.3f}) |"
    other = scored_run(tmp_path / "other", [(9, "a", 1, 0.5)], batch_size=9)
    empty = tmp_path / "empty"
    empty.mkdir()
    for number, another in (("attention", other), ("attention", empty), ("colour", runs[1])):
        with pytest.raises(TrainingError):
            comparison_table([runs[0], another], number)

"""What is exported, its model card, and what it says of weights that nobody should use."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import metadata_of, save_nifti, trained_looking_network
from small_data import export, fit, write_phantoms

from inference.command import main as serve
from inference.network.model import AttentionUNet
from inference.network.weights import load_weights, read_metadata, save_weights
from inference.prediction import Predictor
from training.recipe import Recipe
from training.tables import Score, read_scores, write_table


def run_folder(folder, step, *, held_out=(), scored=None, start_from=None, names=("last",)):
    """A run as `fit` leaves it: what it says of itself, checkpoints, and scores if there are."""
    folder.mkdir()
    recipe = Recipe(base_channels=4, batch_size=8, steps=1000, attention="none")
    case = {"patient": "p", "slices": 3, "annotated_labels": [1], "present_labels": [1]}
    about = {
        "recipe": dataclasses.asdict(recipe),
        "revision": "test",
        "intensity_mean": 0.0,
        "intensity_std": 100.0,
        "training": [{"name": "a", **case}],
        "held_out": [{"name": name, **case} for name in held_out],
        "anatomies": [],
        "start_from": start_from,
    }
    (folder / "run.json").write_text(json.dumps(about))
    weights = AttentionUNet(base_channels=4, attention="none").state_dict()
    for name in names:
        torch.save({"weights": weights, "step": step}, folder / f"{name}.pt")
    if scored is not None:
        write_table(folder / "held_out.csv", Score, [Score(step, "set", "b", 1, scored, 0.0)])
    return folder


@pytest.mark.parametrize(
    ("step", "scored", "start_from", "reasons"),
    [
        (1, None, None, ["trained on 8 slices only (1 steps)"]),
        (900, 0.02, None, ["mean organ DSC 0.020 on held-out cases"]),
        (1, 0.02, None, ["8 slices only", "0.020 on held-out"]),
        (1, 0.8, "others.safetensors", []),
        (900, 0.8, None, []),
        (900, None, None, []),
    ],
)
def test_weights_that_are_of_no_use_say_so(tmp_path, capsys, step, scored, start_from, reasons):
    run = run_folder(tmp_path / "run", step, held_out=["b"], scored=scored, start_from=start_from)
    weights = tmp_path / "w.safetensors"
    assert export(run, weights) == 0
    error, card = capsys.readouterr().err, weights.with_suffix(".md").read_text()
    warning = read_metadata(weights).warning
    assert bool(warning) == bool(reasons) == ("Warning: not fit for use" in card)
    for reason in reasons:
        assert all(reason in text for text in (warning, card, error))


def test_the_service_says_the_warning_at_its_start(tmp_path, ct, capsys):
    network = trained_looking_network()
    weights = tmp_path / "w.safetensors"
    save_weights(weights, network.state_dict(), metadata_of(network, warning="not fit for use: x"))
    (tmp_path / "inputs").mkdir()
    save_nifti(tmp_path / "inputs" / "a_0000.nii.gz", ct)
    places = ["--input", str(tmp_path / "inputs"), "--output", str(tmp_path / "outputs")]
    assert serve([*places, "--weights", str(weights), "--device", "cpu", "--quiet"]) == 0
    assert "not fit for use: x" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["no best", "none", "nan", "no scores", "no run"])
def test_an_export_that_fails_is_one_line_and_leaves_no_weights(tmp_path, capsys, fault):
    run = run_folder(tmp_path / "run", 5, names=() if fault == "none" else ("last",))
    if fault == "nan":
        state = torch.load(run / "last.pt", weights_only=True)
        state["weights"]["head.bias"][3] = float("nan")
        torch.save(state, run / "last.pt")
    more = {"no best": ("--checkpoint", "best"), "no scores": ("--left-out", Path(__file__))}
    output = tmp_path / "w.safetensors"
    assert export(tmp_path if fault == "no run" else run, output, *more.get(fault, ())) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not output.exists()


def test_the_card_has_every_score(tmp_path):
    run = run_folder(tmp_path / "run", 900, held_out=["b"], scored=0.8)
    nan = float("nan")
    scores = [Score(0, "one", "x", 1, 0.5, 0.75), Score(0, "one", "y", 1, 0.7, nan)]
    scores += [Score(0, "two", "z", 14, 0.25, nan)]
    write_table(tmp_path / "left-out.csv", Score, scores)
    assert str(read_scores(tmp_path / "left-out.csv")) == str(scores)
    weights = tmp_path / "w.safetensors"
    assert export(run, weights, "--left-out", tmp_path / "left-out.csv", "--note", "Blind.") == 0
    lines = weights.with_suffix(".md").read_text().splitlines()
    for row in (
        "| liver | 0.800 / 0.000 (1) |",
        "| label | one | two |",
        "| liver | 0.600 / 0.750 (2) |  |",
        "| tumor |  | 0.250 / – (1) |",
        "| **mean of organs** | **0.600** | **nan** |",
        "- Blind.",
        "base_channels = 4",
    ):
        assert row in lines


@pytest.mark.slow
def test_the_full_network_trains_and_its_export_predicts(tmp_path):
    phantoms, run = write_phantoms(tmp_path / "phantoms", 1), tmp_path / "run"
    numbers = {"base_channels": 64, "slice_size": 32, "ema_decay": 0.5, "held_out_fraction": 0}
    assert fit(phantoms, run, "--recipe", "paper", "--steps", 1, **numbers) == 0
    weights = tmp_path / "weights" / "full.safetensors"
    assert export(run, weights) == 0
    state_dict, metadata = load_weights(weights)
    about = json.loads((run / "run.json").read_text())
    assert (metadata.base_channels, metadata.matrix_reduction) == (64, 1)
    assert metadata.intensity_mean == about["intensity_mean"]
    average = torch.load(run / "last.pt", weights_only=True)["average"]
    for name, trained in average.items():
        is_fp16 = trained.is_floating_point() and "running_" not in name
        assert torch.equal(state_dict[name], trained.half() if is_fp16 else trained), name
    assert str(tmp_path) not in weights.with_suffix(".md").read_text()
    predictor = Predictor([(state_dict, metadata)], torch.device("cpu"))
    label_map = predictor.predict(np.zeros((1, 32, 32), np.int16), window=(-1, 1))
    assert label_map.shape == (1, 32, 32)

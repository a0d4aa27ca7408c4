"""What an export says of weights that nobody should use, and of runs with nothing to export."""

import dataclasses
import json

import pytest
import torch
from conftest import metadata_of, save_nifti, trained_looking_network

from inference.command import main as serve
from inference.network.model import AttentionUNet
from inference.network.weights import read_metadata, save_weights
from training.__main__ import main
from training.recipe import Recipe


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
        rows = f"step,case,label,name,dsc,nsd\n{step},b,1,liver,{scored},0\n"
        (folder / "held_out.csv").write_text(rows)
    return folder


def export(run, output, *more):
    options = ["--output", str(output), "--trained-on", "nothing", "--licence", "MIT", *more]
    return main(["export", str(run), *options])


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
    assert export(run, weights, "--checkpoint", "last") == 0
    told, card = capsys.readouterr().err, weights.with_suffix(".md").read_text()
    warning = read_metadata(weights).warning
    assert bool(warning) == bool(reasons)
    assert ("Warning: not fit for use" in card) == bool(reasons)
    for reason in reasons:
        assert reason in warning
        assert reason in card
        assert reason in told


def test_the_service_says_the_warning_at_its_start(tmp_path, ct, capsys):
    network = trained_looking_network()
    weights = tmp_path / "w.safetensors"
    save_weights(weights, network.state_dict(), metadata_of(network, warning="not fit for use: x"))
    (tmp_path / "inputs").mkdir()
    save_nifti(tmp_path / "inputs" / "a_0000.nii.gz", ct)
    places = ["--input", str(tmp_path / "inputs"), "--output", str(tmp_path / "outputs")]
    assert serve([*places, "--weights", str(weights), "--device", "cpu", "--quiet"]) == 0
    assert "warning: w.safetensors: not fit for use: x" in capsys.readouterr().err


def test_weights_without_a_warning_are_read_by_versions_that_knew_none(tmp_path):
    network = trained_looking_network()
    for warning, stored in (("", False), ("x", True)):
        path = tmp_path / f"{warning}.safetensors"
        save_weights(path, network.state_dict(), metadata_of(network, warning=warning))
        assert (b'\\"warning\\"' in path.read_bytes()) == stored
        assert read_metadata(path).warning == warning


@pytest.mark.parametrize(
    ("held_out", "names", "reason"),
    [
        (["b"], ["last"], "has not been scored yet (at every 5000 steps, and at its end)"),
        ([], ["last"], "holds no case out"),
        (["b"], [], "no checkpoint yet: a run writes one every 1000 steps"),
    ],
)
def test_a_run_without_a_best_checkpoint_says_what_to_do(tmp_path, capsys, held_out, names, reason):
    run = run_folder(tmp_path / "run", 5, held_out=held_out, names=names)
    assert export(run, tmp_path / "w.safetensors") == 1
    error = capsys.readouterr().err
    assert reason in error
    assert ("--checkpoint last" in error) == bool(names)
    assert not (tmp_path / "w.safetensors").exists()


def test_an_export_that_fails_leaves_no_weights(tmp_path, capsys):
    run = run_folder(tmp_path / "run", 5)
    weights = tmp_path / "w.safetensors"
    assert export(run, weights, "--checkpoint", "last", "--left-out", str(tmp_path / "no.csv")) == 1
    assert "no.csv" in capsys.readouterr().err
    assert not weights.exists()


def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    run = run_folder(tmp_path / "run", 5)
    state = torch.load(run / "last.pt", weights_only=True)
    state["weights"]["head.bias"][3] = float("nan")
    torch.save(state, run / "last.pt")
    assert export(run, tmp_path / "w.safetensors", "--checkpoint", "last") == 1
    assert not (tmp_path / "w.safetensors").exists()

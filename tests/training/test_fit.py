"""Runs of training: the command line, resuming, many processes, and what is exported."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from inference.network.model import AttentionUNet
from inference.network.weights import load_weights
from inference.prediction import Predictor
from synthetic.phantom import draw_phantom, write_nifti
from training import TrainingError
from training.__main__ import main
from training.evaluation import read_scores, score_cases
from training.fit import follow
from training.recipe import Recipe, learning_rate_at

ROOT = Path(__file__).parents[2]
TINY = ["--base-channels", "8", "--log-interval", "1", "--precision", "fp32", "--device", "cpu"]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for seed in range(3):
        spacing = (14.0, 7.0, 7.0)
        phantom = draw_phantom((16, 64, 64), spacing, seed)
        write_nifti(folder / "images" / f"p{seed}_0000.nii.gz", phantom.volume, spacing)
        write_nifti(folder / "labels" / f"p{seed}.nii.gz", phantom.label_map, spacing)
    return folder


def fit(phantoms, run, *more):
    return main(["--data", f"{phantoms}=complete", "--output", str(run), *TINY, *map(str, more)])


def losses(run: Path) -> dict[int, str]:
    with (run / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): row["loss"] for row in csv.DictReader(file)}


def saved(run: Path, name: str = "last.pt") -> dict:
    return torch.load(run / name, weights_only=True)


EVERYTHING = (
    *("--recipe", "best", "--schedule", "constant", "--slice-size", "64", "--pixel-mm", "6", "8"),
    *(
        "--warmup-steps",
        "7",
        "--batch-size",
        "2",
        "--held-out-fraction",
        "0",
        "--matrix-reduction",
        "2",
    ),
)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_exactly(phantoms, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert fit(phantoms, whole, *EVERYTHING, "--steps", 10) == 0
    # Stopped after a checkpoint at step 5 and one more step that was lost.
    assert fit(phantoms, broken, *EVERYTHING, "--steps", 6, "--checkpoint-interval", 5) == 0
    state = saved(broken)
    assert state["step"] == 6
    assert fit(phantoms, broken, *EVERYTHING, "--steps", 10) == 0
    assert len(losses(whole)) == 10
    assert losses(broken) == losses(whole)
    for name, weights in saved(whole)["weights"].items():
        assert torch.equal(weights, saved(broken)["weights"][name]), name


@pytest.mark.slow
def test_another_run_is_not_continued(phantoms, tmp_path, capsys):
    numbers = ("--recipe", "paper", "--steps", 1, "--held-out-fraction", 0)
    assert fit(phantoms, tmp_path, *numbers) == 0
    assert fit(phantoms, tmp_path, *numbers, "--batch-size", 3) == 1
    assert "batch_size 2, not 3" in capsys.readouterr().err
    assert fit(phantoms, tmp_path, "--recipe", "paper", "--steps", 1, "--held-out", "p0") == 1


@pytest.mark.slow
def test_a_run_from_before_a_number_was_known_is_continued(phantoms, tmp_path):
    numbers = ("--recipe", "paper", "--held-out-fraction", 0)
    assert fit(phantoms, tmp_path, *numbers, "--steps", 1) == 0
    about = json.loads((tmp_path / "run.json").read_text())
    del about["recipe"]["attention"], about["recipe"]["pixel_mm"]
    (tmp_path / "run.json").write_text(json.dumps(about))
    assert fit(phantoms, tmp_path, *numbers, "--steps", 2) == 0
    assert len(losses(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_a_checkpoint(phantoms, tmp_path, number):
    command = [sys.executable, "-m", "training", "--data", f"{phantoms}=complete", "--output"]
    command += [str(tmp_path), "--recipe", "paper", *TINY, "--steps", "100000"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(number)
            break
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    step = saved(tmp_path)["step"]
    assert step >= 3
    assert f"stopped at step {step}" in output
    assert max(losses(tmp_path)) == step


WORKER = """
import sys
import torch
from inference.network import model
from training import fit
from training.__main__ import main

class Network(model.AttentionUNet):
    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return self

fit.AttentionUNet = Network
torch.set_num_threads(1)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_get_the_weights_of_one(phantoms, tmp_path):
    """Batch statistics are held fixed: on a CPU torch cannot share them between processes."""
    (tmp_path / "worker.py").write_text(WORKER)
    weights = []
    for count in (1, 2):
        run = tmp_path / f"run{count}"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        arguments = ["--data", f"{phantoms}=complete", "--output", str(run), *TINY]
        arguments += ["--recipe", "paper", "--steps", "4", "--batch-size", "4"]
        arguments += ["--learning-rate", "0.001", "--held-out", "p0"]
        result = subprocess.run(
            [sys.executable, *launch, str(tmp_path / "worker.py"), *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        weights.append(saved(run)["network"])
        assert len(losses(run)) == 4
    torch.manual_seed(0)
    start = AttentionUNet(base_channels=8).state_dict()
    learned = max((weights[0][name] - start[name]).abs().max().item() for name in start)
    assert learned > 1e-3
    for name, alone in weights[0].items():
        torch.testing.assert_close(weights[1][name], alone, rtol=0, atol=2e-2 * learned, msg=name)


@pytest.mark.slow
def test_a_batch_that_cannot_be_divided_is_refused(phantoms, tmp_path):
    from training.fit import fit as fit_cases
    from training.processes import Processes

    processes = Processes(rank=0, count=2, device=torch.device("cpu"))
    with pytest.raises(TrainingError, match="3 cannot be divided over 2"):
        fit_cases([], [], Recipe(batch_size=3), None, tmp_path, processes)


@pytest.mark.slow
def test_the_loss_falls_and_everything_is_written(phantoms, tmp_path, capsys):
    numbers = ("--recipe", "paper", "--learning-rate", 2e-3, "--steps", 40, "--held-out", "p2")
    assert fit(phantoms, tmp_path, *numbers, "--evaluation-interval", 30) == 0
    values = [float(loss) for loss in losses(tmp_path).values()]
    assert np.mean(values[-5:]) < 0.7 * np.mean(values[:5])
    printed = capsys.readouterr().out
    assert "step 40/40" in printed
    assert "held-out DSC" in printed
    scores = read_scores(tmp_path / "held_out.csv")
    assert {(score.step, score.case) for score in scores} == {(30, "p2"), (40, "p2")}
    assert {score.label for score in scores if score.step == 40} == set(range(1, 15))
    for picture in (tmp_path / "curves.png", tmp_path / "overlays" / "p2.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    about = json.loads((tmp_path / "run.json").read_text())
    assert [case["name"] for case in about["training"]] == ["p0", "p1"]
    assert saved(tmp_path, "best.pt")["best"] == saved(tmp_path)["best"]


@pytest.mark.slow
def test_the_full_network_trains_and_its_export_predicts(phantoms, tmp_path, capsys):
    numbers = ("--recipe", "paper", "--base-channels", 64, "--slice-size", 32, "--ema-decay", 0.5)
    run, weights = tmp_path / "run", tmp_path / "weights" / "full.safetensors"
    assert fit(phantoms, run, *numbers, "--steps", 1, "--held-out-fraction", 0) == 0
    assert "24,496,331 parameters" in capsys.readouterr().out
    export = ["export", str(run), "--output", str(weights), "--checkpoint", "last"]
    export += ["--trained-on", "phantoms", "--licence", "MIT", "--note", "It is blind."]
    assert main(export) == 0

    state_dict, metadata = load_weights(weights)
    about = json.loads((run / "run.json").read_text())
    assert (metadata.base_channels, metadata.matrix_reduction) == (64, 1)
    assert metadata.intensity_mean == about["intensity_mean"]
    for name, trained in saved(run)["average"].items():
        is_fp16 = trained.is_floating_point() and "running_" not in name
        expected = trained.half() if is_fp16 else trained
        assert torch.equal(state_dict[name], expected), name
    card = weights.with_suffix(".md").read_text()
    for part in ("phantoms", "MIT", "It is blind.", "no case was held out", "base_channels = 64"):
        assert part in card
    assert str(tmp_path) not in card
    predictor = Predictor([(state_dict, metadata)], torch.device("cpu"))
    label_map = predictor.predict(np.zeros((1, 32, 32), np.int16), window=(-1, 1))
    assert label_map.shape == (1, 32, 32)


@pytest.mark.slow
def test_the_card_has_the_held_out_scores(phantoms, tmp_path):
    run, weights = tmp_path / "run", tmp_path / "w.safetensors"
    assert fit(phantoms, run, "--recipe", "paper", "--steps", 1, "--held-out", "p0", "p1") == 0
    export = ["export", str(run), "--output", str(weights), "--trained-on", "x", "--licence", "y"]
    assert main([*export, "--checkpoint", "last"]) == 0
    liver = [score for score in read_scores(run / "held_out.csv") if score.label == 1]
    dsc, nsd = (np.mean([getattr(score, name) for score in liver]) for name in ("dsc", "nsd"))
    assert f"| liver | {dsc:.4f} | {nsd:.4f} | 2 |" in weights.with_suffix(".md").read_text()


@pytest.mark.slow
def test_a_run_without_attention_is_scored_and_exported_without(phantoms, tmp_path, monkeypatch):
    run, weights = tmp_path / "run", tmp_path / "w.safetensors"
    numbers = ("--recipe", "paper", "--learning-rate", 2e-3, "--steps", 15, "--held-out", "p2")
    scored = []

    def score(cases, weights, metadata, *more, **named):
        scored.append(metadata.attention)
        return score_cases(cases, weights, metadata, *more, **named)

    monkeypatch.setattr("training.held_out.score_cases", score)
    assert fit(phantoms, run, *numbers, "--attention", "none") == 0
    assert scored == ["none"]
    export = ["export", str(run), "--output", str(weights), "--checkpoint", "last"]
    assert main([*export, "--trained-on", "phantoms", "--licence", "MIT"]) == 0

    state_dict, metadata = load_weights(weights)
    assert metadata.attention == "none"
    phantom = draw_phantom((16, 64, 64), (14.0, 7.0, 7.0), 2)
    hu = phantom.volume[4:12]
    window = tuple(np.percentile(phantom.volume, (1, 99)))
    predictor = Predictor([(state_dict, metadata)], torch.device("cpu"), dtype=torch.float32)
    label_map = predictor.predict(hu, window=window)
    slices = (np.clip(hu, *window) - metadata.intensity_mean) / metadata.intensity_std
    slices = torch.from_numpy(slices.astype(np.float32))[:, None].expand(-1, 3, -1, -1)
    agreement = {}
    for attention in ("none", "relu-sigmoid"):
        network = AttentionUNet(base_channels=8, attention=attention).eval()
        network.load_state_dict({name: tensor.float() for name, tensor in state_dict.items()})
        with torch.no_grad():
            agreement[attention] = np.mean(network(slices).argmax(dim=1).numpy() == label_map)
    assert agreement["none"] > 0.999
    assert agreement["relu-sigmoid"] < 0.99


def test_the_average_follows_the_weights_exponentially():
    torch.manual_seed(0)
    average, network = (torch.nn.BatchNorm2d(3) for _ in range(2))
    expected = 1.0
    for step in range(200):
        network.weight.data.fill_(np.sin(step))
        network.num_batches_tracked.fill_(step)
        follow(average, network, 0.9, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * np.sin(step)
    assert average.weight.tolist() == pytest.approx([expected] * 3, abs=1e-5)
    assert average.num_batches_tracked == 199


def test_learning_rate_rises_then_falls_as_half_a_cosine():
    recipe = Recipe(steps=110, learning_rate=2.0, warmup_steps=10, schedule="cosine")
    rates = [learning_rate_at(step, recipe) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2
    assert rates[60] == pytest.approx(1)
    assert rates[109] == pytest.approx(1 - np.cos(np.pi / 100))
    assert learning_rate_at(10**6, Recipe(learning_rate=3.0)) == 3


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--data", "nowhere", "--output", "run"], "nowhere"),
        (["--data", "nowhere=unknown", "--output", "run"], "no label map unknown"),
        (["--data", "d", "--output", "run", "--recipe", "unknown"], "no recipe unknown"),
        (["--data", "d", "--output", "run", "--batch-size", "0"], "batch_size"),
        (["--output", "run"], "--data"),
        (["export", "run", "--output", "w.bin", "--trained-on", "x", "--licence", "y"], "w.bin"),
    ],
)
def test_wrong_usage_is_told_in_one_line(arguments, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_run_cannot_be_exported(tmp_path, capsys):
    export = ["export", str(tmp_path), "--output", str(tmp_path / "w.safetensors")]
    assert main([*export, "--trained-on", "x", "--licence", "y"]) == 1
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.slow
def test_runs_are_compared_by_a_number(tmp_path, capsys):
    """The table against numbers worked out by hand."""
    dsc = {("none", 1): (0.2, 0.6), ("none", 2): (0.4, 0.8), ("relu-sigmoid", 1): (0.1, 0.5)}
    runs = []
    for (attention, seed), values in dsc.items():
        run = tmp_path / f"{attention}-{seed}"
        run.mkdir()
        (run / "run.json").write_text(json.dumps({"recipe": {"attention": attention}}))
        (run / "metrics.csv").write_text("step,loss\n10,2.0\n20,1.0\n")
        rows = [f"{step},a,1,liver,{value},0" for step, value in zip((10, 20), values, strict=True)]
        (run / "held_out.csv").write_text("step,case,label,name,dsc,nsd\n" + "\n".join(rows))
        runs.append(str(run))
    picture = tmp_path / "curves.png"
    assert main(["compare", *runs, "--by", "attention", "--picture", str(picture)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| attention | step 10 | step 20 |",
        "|---|---|---|",
        "| none | 0.300 (0.200 to 0.400) | 0.700 (0.600 to 0.800) |",
        "| relu-sigmoid | 0.100 (0.100 to 0.100) | 0.500 (0.500 to 0.500) |",
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="2"):
        main(["compare", *runs, "--by", "colour", "--picture", str(picture)])

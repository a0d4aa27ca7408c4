"""Runs of training: resuming, stopping, many processes, the clock, CUDA, and what cannot go on."""

import csv
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cuda import aten
from small_data import export, fit, settings, write_case, write_phantoms

from inference.files import locked
from inference.network.model import AttentionUNet
from inference.network.weights import load_weights
from training import fit as fit_module
from training import synthesis
from training.__main__ import main
from training.fit import choose_precision, update_average
from training.processes import StopRequest
from training.recipe import Recipe, learning_rate_at
from training.tables import read_scores

ROOT = Path(__file__).parents[2]
PAPER = ("--recipe", "paper")
NO_HELD_OUT = {"held_out_fraction": 0}
EVERYTHING = {
    "schedule": "constant",
    "slice_size": 64,
    "pixel_mm": "6,8",
    "warmup_steps": 7,
    "batch_size": 2,
    "matrix_reduction": 2,
    **NO_HELD_OUT,
}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two patients with a liver."""
    folder = tmp_path_factory.mktemp("data")
    labels = np.zeros((32, 32, 4), np.uint8)
    labels[4:20, 6:18, 1:3] = 1
    for seed, name in enumerate("ab"):
        noise = np.random.default_rng(seed).normal(0, 50, labels.shape)
        write_case(folder, name, labels, (noise + 100 * labels).astype(np.int16))
    return folder


def losses(run: Path) -> dict[int, float]:
    with (run / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


def saved(run: Path, name: str = "last.pt") -> dict:
    return torch.load(run / name, weights_only=True)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_exactly(phantoms, tmp_path):
    """Though a step after the checkpoint was lost."""
    whole, broken, best = tmp_path / "whole", tmp_path / "broken", ("--recipe", "best", "--steps")
    phantoms = f"{phantoms}=complete"
    assert fit(phantoms, whole, *best, 4, **EVERYTHING) == 0
    assert fit(phantoms, broken, *best, 2, **EVERYTHING) == 0
    checkpoint = (broken / "last.pt").read_bytes()
    assert fit(phantoms, broken, *best, 3, **EVERYTHING) == 0
    (broken / "last.pt").write_bytes(checkpoint)
    assert fit(phantoms, broken, *best, 4, **EVERYTHING) == 0
    assert len(losses(whole)) == 4
    assert losses(broken) == losses(whole)
    for name, weights in saved(whole)["weights"].items():
        assert torch.equal(weights, saved(broken)["weights"][name]), name


@pytest.mark.slow
def test_another_run_is_not_resumed_and_steps_done_are_kept(data, tmp_path, capsys):
    assert fit(data, tmp_path, *PAPER, "--steps", 3, **NO_HELD_OUT) == 0
    before = (tmp_path / "recipe.toml").read_text()
    capsys.readouterr()
    assert fit(data, tmp_path, *PAPER, "--steps", 4, "--batch-size", 3, **NO_HELD_OUT) == 1
    assert fit(data, tmp_path, *PAPER, "--steps", 4, "--held-out", "a") == 1
    assert fit(data, tmp_path, *PAPER, "--steps", 2, **NO_HELD_OUT) == 1
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert (tmp_path / "recipe.toml").read_text() == before
    about = json.loads((tmp_path / "run.json").read_text())
    del about["recipe"]["attention"]  # as before it was known
    (tmp_path / "run.json").write_text(json.dumps(about))
    assert fit(data, tmp_path, *PAPER, "--steps", 3, **NO_HELD_OUT) == 0
    assert saved(tmp_path)["step"] == 3
    assert fit(data, tmp_path, *PAPER, "--steps", 4, **NO_HELD_OUT) == 0
    assert len(losses(tmp_path)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_after_the_step(data, tmp_path, monkeypatch, number):
    loss, steps = fit_module.deep_supervision_loss, []

    def signalled(*arguments, **named):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), number)
        return loss(*arguments, **named)

    monkeypatch.setattr(fit_module, "deep_supervision_loss", signalled)
    assert fit(data, tmp_path, *PAPER, "--steps", 9, "--held-out", "b") == 128 + number
    assert saved(tmp_path)["step"] == max(losses(tmp_path)) == 3


def test_a_second_signal_and_one_before_the_loop_end_at_once():
    stop = StopRequest()
    with pytest.raises(KeyboardInterrupt):
        stop.note(signal.SIGTERM, None)
    stop = StopRequest(after_step=True)
    stop.note(signal.SIGHUP, None)
    with pytest.raises(KeyboardInterrupt):
        stop.note(signal.SIGTERM, None)
    assert stop.signal == signal.SIGHUP


WORKER = """
import sys, torch
from inference.network import model
from training import fit
from training.__main__ import main

class FixedStatistics(model.AttentionUNet):
    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return self

torch.set_num_threads(1)
fit._STATISTICS_BATCHES, fit.AttentionUNet = 1, FixedStatistics
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_get_the_weights_of_one(data, tmp_path):
    """Batch statistics are held fixed: on a CPU torch cannot share them between processes."""
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = ["--data", data, "--device", "cpu", "--steps", 3, "--batch-size", 4, *PAPER]
    options += ["--learning-rate", 0.001, "--held-out", "b"]
    options += settings(base_channels=4, log_interval=1, precision="fp32")
    weights = []
    for launcher in ((), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")):
        run = tmp_path / f"run{len(launcher)}"
        command = [sys.executable, *launcher, tmp_path / "worker.py", "fit", *options]
        command = [*map(str, command), "--output", str(run)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=240)
        weights.append(saved(run)["network"])
        assert len(losses(run)) == 3
    torch.manual_seed(0)
    start = AttentionUNet(base_channels=4).state_dict()
    learned = max((weights[0][name] - start[name]).abs().max().item() for name in start)
    assert learned > 1e-3
    for name, alone in weights[0].items():
        torch.testing.assert_close(weights[1][name], alone, rtol=0, atol=2e-2 * learned, msg=name)


@pytest.mark.slow
def test_a_tiny_run_finds_the_liver_and_everything_is_written(data, tmp_path):
    options = (*PAPER, "--batch-size", 4, "--steps", 80, "--held-out", "b")
    numbers = {"attention": "none", "base_channels": 8, "schedule": "cosine", "dice_weight": 1}
    numbers["evaluation_minutes"] = 0.001
    assert fit(data, tmp_path, *options, "--learning-rate", 1e-2, **numbers) == 0
    values = list(losses(tmp_path).values())
    assert np.mean(values[-5:]) < 0.5 * np.mean(values[:5])
    scores = read_scores(tmp_path / "held_out.csv")
    steps = sorted({score.step for score in scores})
    assert steps[-1] == 80 and len(steps) > 1  # by time: at most a tenth of it
    assert {(score.case, score.label) for score in scores} == {("b", 1)}
    assert scores[-1].dsc > 0.8
    for picture in (tmp_path / "curves.png", tmp_path / "overlays" / "b.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    about = json.loads((tmp_path / "run.json").read_text())
    assert [case["name"] for case in about["training"]] == ["a"]
    best = steps[int(np.argmax([score.dsc for score in scores]))]
    assert saved(tmp_path, "best.pt")["step"] == best


@pytest.mark.slow
def test_a_run_by_the_clock_ends_its_cosine_in_time_and_exports(data, tmp_path, monkeypatch):
    """By a clock that a step moves by a second, after a first step of ten."""
    now = [0.0]
    monkeypatch.setattr(fit_module.time, "monotonic", lambda: now[0])
    loss = fit_module.deep_supervision_loss

    def timed(*arguments, **named):
        now[0] += 1 if now[0] else 10
        return loss(*arguments, **named)

    monkeypatch.setattr(fit_module, "deep_supervision_loss", timed)
    options = ("--recipe", "paper", "--minutes", 0.5, "--learning-rate", 1e-3, "--held-out", "b")
    assert fit(data, tmp_path, *options, schedule="cosine") == 0
    rates = [float(row.split(",")[2]) for row in (tmp_path / "metrics.csv").read_text().split()[1:]]
    assert len(rates) == 16  # 10 s, 15 of a second, 2.8 for the scores and 2 for start and end
    expected = [0.5e-3 * (1 + np.cos(np.pi * step / 16)) for step in range(2, 16)]
    assert rates[2:] == pytest.approx(expected, rel=0.05)
    metadata = load_weights(tmp_path / "weights.safetensors")[1]
    assert metadata.trained_on == data.name
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["steps"] == 16


def test_the_average_follows_the_weights_exponentially():
    torch.manual_seed(0)
    average, network = (torch.nn.BatchNorm2d(3) for _ in range(2))
    expected = 1.0
    for step in range(200):
        network.weight.data.fill_(np.sin(step))
        network.num_batches_tracked.fill_(step)
        update_average(average, network, 0.9, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * np.sin(step)
    assert average.weight.tolist() == pytest.approx([expected] * 3, abs=1e-5)
    assert average.num_batches_tracked == 199


def test_learning_rate_rises_then_falls_as_half_a_cosine():
    recipe = Recipe(steps=110, learning_rate=2.0, warmup_steps=10, schedule="cosine")
    rates = [learning_rate_at(step, recipe) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert (rates[10], rates[60]) == (2, pytest.approx(1))
    assert rates[109] == pytest.approx(1 - np.cos(np.pi / 100))
    assert learning_rate_at(10**6, Recipe(learning_rate=3.0)) == 3


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--data", "nowhere", "--output", "run"], "nowhere"),
        (["--data", "nowhere=unknown", "--output", "run"], "unknown"),
        (["--data", "d", "--output", "run", "--recipe", "unknown"], "unknown"),
        (["--data", "d", "--output", "run", "--batch-size", "0"], "batch_size"),
        (["--data", "d", "--output", "run", "--set", "stepz=1"], "stepz"),
        (["--data", "d", "--output", "run", "--set", "folds=3", "--held-out", "a"], "folds"),
        (["--data", "d", "--output", "run", "--set", "synthetic_fraction=0.5"], "--anatomy"),
        (["--output", "run"], "--data"),
        (["export", "set", "--output", "w.bin", "--trained-on", "x", "--licence", "y"], "w.bin"),
        (["score", "set", "--data", "set", "--output", "x.csv"], "left_out"),
        (["export", "gone", "--output", "w", "--trained-on", "x", "--licence", "y"], "gone"),
        (["score", "gone", "--data", "set", "--output", "x.csv"], "gone"),
        (["compare", "set", "gone"], "gone"),
        (["fit", "--data", "set", "--output", "run", "--start-from", "gone"], "gone"),
        (["fit", "--data", "set", "--output", "run", "--device", "toaster"], "toaster"),
        (["fit", "--data", "set", "--output", "run", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(
    arguments, reason, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_case(tmp_path / "set", "a")
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert reason in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.slow
@pytest.mark.parametrize("damaged", ["loss", "score"])
def test_what_fails_costs_no_step_and_the_advice_works_there(data, tmp_path, monkeypatch, damaged):
    """Weights that are not finite are never saved; what fails in scoring is scored next time."""
    options, numbers = (*PAPER, "--held-out", "b"), {"log_interval": 50}
    assert fit(data, tmp_path, *options, "--steps", 2) == 0
    loss = fit_module.deep_supervision_loss
    with monkeypatch.context() as patched:
        if damaged == "loss":
            nan = lambda *a, **b: loss(*a, **b) * np.nan  # noqa: E731
            patched.setattr(fit_module, "deep_supervision_loss", nan)
            assert fit(data, tmp_path, *options, "--steps", 4, **numbers) == 1
        else:
            patched.setattr(fit_module, "score_cases", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                fit(data, tmp_path, *options, "--steps", 4, **numbers)
    assert saved(tmp_path)["step"] == (2 if damaged == "loss" else 4)
    options = (*options, "--steps", 4, "--learning-rate", 1e-6)
    assert fit(data, tmp_path, *options, gradient_clip=1, **numbers) == 0
    assert {score.step for score in read_scores(tmp_path / "held_out.csv")} == {2, 4}


@pytest.fixture(scope="module")
def one_step(data, tmp_path_factory) -> Path:
    """A run of one step, to copy."""
    run = tmp_path_factory.mktemp("runs") / "one"
    assert fit(data, run, *PAPER, "--steps", 1, **NO_HELD_OUT) == 0
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [lambda content: content[: min(5000, len(content) // 2)], lambda content: b"x" * 300],
)
@pytest.mark.parametrize("name", ["last.pt", "run.json"])
def test_a_damaged_file_of_a_run_is_one_line(data, one_step, tmp_path, capsys, name, damage):
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    capsys.readouterr()
    assert export(tmp_path, tmp_path / "w.safetensors") == 1
    assert fit(data, tmp_path, *PAPER, "--steps", 2, **NO_HELD_OUT) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(str(path) in line for line in lines)
    assert not any(os.strerror(errno.EINVAL) in line for line in lines)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(data, tmp_path, capsys):
    """By a limit on the size of files, which holds for root as well."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (10_000, 60_000):  # the cache; the checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            code = fit(data, tmp_path / "run", *PAPER, "--steps", 2, "--held-out", "b")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert (code, len(capsys.readouterr().err.splitlines())) == (1, 1)
        assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".partial")]
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused(data, one_step, tmp_path, capsys):
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with locked(tmp_path / "last.pt", wait=False):
        assert fit(data, tmp_path, *PAPER, "--steps", 2, **NO_HELD_OUT) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert {path: path.read_bytes() for path in before} == before
    assert fit(data, tmp_path, *PAPER, "--steps", 2, **NO_HELD_OUT) == 0


def test_data_is_checked_before_patients_are_drawn(data, tmp_path, monkeypatch):
    monkeypatch.setattr(synthesis, "synthetic_cases", lambda *_: pytest.fail("drawn"))
    numbers = {"synthetic_fraction": 0.5, "synthetic_phantoms": 2}
    assert fit(data, tmp_path / "run", "--held-out", "nobody", **numbers) == 1


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), torch.float32), ((8, 0), torch.bfloat16)],
)
def test_auto_is_bf16_only_where_the_device_has_it(monkeypatch, capability, expected):
    """Turing (7.5) answers `is_bf16_supported()` with True: it emulates it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choose_precision("auto", torch.device("cuda", 0)) == expected


@pytest.mark.slow
def test_steps_and_scoring_on_cuda(phantoms, tmp_path, cuda_device, monkeypatch):
    """The loss of the CPU's first steps, but for the precision, wherever the slices lie."""
    options = ("--recipe", "best", "--steps", 2, "--held-out", "p2")
    numbers = {**EVERYTHING, "warmup_steps": 1, "base_channels": 8, "held_out_fraction": 0.1}
    data = f"{phantoms}=complete"
    assert fit(data, tmp_path / "cpu", *options, **numbers) == 0
    expected = list(losses(tmp_path / "cpu").values())
    device = cuda_device()
    options, numbers["precision"] = (*options, "--device", "cuda"), "bf16"
    for resident in (False, True):
        monkeypatch.setattr(fit_module, "fit_on", lambda *_, resident=resident: resident)
        run = tmp_path / f"cuda-{resident}"
        assert fit(data, run, *options, **numbers) == 0
        assert list(losses(run).values()) == pytest.approx(expected, rel=0.01)
        assert (run / "held_out.csv").is_file()
        assert saved(run)["step"] == 2
    assert aten._fused_adamw_ in device.operators
    assert all(index == 0 for _, index in device.traffic.fractions)
    assert fit(data, run, *options, **numbers) == 0  # resumed

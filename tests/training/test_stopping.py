"""How a run starts, tells of itself, stops and is taken up again."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_nifti
from training.progress import StepClock, duration, too_long

from inference.files import locked
from training import held_out
from training.__main__ import main
from training.evaluation import read_scores
from training.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
TINY = ["--recipe", "paper", "--base-channels", "4", "--precision", "fp32", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    labels = np.zeros((32, 32, 4), np.uint8)
    labels[4:20, 6:18, 1:3] = 1
    for name in ("a", "b"):
        hu = (rng.normal(0, 50, labels.shape) + 100 * labels).astype(np.int16)
        for kind, suffix, array in (("images", "_0000", hu), ("labels", "", labels)):
            (folder / kind).mkdir(exist_ok=True)
            save_nifti(folder / kind / f"{name}{suffix}.nii.gz", array)
    return folder


def fit(data, run, *more):
    return main(["fit", "--data", str(data), "--output", str(run), *TINY, *map(str, more)])


def saved(run: Path) -> dict:
    return torch.load(run / "last.pt", weights_only=True)


SLOW_STEP = """
import sys, time
from training import fit, processes
from training.__main__ import main

processes.GRACE_S = 0.5
loss, steps = fit.deep_supervision_loss, []

def slow(*arguments, **named):
    steps.append(1)
    if len(steps) == 3:  # the network's statistics of the third step are there, its weights not
        print("in the third step", flush=True)
        time.sleep(600)
    return loss(*arguments, **named)

fit.deep_supervision_loss = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_step_that_outlasts_the_grace_is_left_and_the_one_before_saved(data, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_STEP)
    run = tmp_path / "run"
    options = ["fit", "--data", str(data), *TINY, "--held-out-fraction", "0"]
    command = [sys.executable, str(tmp_path / "slow.py"), *options, "--output", str(run)]
    process = subprocess.Popen(
        [*command, "--steps", "9"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("in the third step"):
            process.send_signal(signal.SIGINT)
            break
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert output.splitlines()[0].startswith("SIGINT: stopping after")
    assert "stopped at step 2; the same command goes on from there" in output
    assert fit(data, tmp_path / "other", "--held-out-fraction", 0, "--steps", 2) == 0
    left, expected = saved(run), saved(tmp_path / "other")
    assert left["step"] == 2
    for name, tensor in expected["network"].items():  # the batch statistics among them
        torch.testing.assert_close(left["network"][name], tensor, msg=name)


def test_ctrl_c_while_data_is_read_is_a_line(data, tmp_path, monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.cache.cache_case", interrupted)
    assert fit(data, tmp_path / "run", "--steps", 1) == 130
    assert "stopped before the first step" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:99", "toaster"])
def test_a_device_that_is_not_there_is_told_before_anything_is_read(data, tmp_path, device, capsys):
    with pytest.raises(SystemExit, match="2"):
        fit(data, tmp_path / "run", "--device", device)
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"--device {device}: " in last
    assert not (tmp_path / "run").exists()


def test_data_is_checked_before_patients_are_drawn(data, tmp_path, monkeypatch, capsys):
    def drawn(*_: object) -> None:
        raise AssertionError("drawn before the data was known to be in order")

    monkeypatch.setattr("training.anatomies.draw_anatomy", drawn)
    options = ("--synthetic-fraction", 0.5, "--synthetic-phantoms", 2, "--held-out", "nobody")
    assert fit(data, tmp_path / "run", *options) == 1
    assert "nobody" in capsys.readouterr().err


@pytest.mark.slow
def test_the_first_step_is_told_and_its_time(data, tmp_path, capsys):
    assert fit(data, tmp_path / "run", "--held-out-fraction", 0, "--steps", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    (first,) = [line for line in lines if line.startswith("step 1/2")]
    assert "s a step" in first and first.endswith("left")


def test_a_run_of_days_names_the_slim_recipe_on_a_cpu():
    best, slim = load_recipe("best"), load_recipe("slim")
    cpu = torch.device("cpu")
    assert too_long(17 * 86400, best, cpu).startswith("about 17 days on this device: use --recipe")
    assert "--recipe" not in too_long(17 * 86400, slim, cpu)
    assert too_long(17 * 86400, best, torch.device("cuda", 0)) == ""
    assert too_long(3600, best, cpu) == ""
    assert duration(17 * 86400) == "17 days"
    assert duration(7200) == "2 h 00 min"


def test_steps_between_two_lines_are_told_every_half_minute(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("training.progress.time.monotonic", lambda: now[0])
    clock = StepClock(Recipe(steps=100_000), torch.device("cpu"), 10)
    told = []
    for step in range(11, 21):
        now[0] += 12
        if clock.due(step):
            told.append((step, clock.lines(step, 1.0)))
    assert [step for step, _ in told] == [11, 14, 17, 20]
    assert told[0][1][1].startswith("about 14 days on this device")  # 99,990 steps of 12 s
    assert told[1][1] == ["step 14/100000  loss 1.0000  12.0 s a step  14 days left"]


@pytest.mark.slow
def test_a_first_step_of_minutes_is_told_while_it_goes_on(monkeypatch, capsys):
    monkeypatch.setattr("training.progress.LONGEST_SILENCE_S", 0.05)
    monkeypatch.setattr("training.progress._TOO_LONG_S", 1.0)
    recipe = Recipe(steps=4_000_000)
    with StepClock(recipe, torch.device("cpu"), 0) as clock:
        clock.start()
        time.sleep(0.5)
        clock.due(1)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("still in the first step after 0 s; 4000000 such steps are more than 2")
    assert line.endswith("use --recipe slim, or a GPU")
    with StepClock(recipe, torch.device("cpu"), 0) as clock:
        clock.start()
        assert clock.due(1)
    time.sleep(0.2)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_steps_below_those_done_are_refused_and_equal_ones_explained(data, tmp_path, capsys):
    common = ("--held-out-fraction", 0)
    assert fit(data, tmp_path, *common, "--steps", 3) == 0
    before = (tmp_path / "recipe.toml").read_text()
    assert fit(data, tmp_path, *common, "--steps", 2) == 1
    error = capsys.readouterr().err
    assert "has done 3 steps, more than --steps 2: give more than 3" in error
    assert "--checkpoint last" in error
    assert (tmp_path / "recipe.toml").read_text() == before
    assert fit(data, tmp_path, *common, "--steps", 3) == 0
    assert "has done all its 3 steps: --steps above 3" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_is_all_warm_up_is_told(data, tmp_path, capsys):
    options = ("--held-out-fraction", 0, "--learning-rate", 0.1, "--warmup-steps", 10)
    assert fit(data, tmp_path, *options, "--steps", 2) == 0
    assert "all 2 steps are warm-up (warmup_steps 10)" in capsys.readouterr().out
    assert fit(data, tmp_path, *options, "--steps", 11) == 0
    assert "warm-up" not in capsys.readouterr().out


@pytest.mark.slow
def test_other_steps_on_a_cosine_tell_what_becomes_of_the_learning_rate(data, tmp_path, capsys):
    options = ("--held-out-fraction", 0, "--learning-rate", 0.1, "--schedule", "cosine")
    assert fit(data, tmp_path, *options, "--steps", 2) == 0
    assert fit(data, tmp_path, *options, "--steps", 4) == 0
    # Half a cosine, at its middle and at its end.
    expected = "was to end at step 2 and now ends at 4: from step 2 its learning rate is 5.0e-02"
    assert f"{expected}, not 0.0e+00" in capsys.readouterr().out


@pytest.mark.slow
def test_what_fails_while_scoring_costs_no_step_and_is_scored_next_time(
    data, tmp_path, monkeypatch
):
    """The checkpoint is written before the scoring, and the run then scores what it did not."""

    def broken(*_: object, **__: object) -> None:
        raise OSError("no room")

    options = ("--held-out", "b", "--steps", 4, "--evaluation-interval", 2)
    with monkeypatch.context() as patched:
        patched.setattr(held_out, "score_cases", broken)
        assert fit(data, tmp_path, *options) == 1
    assert saved(tmp_path)["step"] == 2
    assert not (tmp_path / "held_out.csv").exists()
    assert fit(data, tmp_path, *options) == 0
    assert {score.step for score in read_scores(tmp_path / "held_out.csv")} == {2, 4}
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["steps"] == 4


def test_a_run_goes_on_where_its_precision_is_another(tmp_path):
    """What "auto" means depends on the device: a bf16 run has no scale for one that needs it."""
    from training.checkpoint import State

    def state(enabled: bool) -> State:
        network = torch.nn.BatchNorm2d(2)
        optimizer = torch.optim.AdamW(network.parameters())
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        return State(network, None, optimizer, scaler, torch.zeros(()))

    for before, after in ((False, True), (True, False), (True, True)):
        state(before).save(tmp_path / "last.pt")
        taken_up = state(after)
        taken_up.load(tmp_path / "last.pt", torch.device("cpu"))
        assert taken_up.scaler.is_enabled() == after


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((6, 1), torch.float16)],
)
def test_auto_is_bf16_only_where_the_device_has_it(monkeypatch, capability, expected):
    """Turing (7.5) answers `is_bf16_supported()` with True: it emulates it."""
    from training.fit import choose_precision

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choose_precision("auto", torch.device("cuda", 0)) == expected


NO_HELD_OUT = ("--held-out-fraction", 0)


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--checkpoint-interval", 1), ()])
def test_weights_that_are_not_finite_are_never_saved(data, tmp_path, capsys, monkeypatch, more):
    """What was there stays, and the advice given works in that folder."""
    from training import fit as module

    assert fit(data, tmp_path, *NO_HELD_OUT, "--steps", 2) == 0
    before = (tmp_path / "last.pt").read_bytes()
    options = (*NO_HELD_OUT, "--steps", 4, *more)
    with monkeypatch.context() as patched:
        loss = module.deep_supervision_loss
        patched.setattr(module, "deep_supervision_loss", lambda *a, **b: loss(*a, **b) * np.nan)
        assert fit(data, tmp_path, *options) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert (tmp_path / "last.pt").read_bytes() == before
    assert fit(data, tmp_path, *options, "--learning-rate", 1e-6, "--gradient-clip", 1) == 0
    assert saved(tmp_path)["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda content: content[:-999], lambda content: b"x" * 300])
@pytest.mark.parametrize("name", ["last.pt", "run.json"])
def test_a_damaged_file_of_a_run_is_one_line(data, tmp_path, capsys, name, damage):
    assert fit(data, tmp_path, *NO_HELD_OUT, "--steps", 1) == 0
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    capsys.readouterr()
    export = ["export", tmp_path, "--output", tmp_path / "w.safetensors", "--checkpoint", "last"]
    assert main([*map(str, export), "--trained-on", "x", "--licence", "y"]) == 1
    assert fit(data, tmp_path, *NO_HELD_OUT, "--steps", 2) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(str(path) in line for line in lines)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(data, tmp_path):
    """By a limit on the size of files, which holds for root as well."""
    run = tmp_path / "run"
    options = ["--data", data, "--output", run, *TINY, *NO_HELD_OUT, "--steps", "2"]
    for limit in (10_000, 60_000):  # the cache; the checkpoint
        code = "import resource, sys; from training.__main__ import main; resource.setrlimit("
        code += f"resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(main(sys.argv[1:]))"
        result = subprocess.run(
            [sys.executable, "-c", code, *map(str, options)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 1, result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".partial")]
    assert not (run / "last.pt").exists()


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused(data, tmp_path, capsys):
    assert fit(data, tmp_path, *NO_HELD_OUT, "--steps", 1) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with locked(tmp_path / "last.pt", wait=False):
        assert fit(data, tmp_path, *NO_HELD_OUT, "--steps", 2) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert {path: path.read_bytes() for path in before} == before
    assert fit(data, tmp_path, *NO_HELD_OUT, "--steps", 2) == 0


def test_temporary_files_go_where_the_output_is_if_nothing_else_is_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    monkeypatch.setenv("TMPDIR", "/proc/nowhere")
    with pytest.raises(SystemExit):
        main(["fit", "--data", str(tmp_path), "--output", str(tmp_path / "run")])
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(tmp_path / "run")

"""The efficiency run of a local command: rows, failures, files, wrong usage."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import (
    ROOT,
    Done,
    make_inputs,
    read_case,
    read_table,
    run_efficiency,
    running,
    save,
)

MISBEHAVIOR = """
case=$(basename "$1"/*_0000.nii.gz _0000.nii.gz)
case $case in
    good) cp "$1"/* "$2/good.nii.gz" ;;
    crash) echo starting; echo it broke >&2; exit 3 ;;
    fault) kill -SEGV $$ ;;
    hang) setsid sleep MARKER & sleep MARKER ;;
    greedy) exec PYTHON -c 'b = bytearray(600 << 20); import time; time.sleep(60)' ;;
    misnamed) cp "$1"/* "$2/other.nii.gz" ;;
    leaves) sleep MARKER & cp "$1"/* "$2/leaves.nii.gz" ;;
    misshapen) cp MISSHAPEN "$2/misshapen.nii.gz" ;;
    cuda) echo 'torch.OutOfMemoryError: CUDA out of memory. Tried to allocate' >&2; exit 1 ;;
esac
"""


@pytest.fixture(scope="module")
def misbehaved(tmp_path_factory) -> tuple[Done, Path, str]:
    """One run over cases that go wrong in every way: what it said, its report, its marker."""
    folder = tmp_path_factory.mktemp("misbehaved")
    marker = f"98{os.getpid()}"
    misshapen = save(folder / "misshapen.nii.gz", np.zeros((6, 5, 3), np.uint8))
    script = folder / "team.sh"
    script.write_text(
        MISBEHAVIOR.replace("MARKER", marker)
        .replace("PYTHON", sys.executable)
        .replace("MISSHAPEN", str(misshapen))
    )
    names = ["good", "crash", "fault", "hang", "greedy", "misnamed", "leaves", "misshapen", "cuda"]
    done = run_efficiency(
        *("--inputs", make_inputs(folder / "in", *names)),
        *("--outputs", folder / "out", "--report", folder / "run"),
        *("--command", f"bash {script} {{inputs}} {{outputs}}"),
        *("--timeout", 2, "--memory-limit", "300m"),
    )
    return done, folder / "run", marker


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "status", "reason", "exit_code"),
    [
        ("good", "ok", None, 0),
        ("leaves", "ok", None, 0),
        ("crash", "crashed", "exit code 3: it broke", 3),
        ("fault", "crashed", "exit code -11", -11),
        ("hang", "timeout", "ended after 2 s", None),
        ("greedy", "out of memory", "over the limit of 300m", None),
        ("cuda", "out of memory", "torch.OutOfMemoryError: CUDA out of memory", 1),
        ("misnamed", "no output", "no misnamed.nii.gz: found other.nii.gz instead", 0),
        ("misshapen", "invalid output", "shape 6×5×3, the input has 6×5×4", 0),
    ],
)
def test_each_failure_has_its_own_row_and_reason(misbehaved, name, status, reason, exit_code):
    done, report, _ = misbehaved
    assert done.returncode == 1
    result = read_case(report, name)
    assert result["status"] == status
    assert (result["reason"] or "").startswith(reason or "")
    assert result["exit_code"] == exit_code
    assert result["image_size"] == [6, 5, 4]
    row = read_table(report)[f"{name}_0000.nii.gz"]
    if status == "ok":
        assert float(row["Time"]) == pytest.approx(result["seconds"], abs=0.01)
        assert result["penalty"] is None
    else:  # FLARE 2022 rules; without a device there is no penalty for its memory
        assert float(row["Time"]) == 3600
        assert row["AUC_GPU_Time"] == ""
        assert row["MaxRAM"] == ""
        assert float(row["AUC_CPU_Time"]) == 360000
    assert result["output"]["valid"] == (status == "ok")
    shown = f"{float(row['Time']):.2f}"
    assert f"| {name} | 6×5×4 | {shown} |" in done.stdout


@pytest.mark.slow
def test_without_a_gpu_the_table_shows_what_was_measured(misbehaved):
    done, report, _ = misbehaved
    head, *_, mean = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert "GPU" not in head
    assert "| Max RAM, process tree (MB) | Total RAM (MB·s) | Max CPU (%) |" in head
    times = [float(row["Time"]) for row in read_table(report).values()]
    assert f"| mean of 9 |  | {np.mean(times):.2f} |" in mean
    assert mean.endswith("| 7 failed |")
    page = (report / "efficiency.md").read_text()
    assert "RAM (process tree) is the sum of the RSS" in page
    assert "Failed cases count 3600 s" in page


@pytest.mark.slow
def test_only_finished_runs_leave_a_label_map(misbehaved):
    _, report, _ = misbehaved
    written = {path.name for path in (report.parent / "out").iterdir()}
    assert written == {"good.nii.gz", "leaves.nii.gz", "misshapen.nii.gz"}


@pytest.mark.slow
def test_nothing_is_left_running_or_lying_about(misbehaved):
    _, report, marker = misbehaved
    assert running(marker) == []
    assert not list(report.glob(".work*"))
    assert not list(report.rglob("*.partial"))


@pytest.mark.slow
def test_every_case_has_its_files(misbehaved):
    _, report, _ = misbehaved
    for name in ("good", "crash", "hang"):
        assert (report / f"efficiency/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (report / "efficiency/crash.log").read_text() == "starting\nit broke\n"
    header = (report / "command_Efficiency.csv").read_text().splitlines()[0]
    assert header == (
        "Name,Time,MaxGPU_Mem,AUC_GPU_Time,MaxCPU_Utilization,AUC_CPU_Time,MaxRAM,AUC_RAM_Time"
    )


@pytest.mark.slow
def test_ram_and_cpu_are_those_of_the_command(tmp_path):
    script = "b = bytearray(200 << 20); import time; t = time.process_time()\n"
    script += "while time.process_time() < t + 1: pass"
    (tmp_path / "work.py").write_text(script)
    run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "x"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--command"),
        f"{sys.executable} {tmp_path}/work.py; : {{inputs}} {{outputs}}",
    )
    result = read_case(tmp_path / "run", "x")
    assert 200 < result["max_ram_mb"] < 260
    # One second of one core, of which the last samples may miss a part at the end.
    cpu_seconds = result["auc_cpu_percent_s"] / 100 * os.cpu_count()
    assert 0.5 < cpu_seconds < 1.5


@pytest.mark.slow
def test_a_name_that_no_plot_can_show_costs_nothing(tmp_path):
    done = run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", r"x$\foo$"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--command", r"cp {inputs}/* {outputs}/'x$\foo$.nii.gz'"),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / r"run/efficiency/x$\foo$.png").is_file()


@pytest.mark.slow
def test_a_plot_that_fails_costs_the_plot(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no pens")

    monkeypatch.setattr("benchmark.containers.efficiency.draw_curves", fail)
    done = run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "x"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--command", "cp {inputs}/* {outputs}/x.nii.gz"),
    )
    assert done.returncode == 0
    assert "not drawn: no pens" in done.stderr


@pytest.mark.slow
def test_a_run_too_short_to_be_read_has_no_ram_rather_than_none(tmp_path):
    done = run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "x"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--interval", 60),
        *("--command", "cp {inputs}/* {outputs}/x.nii.gz"),
    )
    assert done.returncode == 0  # its one reading was before the command began
    row = read_table(tmp_path / "run")["x_0000.nii.gz"]
    assert (row["MaxRAM"], row["AUC_RAM_Time"], row["MaxCPU_Utilization"]) == ("", "", "")
    assert ", RAM" not in done.stderr


@pytest.mark.slow
def test_phases_are_told_from_the_start_of_the_case(tmp_path):
    writer = tmp_path / "write.py"
    writer.write_text(
        "import json, os, time\n"
        "start = time.monotonic(); time.sleep(0.2)\n"
        "line = {'phase': 'predict', 'case': 'x', 'start': start, 'end': time.monotonic()}\n"
        "with open(os.environ['ABDOSEG_PHASE_LOG'], 'w') as log:\n"
        "    print('broken {', json.dumps(line), sep='\\n', file=log)\n"
    )
    run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "x"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--phases", "--command"),
        f"{sys.executable} {writer}; cp {{inputs}}/* {{outputs}}/x.nii.gz",
    )
    result = read_case(tmp_path / "run", "x")
    (phase,) = result["phases"]
    assert (phase["phase"], phase["case"]) == ("predict", "x")
    assert 0 < phase["start_s"] < phase["start_s"] + 0.2 <= phase["end_s"] < result["seconds"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x.nii.gz"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--command", "cp {inputs}/x ."], "{outputs}"),
        (["--command", "{inputs} {outputs}", "--team", "a/b"], "--team"),
        (["--command", "{inputs} {outputs}", "--interval", "0"], "above 0"),
        (["--command", "{inputs} {outputs}", "--repeat", "2"], "an odd number such as 1, 3 or 5"),
        (["--command", "{inputs} {outputs}", "--memory-limit", "lots"], "memory-limit"),
        (["--command", "{inputs} {outputs}", "--image", "x"], "not allowed"),
        ([], "required"),
    ],
)
def test_wrong_usage_says_what_to_do(tmp_path, options, message):
    inputs = make_inputs(tmp_path / "in", "x")
    places = ["--inputs", inputs, "--outputs", tmp_path / "out", "--report", tmp_path / "run"]
    done = run_efficiency(*places, *options)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_torch_is_never_imported():
    program = "import sys, benchmark.containers.efficiency; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0

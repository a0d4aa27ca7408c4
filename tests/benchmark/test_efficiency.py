"""The efficiency run from its command line: rows, failures, endings, resuming, containers."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from unittest import mock

import nibabel
import numpy as np
import psutil
import pytest

from benchmark.__main__ import main
from benchmark.containers.output_check import check_output
from benchmark.containers.repeats import least_and_most, median_run
from benchmark.containers.targets import Container, Folders, MemoryLimit
from benchmark.judging.compare import markdown
from benchmark.judging.report import page_data
from benchmark.judging.runs import read_run

ROOT = Path(__file__).parents[2]
AFFINE = np.diag([-0.8, -0.8, 2.5, 1.0])
BASE_IMAGE = "python:3.11-slim-bookworm"


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def make_inputs(folder: Path, *names: str) -> Path:
    for name in names:
        save(folder / f"{name}_0000.nii.gz", np.zeros((6, 5, 4), np.int16))
    return folder


@dataclass(frozen=True)
class Done:
    """What a run of the command line left behind."""

    returncode: int
    stdout: str
    stderr: str


def run_benchmark(*arguments: object, **environment: str) -> Done:
    """`python -m benchmark` in this process."""
    output, errors = StringIO(), StringIO()
    with (
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            code = main([*map(str, arguments)])
        except SystemExit as usage:
            code = usage.code
    return Done(code, output.getvalue(), errors.getvalue())


def run_efficiency(*arguments: object, **environment: str) -> Done:
    """`python -m benchmark efficiency` in this process."""
    return run_benchmark("efficiency", *arguments, **environment)


def start_efficiency(*arguments: object, **environment: str) -> subprocess.Popen:
    """The same in a process of its own, to be interrupted."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmark", "efficiency", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def read_case(report: Path, name: str) -> dict:
    return json.loads((report / f"efficiency/{name}.json").read_text())


def read_table(report: Path, team: str = "command") -> dict[str, dict[str, str]]:
    with (report / f"{team}_Efficiency.csv").open() as file:
        return {row["Name"]: row for row in csv.DictReader(file)}


def running(marker: str) -> list[psutil.Process]:
    """Processes with a word of this test on their command line, the measuring one left out."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if marker in words and "benchmark" not in words:
            found.append(process)
    return found


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


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


def stop_in_the_middle(tmp_path: Path, number: int) -> tuple[int, str, list[object]]:
    marker = f"97{os.getpid()}{number}"
    script = tmp_path / "team.sh"
    script.write_text(
        'case=$(basename "$1"/*_0000.nii.gz _0000.nii.gz)\n'
        f"if [ $case = b ] && [ ! -e {tmp_path}/free ]; then\n"
        f"    setsid sleep {marker} & sleep {marker}\n"
        "fi\n"
        'cp "$1"/* "$2/$case.nii.gz"\n'
    )
    arguments = [
        *("--inputs", make_inputs(tmp_path / "in", "a", "b"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run"),
        *("--command", f"bash {script} {{inputs}} {{outputs}}"),
    ]
    process = start_efficiency(*arguments)
    wait_for(lambda: len(running(marker)) == 2)
    time.sleep(0.3)  # a sampler's tick, which sees the process that leaves the group
    process.send_signal(number)
    process.wait(timeout=60)
    return process.returncode, marker, arguments


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_and_resume_goes_on(tmp_path, number):
    code, marker, arguments = stop_in_the_middle(tmp_path, number)
    assert code == 128 + number
    assert running(marker) == []
    assert list(read_table(tmp_path / "run")) == ["a_0000.nii.gz"]
    assert not (tmp_path / "run/efficiency/b.json").exists()

    first = read_case(tmp_path / "run", "a")
    (tmp_path / "free").touch()
    done = run_efficiency(*arguments, "--resume", "--memory-tolerance", 2048)
    assert done.returncode == 0
    assert "a (6×5×4)" in done.stderr
    assert done.stderr.count("from the earlier run") == 1
    again = read_case(tmp_path / "run", "a")
    assert again["samples"] == first["samples"]
    assert again["tolerances"]["mb"] == 2048
    assert list(read_table(tmp_path / "run")) == ["a_0000.nii.gz", "b_0000.nii.gz"]


@pytest.mark.slow
def test_resume_with_another_command_is_refused_and_removes_nothing(tmp_path):
    arguments = [
        *("--inputs", make_inputs(tmp_path / "in", "x"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--resume", "--command"),
    ]
    run_efficiency(*arguments, "cp {inputs}/x_0000.nii.gz {outputs}/x.nii.gz")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = run_efficiency(*arguments, "sleep 0.01; cp {inputs}/* {outputs}/x.nii.gz")
    assert done.returncode == 2
    assert "another command" in done.stderr
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["", "{", "[1]", "{}", '{"samples": 3}', "null", "[" * 100_000])
def test_a_damaged_result_is_measured_again(tmp_path, damage):
    arguments = [
        *("--inputs", make_inputs(tmp_path / "in", "x"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--resume", "--command"),
        "cp {inputs}/x_0000.nii.gz {outputs}/x.nii.gz",
    ]
    assert run_efficiency(*arguments).returncode == 0
    (tmp_path / "run/efficiency/x.json").write_text(damage)
    done = run_efficiency(*arguments)
    assert done.returncode == 0, done.stderr
    assert "from the earlier run" not in done.stderr
    assert read_case(tmp_path / "run", "x")["status"] == "ok"


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
def test_repetitions_show_the_run_of_median_time(tmp_path):
    count = tmp_path / "count"
    done = run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "x"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--repeat", 3, "--command"),
        f"echo >> {count}; case $(wc -l < {count}) in 1) sleep 0.9;; 2) sleep 0.5;; *) exit 1;; "
        "esac; cp {inputs}/* {outputs}/x.nii.gz",
    )
    assert done.returncode == 1  # the third failed, and counts an hour
    times = [read_case(tmp_path / "run", name)["seconds"] for name in ("x", "x.repeat1")]
    assert read_case(tmp_path / "run", "x.repeat2")["status"] == "crashed"
    row = read_table(tmp_path / "run")["x_0000.nii.gz"]
    assert float(row["Time"]) == pytest.approx(max(times), abs=0.01)
    assert f"| {max(times):.2f} | {min(times):.2f}–3600.00 |" in done.stdout
    # The same run in everything that reads the folder.
    run = read_run(tmp_path / "run")
    assert run.measured("x", "Time") == max(times)
    (page_row,) = page_data([run])["rows"]
    assert (page_row["time"], page_row["timeRange"]) == (max(times), (min(times), 3600.0))
    (curve,) = page_data([run])["curves"]
    assert curve["ram"][0][-1] == pytest.approx(max(times), abs=0.2)
    assert not (tmp_path / "run/efficiency/x.repeat1.png").exists()
    assert "**A took 1.00 times as long" in markdown(run, run)


def test_of_an_even_number_of_old_runs_all_tables_take_the_same():
    runs = [
        {"penalty": None, "seconds": seconds, "max_ram_mb": seconds} for seconds in (4, 1, 3, 2)
    ]
    assert median_run(runs)["seconds"] == 2
    assert median_run([*runs, {"penalty": {}, "seconds": 0.1}])["seconds"] == 2
    failed = [{"penalty": {"seconds": 3600.0}, "seconds": 0.1}] * 2
    assert median_run([runs[0], *failed])["penalty"]  # most of its runs failed
    assert least_and_most(runs, "max_ram_mb") == (1, 4)


@pytest.mark.slow
def test_a_warm_up_is_discarded(tmp_path):
    count = tmp_path / "count"
    done = run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "x", "y"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--warm-up", "--command"),
        f"echo >> {count}; [ $(wc -l < {count}) = 1 ] || "
        "cp {inputs}/* {outputs}/$(basename {inputs}/* _0000.nii.gz).nii.gz; : $(ls {outputs})",
    )
    assert done.returncode == 0, done.stderr  # the run that wrote nothing does not count
    assert len(count.read_text()) == 3
    assert not read_case(tmp_path / "run", "x")["first"]
    page = (tmp_path / "run/efficiency.md").read_text()
    assert "A first run was discarded (--warm-up)" in page
    again = run_efficiency(
        *("--inputs", tmp_path / "in", "--outputs", tmp_path / "out", "--resume"),
        *("--report", tmp_path / "run", "--command"),
        json.loads((tmp_path / "run/environment.json").read_text())["command"],
    )
    assert again.returncode == 2
    assert "another warm_up" in again.stderr  # cold and warm runs are not mixed


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
def test_without_a_warm_up_the_first_run_is_named(tmp_path):
    run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "x", "y"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--command", "true {inputs} {outputs}"),
    )
    assert [read_case(tmp_path / "run", name)["first"] for name in "xy"] == [True, False]
    assert "a run of x was the first here" in (tmp_path / "run/efficiency.md").read_text()


@pytest.mark.slow
def test_another_team_leaves_nothing_of_the_one_before(tmp_path):
    places = [
        *("--inputs", make_inputs(tmp_path / "in", "x"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--command", "cp {inputs}/* {outputs}/x.nii.gz"),
    ]
    run_efficiency(*places, "--team", "before")
    (tmp_path / "run/accuracy_per_case.csv").write_text("Name,Liver_DSC,Liver_NSD\nx,0.5,0.5\n")
    (tmp_path / "run/mine.txt").write_text("notes")
    done = run_efficiency(*places, "--team", "after")
    assert "replacing the earlier run" in done.stderr
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        *("after_Efficiency.csv", "efficiency.md", "environment.json", "efficiency", "mine.txt")
    }


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


def test_a_foreign_label_map_is_never_replaced(tmp_path):
    reference = save(tmp_path / "out/x.nii.gz", np.ones((6, 5, 4), np.uint8)).read_bytes()
    done = run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "x"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--command", "cp {inputs}/* {outputs}/x.nii.gz"),
    )
    assert done.returncode == 2
    assert "in the way" in done.stderr
    assert (tmp_path / "out/x.nii.gz").read_bytes() == reference


@pytest.mark.parametrize(
    ("array", "affine", "scorable", "problem"),
    [
        (np.zeros((6, 5, 4), np.uint8), AFFINE, True, None),
        (np.full((6, 5, 4), 14, np.int16), AFFINE + 1e-5, True, None),
        (np.zeros((5, 6, 4), np.uint8), AFFINE, False, "shape 5×6×4"),
        (np.zeros((6, 5, 4), np.uint8), np.diag([0.8, -0.8, 2.5, 1]), True, "affine"),
        (np.zeros((6, 5, 4), np.float32), AFFINE, True, "stored as float32"),
        (np.full((6, 5, 4), 15, np.uint8), AFFINE, True, "no label: 15"),
        (np.full((6, 5, 4), -1, np.int16), AFFINE, True, "no label: -1"),
    ],
)
def test_output_is_held_against_its_input(tmp_path, array, affine, scorable, problem):
    image = save(tmp_path / "in/x_0000.nii.gz", np.zeros((6, 5, 4), np.int16))
    check = check_output(save(tmp_path / "out/x.nii.gz", array, affine), image)
    assert check.found
    assert check.scorable == scorable
    assert check.valid == (problem is None)
    assert problem is None or problem in "; ".join(check.problems)


def test_a_damaged_output_is_no_score(tmp_path):
    image = save(tmp_path / "in/x_0000.nii.gz", np.zeros((6, 5, 4), np.int16))
    output = save(tmp_path / "out/x.nii.gz", np.zeros((60, 50, 40), np.uint8))
    output.write_bytes(output.read_bytes()[:-20])
    check = check_output(output, image)
    assert check.found
    assert not check.scorable
    assert not check.valid


def test_the_command_line_is_the_organisers():
    folders = Folders(Path("/here/inputs"), Path("/here/outputs"), Path("log"))
    line = Container("team:latest", MemoryLimit.parse("28g"), 1, phases=False)
    assert line.command_line("team", folders) == [
        *("docker", "container", "run", "--shm-size=28gb", "-m", "28G", "--gpus", "device=1"),
        *("--name", "team", "--rm", "-v", "/here/inputs/:/workspace/inputs/"),
        *("-v", "/here/outputs/:/workspace/outputs/", "team:latest"),
        *("/bin/bash", "-c", "sh predict.sh"),
    ]


@pytest.mark.slow
def test_torch_is_never_imported():
    program = "import sys, benchmark.containers.efficiency; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


class StandInEngine:
    """`docker_stub.py` as the `docker` command."""

    def __init__(self, folder: Path):
        self.folder = folder
        binaries = folder / "bin"
        binaries.mkdir(parents=True)
        script = binaries / "docker"
        stub = Path(__file__).with_name("docker_stub.py")
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {stub} "$@"\n')
        script.chmod(0o755)
        path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
        self.environment = {"PATH": path, "DOCKER_STUB": str(folder)}

    def make_image(self, name: str, predict: str) -> None:
        (self.folder / "images" / name).mkdir(parents=True)
        (self.folder / "images" / name / "predict.sh").write_text(predict)

    def containers(self, name: str) -> list[str]:
        return [path.stem for path in self.folder.glob(f"{name}-*.pid")]

    def close(self) -> None:
        pass


class RealEngine:
    """The Docker engine of this machine."""

    environment: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, folder: Path):
        self.images: list[str] = []

    def make_image(self, name: str, predict: str) -> None:
        with_script = f"mkdir -p /workspace; printf %s '{predict}' > /workspace/predict.sh"
        self._docker("run", "--name", f"make-{name}", BASE_IMAGE, "sh", "-c", with_script)
        self._docker("commit", "--change", "WORKDIR /workspace", f"make-{name}", f"{name}:latest")
        self._docker("rm", f"make-{name}")
        self.images.append(name)

    def containers(self, name: str) -> list[str]:
        return self._docker("ps", "-a", "--filter", f"name=^/{name}-", "-q").split()

    def close(self) -> None:
        for name in self.images:
            self._docker("rmi", f"{name}:latest")

    def _docker(self, *arguments: str) -> str:
        done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True)
        return done.stdout


def engine_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    question = ["docker", "image", "inspect", BASE_IMAGE]
    return subprocess.run(question, capture_output=True).returncode == 0


ENGINES = [StandInEngine, *([RealEngine] if engine_answers() else [])]


@pytest.fixture(params=ENGINES)
def engine(request, tmp_path):
    engine = request.param(tmp_path / "engine")
    yield engine
    engine.close()


CONTAINER_SCRIPT = """set -e
case $(basename inputs/*_0000.nii.gz _0000.nii.gz) in
a) sleep 0.4; cp inputs/a_0000.nii.gz outputs/a.nii.gz ;;
b) echo no luck; exit 4 ;;
c) sleep 1000 ;;
esac
"""


@pytest.mark.slow
def test_containers_run_fail_and_are_removed(engine, tmp_path):
    team = f"abdoseg-test-{os.getpid()}"
    engine.make_image(team, CONTAINER_SCRIPT)
    done = run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "a", "b", "c"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--image", f"{team}:latest", "--timeout", 3),
        **engine.environment,
    )
    assert done.returncode == 1, done.stderr
    statuses = [read_case(tmp_path / "run", name)["status"] for name in "abc"]
    assert statuses == ["ok", "crashed", "timeout"]
    assert read_case(tmp_path / "run", "b")["reason"] == "exit code 4: no luck"
    assert read_case(tmp_path / "run", "a")["seconds"] >= 0.4
    assert len(read_table(tmp_path / "run", team)) == 3
    assert engine.containers(team) == []
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert environment["image"] == f"{team}:latest"
    assert environment["image_digest"].startswith("sha256:")


@pytest.mark.slow
def test_ctrl_c_removes_the_container(engine, tmp_path):
    team = f"abdoseg-stop-{os.getpid()}"
    engine.make_image(team, CONTAINER_SCRIPT)
    process = start_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "c"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--image", team),
        **engine.environment,
    )
    wait_for(lambda: engine.containers(team))
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert process.returncode == 130
    assert engine.containers(team) == []


@pytest.mark.slow
def test_the_engine_is_asked_for_what_the_organisers_ask(tmp_path):
    engine = StandInEngine(tmp_path / "engine")
    engine.make_image("team", CONTAINER_SCRIPT)
    archive = tmp_path / "TEAM.tar.gz"
    archive.write_text("team:latest")
    done = run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "a"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--archive", archive, "--memory-limit", "2g"),
        **engine.environment,
    )
    assert done.returncode == 0, done.stderr
    orders = [json.loads(line) for line in (engine.folder / "orders").read_text().splitlines()]
    assert ["load", "-i", str(archive)] in orders
    (order,) = [order for order in orders if order[:2] == ["container", "run"]]
    assert order[2:5] == ["--shm-size=2gb", "-m", "2G"]
    assert order[-4:] == ["team:latest", "/bin/bash", "-c", "sh predict.sh"]
    assert "-e" not in order


def test_an_archive_with_another_image_says_which_name_is_needed(tmp_path):
    engine = StandInEngine(tmp_path / "engine")
    archive = tmp_path / "Team.tar.gz"
    archive.write_text("our-best:v2")
    done = run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "a"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--archive", archive),
        **engine.environment,
    )
    assert done.returncode == 2
    assert "our-best:v2" in done.stderr
    assert "team:latest" in done.stderr


def test_an_engine_that_refuses_is_not_the_teams_failure(tmp_path):
    engine = StandInEngine(tmp_path / "engine")
    engine.make_image("team", CONTAINER_SCRIPT)
    (engine.folder / "images/team/refused").touch()
    done = run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "a"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--image", "team"),
        **engine.environment,
    )
    assert done.returncode == 2
    assert "could not select device driver" in done.stderr
    assert not (tmp_path / "run/team_Efficiency.csv").exists()

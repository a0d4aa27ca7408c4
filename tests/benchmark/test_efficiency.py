"""The efficiency run: rows, failures, files, repetitions, resumption, engines, faults around it."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from harness import (
    COPY,
    ROOT,
    Done,
    StandInEngine,
    make_inputs,
    measure,
    page_data,
    places,
    read,
    read_case,
    read_table,
    run_benchmark,
    running,
    save,
    start,
    tables_of,
    wait_for,
)

from benchmark.containers import efficiency, results
from benchmark.containers.runner import Container, Folders
from benchmark.judging.compare import markdown
from benchmark.judging.report import case_row, curves_of
from benchmark.judging.runs import read_run

MISBEHAVIOR = """
case=$(basename "$1"/*_0000.nii.gz _0000.nii.gz)
case $case in
    good) cp "$1"/* "$2/good.nii.gz" ;;
    crash) echo starting; echo it broke >&2; exit 3 ;;
    fault) kill -SEGV $$ ;;
    hang) setsid sleep MARKER & sleep MARKER ;;
    greedy) exec PYTHON -c 'b = bytearray(600 << 20); import time; time.sleep(600)' ;;
    misnamed) cp "$1"/* "$2/other.nii.gz" ;;
    leaves) sleep MARKER & cp "$1"/* "$2/leaves.nii.gz" ;;
    misshapen) cp MISSHAPEN "$2/misshapen.nii.gz" ;;
    cuda) echo 'torch.OutOfMemoryError: CUDA out of memory. Tried to allocate' >&2; exit 1 ;;
esac
"""


@pytest.fixture(scope="module")
def misbehaved(tmp_path_factory) -> tuple[Done, Path, str]:
    """One run over cases that go wrong in every way: what it printed, its folder, its marker.

    The one that hangs has a run of its own, so that no other has a time limit to reach.
    """
    folder, marker = tmp_path_factory.mktemp("misbehaved"), f"98{os.getpid()}"
    misshapen = save(folder / "misshapen.nii.gz", np.zeros((6, 5, 3), np.uint8))
    names = {"MARKER": marker, "PYTHON": sys.executable, "MISSHAPEN": str(misshapen)}
    script = folder / "team.sh"
    script.write_text(re.sub("MARKER|PYTHON|MISSHAPEN", lambda m: names[m[0]], MISBEHAVIOR))
    command = f"bash {script} {{inputs}} {{outputs}}"
    cases = "good crash fault greedy misnamed leaves misshapen cuda"
    done = measure(folder, cases, "--memory-limit", "300m", command=command)
    measure(folder / "hang", "hang", "--timeout", 2, command=command)
    return done, folder, marker


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "status", "exit_code"),
    [
        ("good", "ok", 0),
        ("leaves", "ok", 0),
        ("crash", "crashed", 3),
        ("fault", "crashed", -11),
        ("hang", "timeout", None),
        ("greedy", "out of memory", None),
        ("cuda", "out of memory", 1),
        ("misnamed", "no output", 0),
        ("misshapen", "invalid output", 0),
    ],
)
def test_each_failure_has_its_own_row_and_status(misbehaved, name, status, exit_code):
    done, folder, _ = misbehaved
    folder = folder / "hang" if name == "hang" else folder
    assert done.code == 1
    result, row = read_case(folder, name), read_table(folder)[name]
    assert (result["status"], result["exit_code"]) == (status, exit_code)
    assert bool(result["reason"]) == (status != "ok")
    assert (result["penalty"] is None) == (status == "ok") == result["output"]["valid"]
    if status == "ok":
        assert float(row["Time"]) == pytest.approx(result["seconds"], abs=0.01)
    else:  # FLARE 2022 rules; without a device there is no penalty for its memory
        assert (float(row["Time"]), float(row["AUC_CPU_Time"])) == (3600, 360000)
        assert row["AUC_GPU_Time"] == row["MaxRAM"] == ""


@pytest.mark.slow
def test_a_run_leaves_its_tables_and_label_maps_and_nothing_else(misbehaved):
    done, folder, marker = misbehaved
    head, *rows = tables_of(done.out)
    assert not any("GPU" in title for title in head)
    assert len(rows) == 8 + 1
    times = [float(row["Time"]) for row in read_table(folder).values()]
    assert rows[-1][2] == f"{np.mean(times):.2f}"
    assert sum(row[-1] == "ok" for row in rows) == 2
    written = {path.name for path in (folder / "out").iterdir()}
    assert written == {"good.nii.gz", "leaves.nii.gz", "misshapen.nii.gz"}
    assert (folder / "run/efficiency/crash.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "run/efficiency/crash.log").read_text() == "starting\nit broke\n"
    assert running(marker) == []
    assert not [*folder.rglob(".work*"), *folder.rglob("*.partial")]


@pytest.mark.slow
def test_odd_names_lost_plots_and_short_runs_cost_nothing(tmp_path, monkeypatch):
    name = r"a|b<img src=x>`c`$\foo$"
    make_inputs(tmp_path / "1/in", name)
    # Its one reading was before the command started: no figure rather than 0.
    monkeypatch.setattr("benchmark.containers.sampler.next_tick", lambda *_: 10**6)
    done = measure(tmp_path / "1", "")
    assert done.code == 0, done.err
    assert (tmp_path / f"1/run/efficiency/{name}.png").is_file()
    page = (tmp_path / "1/run/efficiency.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| a")]
    assert "<img" not in page
    assert len(re.findall(r"(?<!\\)\|", row)) == page.splitlines()[3].count("|")
    cells = read_table(tmp_path / "1")[name]
    assert {cells[n] for n in ("MaxRAM", "AUC_RAM_Time", "MaxCPU_Utilization")} == {""}

    monkeypatch.setattr(efficiency, "draw_curves", mock.Mock(side_effect=RuntimeError))
    monkeypatch.setattr(Path, "chmod", mock.Mock(side_effect=PermissionError))  # as CIFS does
    assert measure(tmp_path / "2", "x").code == 0
    assert not (tmp_path / "2/run/efficiency/x.png").exists()


@pytest.mark.slow
def test_phases_are_counted_from_the_start_of_the_case(tmp_path):
    writer = tmp_path / "write.py"
    writer.write_text(
        "import json, os, time\n"
        "start = time.monotonic(); time.sleep(0.2)\n"
        "line = {'phase': 'predict', 'case': 'x', 'start': start, 'end': time.monotonic()}\n"
        "with open(os.environ['ABDOSEG_PHASE_LOG'], 'w') as log:\n"
        "    print('broken {', json.dumps(line), sep='\\n', file=log)\n"
    )
    measure(tmp_path, "x", "--phases", command=f"{sys.executable} {writer}; {COPY}")
    result = read_case(tmp_path, "x")
    (phase,) = result["phases"]
    assert (phase["phase"], phase["case"]) == ("predict", "x")
    assert 0 < phase["start_s"] < phase["start_s"] + 0.2 <= phase["end_s"] < result["seconds"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.nii.gz"]


PLACES = ["--command", "{inputs} {outputs}"]


@pytest.mark.parametrize(
    "options",
    [
        ["--command", "cp {inputs}/x ."],
        [*PLACES, "--team", "a/b"],
        [*PLACES, "--timeout", "0"],
        [*PLACES, "--repeat", "2"],
        [*PLACES, "--memory-limit", "lots"],
        [*PLACES, "--image", "x"],
        [],
    ],
)
def test_wrong_usage_is_refused_before_anything_is_run(tmp_path, options):
    done = measure(tmp_path, "x", *options, command=None)
    assert (done.code, "Traceback" in done.err) == (2, False)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- repetitions and resumption


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_and_resume_continues(tmp_path, number):
    marker = f"97{os.getpid()}{number}"
    hang = f"setsid sleep {marker} & sleep {marker}"
    wait = f"if [ -e {{inputs}}/b_0000.nii.gz ] && [ ! -e {tmp_path}/free ]; then {hang}; fi"
    command = f"{wait}; {COPY}"
    process = start("efficiency", *places(tmp_path, "a", "b"), "--command", command)
    wait_for(lambda: len(running(marker)) == 2)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert running(marker) == []
    assert list(read_table(tmp_path)) == ["a"]
    first = read_case(tmp_path, "a")
    (tmp_path / "free").touch()
    assert measure(tmp_path, "", command=command).code == 2  # nothing is replaced unasked
    assert measure(tmp_path, "", "--resume", command=command).code == 0
    assert read_case(tmp_path, "a") == first
    assert list(read_table(tmp_path)) == ["a", "b"]


@pytest.mark.slow
def test_only_a_whole_result_of_the_same_run_is_resumed(tmp_path):
    count = tmp_path / "count"
    command = f"echo >> {count}; {COPY}"
    measure(tmp_path, "x", command=command)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for others in (["--warm-up"], ["--repeat", 3], ["--timeout", 9], ["--team", "a"]):
        assert measure(tmp_path, "", "--resume", *others, command=command).code == 2
    assert measure(tmp_path, "", "--resume", command=COPY).code == 2
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for damage in ("", "{", "[1]", "{}", '{"samples": 3}', "null", "[" * 100_000):
        (tmp_path / "run/efficiency/x.json").write_text(damage)
        assert measure(tmp_path, "", "--resume", command=command).code == 0
        assert read_case(tmp_path, "x")["status"] == "ok"
    assert len(count.read_text()) == 1 + 7


@pytest.mark.slow
def test_repetitions_show_the_run_of_median_time(tmp_path):
    count = tmp_path / "count"
    slower = f"case $(wc -l < {count}) in 1) sleep 0.9;; 2) sleep 0.5;; *) exit 1;; esac"
    done = measure(tmp_path, "x", "--repeat", 3, command=f"echo >> {count}; {slower}; {COPY}")
    assert done.code == 1  # the third failed, and counts an hour
    least, most = sorted(read_case(tmp_path, name)["seconds"] for name in ("x", "x.repeat1"))
    assert read_case(tmp_path, "x.repeat2")["status"] == "crashed"
    assert float(read_table(tmp_path)["x"]["Time"]) == pytest.approx(most, abs=0.01)
    assert tables_of(done.out)[1][2:4] == [f"{most:.2f}", f"{least:.2f}–3600.00"]
    # The same run in everything that reads the folder.
    run = read_run(tmp_path / "run")
    assert run.measured("x", "Time") == most
    row = case_row(run, 0, "x")
    assert (row["time"], row["timeRange"]) == (most, (least, 3600.0))
    assert curves_of(run)[0]["ram"][0][-1] <= most
    assert "1.00 times as long" in markdown(run, run)


def test_of_an_even_number_of_old_runs_all_tables_take_the_same():
    runs = [{"penalty": None, "seconds": n} for n in (4, 1, 3, 2)]
    assert results.median_run(runs)["seconds"] == 2
    assert results.median_run([*runs, {"penalty": {}, "seconds": 0.1}])["seconds"] == 2
    failed = [{"penalty": {"seconds": 3600.0}, "seconds": 0.1}] * 2
    assert results.median_run([runs[0], *failed])["penalty"]  # most of its runs failed
    assert results.least_and_most(runs) == (1, 4)


@pytest.mark.slow
def test_a_warm_up_is_discarded_and_a_cold_first_run_is_named(tmp_path):
    count = tmp_path / "count"
    command = f"echo >> {count}; [ $(wc -l < {count}) = 1 ] || {COPY}"
    done = measure(tmp_path, "x y", "--warm-up", command=command)
    assert done.code == 0, done.err  # the run that wrote nothing does not count
    assert len(count.read_text()) == 3
    assert [read_case(tmp_path, name)["first"] for name in "xy"] == [False, False]
    measure(tmp_path / "cold", "x y", command="true {inputs} {outputs}")
    assert [read_case(tmp_path / "cold", name)["first"] for name in "xy"] == [True, False]


def test_label_maps_of_others_are_not_replaced(tmp_path):
    foreign = save(tmp_path / "out/x.nii.gz", np.ones((6, 5, 4), np.uint8))
    before = foreign.read_bytes()
    for option in ((), ("--resume",)):
        assert measure(tmp_path, "x", *option).code == 2
        assert foreign.read_bytes() == before


# ---------------------------------------------------------------- faults around a run


@pytest.mark.slow
def test_what_is_no_ct_is_reported_and_costs_itself(tmp_path):
    inputs = make_inputs(tmp_path / "in", "good")
    whole = (inputs / "good_0000.nii.gz").read_bytes()
    (inputs / "text_0000.nii.gz").write_text("nothing")
    (inputs / "bits_0000.nii.gz").write_bytes(whole[:20] + bytes(20) + whole[40:])
    (inputs / "unfetched_0000.nii.gz").symlink_to("../annex/object")
    (inputs / "folder_0000.nii.gz").mkdir()
    (inputs / "LOUD_0000.NII.GZ").write_bytes(whole)
    done = measure(tmp_path, "")
    assert done.code == 1
    assert list(read_table(tmp_path)) == ["good"]
    names = {path.name for path in inputs.iterdir()} - {"good_0000.nii.gz"}
    assert set(read(tmp_path / "run/environment.json")["not_measured"]) == names
    page = (tmp_path / "run/efficiency.md").read_text()
    run_benchmark("report", tmp_path / "run", "--output", tmp_path / "page.html")
    (note, *_) = page_data(tmp_path / "page.html")["notes"]
    assert all(name in page and name in done.err and name in note for name in names)


def test_folders_that_cannot_be_used_are_one_line(tmp_path):
    assert measure(tmp_path / "fold", "Case case").code == 2  # one name for some file systems
    assert measure(tmp_path / "none", "").code == 2
    (tmp_path / "run").write_text("a file")
    done = measure(tmp_path, "a")
    assert done.code == 2
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_finished_cases_stay(tmp_path):
    write_json = efficiency.write_json

    def full_from_the_second_case(path, content):
        if path.name == "b.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_json(path, content)

    with mock.patch.object(efficiency, "write_json", full_from_the_second_case):
        done = measure(tmp_path, "a b")
    assert done.code == 2
    assert "Traceback" not in done.err
    assert read_case(tmp_path, "a")["status"] == "ok"
    assert (tmp_path / "out/a.nii.gz").exists()


# ---------------------------------------------------------------- engines

CONTAINER_SCRIPT = """set -e
case $(basename inputs/*_0000.nii.gz _0000.nii.gz) in
a) sleep 0.4; cp inputs/a_0000.nii.gz outputs/a.nii.gz ;;
b) echo no luck; exit 4 ;;
c) sleep 1000 ;;
esac
"""


def test_the_command_line_is_the_organisers():
    folders = Folders(Path("/here/inputs"), Path("/here/outputs"), Path("log"))
    assert Container("team:latest", "28g", "1").command_line("team", folders) == [
        *("docker", "container", "run", "--shm-size=28gb", "-m", "28G", "--gpus", "device=1"),
        *("--name", "team", "--rm", "-v", "/here/inputs/:/workspace/inputs/"),
        *("-v", "/here/outputs/:/workspace/outputs/", "team:latest"),
        *("/bin/bash", "-c", "sh predict.sh"),
    ]


@pytest.fixture
def engine(tmp_path):
    return StandInEngine(tmp_path / "engine")


@pytest.mark.slow
def test_containers_run_fail_and_are_removed(engine, tmp_path):
    engine.make_image("team", CONTAINER_SCRIPT)
    image = ("--image", "team:latest")
    done = measure(tmp_path, "a b", *image, command=None, **engine.environment)
    assert done.code == 1, done.err
    a, b = read_case(tmp_path, "a"), read_case(tmp_path, "b")
    assert (a["status"], a["seconds"] >= 0.4) == ("ok", True)
    assert (b["status"], b["exit_code"]) == ("crashed", 4)
    assert len(read_table(tmp_path, "team")) == 2
    environment = read(tmp_path / "run/environment.json")
    assert environment["image"] == "team:latest"
    assert environment["image_digest"].startswith("sha256:")
    measure(tmp_path / "hang", "c", "--timeout", 3, *image, command=None, **engine.environment)
    assert read_case(tmp_path / "hang", "c")["status"] == "timeout"

    process = start("efficiency", *places(tmp_path / "stop", "c"), *image, **engine.environment)
    wait_for(lambda: engine.containers("team"))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert engine.containers("team") == []


@pytest.mark.slow
def test_an_archive_is_loaded_and_run_as_the_organisers_do(engine, tmp_path):
    engine.make_image("team", CONTAINER_SCRIPT)
    archive = tmp_path / "TEAM.tar.gz"
    archive.write_text("team:latest")
    options = ("--archive", archive, "--memory-limit", "2g")
    done = measure(tmp_path, "a", *options, command=None, **engine.environment)
    assert done.code == 0, done.err
    assert engine.orders("load") == [["load", "-i", str(archive)]]
    (order,) = engine.orders("container", "run")
    assert order[2:5] == ["--shm-size=2gb", "-m", "2G"]
    assert order[-4:] == ["team:latest", "/bin/bash", "-c", "sh predict.sh"]
    archive.write_text("our-best:v2")
    done = measure(tmp_path / "2", "a", *options, command=None, **engine.environment)
    assert done.code == 2
    assert {"our-best:v2,", "team:latest:"} <= set(done.err.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("warning", "script", "code"),
    [
        ("", None, 2),
        ("WARNING: forwarding is disabled.\n", None, 2),
        (None, "echo 'docker: Error response from daemon: no.'; exit 125\n", 1),
    ],
)
def test_an_engine_that_refuses_is_not_the_teams_failure(engine, tmp_path, warning, script, code):
    engine.make_image("team", script or "true\n")
    if warning is not None:
        (engine.folder / "images/team/refused").write_text(warning)
    done = measure(tmp_path, "a", "--image", "team", command=None, **engine.environment)
    assert done.code == code
    if code == 2:
        assert "could not select device driver" in done.err
        assert not (tmp_path / "run/team_Efficiency.csv").exists()
    else:  # a container that speaks like the engine
        case = read_case(tmp_path, "a")
        assert (case["status"], case["exit_code"]) == ("crashed", 125)


@pytest.mark.slow
def test_an_engine_slow_to_find_a_container_adds_nothing_to_its_time(engine, tmp_path):
    engine.make_image("team", "cp inputs/a_0000.nii.gz outputs/a.nii.gz\n")
    slow = engine.environment | {"DOCKER_STUB_SLOW": "40"}
    done = measure(tmp_path, "a", "--image", "team", "--timeout", 30, command=None, **slow)
    assert done.code == 0, done.err
    assert read_case(tmp_path, "a")["status"] == "ok"


@pytest.mark.slow
def test_a_killed_harness_leaves_a_container_that_the_next_removes(engine, tmp_path):
    engine.make_image("left", "sleep 1000\n")
    engine.make_image("next", "cp inputs/a_0000.nii.gz outputs/a.nii.gz\n")
    here = engine.environment
    harness = start("efficiency", *places(tmp_path / "1", "a"), "--image", "left", **here)
    wait_for(lambda: list(engine.folder.glob("left-*.label")))
    # While its harness lives another leaves it alone.
    assert measure(tmp_path / "2", "a", "--image", "next", command=None, **here).code == 0
    assert len(engine.containers("left")) == 1
    harness.kill()
    harness.communicate()
    assert measure(tmp_path / "3", "a", "--image", "next", command=None, **here).code == 0
    assert engine.containers("left") == []


@pytest.mark.slow
def test_torch_is_never_imported():
    # What the harness measures (the plain pipeline, the bare network) runs in processes of its own.
    code = "import sys; from benchmark.__main__ import COMMANDS as c; import importlib\n"
    code += "for n, (m, _) in c.items():\n"
    code += "    if n != 'plain-pipeline':\n"
    code += "        importlib.import_module(m)\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

"""Efficiency runs that are repeated, warmed up, resumed, or follow another in one folder."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from harness import (
    make_inputs,
    read_case,
    read_table,
    run_efficiency,
    running,
    save,
    start_efficiency,
    wait_for,
)

from benchmark.containers.results import least_and_most, median_run
from benchmark.judging.compare import markdown
from benchmark.judging.report import curves_of, page_data
from benchmark.judging.runs import read_run


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
    (curve,) = curves_of(run)
    assert curve["ram"][0][-1] == pytest.approx(max(times), abs=0.2)
    assert not (tmp_path / "run/efficiency/x.repeat1.png").exists()
    assert "**A takes 1.00 times as long" in markdown(run, run)


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


def test_a_foreign_label_map_is_never_replaced(tmp_path):
    reference = save(tmp_path / "out/x.nii.gz", np.ones((6, 5, 4), np.uint8)).read_bytes()
    done = run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "x"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--command", "cp {inputs}/* {outputs}/x.nii.gz"),
    )
    assert done.returncode == 2
    assert "in the way" in done.stderr
    assert (tmp_path / "out/x.nii.gz").read_bytes() == reference

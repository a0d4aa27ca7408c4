"""Containers that cheat or break: their own row suffers, the host's files and the run do not."""

import os
import subprocess
import threading
import time
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

import nibabel
import numpy as np
import psutil
import pytest
from harness import (
    StandInEngine,
    make_inputs,
    read_case,
    read_table,
    run_efficiency,
    running,
    save,
    start_efficiency,
    wait_for,
)

from benchmark.containers import outputs, runner
from benchmark.containers.engine import remove_abandoned
from benchmark.containers.outputs import LogWriter, RefusedError, collect, open_left_file
from benchmark.containers.runner import Container, _orphans_ended
from inference.volume import VolumeError, read_volume

HOSTILE = """
case=$(basename "$1"/*_0000.nii.gz _0000.nii.gz)
case $case in
    good) cp "$1"/* "$2/good.nii.gz" ;;
    link) ln -s SECRET "$2/link.nii.gz" ;;
    pipe) mkfifo "$2/pipe.nii.gz" "$2/.abdoseg_phases.jsonl" ;;
    folder) mkdir "$2/folder.nii.gz" ;;
    large) truncate -s 3G "$2/large.nii.gz" ;;
    bomb) cp BOMB "$2/bomb.nii.gz" ;;
    phases) cp "$1"/* "$2/phases.nii.gz"
        printf '%s\\n' '[1]' '{"phase": "a", "case": null, "start": NaN, "end": 1}' \\
            '{"phase": "b", "case": 7, "start": 1, "end": 1e999}' > "$2/.abdoseg_phases.jsonl" ;;
    talks) cp "$1"/* "$2/talks.nii.gz"; head -c 40000000 /dev/zero ;;
    escapes) printf 'bad \\033[2J\\007 end\\n'; exit 3 ;;
esac
"""


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    secret = save(folder / "reference.nii.gz", np.ones((6, 5, 4), np.uint8))
    bomb = save(folder / "bomb.nii.gz", np.zeros((6000, 600, 20), np.uint8))
    script = folder / "hostile.sh"
    script.write_text(HOSTILE.replace("SECRET", str(secret)).replace("BOMB", str(bomb)))
    names = ["good", "link", "pipe", "folder", "large", "bomb", "phases", "talks", "escapes"]
    inputs = make_inputs(folder / "in", *names)
    done = run_efficiency(
        *("--inputs", inputs, "--outputs", folder / "out", "--report", folder / "report"),
        *("--command", f"bash {script} {{inputs}} {{outputs}}", "--phases", "--timeout", 60),
    )
    return folder, done


@pytest.mark.slow
def test_every_case_has_its_row_and_the_run_ends(hostile_run):
    folder, done = hostile_run
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(read_table(folder / "report")) == 9
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "bomb.nii.gz", "good.nii.gz", "phases.nii.gz", "talks.nii.gz"
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("link", "is a link, which is not followed"),
        ("pipe", "is not a regular file"),
        ("folder", "is not a regular file"),
        ("large", "more than it may"),
        ("bomb", "shape 6000×600×20, the input has 6×5×4"),
    ],
)
def test_what_is_not_a_label_map_of_its_own_is_not_taken(hostile_run, case, words):
    folder, _ = hostile_run
    result = read_case(folder / "report", case)
    assert words in result["reason"]
    assert result["penalty"]
    # A whole file of another shape is kept for whoever scores it; it was never unpacked here.
    assert (folder / "out" / f"{case}.nii.gz").exists() == (case == "bomb")


@pytest.mark.slow
def test_strange_phases_are_left_out(hostile_run):
    folder, _ = hostile_run
    assert read_case(folder / "report", "phases")["phases"] == []
    assert read_case(folder / "report", "pipe")["phases"] == []


@pytest.mark.slow
def test_what_is_printed_is_cut_and_cannot_drive_a_terminal(hostile_run):
    folder, done = hostile_run
    log = folder / "report/efficiency/talks.log"
    assert log.stat().st_size < 17 << 20
    assert b"[cut here" in log.read_bytes()[-100:]
    assert read_case(folder / "report", "escapes")["reason"] == (
        r"exit code 3: bad \x1b[2J\x07 end"
    )
    assert "\x1b" not in done.stderr + done.stdout


def test_a_link_in_the_place_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "a").write_text("secret")
    (tmp_path / "outputs").symlink_to(tmp_path / "host")
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        open_left_file(tmp_path / "outputs", "a", 100)


def test_no_more_is_copied_than_the_limit(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1000))
    collect(tmp_path, "a", tmp_path / "copy", 1000)
    assert (tmp_path / "copy").read_bytes() == bytes(1000)
    with pytest.raises(RefusedError, match="more than it may"):
        collect(tmp_path, "a", tmp_path / "other", 999)


@pytest.mark.parametrize(("length", "kept"), [(0, 0), (100, 100), (101, 100), (70_000, 100)])
def test_a_log_keeps_its_first_bytes(tmp_path, length, kept):
    read_end, write_end = os.pipe()
    writer = LogWriter(read_end, tmp_path / "log", most_bytes=100)
    writer.start()
    feeder = threading.Thread(
        target=lambda: (os.write(write_end, b"x" * length), os.close(write_end))
    )
    feeder.start()
    feeder.join()
    writer.join()
    content = (tmp_path / "log").read_bytes()
    assert content.count(b"x") == kept
    assert (b"[cut here" in content) == (length > kept)


@pytest.mark.slow
def test_a_container_that_speaks_like_the_engine_costs_its_own_row(tmp_path):
    engine = StandInEngine(tmp_path / "engine")
    engine.make_image("liar", "echo 'docker: Error response from daemon: no.'; exit 125\n")
    done = run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "a", "b"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "report", "--image", "liar:latest"),
        **engine.environment,
    )
    assert done.returncode == 1
    rows = [read_case(tmp_path / "report", name) for name in "ab"]
    assert [(row["status"], row["exit_code"]) for row in rows] == [("crashed", 125)] * 2


@pytest.mark.parametrize("answer", ["", "\n", "<no value>\n", "0\n"])
def test_an_engine_may_answer_with_no_process(monkeypatch, answer):
    monkeypatch.setattr(runner, "docker", lambda *_: CompletedProcess([], 0, answer, ""))
    container = Container("a:latest", "28g")
    assert container.find_meter("a") is None


def test_a_pipe_as_a_volume_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.nii.gz")
    with pytest.raises(VolumeError, match="not a regular file"):
        read_volume(tmp_path / "a.nii.gz")


def test_a_pipe_as_a_prediction_fails_its_case(tmp_path):
    from benchmark.scoring.scores import score_case

    reference = save(tmp_path / "a.nii.gz", np.ones((6, 5, 4), np.uint8))
    pipe = tmp_path / "b.nii.gz"
    os.mkfifo(pipe)
    scores = score_case(reference, Path(pipe))
    assert "not a regular file" in scores.failure
    assert nibabel.load(reference).shape == (6, 5, 4)


@pytest.mark.slow
def test_a_daemon_that_left_its_group_and_its_parent_is_ended(tmp_path):
    marker = f"97{os.getpid()}"
    # The daemon's parents are gone before anybody could have seen it below the command.
    forks = f"(setsid sh -c '(setsid sleep {marker} > /dev/null 2>&1 &) &')"
    done = run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "a"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "report"),
        *("--command", f"{forks}; cp {{inputs}}/a_0000.nii.gz {{outputs}}/a.nii.gz"),
    )
    assert done.returncode == 0, done.stderr
    assert running(marker) == []


def test_the_harness_own_children_are_no_orphans():
    with subprocess.Popen(["sleep", "1000"]) as own:
        with _orphans_ended():
            started = subprocess.Popen(["sleep", "1000"])
        assert own.poll() is None
        own.kill()
    assert not psutil.pid_exists(started.pid)


@pytest.mark.slow
def test_a_killed_harness_leaves_a_container_that_the_next_removes(tmp_path):
    engine = StandInEngine(tmp_path / "engine")
    engine.make_image("left", "touch outputs/started; sleep 1000\n")
    engine.make_image("next", "cp inputs/a_0000.nii.gz outputs/a.nii.gz\n")
    inputs = make_inputs(tmp_path / "in", "a")

    def places(name):
        folders = ("--outputs", tmp_path / f"out-{name}", "--report", tmp_path / f"run-{name}")
        return ("--inputs", inputs, *folders, "--image", name)

    harness = start_efficiency(*places("left"), **engine.environment)
    wait_for(lambda: engine.containers("left"))
    wait_for(lambda: list(engine.folder.glob("left-*.label")))
    (container,) = engine.containers("left")
    with mock.patch.dict(os.environ, engine.environment):
        remove_abandoned()
    assert engine.containers("left") == [container]  # its harness lives
    harness.kill()
    harness.wait()
    done = run_efficiency(*places("next"), **engine.environment)
    assert done.returncode == 0, done.stderr
    assert f"removing {container}" in done.stderr
    assert engine.containers("left") == []


@pytest.mark.parametrize(
    ("worst", "words"),
    [
        (lambda path, image: bytearray(40 << 30), "takes more than 1,024 MB"),
        (lambda path, image: os._exit(9), "ended the reader"),
        pytest.param(
            lambda path, image: time.sleep(1000), "took more than 1 s", marks=pytest.mark.slow
        ),
        (lambda path, image: {}["a"], "reading it failed: KeyError"),
    ],
)
def test_whatever_a_label_map_does_to_its_reader_costs_its_case(monkeypatch, worst, words):
    monkeypatch.setattr(outputs, "_START", "fork")  # so that the reader has the stand-in
    monkeypatch.setattr(outputs, "_BASE_SECONDS", 1.0)
    monkeypatch.setattr(outputs, "check_output", worst)
    check = outputs.check_output_apart(Path("a"), Path("b"), 8)
    assert words in check.problems[0]
    assert not check.scorable


def test_a_full_disk_does_not_make_a_container_wait():
    read_end, write_end = os.pipe()
    writer = LogWriter(read_end, Path("/dev/full"))
    writer.start()
    for _ in range(50):  # more than a pipe holds
        os.write(write_end, bytes(1 << 16))
    os.close(write_end)
    writer.join(10)
    assert not writer.is_alive()


@pytest.mark.slow
def test_an_engine_that_warns_before_it_refuses_stops_the_run(tmp_path):
    engine = StandInEngine(tmp_path / "engine")
    engine.make_image("team", "true\n")
    (engine.folder / "images/team/refused").write_text("WARNING: forwarding is disabled.\n")
    done = run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "a"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "report", "--image", "team"),
        **engine.environment,
    )
    assert done.returncode == 2
    assert "could not select device driver" in done.stderr

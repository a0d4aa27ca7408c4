"""Containers that cheat or break: their own row suffers, the host's files and the run do not."""

import os
import subprocess
import time
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import psutil
import pytest
from harness import AFFINE, COPY, measure, read_case, read_table, running, save

from benchmark.containers import outputs, runner
from benchmark.containers.outputs import (
    LogWriter,
    RefusedError,
    check_output,
    open_left_file,
    take_output,
)
from benchmark.scoring.scores import score_case

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


@pytest.mark.slow
def test_whatever_a_container_leaves_costs_its_own_row(tmp_path):
    secret = save(tmp_path / "reference.nii.gz", np.ones((6, 5, 4), np.uint8))
    bomb = save(tmp_path / "bomb.nii.gz", np.zeros((6000, 600, 20), np.uint8))
    script = tmp_path / "hostile.sh"
    script.write_text(HOSTILE.replace("SECRET", str(secret)).replace("BOMB", str(bomb)))
    names = "good link pipe folder large bomb phases talks escapes"
    done = measure(tmp_path, names, "--phases", command=f"bash {script} {{inputs}} {{outputs}}")
    assert done.code == 1
    assert "Traceback" not in done.err
    assert "\x1b" not in done.err + done.out
    assert len(read_table(tmp_path)) == 9
    # A whole file of another shape is there for whoever scores it; it was never unpacked here.
    whole = ["bomb.nii.gz", "good.nii.gz", "phases.nii.gz", "talks.nii.gz"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == whole
    assert read_case(tmp_path, "phases")["phases"] == read_case(tmp_path, "pipe")["phases"] == []
    assert (tmp_path / "run/efficiency/talks.log").stat().st_size < 17 << 20
    assert r"\x1b" in read_case(tmp_path, "escapes")["reason"]
    aspects = {"link": "file", "pipe": "file", "folder": "file", "large": "file", "bomb": "shape"}
    for name, aspect in aspects.items():
        result = read_case(tmp_path, name)
        assert (result["output"]["aspects"], bool(result["penalty"])) == ([aspect], True)


def test_only_a_file_of_the_folder_itself_is_opened_and_none_above_the_limit(tmp_path):
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "a").write_bytes(bytes(1000))
    with open_left_file(tmp_path / "host", "a", 1000) as file:
        assert file.read() == bytes(1000)
    with pytest.raises(RefusedError):
        open_left_file(tmp_path / "host", "a", 999)
    (tmp_path / "outputs").symlink_to(tmp_path / "host")
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        open_left_file(tmp_path / "outputs", "a", 1000)


@pytest.mark.parametrize(("length", "stored"), [(0, 0), (100, 100), (101, 100), (60_000, 100)])
def test_a_log_stores_its_first_bytes(tmp_path, length, stored):
    writer = LogWriter(tmp_path / "log", most_bytes=100)
    os.write(writer.sink, b"x" * length)
    writer.start()
    writer.join()
    content = (tmp_path / "log").read_bytes()
    assert content[:stored] == b"x" * stored
    assert bool(content[stored:]) == (length > stored)


def test_a_full_disk_does_not_make_a_container_wait():
    writer = LogWriter(Path("/dev/full"))
    sink = os.dup(writer.sink)
    writer.start()
    for _ in range(50):  # more than a pipe takes
        os.write(sink, bytes(1 << 16))
    os.close(sink)
    writer.join(10)
    assert not writer.is_alive()


@pytest.mark.parametrize("answer", ["", "\n", "<no value>\n", "0\n"])
def test_an_engine_may_answer_with_no_process(monkeypatch, answer):
    monkeypatch.setattr(runner, "docker", lambda *_: CompletedProcess([], 0, answer, ""))
    assert runner.Container("a:latest", "28g").find_meter("a") is None


def test_a_pipe_is_no_label_map_and_is_not_waited_for(tmp_path):
    reference = save(tmp_path / "a.nii.gz", np.ones((6, 5, 4), np.uint8))
    os.mkfifo(tmp_path / "b.nii.gz")
    assert score_case(reference, tmp_path / "b.nii.gz").failure


@pytest.mark.slow
def test_a_daemon_that_left_its_group_and_its_parent_is_ended(tmp_path):
    marker = f"97{os.getpid()}"
    # The daemon's parents are gone before anybody could have seen it below the command.
    forks = f"(setsid sh -c '(setsid sleep {marker} > /dev/null 2>&1 &) &')"
    done = measure(tmp_path, "a", command=f"{forks}; {COPY}")
    assert done.code == 0, done.err
    assert running(marker) == []


def test_the_harness_own_children_are_no_orphans():
    with subprocess.Popen(["sleep", "1000"]) as own:
        with runner._orphans_killed():
            started = subprocess.Popen(["sleep", "1000"])
        assert own.poll() is None
        own.kill()
    assert not psutil.pid_exists(started.pid)


@pytest.mark.parametrize(
    "worst",
    [
        lambda path, image: bytearray(40 << 30),
        lambda path, image: os._exit(9),
        pytest.param(lambda path, image: time.sleep(1000), marks=pytest.mark.slow),
        lambda path, image: {}["a"],
    ],
)
def test_whatever_a_label_map_does_to_its_reader_costs_its_case(tmp_path, monkeypatch, worst):
    monkeypatch.setattr(outputs, "_START", "fork")  # so that the reader has the stand-in
    monkeypatch.setattr(outputs, "_BASE_SECONDS", 1.0)
    monkeypatch.setattr(outputs, "check_output", worst)
    save(tmp_path / "outputs/a.nii.gz", np.zeros((2, 2, 2), np.uint8))
    places = (tmp_path / "outputs", tmp_path / "a.nii.gz")
    check = take_output(*places, tmp_path / "b", (2, 2, 2))
    assert (check.found, check.scorable, check.aspects) == (True, False, ["file"])


@pytest.mark.parametrize(
    ("array", "affine", "aspects"),
    [
        (np.zeros((6, 5, 4), np.uint8), AFFINE, []),
        (np.full((6, 5, 4), 14, np.int16), AFFINE + 1e-5, []),
        (np.zeros((5, 6, 4), np.uint8), AFFINE, ["shape"]),
        (np.zeros((6, 5, 4), np.uint8), np.diag([0.8, -1.1, 2.5, 1]), ["affine"]),
        (np.zeros((6, 5, 4), np.float32), AFFINE, ["type"]),
        (np.full((6, 5, 4), 0.5, np.float32), AFFINE, ["type", "labels"]),
        (np.full((6, 5, 4), 15, np.uint8), AFFINE, ["labels"]),
        (np.full((6, 5, 4), -1, np.int16), AFFINE, ["labels"]),
        (None, AFFINE, ["file"]),
    ],
)
def test_output_is_compared_with_its_input(tmp_path, array, affine, aspects):
    image = save(tmp_path / "in/x_0000.nii.gz", np.zeros((6, 5, 4), np.int16))
    made = np.random.default_rng(0).integers(0, 15, (6, 5, 4), np.uint8)
    output = save(tmp_path / "out/x.nii.gz", made if array is None else array, affine)
    if array is None:
        output.write_bytes(output.read_bytes()[:-20])
    check = check_output(output, image)
    assert check.found
    assert (check.valid, check.aspects) == (not aspects, aspects)
    assert check.scorable == (not {"shape", "file"} & set(aspects))

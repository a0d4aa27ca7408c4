"""Containers that cheat or break: their own row suffers, the host's files and the run do not."""

import os
import threading
from pathlib import Path
from subprocess import CompletedProcess

import nibabel
import numpy as np
import pytest
from test_efficiency import (
    StandInEngine,
    make_inputs,
    read_case,
    read_table,
    run_efficiency,
    save,
)

from benchmark.containers import targets
from benchmark.containers.collecting import LogWriter, RefusedError, collect, open_left_file
from benchmark.containers.targets import Container, MemoryLimit
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
    monkeypatch.setattr(targets, "docker", lambda *_: CompletedProcess([], 0, answer, ""))
    container = Container("a:latest", MemoryLimit.parse("28g"), None, phases=False)
    assert container.find_meter("a", None) is None


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

"""Streams that are lost, signals and kills: what is being written is whole."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import names_in, plain_service, save_nifti

from inference.service import Service
from inference.signals import signals_raise
from inference.sources import NiftiFile

ROOT = Path(__file__).parents[2]

SERVICE = """
import sys, time
from inference import command, files, outputs, service, signals
predict, write = service.Service._predict, outputs.write_label_map
def slowly(self, read, predictor):
    label_map = predict(self, read, predictor)
    if read.case.name == "b":
        print("predicting", flush=True)
        time.sleep({seconds})
    return label_map
service.Service._predict = slowly
signals.GRACE_SECONDS, signals.LAST_SECONDS = {grace}, {grace} + 0.3
def hanging(path, *arguments):
    if {hang} and path.name == "b.nii.gz":
        files.os.fsync = lambda descriptor: time.sleep(600)
    write(path, *arguments)
outputs.write_label_map = hanging
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.fixture
def start(folders, weights_file, cts):
    """Start the service on cases a to d; it has printed that b is being predicted."""

    def start(*more, seconds=0.0, grace=0.5, hang=False):
        cts(*"abcd")
        script = SERVICE.format(seconds=seconds, grace=grace, hang=hang)
        places = ("--input", folders[0], "--output", folders[1], "--weights", weights_file)
        command = [sys.executable, "-c", script, *places, "--device", "cpu", *more]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*map(str, command)], cwd=ROOT, **pipes)
        assert process.stdout.readline() == "predicting\n"
        return process

    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "seconds", "written"),
    [("SIGTERM", 600, "a"), ("SIGHUP", 600, "a"), ("SIGINT", 600, "a"), ("SIGTERM", 1, "ab")],
)
def test_a_signal_ends_it_after_what_is_being_written(
    folders, start, tmp_path, number, seconds, written
):
    log = tmp_path / "m.jsonl"
    process = start("--manifest", log, seconds=seconds, grace=0.5 if seconds > 1 else 8)
    process.send_signal(signal.Signals[number])
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.Signals[number], errors
    assert number in errors.splitlines()[-1]
    assert names_in(folders[1]) == [f"{name}.nii.gz" for name in written]
    assert [json.loads(line)["case"] for line in log.read_text().splitlines()] == [*written]


@pytest.mark.slow
def test_sigterm_does_not_wait_for_a_disk_that_hangs(folders, start):
    process = start(hang=True)
    while not list(folders[1].glob(".*.partial")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert names_in(folders[1]) == ["a.nii.gz"]  # and no temporary file


@pytest.mark.slow
def test_a_killed_run_is_continued(folders, run, start, tmp_path, predicted):
    log, table = tmp_path / "m.jsonl", tmp_path / "t.csv"
    records = ("--keep-existing", "--manifest", log, "--statistics", table)
    process = start(*records, seconds=600)
    while not log.exists() or not log.read_bytes().endswith(b"\n"):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert [path.name for path in folders[1].glob("*.nii.gz")] == ["a.nii.gz"]
    assert run("--quiet", *records) == 0
    assert predicted == ["b", "c", "d"]
    assert len(table.read_text().splitlines()) == 1 + 4 * 14
    resumed = {path.name: path.read_bytes() for path in folders[1].glob("*.nii.gz")}
    assert run("--quiet", "--output", tmp_path / "fresh") == 0
    assert resumed == {path.name: path.read_bytes() for path in (tmp_path / "fresh").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "redirections",
    ["2>&-", "2>&- >&-", "2>/dev/full >/dev/full", "2>&1 | true; exit ${PIPESTATUS[0]}"],
)
def test_lost_streams_cost_no_case(folders, weights_file, cts, redirections):
    cts(*"abc")
    places = f"--input {folders[0]} --output {folders[1]} --weights {weights_file}"
    command = f"{sys.executable} -m inference {places} --device cpu {redirections}"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT, check=False).returncode == 0
    assert names_in(folders[1]) == [f"{name}.nii.gz" for name in "abc"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_between_prediction_and_writing_loses_nothing(
    folders, run, cts, monkeypatch, number
):
    cts(*"ab")
    attempt = Service._attempt

    def attempt_and_signal(self, case, *step):
        result = attempt(self, case, *step)
        if threading.current_thread() is threading.main_thread():
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(Service, "_attempt", attempt_and_signal)
    assert run("--quiet") == 128 + number
    assert names_in(folders[1]) == ["a.nii.gz"]


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with signals_raise():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reader_that_waits_for_memory_ends_with_the_run(folders, ct):
    """Else a caller that was interrupted would wait for it for ever."""
    paths = [save_nifti(folders[0] / f"{name}_0000.nii", ct) for name in "ab"]

    def interrupt(voxels):
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    service = plain_service(folders, interrupt, 2 * ct.size + paths[0].stat().st_size)
    with pytest.raises(KeyboardInterrupt):
        service.run([NiftiFile(path) for path in paths])
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3])
def test_ctrl_c_while_importing_shows_no_traceback(folders, weights_file, cts, delay):
    cts("a")
    process = subprocess.Popen(
        ["sh", "predict.sh", "--input", folders[0], "--output", folders[1],
         "--weights", weights_file, "--device", "cpu"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    while not catches(process.pid, signal.SIGTERM):  # before that it is Python that starts
        assert process.poll() is None
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert process.returncode in (130, 0)


def catches(pid, number):
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return int(caught.split()[1], 16) >> (number - 1) & 1

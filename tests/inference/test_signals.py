"""Streams that are lost and signals that come: what is being written is whole, the rest is told."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import PlainLoader, save_nifti

from inference.memory import MemoryBudget
from inference.outputs import Outputs
from inference.service import Service
from inference.signals import signals_raise
from inference.sources import NiftiFile

ROOT = Path(__file__).parents[2]

SHELL_RUN = "{python} -m inference --input {inputs} --output {outputs} --weights {weights} \
--device cpu"


def shell(folders, weights_file, redirections, **more):
    command = SHELL_RUN.format(
        python=sys.executable, inputs=folders[0], outputs=folders[1], weights=weights_file
    )
    return subprocess.run(
        ["bash", "-c", f"{command} {redirections}"], cwd=ROOT, timeout=120, check=False, **more
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "redirections",
    ["2>&-", "2>&- >&-", "2>/dev/full >/dev/full", "2>&1 | true; exit ${PIPESTATUS[0]}"],
)
def test_lost_streams_cost_no_case(folders, weights_file, ct, redirections):
    for name in "abc":
        save_nifti(folders[0] / f"{name}_0000.nii.gz", ct)
    assert shell(folders, weights_file, redirections).returncode == 0
    assert sorted(path.name for path in folders[1].iterdir()) == [f"{n}.nii.gz" for n in "abc"]
    for path in folders[1].iterdir():
        assert nibabel.load(path).shape == ct.shape
        np.asanyarray(nibabel.load(path).dataobj)


SLOW_SERVICE = """
import sys, time
from inference import command
from inference import service
from inference import signals
predict = service.Service._predict
def slowly(self, read, predictor):
    if read.case.name == "b":
        print("waiting", flush=True)
        time.sleep(600)
    return predict(self, read, predictor)
service.Service._predict = slowly
signals.GRACE_SECONDS = 0.5
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_a_signal_ends_it_after_what_is_being_written(folders, weights_file, ct, number, code):
    for name in "abc":
        save_nifti(folders[0] / f"{name}_0000.nii.gz", ct)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_SERVICE, "--input", str(folders[0]), "--output",
         str(folders[1]), "--weights", str(weights_file), "--device", "cpu"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "are whole" in errors.splitlines()[-1]
    assert [path.name for path in folders[1].iterdir()] == ["a.nii.gz"]
    assert nibabel.load(folders[1] / "a.nii.gz").shape == ct.shape


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_between_prediction_and_writing_loses_nothing(
    folders, run, ct, monkeypatch, number
):
    for name in "ab":
        save_nifti(folders[0] / f"{name}_0000.nii.gz", ct)
    attempt = Service._attempt

    def attempt_and_signal(self, case, *step):
        result = attempt(self, case, *step)
        if threading.current_thread() is threading.main_thread():
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(Service, "_attempt", attempt_and_signal)
    assert run("--quiet") == 128 + number
    assert [path.name for path in folders[1].iterdir()] == ["a.nii.gz"]


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with signals_raise():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_memory_of_a_case_given_up_goes_to_the_reader(folders, ct):
    """Else a caller that was interrupted would wait for its reader for ever."""
    paths = [save_nifti(folders[0] / f"{name}_0000.nii", ct) for name in "ab"]
    folders[1].mkdir()
    budget = MemoryBudget(2 * ct.size + paths[0].stat().st_size)

    def interrupt(voxels):
        raise KeyboardInterrupt

    service = Service(Outputs(folders[1]), PlainLoader(interrupt), budget=budget)
    with pytest.raises(KeyboardInterrupt):
        service.run([NiftiFile(path) for path in paths])
    budget.take(budget.total)  # all of it is there again


@pytest.mark.slow
def test_ctrl_c_while_importing_shows_no_traceback(folders, weights_file, ct):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    for delay in (0.0, 0.1, 0.3):
        process = subprocess.Popen(
            ["sh", "predict.sh", "--input", str(folders[0]), "--output", str(folders[1]),
             "--weights", str(weights_file), "--device", "cpu"],
            cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHON": sys.executable},
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

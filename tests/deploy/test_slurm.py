"""deploy/slurm.sbatch on a Slurm of its own on this machine (Debian: slurm-wlm, munge; as root)."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from inference.network.weights import DEMONSTRATION_WEIGHTS
from synthetic.phantom import draw_phantom, write_nifti

ROOT = Path(__file__).parents[2]
CASES, SPACING = 12, (6.0, 1.6, 1.6)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))) or os.getuid() != 0,
        reason="needs Slurm and munge, and root for their daemons",
    ),
]

CONFIGURATION = """
ClusterName=try
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort=26817
SlurmdPort=26818
AuthType=auth/munge
AuthInfo=socket={work}/munge.socket
CredType=cred/munge
StateSaveLocation={work}/state
SlurmdSpoolDir={work}/spool
SlurmctldPidFile={work}/slurmctld.pid
SlurmdPidFile={work}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def wait_for(true, *, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, true
        time.sleep(0.1)


def slurm(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.fixture
def work(monkeypatch):
    """A folder that the cluster works in, as long as the test runs."""
    work = Path(subprocess.check_output(["mktemp", "-d", "/tmp/slurm-XXXX"], text=True).strip())
    work.chmod(0o755)  # the socket's folder; its path must be short
    for name, mode in (("state", 0o755), ("spool", 0o755), ("munge", 0o700)):
        (work / name).mkdir(mode)
    (work / "munge/key").write_bytes(os.urandom(1024))
    (work / "munge/key").chmod(0o600)
    host = socket.gethostname().split(".")[0]
    (work / "slurm.conf").write_text(
        CONFIGURATION.format(host=host, work=work, cpus=os.cpu_count())
    )
    monkeypatch.setenv("SLURM_CONF", str(work / "slurm.conf"))
    monkeypatch.setenv("PYTHON", sys.executable)
    munged = ["munged", "--foreground", "--force", f"--socket={work}/munge.socket"]
    munged += [f"--{name}-file={work}/munge/{name}" for name in ("key", "pid", "log", "seed")]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
            daemon = stack.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))
            stack.callback(daemon.terminate)
            wait_for((work / "munge.socket").exists)
        wait_for(lambda: slurm("sinfo", "-h", "-o", "%T") == "idle\n")
        # Slurm's step daemons outlive slurmd: what still runs is ended first.
        stack.callback(subprocess.run, ["scancel", "--full", "--signal=KILL", "--user=root"])
        yield work


def test_a_task_that_is_killed_and_queued_again_costs_nothing(work):
    inputs, alone, labels = (work / name for name in ("inputs", "alone", "labels"))
    inputs.mkdir()
    volume = draw_phantom((40, 256, 256), SPACING, 500).volume
    for index in range(CASES):
        write_nifti(inputs / f"c{index:02}_0000.nii.gz", volume[index:], SPACING)
    weights = ("--weights", str(DEMONSTRATION_WEIGHTS), "--device", "cpu")
    slurm("sh", "predict.sh", "--input", inputs, "--output", alone, "--quiet", *weights)

    batch = ["sbatch", "--parsable", "--array=0-3", "--cpus-per-task=1", "--mem=0"]
    batch += [f"--output={work}/task-%a.log", "deploy/slurm.sbatch", inputs, labels, *weights]
    job = slurm(*batch).strip()
    log, first = work / "labels.1-of-4.jsonl", f"{job}_1"
    wait_for(lambda: log.exists() and log.read_text().count("\n"))
    for process in psutil.process_iter(["name", "environ"]):
        variables = process.info["environ"] or {}
        task = [variables.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK")]
        if "python" in process.info["name"] and task == [job, "1"]:
            process.kill()
    states = ["squeue", "-h", "-t", "all", "-o", "%T", "-j"]
    wait_for(lambda: slurm(*states, first) == "FAILED\n")
    assert log.read_text().count("\n") < CASES // 4  # it was not done before it was killed
    slurm("scontrol", "requeue", first)
    wait_for(lambda: set(slurm(*states, job).split()) == {"COMPLETED"}, seconds=300)

    expected = {path.name: path.read_bytes() for path in alone.iterdir()}
    found = {path.name: path.read_bytes() for path in labels.iterdir() if path.name[0] != "."}
    assert len(expected) == CASES and found == expected
    lines = "".join(path.read_text() for path in work.glob("labels.*-of-4.jsonl"))
    assert all(f'{{"case": "c{index:02}"' in lines for index in range(CASES))

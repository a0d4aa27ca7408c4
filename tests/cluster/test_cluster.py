"""Cases over a real Ray cluster of several nodes, all on this machine's loopback address."""

import contextlib
import gzip
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import psutil
import pytest

# Before Ray is imported: no reports to its makers, nodes that only this machine can reach, and only
# with a token, whatever the home folder has.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

import ray
from ray._private.utils import get_ray_address_file
from ray.cluster_utils import Cluster

from cluster import command, runner
from cluster.worker import Worker
from inference.network.weights import DEMONSTRATION_WEIGHTS
from inference.startup import CANNOT_START
from synthetic.phantom import draw_phantom, write_nifti

ROOT = Path(__file__).parents[2]
CASES = 60
SPACING = (12.0, 4.0, 4.0)

NODE = {"node_ip_address": "127.0.0.1", "num_cpus": 1, "object_store_memory": 80 << 20}
QUICK_TO_NOTICE = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Sixty stacks of slices cut from three phantoms, no two alike, of different lengths."""
    folder = tmp_path_factory.mktemp("inputs")
    phantoms = [draw_phantom((36, 96, 96), SPACING, seed).volume for seed in range(3)]
    for index in range(CASES):
        volume = phantoms[index % 3]
        first, count = index // 3, 8 + index % 7
        write_nifti(folder / f"c{index:02}_0000.nii.gz", volume[first : first + count], SPACING)
    return folder


def call(program, inputs, outputs, *arguments):
    return [
        sys.executable, "-m", program, "--input", str(inputs), "--output", str(outputs),
        "--weights", str(DEMONSTRATION_WEIGHTS), *map(str, arguments),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def expected(inputs, tmp_path_factory):
    """What one machine writes, by file name; and its table of statistics."""
    outputs = tmp_path_factory.mktemp("single")
    table = outputs.with_name("single.csv")
    arguments = ("--device", "cpu", "--statistics", table)
    subprocess.run(call("inference", inputs, outputs, "--quiet", *arguments), cwd=ROOT, check=True)
    assert len(contents(outputs)) == CASES
    return contents(outputs), table.read_bytes()


@pytest.fixture(scope="module")
def nodes():
    """A cluster of three nodes with one core each."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets' paths must be short
    head = {"include_dashboard": False, "include_log_monitor": False}
    head |= {"temp_dir": folder, "_system_config": QUICK_TO_NOTICE}
    # Ray writes the head's address here, wherever `temp_dir` is, and does not make the folder.
    Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(initialize_head=True, head_node_args=NODE | head)
    for _ in range(2):
        cluster.add_node(wait=False, **NODE)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def contents(folder):
    """What lies there under a final name, unpacked: ISA-L may pack the same in two ways."""
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return {path.name: gzip.decompress(path.read_bytes()) for path in files}


@contextlib.contextmanager
def started(nodes, inputs, outputs, *arguments):
    """A run under way."""
    command = call("cluster", inputs, outputs, "--address", nodes.address, "--cpus", 1, *arguments)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(count, outputs, process):
    """Until so many label maps are there."""
    while not outputs.is_dir() or len(contents(outputs)) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def node_at_work(nodes, process):
    """A node, not the driver's, whose worker has cases; processes are named by what they run."""
    while True:
        for node in nodes.worker_nodes:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            with contextlib.suppress(psutil.Error):
                if any("Worker.segment" in "".join(p.cmdline()) for p in raylet.children()):
                    return node
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_a_node_killed_in_the_middle_costs_nothing(nodes, inputs, expected, tmp_path):
    outputs, table = tmp_path / "outputs", tmp_path / "table.csv"
    with started(nodes, inputs, outputs, "--statistics", table) as process:
        wait_for(CASES // 6, outputs, process)
        nodes.remove_node(node_at_work(nodes, process), allow_graceful=False)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    # Of the node and its processes Ray may first hear of either.
    assert re.search("warning: a worker was lost: its (node|process) died.*; it had c", err), err
    label_maps, statistics = expected
    assert contents(outputs) == label_maps
    assert table.read_bytes() == statistics
    lines = out.splitlines()
    assert [line.split()[-1] for line in lines[1 : CASES + 1]] == ["done"] * CASES
    assert lines[-1].startswith(f"{CASES} of {CASES} cases")
    # Each told once, and the longest begun first.
    told = re.findall(r"^\[\d+/60\] (c\d\d): done$", err, re.MULTILINE)
    assert sorted(told) == sorted(name[:3] for name in label_maps)
    slices = {c: nibabel.load(inputs / f"{c}_0000.nii.gz").shape[2] for c in told}
    early, late = told[: CASES // 3], told[-CASES // 3 :]
    assert sum(slices[c] for c in early) > sum(slices[c] for c in late)


def test_a_run_interrupted_twice_is_taken_up(nodes, inputs, expected, tmp_path):
    outputs, table, manifest = (tmp_path / name for name in ("outputs", "s.csv", "m.jsonl"))
    asked = ("--keep-existing", "--statistics", table, "--manifest", manifest)
    with started(nodes, inputs, outputs, *asked) as process:
        wait_for(5, outputs, process)
        process.kill()
    with started(nodes, inputs, outputs, *asked) as process:
        wait_for(25, outputs, process)
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "stopped by SIGTERM: the label maps written so far are whole" in err
    before = {path: path.stat().st_mtime_ns for path in outputs.glob("*.nii.gz")}
    label_maps, statistics = expected
    assert contents(outputs).items() <= label_maps.items()
    with started(nodes, inputs, outputs, *asked) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert contents(outputs) == label_maps
    assert {path: path.stat().st_mtime_ns for path in before} == before
    status = [line.split()[-1] for line in out.splitlines()[1 : CASES + 1]]
    assert status.count("kept") == len(before)
    assert status.count("done") == CASES - len(before)
    # What the killed run had written and not told is told as well.
    volumes = [line.split(",")[:4] for line in statistics.decode().splitlines()]
    assert [line.split(",")[:4] for line in table.read_text().splitlines()] == volumes
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert {line["case"] for line in lines} == {path.name[:3] for path in inputs.iterdir()}
    assert {line["device"] for line in lines if line["status"] == "done"} == {"cpu"}


def test_a_case_that_kills_its_worker_fails_alone(
    nodes, inputs, expected, tmp_path, monkeypatch, capsys
):
    few, outputs = tmp_path / "few", tmp_path / "outputs"
    few.mkdir()
    for path in sorted(inputs.iterdir())[:8]:
        shutil.copy(path, few)
    (few / "c08_0000.nii.gz").write_bytes(b"no volume")  # must end before the next is known
    deadly = "c03"

    class Mortal(Worker):
        def segment(self, source, record):
            if source.name.startswith(deadly):
                time.sleep(0.2)  # until it has company
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1)  # and the company is not done before
            return super().segment(source, record)

    monkeypatch.chdir(ROOT)  # where the workers find the packages
    monkeypatch.setattr(runner, "Worker", Mortal)
    arguments = ("--address", nodes.address, "--cpus", 1, "--workers", 1)
    arguments = call("cluster", few, outputs, *arguments)[3:]
    assert command.main(arguments) == 1
    label_maps, _ = expected
    names = [f"c{index:02}.nii.gz" for index in range(8) if index != 3]
    assert contents(outputs) == {name: label_maps[name] for name in names}
    captured = capsys.readouterr()
    lost = re.findall(r"^warning: a worker was lost: its process died.*; it had (.*)$",
                      captured.err, re.MULTILINE)  # fmt: skip
    assert len(lost) == runner.TRIES
    assert deadly in lost[0].split(", ")
    assert len(lost[0].split(", ")) > 1
    assert lost[1:] == [deadly] * (runner.TRIES - 1)
    assert re.search(rf"^error: .*{deadly}_0000.nii.gz: its worker was lost 3 times", captured.err,
                     re.MULTILINE)  # fmt: skip
    assert captured.out.splitlines()[-1].startswith("7 of 9 cases")


def test_what_the_cluster_lacks_is_said_in_one_line(nodes, inputs, tmp_path, capsys):
    arguments = call("cluster", inputs, tmp_path, "--address", nodes.address)[3:]
    for more, line in (
        (["--device", "cuda"], "error: no node of the cluster has a GPU"),
        (["--cpus", "2"], "error: no node of the cluster has 2 cores for a worker"),
    ):
        assert command.main([*arguments, *more]) == 2
        assert capsys.readouterr().err.splitlines() == [line]
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("deadly", "message"),
    [(False, "the weights do not fit"), (True, "it died 3 times before it was ready")],
)
def test_no_worker_that_can_begin(nodes, inputs, tmp_path, monkeypatch, capsys, deadly, message):
    class Unfit(Worker):
        def start(self):
            if deadly:
                os._exit(1)
            raise ValueError("the weights do not fit")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runner, "Worker", Unfit)
    more = ("--address", nodes.address, "--workers", 1)
    assert command.main(call("cluster", inputs, tmp_path, *more)[3:]) == CANNOT_START
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: it cannot start: no worker could start: {message}")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--device", "cuda:1"), ("--cpus", "0"), ("--workers", "-1"), ("--address", "somewhere")],
)
def test_wrong_usage(inputs, tmp_path, capsys, option, value):
    with pytest.raises(SystemExit) as ended:
        command.main(call("cluster", inputs, tmp_path, option, value)[3:])
    assert ended.value.code == 2
    assert option in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (PermissionError(13, "Permission denied", "/tmp/ray"), "/tmp/ray (RAY_TMPDIR"),
        (Exception("The current node timed out during startup."), "timed out during startup"),
        (ImportError("No module named ray"), "requirements-cluster.txt"),
    ],
)
def test_a_cluster_that_cannot_be_joined(inputs, tmp_path, monkeypatch, capsys, raised, message):
    def refuse(**_):
        raise raised

    monkeypatch.setattr(ray, "init", refuse)
    assert command.main(call("cluster", inputs, tmp_path)[3:]) == CANNOT_START
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    nobody = ("--address", "127.0.0.1:1")
    assert command.main(call("cluster", inputs, tmp_path, *nobody)[3:]) == CANNOT_START


@pytest.mark.parametrize("option", ["--statistics", "--manifest"])
def test_a_table_that_cannot_be_written_is_wrong_usage_before_ray_starts(
    inputs, tmp_path, monkeypatch, capsys, option
):
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    assert command.main(call("cluster", inputs, tmp_path, option, "/proc/none/t.json")[3:]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert option in line


def test_a_worker_refuses_to_begin_where_the_folders_are_others(inputs, tmp_path):
    """A node that lacks them would otherwise be the quickest of all, and fail every case."""
    options = command._parse(call("cluster", inputs, tmp_path)[3:])
    there, gone = next(inputs.iterdir()), tmp_path / "gone_0000.nii.gz"
    for sample, mark, message in ((gone, there, "is not there"), (there, gone, "another folder")):
        with pytest.raises(ValueError, match=message):
            Worker(options, sample, mark).start()


def test_help_does_not_wait_for_ray():
    shown = [sys.executable, "-X", "importtime", "-m", "cluster", "--help"]
    ended = subprocess.run(shown, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--address" in ended.stdout
    assert not re.search(r"\| +(ray|torch)$", ended.stderr, re.MULTILINE)

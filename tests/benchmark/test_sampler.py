"""The sampler and its meters by closed forms: areas, schedule, cgroups, process trees."""

import itertools
import math
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from benchmark.containers import meters
from benchmark.containers.meters import Cgroup, ProcessTree, find_cgroup
from benchmark.containers.results import PENALTY, flare_area, true_area
from benchmark.containers.sampler import Sampler


@pytest.fixture(scope="module")
def nvml_stub(tmp_path_factory) -> Path:
    """A folder with the stand-in for NVML's library."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "a C compiler is needed to build the NVML stand-in: apt-get install gcc"
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("nvml_stub.c")
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return folder


def test_flare_area_is_the_sum_of_the_samples_times_the_interval():
    samples = [1000.4, 2218.0, 2218.0, 310.3]
    assert flare_area(samples) == round((1000.4 + 2218 + 2218 + 310.3) * 0.1) == 575
    assert flare_area(samples, tolerance=2048) == round(2 * 170 * 0.1)
    assert flare_area(samples, tolerance=4096) == 0
    assert flare_area([8192.0] * 36000) == PENALTY["auc_gpu_mb_s"]  # an hour of 8192 MB


def test_true_area_is_exact_for_lines_however_the_times_lie():
    times = np.array([0.0, 0.1, 0.23, 0.9, 1.0, 2.5])
    assert true_area(times, 40 + 300 * times) == pytest.approx(40 * 2.5 + 300 * 2.5**2 / 2)
    assert true_area(times, np.full(6, 5000.0), tolerance=4096) == pytest.approx(904 * 2.5)


class Meter:
    """Takes a while to read, or fails."""

    source = "made up"

    def __init__(self, seconds=0.0, error=None):
        self.seconds, self.error = seconds, error

    def read(self):
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        return 0.0, 1.0


@pytest.mark.slow
def test_a_slow_reading_costs_ticks_but_no_drift():
    interval = 0.01
    sampler = Sampler(interval=interval)
    sampler.meter = Meter(0.025)
    sampler.start()
    time.sleep(0.3)
    samples, cost = sampler.stop()
    ticks = [math.floor(moment / interval + 1e-3) for moment in samples.time_s]
    assert all(earlier < later for earlier, later in itertools.pairwise(ticks))
    # A sampler that sleeps between readings loses no tick: it moves them all.
    assert cost.missed_ticks >= 2 * len(ticks)
    end = samples.time_s[-1] + cost.max_reading_ms / 1000
    assert len(ticks) + cost.missed_ticks <= math.ceil(end / interval) + 1
    assert cost.samples == len(ticks) == len(samples.ram_mb) == len(samples.cpu_percent)
    assert cost.mean_reading_ms >= 25
    assert samples.gpu_used_mb is None


def test_a_meter_that_fails_is_not_swallowed_and_an_ended_container_reads_0(tmp_path):
    sampler = Sampler(interval=0.01)
    sampler.meter = Meter(error=ZeroDivisionError())
    sampler.start()
    with pytest.raises(ZeroDivisionError):
        sampler.stop()
    sampler = Sampler(interval=0.01)
    sampler.meter = Cgroup(2, tmp_path, tmp_path)
    sampler.start()
    samples, _ = sampler.stop()
    assert set(samples.ram_mb) == set(samples.cpu_percent) == {0.0}


def fake_proc(folder: Path, membership: str, mounts: str) -> Path:
    (folder / "proc/12").mkdir(parents=True)
    (folder / "proc/12/cgroup").write_text(membership)
    (folder / "proc/mounts").write_text(mounts)
    return folder / "proc"


def write_memory(folder: Path, own: str, mapped: str, shared: str) -> None:
    """300 MB of its own, 1 MB of mapped files, 200 MB of shared memory; no process."""
    mb = 2**20
    lines = [f"{own} {300 * mb}", f"{mapped} {mb}", f"{shared} {200 * mb}", "file 1"]
    (folder / "memory.stat").write_text("\n".join(lines))
    (folder / "cgroup.procs").write_text("")


def test_cgroup_v1_is_found_and_read(tmp_path):
    cpu, memory = tmp_path / "cpu,cpuacct/docker/ab", tmp_path / "memory/docker/ab"
    for folder in (cpu, memory):
        folder.mkdir(parents=True)
    (cpu / "cpuacct.usage").write_text("2500000000\n")
    write_memory(memory, "total_rss", "total_mapped_file", "total_shmem")
    proc = fake_proc(
        tmp_path,
        "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n0::/docker/ab\n",
        f"cgroup {cpu.parents[1]} cgroup rw,cpu,cpuacct 0 0\n"
        f"cgroup {memory.parents[1]} cgroup rw,memory 0 0\n"
        f"cgroup2 {tmp_path}/unified cgroup2 rw 0 0\n",
    )
    cgroup = find_cgroup(12, proc)
    assert (cgroup.source, cgroup.read()) == ("cgroup v1", (2.5, 501.0))


def test_cgroup_v2_is_found_and_read(tmp_path):
    folder = tmp_path / "cgroup/system.slice/docker-ab.scope"
    folder.mkdir(parents=True)
    (folder / "cpu.stat").write_text("usage_usec 1250000\nuser_usec 1000000\n")
    write_memory(folder, "anon", "file_mapped", "shmem")
    mounts = f"cgroup2 {tmp_path / 'cgroup'} cgroup2 rw 0 0\n"
    cgroup = find_cgroup(12, fake_proc(tmp_path, "0::/system.slice/docker-ab.scope\n", mounts))
    assert (cgroup.source, cgroup.read()) == ("cgroup v2", (1.25, 501.0))


def test_a_cgroup_out_of_sight_is_none(tmp_path):
    proc = fake_proc(tmp_path, "0::/../other\n", f"cgroup2 {tmp_path}/gone cgroup2 rw 0 0\n")
    assert find_cgroup(12, proc) is find_cgroup(13, proc) is None


def test_shared_memory_that_is_mapped_counts_once(tmp_path):
    status = "Name:\tx\nRssAnon:\t9 kB\nRssShmem:\t  {} kB\n"
    for pid, mb in ((1, 150), (2, 80)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "status").write_text(status.format(1024 * mb))
    assert meters._mapped_shared_bytes([1, 2, 3], tmp_path) == 230 << 20


def test_a_process_tree_counts_children_orphans_and_files_in_shared_memory(monkeypatch):
    used = namedtuple("Usage", "used")
    before, after = used(10 << 20), used(310 << 20)
    usage = iter([before, before, after])
    monkeypatch.setattr(meters.shutil, "disk_usage", lambda _: next(usage))
    child = "import time\nb = bytearray(50 << 20); b[::4096] = bytes(len(b[::4096]))\n"
    child += "while time.process_time() < 0.3: pass\nprint(flush=True); input()"
    middle = f"import subprocess as s; s.Popen([{sys.executable!r}, '-c', {child!r}]); input()"
    with subprocess.Popen(
        [sys.executable, "-c", middle], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        tree = ProcessTree(process.pid)
        process.stdout.readline()
        cpu_seconds, ram_mb = tree.read()
        assert 0.25 < cpu_seconds < 3
        assert 50 < ram_mb < 150
        assert tree.read()[1] == pytest.approx(ram_mb + 300, abs=1)
        process.kill()
        process.wait()
        (orphan,) = tree.refresh()  # the child, whose parent is gone
        orphan.kill()

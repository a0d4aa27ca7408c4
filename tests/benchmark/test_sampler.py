"""The sampler against closed forms: areas, schedule, cgroups, process trees and NVML itself."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

from benchmark.containers.meters import Cgroup, ProcessTree, find_cgroup
from benchmark.containers.results import flare_area, true_area
from benchmark.containers.sampler import Sampler, next_tick

ROOT = Path(__file__).parents[2]


def test_flare_area_is_the_sum_of_the_samples_times_the_interval():
    samples = [1000.4, 2218.0, 2218.0, 310.3]
    assert flare_area(samples, 0.1) == round((1000.4 + 2218 + 2218 + 310.3) * 0.1) == 575
    assert flare_area(samples, 0.1, tolerance=2048) == round(2 * 170 * 0.1)
    assert flare_area(samples, 0.1, tolerance=4096) == 0


def test_an_hour_of_8192_mb_is_the_challenge_penalty():
    assert flare_area([8192.0] * 36000, 0.1) == 29491200


def test_true_area_is_exact_for_lines_however_the_times_lie():
    times = np.array([0.0, 0.1, 0.23, 0.9, 1.0, 2.5])
    assert true_area(times, 40 + 300 * times) == pytest.approx(40 * 2.5 + 300 * 2.5**2 / 2)
    assert true_area(times, np.full(6, 5000.0), tolerance=4096) == pytest.approx(904 * 2.5)


@pytest.mark.parametrize(
    ("tick", "elapsed", "expected"),
    [
        (0, 0.001, 1),  # the reading was quick: the next tick
        (4, 0.499, 5),
        (4, 0.55, 6),  # tick 5 passed meanwhile and is missed, not caught up with
        (4, 1.01, 11),
    ],
)
def test_ticks_stay_on_the_grid(tick, elapsed, expected):
    assert next_tick(tick, elapsed, 0.1) == expected


class SlowMeter:
    source = "slow"

    def read(self):
        time.sleep(0.025)
        return 0.0, 1.0


@pytest.mark.slow
def test_a_slow_reading_costs_ticks_but_no_drift():
    interval = 0.01
    sampler = Sampler(None, interval)
    sampler.meter = SlowMeter()
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


def test_a_meter_that_fails_is_not_swallowed():
    class Broken:
        source = "broken"

        def read(self):
            raise ZeroDivisionError

    sampler = Sampler(None, 0.01)
    sampler.meter = Broken()
    sampler.start()
    with pytest.raises(ZeroDivisionError):
        sampler.stop()


def fake_proc(tmp_path: Path, membership: str, mounts: str) -> Path:
    proc = tmp_path / "proc"
    (proc / "12").mkdir(parents=True)
    (proc / "12" / "cgroup").write_text(membership)
    (proc / "mounts").write_text(mounts)
    return proc


def test_cgroup_v1_is_found_and_read(tmp_path):
    cpu, memory = tmp_path / "cpu,cpuacct", tmp_path / "memory"
    for folder in (cpu / "docker/ab", memory / "docker/ab"):
        folder.mkdir(parents=True)
    (cpu / "docker/ab/cpuacct.usage").write_text("2500000000\n")
    (memory / "docker/ab/memory.stat").write_text(
        f"rss 1\ntotal_rss {300 * 2**20}\ntotal_mapped_file {2**20}\n"
    )
    proc = fake_proc(
        tmp_path,
        "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n0::/docker/ab\n",
        f"cgroup {cpu} cgroup rw,cpu,cpuacct 0 0\ncgroup {memory} cgroup rw,memory 0 0\n"
        f"cgroup2 {tmp_path}/unified cgroup2 rw 0 0\n",
    )
    cgroup = find_cgroup(12, proc)
    assert cgroup.source == "cgroup v1"
    assert cgroup.read() == (2.5, 301.0)


def test_cgroup_v2_is_found_and_read(tmp_path):
    folder = tmp_path / "cgroup/system.slice/docker-ab.scope"
    folder.mkdir(parents=True)
    (folder / "cpu.stat").write_text("usage_usec 1250000\nuser_usec 1000000\n")
    (folder / "memory.stat").write_text(f"anon {64 * 2**20}\nfile {2**30}\nfile_mapped {2**20}\n")
    proc = fake_proc(
        tmp_path,
        "0::/system.slice/docker-ab.scope\n",
        f"cgroup2 {tmp_path / 'cgroup'} cgroup2 rw 0 0\n",
    )
    cgroup = find_cgroup(12, proc)
    assert cgroup.source == "cgroup v2"
    assert cgroup.read() == (1.25, 65.0)


def test_a_cgroup_out_of_sight_is_none(tmp_path):
    proc = fake_proc(tmp_path, "0::/../other\n", f"cgroup2 {tmp_path}/gone cgroup2 rw 0 0\n")
    assert find_cgroup(12, proc) is None
    assert find_cgroup(13, proc) is None


def test_a_container_that_has_ended_reads_as_nothing(tmp_path):
    sampler = Sampler(None, 0.01)
    sampler.meter = Cgroup(2, tmp_path, tmp_path)
    sampler.start()
    samples, _ = sampler.stop()
    assert set(samples.ram_mb) == set(samples.cpu_percent) == {0.0}


def test_process_tree_counts_children_and_orphans():
    child = "b = bytearray(50 << 20); b[::4096] = bytes(len(b[::4096])); print(flush=True); input()"
    middle = f"import subprocess as s; s.Popen([{sys.executable!r}, '-c', {child!r}]); input()"
    with subprocess.Popen(
        [sys.executable, "-c", middle], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        tree = ProcessTree(process.pid)
        process.stdout.readline()
        _, ram_mb = tree.read()
        assert 50 < ram_mb < 150
        process.kill()
        process.wait()
        orphans = tree.refresh()  # the child, whose parent is gone
        assert len(orphans) == 1
        orphans[0].kill()


@pytest.fixture(scope="module")
def nvml_stub(tmp_path_factory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "a C compiler is needed to build the NVML stand-in: apt-get install gcc"
    folder = tmp_path_factory.mktemp("nvml")
    library = folder / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("nvml_stub.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return folder


def measure_with_stub(
    stub: Path, folder: Path, *options: str, seconds: float = 0.6, **environment: str
) -> tuple[int, dict, Path]:
    """`benchmark efficiency` over one case with the stand-in for NVML: code, JSON, report."""
    (folder / "in").mkdir()
    labels = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.uint8), np.eye(4))
    nibabel.save(labels, folder / "in/x_0000.nii.gz")
    command = f"sleep {seconds}; cp {{inputs}}/x_0000.nii.gz {{outputs}}/x.nii.gz"
    code = subprocess.run(
        [
            *(sys.executable, "-m", "benchmark", "efficiency", "--command", command),
            *("--inputs", folder / "in", "--outputs", folder / "out", "--report", folder / "run"),
            *options,
        ],
        cwd=ROOT,
        env=os.environ
        | {"LD_LIBRARY_PATH": str(stub), "NVML_STUB_LOG": str(folder / "readings")}
        | environment,
    ).returncode
    result = folder / "run/efficiency/x.json"
    return code, json.loads(result.read_text()) if result.exists() else {}, folder / "run"


def arithmetic_sum(first: float, last: float, step: float) -> float:
    return 0.0 if last < first else (first + last) / 2 * (round((last - first) / step) + 1)


@pytest.fixture(scope="module")
def steps_run(nvml_stub, tmp_path_factory) -> tuple[dict, list[float], Path]:
    """A run over the steps curve: its JSON, every reading the library gave, its folder."""
    folder = tmp_path_factory.mktemp("steps")
    options = ("--memory-tolerance", "241", "--time-tolerance", "0.5")
    code, result, run = measure_with_stub(nvml_stub, folder, *options, NVML_STUB_CURVE="steps")
    assert code == 0
    return result, [float(line) for line in (folder / "readings").read_text().splitlines()], run


@pytest.mark.slow
def test_samples_lie_on_the_tenths_of_a_second(steps_run):
    result, _, _ = steps_run
    times, late = result["samples"]["time_s"], result["sampler"]["max_late_ms"] / 1000
    ticks = [math.floor(moment / 0.1 + 1e-4) for moment in times]
    assert all(earlier < later for earlier, later in itertools.pairwise(ticks))
    assert ticks[-1] - math.ceil(late / 0.1) <= len(ticks) - 1 + result["sampler"]["missed_ticks"]


@pytest.mark.slow
def test_nvml_readings_peak_and_area_have_closed_forms(steps_run):
    result, readings, run = steps_run
    samples = result["samples"]["gpu_used_mb"]
    count = len(samples)
    first, last = readings[-count], 200 + 3 * (len(readings) - 1)
    assert samples == readings[-count:] == [first + 3 * n for n in range(count)]
    assert count == result["sampler"]["samples"] >= 2
    assert result["peak_gpu_mb"] == last
    assert result["auc_flare_mb_s"] == round(0.1 * arithmetic_sum(first, last, 3))
    above = first + 3 * max(0, math.ceil((241 - first) / 3))
    over = arithmetic_sum(above - 241, last - 241, 3)
    assert result["auc_flare_tolerated_mb_s"] == round(0.1 * over)
    assert result["seconds_tolerated"] == pytest.approx(result["seconds"] - 0.5)
    # The ten readings just before the case are the idle device.
    assert result["idle_gpu_mb"] == pytest.approx(first - 3 * 5.5)
    assert set(result["samples"]["gpu_reserved_mb"]) == {150.0}
    assert set(result["samples"]["gpu_process_mb"]) == {300.0}  # process 4242 was there before

    environment = json.loads((run / "environment.json").read_text())
    assert (environment["gpu"], environment["driver"]) == ("Stub GPU", "1.2.3")
    assert environment["idle_gpu_processes"] == [4242]
    header, row = (run / "command_Efficiency.csv").read_text().splitlines()
    cells = dict(zip(header.split(","), row.split(","), strict=True))
    assert float(cells["MaxGPU_Mem"]) == last
    assert float(cells["AUC_GPU_Time"]) == result["auc_flare_mb_s"]


@pytest.mark.slow
def test_true_area_of_a_ramp_is_within_the_sampling_error(nvml_stub, tmp_path):
    _, result, _ = measure_with_stub(nvml_stub, tmp_path, NVML_STUB_CURVE="ramp")
    times, samples = result["samples"]["time_s"], result["samples"]["gpu_used_mb"]
    slope, duration = 500, times[-1] - times[0]
    # Each value was read within its reading's duration after its time stamp.
    stamp_error = result["sampler"]["max_reading_ms"] / 1000 + 1e-5
    assert samples[-1] - samples[0] == pytest.approx(slope * duration, abs=slope * stamp_error)
    closed_form = (samples[0] + slope * duration / 2) * duration
    assert result["auc_true_mb_s"] == pytest.approx(closed_form, abs=slope * stamp_error * duration)


@pytest.mark.slow
def test_an_old_driver_that_tells_no_reserved_memory(nvml_stub, tmp_path):
    code, result, _ = measure_with_stub(
        nvml_stub, tmp_path, seconds=0.1, NVML_STUB_CURVE="steps", NVML_STUB_OLD="1"
    )
    assert code == 0
    assert result["samples"]["gpu_reserved_mb"] is None
    assert result["peak_gpu_mb"] == result["samples"]["gpu_used_mb"][-1] > 200


@pytest.mark.slow
def test_without_a_device_the_gpu_cells_are_empty(nvml_stub, tmp_path):
    code, result, run = measure_with_stub(
        nvml_stub, tmp_path, seconds=0.1, NVML_STUB_DEVICES="0", NVML_STUB_CURVE="steps"
    )
    assert code == 0
    assert result["samples"]["gpu_used_mb"] is None
    assert result["peak_gpu_mb"] is result["auc_flare_mb_s"] is result["auc_true_mb_s"] is None
    row = (run / "command_Efficiency.csv").read_text().splitlines()[1].split(",")
    assert row[2:4] == ["", ""]
    note = json.loads((run / "environment.json").read_text())["gpu_note"]
    assert "no device" in note
    assert note in (run / "efficiency.md").read_text()


@pytest.mark.slow
def test_a_device_that_is_not_there_is_wrong_usage(nvml_stub, tmp_path):
    code, _, run = measure_with_stub(nvml_stub, tmp_path, "--gpu", "3", NVML_STUB_CURVE="steps")
    assert code == 2
    assert not run.exists()

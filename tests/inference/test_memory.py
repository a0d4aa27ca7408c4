"""Volumes that do not fit, and files that unpack to more than they say."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import RAS_AFFINE, errors_of, plain_service, save_nifti

from inference.memory import cpu_limit, memory_limit
from inference.network.weights import load_weights
from inference.prediction import Predictor
from inference.sources import NiftiFile

ROOT = Path(__file__).parents[2]


def with_groups(root, membership, files):
    """A file system in which a process is a member of control groups with such files."""
    for name, text in {"proc/self/cgroup": membership, **files}.items():
        path = root / name if name.startswith("proc") else root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        ("", {}, MACHINE),
        ("0::/a/b", {"a/b/memory.max": "max"}, MACHINE),
        ("0::/a/b", {"a/memory.max": "3000000000", "a/b/memory.max": "max"}, 3_000_000_000),
        ("0::/a/b", {"a/memory.max": "3000000000", "a/b/memory.max": "2000000000"}, 2_000_000_000),
        ("5:cpu:/x\n4:memory:/docker/1", {"memory/memory.limit_in_bytes": "1000000000"}, 10**9),
    ],
)
def test_the_memory_limit_is_that_of_the_group(tmp_path, membership, files, limit):
    assert memory_limit(with_groups(tmp_path, membership, files)) == limit


@pytest.mark.parametrize("kind", ["AS", "DATA"])
def test_ulimits_are_limits_of_memory(kind):
    script = (
        "import resource; from inference.memory import memory_limit\n"
        f"resource.setrlimit(resource.RLIMIT_{kind}, (1234567890, -1)); print(memory_limit())"
    )
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(ended.stdout) == 1234567890


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        ("", {}, 64),
        ("0::/", {"cpu.max": "max 100000"}, 64),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "399999 100000"}, 3),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("3:cpu,cpuacct:/docker/1", {"cpu/cpu.cfs_quota_us": "-1"}, 64),
        ("3:cpu,cpuacct:/x", {"cpu,cpuacct/x/cpu.cfs_quota_us": "500000"}, 5),
        ("3:cpu:/docker/1\n0::/", {"cpu/cpu.cfs_quota_us": "25000"}, 1),
    ],
)
def test_the_cpu_limit_is_that_of_affinity_and_quota(
    tmp_path, monkeypatch, membership, files, cpus
):
    monkeypatch.setattr("inference.memory.os.sched_getaffinity", lambda _: set(range(64)))
    periods = {f"{name.rpartition('/')[0]}/cpu.cfs_period_us": "100000" for name in files}
    assert cpu_limit(with_groups(tmp_path, membership, files | periods)) == cpus


@pytest.mark.parametrize(("asked", "threads"), [("", 2), ("3", 4)])
def test_lanes_follow_the_quota_unless_openmp_is_told(weights_file, monkeypatch, asked, threads):
    monkeypatch.setattr("inference.device.cpu_limit", lambda: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)  # as OMP_NUM_THREADS or cores make it
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert Predictor([load_weights(weights_file)], torch.device("cpu")).lanes == threads


def bomb(path, claimed, unpacked):
    """A file whose header claims a shape, and which unpacks to so many bytes of zeros."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header["dim"][:4] = [3, *claimed]
    header["magic"], header["vox_offset"] = header.single_magic, 352
    header.set_sform(RAS_AFFINE, 1)
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(header.binaryblock + bytes(4))
        for _ in range(unpacked // (1 << 20)):
            file.write(bytes(1 << 20))
    return path


def test_a_case_that_cannot_fit_is_refused_before_it_is_unpacked(
    folders, run, ct, monkeypatch, capsys
):
    bomb(folders[0] / "a_0000.nii.gz", (12000, 12000, 900), 1 << 20)
    save_nifti(folders[0] / "b_0000.nii.gz", ct)
    monkeypatch.setattr("inference.service.memory_limit", lambda: 3_000_000_000)
    assert run("--quiet") == 1
    (line,) = errors_of(capsys)
    assert "a_0000.nii.gz" in line and "GB of memory" in line
    assert [path.name for path in folders[1].iterdir()] == ["b.nii.gz"]


@pytest.mark.slow
def test_a_slice_that_the_network_cannot_hold_is_refused(folders, run, monkeypatch, capsys):
    bomb(folders[0] / "a_0000.nii.gz", (12000, 12000, 1), 275 << 20)
    monkeypatch.setattr("inference.service.memory_limit", lambda: 3_000_000_000)
    assert run("--quiet") == 1
    assert "GB of memory" in errors_of(capsys)[0]


@pytest.mark.slow
def test_no_more_is_unpacked_than_the_header_says(tmp_path):
    path = bomb(tmp_path / "a.nii.gz", (20, 20, 5), 64 << 20)
    script = (
        "import resource, sys; from pathlib import Path; from inference.volume import read_volume\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert read_volume(Path(sys.argv[1])).voxels.shape == (5, 20, 20)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20 << 10  # kB; what the file unpacks to is 64 MB


def test_cases_wait_for_memory_one_after_another(folders, ct, tmp_path):
    paths = [save_nifti(folders[0] / f"{name}_0000.nii", ct) for name in "abc"]
    need = 2 * ct.size + paths[0].stat().st_size  # the voxels and the file they come from
    most = []

    def predict(voxels):
        most.append(service.budget._taken)
        return np.zeros(voxels.shape, np.uint8)

    service = plain_service(folders, predict, need + 10)
    sources = [NiftiFile(path) for path in paths]
    assert [case.status for case in service.run(sources)] == ["done"] * 3
    assert most == [need] * 3
    assert service.budget._taken == 0

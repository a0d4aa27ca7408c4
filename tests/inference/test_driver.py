"""The calls of the NVIDIA driver, against a stand-in for it."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from inference.cuda import driver


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "a C compiler is needed to build the stand-in: apt-get install gcc"
    path = tmp_path_factory.mktemp("cuda") / "libcuda.so.1"
    source = Path(__file__).with_name("cuda_stub.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, source], check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture
def calls(library, tmp_path, monkeypatch):
    """What was called, and with what."""
    monkeypatch.setattr(driver, "_library", lambda: library)
    monkeypatch.setenv("CUDA_STUB_LOG", str(tmp_path / "log"))
    (tmp_path / "log").touch()
    return lambda: (tmp_path / "log").read_text().splitlines()


@pytest.mark.parametrize("fails", ["", "I"])  # torch gets the same error
def test_no_memory_is_taken_before_it_is_needed(calls, monkeypatch, fails):
    monkeypatch.setenv("CUDA_STUB_FAILS", fails)
    driver.initialise().join()
    assert calls() == ["cuInit 0"]


def test_version(calls):
    assert driver.cuda_version() == (12, 4)


def test_without_a_driver(monkeypatch):
    monkeypatch.setattr(driver, "_library", lambda: None)
    assert driver.initialise() is None
    assert driver.cuda_version() is None

"""The calls of the NVIDIA driver, against a stand-in for it."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from inference import driver


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


def test_no_memory_is_taken_before_it_is_needed(calls):
    driver.begin(1, with_context=False).join()
    assert calls() == ["cuInit 0"]


def test_the_context_of_the_device_asked_for(calls):
    driver.begin(2, with_context=True).join()
    assert calls() == ["cuInit 0", "cuDeviceGet 2", "cuDevicePrimaryCtxRetain 42"]


def test_the_context_is_destroyed(calls):
    driver.end_context(1)
    assert calls() == ["cuDeviceGet 1", "cuDevicePrimaryCtxReset 41"]


@pytest.mark.parametrize(
    ("fails", "expected"), [("I", ["cuInit 0"]), ("D", ["cuInit 0", "cuDeviceGet 0"])]
)
def test_what_fails_is_left_to_torch(calls, monkeypatch, fails, expected):
    monkeypatch.setenv("CUDA_STUB_FAILS", fails)
    driver.begin(0, with_context=True).join()
    assert calls() == expected
    driver.end_context(0)


def test_version(calls):
    assert driver.cuda_version() == (12, 4)


def test_without_a_driver(monkeypatch):
    monkeypatch.setattr(driver, "_library", lambda: None)
    assert driver.begin(0, with_context=True) is None
    assert driver.cuda_version() is None
    driver.end_context(0)

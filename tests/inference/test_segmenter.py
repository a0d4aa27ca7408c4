"""The Python interface against the command line, on paths and images, twice and from threads."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import save_nifti

from inference.command import main
from inference.network.weights import DEMONSTRATION_WEIGHTS
from inference.segmenter import Segmenter

ROOT = Path(__file__).parents[2]


@pytest.fixture
def case(tmp_path, ct):
    (tmp_path / "in").mkdir()
    path = save_nifti(tmp_path / "in" / "a_0000.nii.gz", ct)
    options = ["--input", str(path.parent), "--output", str(tmp_path / "out"), "--quiet"]
    options += ["--weights", str(DEMONSTRATION_WEIGHTS), "--device", "cpu"]
    assert main(options) == 0
    return path, nibabel.load(tmp_path / "out" / "a.nii.gz")


@pytest.mark.slow
def test_it_gives_what_the_command_line_writes(case):
    path, written = case
    segmenter = Segmenter(DEMONSTRATION_WEIGHTS, device="cpu")
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(segmenter, [path, str(path), nibabel.load(path)]))
    for labels in results:
        assert np.array_equal(labels.dataobj, written.dataobj)
        assert labels.get_data_dtype() == np.uint8
        assert np.array_equal(labels.affine, nibabel.load(path).affine)
    found = segmenter.segment(path)
    counts = np.bincount(np.asarray(written.dataobj).ravel(), minlength=15)[1:]
    assert list(found.statistics["voxels"].values()) == counts.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "ct", [np.zeros((4, 4, 4, 2)), np.zeros((4, 4, 4), np.complex64), np.zeros((0, 4, 4))]
)
def test_an_image_that_is_no_volume_is_a_value_error(ct):
    with pytest.raises(ValueError):
        Segmenter(DEMONSTRATION_WEIGHTS, device="cpu")(nibabel.Nifti1Image(ct, np.eye(4)))


@pytest.mark.slow
def test_it_changes_nothing_of_its_process(case):
    code = """
import os, signal, sys, threading, warnings
import torch, nibabel
def state():
    handlers = [signal.getsignal(number) for number in (1, 2, 15)]
    return (handlers, list(warnings.filters), dict(os.environ), sys.getswitchinterval(),
            torch.get_num_threads(), "pydicom" in sys.modules and sys.modules["pydicom"] is None)
threads = []
before = state()
from inference import Segmenter
Segmenter(sys.argv[2], device="cpu")(sys.argv[1])
assert state() == before
thread = threading.Thread(target=lambda: threads.append(torch.get_num_threads()))
thread.start(), thread.join()
assert threads == [torch.get_num_threads()], threads
"""
    command = [sys.executable, "-c", code, str(case[0]), str(DEMONSTRATION_WEIGHTS)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

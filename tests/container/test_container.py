"""The image in a real Docker engine, run as the organisers run it, and hardened.

`make test-docker` runs these: they need an engine and the image that `make docker` builds.
"""

import os
import shutil
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from conftest import assert_same_grid
from pydicom.uid import JPEGLosslessSV1

from synthetic.phantom import draw_phantom, write_nifti
from tests.inference.dicom.writing import recoded, single_slices, write

IMAGE = os.environ.get("IMAGE", "abdoseg:latest")
SHARED = Path(__file__).parents[3] / "shared"

AS_ORGANISERS = ["--shm-size=28gb", "-m", "28G"]
HARDENED = [
    *("--user", "1000:1000", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--network", "none", "--read-only", "--tmpfs", "/tmp"),
]


def docker(*arguments):
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def folders(tmp_path):
    """Inputs and outputs below a folder that any user may enter."""
    for folder in [*reversed(tmp_path.parents)][-3:]:
        folder.chmod(0o755)
    tmp_path.chmod(0o755)
    inputs, outputs = tmp_path / "inputs", tmp_path / "outputs"
    inputs.mkdir()
    outputs.mkdir()
    return inputs, outputs


def predict(folders, options, command="sh predict.sh"):
    inputs, outputs = folders
    mounts = ["-v", f"{inputs}:/workspace/inputs/", "-v", f"{outputs}:/workspace/outputs/"]
    return docker(
        *("container", "run", "--rm", *options, *mounts, IMAGE, "/bin/bash", "-c", command)
    )


def assert_same_grids(inputs, outputs):
    for path in inputs.iterdir():
        assert_same_grid(path, outputs / path.name.replace("_0000", ""))


@pytest.mark.parametrize("options", [AS_ORGANISERS, HARDENED], ids=["organisers", "hardened"])
def test_a_case_from_volume_to_label_map(folders, options):
    inputs, outputs = folders
    spacing = (5.0, 2.5, 2.5)
    write_nifti(
        inputs / "case_0000.nii.gz", draw_phantom((40, 160, 160), spacing, 1).volume, spacing
    )
    if "--user" in options:
        shutil.chown(outputs, 1000, 1000)
    ended = predict(folders, options)
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in outputs.iterdir()] == ["case.nii.gz"]
    assert_same_grids(inputs, outputs)


def test_every_real_ct_keeps_its_geometry(folders):
    images = SHARED / "ct" / "images"
    if not images.is_dir():
        pytest.fail("real CT is needed beside the project: ../shared/ct/images")
    inputs, outputs = folders
    for path in images.iterdir():
        shutil.copy(path, inputs)
    ended = predict(folders, AS_ORGANISERS)
    assert ended.returncode == 0, ended.stderr
    assert_same_grids(inputs, outputs)


def test_dicom_series_in_dicom_seg_out(folders):
    """Compressed ones, which are decoded in processes of their own, without any rights."""
    inputs, outputs = folders
    volume = draw_phantom((40, 160, 160), (5.0, 2.5, 2.5), 1).volume
    datasets = single_slices(np.ascontiguousarray(volume[:6]).astype(np.int16))
    write(inputs / "study", [recoded(one, JPEGLosslessSV1, inputs.parent) for one in datasets])
    shutil.chown(outputs, 1000, 1000)
    ended = predict(folders, HARDENED, "sh predict.sh --format both --names folder")
    assert ended.returncode == 0, ended.stderr
    assert {path.name for path in outputs.iterdir()} == {"study.nii.gz", "study.seg.dcm"}
    assert pydicom.dcmread(outputs / "study.seg.dcm").Modality == "SEG"
    assert nibabel.load(outputs / "study.nii.gz").shape == (160, 160, 6)


def test_a_bad_case_and_wrong_usage_have_their_exit_codes(folders):
    inputs, outputs = folders
    (inputs / "bad_0000.nii.gz").write_bytes(b"nothing")
    ended = predict(folders, AS_ORGANISERS)
    assert ended.returncode == 1
    assert "bad_0000.nii.gz" in ended.stderr
    assert list(outputs.iterdir()) == []
    assert predict(folders, AS_ORGANISERS, "sh predict.sh --device abacus").returncode == 2


def test_the_image_holds_what_it_needs_and_no_more():
    listed = docker("run", "--rm", IMAGE, "sh", "-c", "ls && python3 -m pip list")
    assert listed.returncode == 0, listed.stderr
    assert {"inference", "predict.sh", "requirements.txt", "weights"} <= set(listed.stdout.split())
    for stranger in ("benchmark", "training", "tests", "torchvision", "scikit-image", "pytest"):
        assert stranger not in listed.stdout.split()
    compiled = docker("run", "--rm", IMAGE, "sh", "-c", "ls inference/__pycache__")
    assert "prediction.cpython" in compiled.stdout


def test_every_library_finds_those_it_needs():
    """The lean image lost none that the loader asks for; the driver brings its own."""
    # What a wheel bundles in a folder PACKAGE.libs is found by the extension that loads it, not by
    # itself; with the extension its whole tree is looked at.
    find = r"find /opt/abdoseg -type f \( -name '*.so' -o -name '*.so.*' \) -not -path '*.libs/*'"
    find += " -exec ldd {} +"
    listed = docker("run", "--rm", IMAGE, "sh", "-c", find)
    assert "libtorch_cuda.so => /opt" in listed.stdout
    missing = {line.split()[0] for line in listed.stdout.splitlines() if "not found" in line}
    assert missing <= {"libcuda.so.1"}


# Run in the image. Without a driver cuDNN cannot compute, but its shim, which loads a sub-library
# at the first call of one of its functions, does so; and NVRTC compiles.
LAZY = """
import ctypes, pathlib, torch
library = ctypes.CDLL("libcudnn.so.9")
made = ctypes.c_void_p()
assert library.cudnnCreateTensorDescriptor(ctypes.byref(made)) == 0
assert library.cudnnCreateConvolutionDescriptor(ctypes.byref(made)) == 0
for of in ("Graph", "Ops", "Cnn"):
    assert library[f"cudnn{of}VersionCheck"]() == 0
folder = pathlib.Path(torch.__file__).parents[1] / "nvidia/cudnn/lib"
for part in ("heuristic", "engines_precompiled", "engines_runtime_compiled", "engines_tensor_ir"):
    ctypes.CDLL(str(folder / f"libcudnn_{part}.so.9"))

compiler = ctypes.CDLL("libnvrtc.so.13")
program = ctypes.c_void_p()
source = b"__global__ void root(float* x) { *x = sqrtf(*x); }"
assert compiler.nvrtcCreateProgram(ctypes.byref(program), source, b"k.cu", 0, None, None) == 0
assert compiler.nvrtcCompileProgram(program, 0, None) == 0
"""


def test_what_torch_loads_at_its_first_use_is_there():
    ended = docker("run", "--rm", IMAGE, "python3", "-c", LAZY)
    assert ended.returncode == 0, ended.stderr

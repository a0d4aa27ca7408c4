"""Our own speed: the plain baseline's label maps, the network's operations, one real comparison."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    ORIENTATIONS,
    RAS_AFFINE,
    metadata_of,
    reoriented,
    save_nifti,
    stored,
    trained_looking_network,
)
from harness import read, run_benchmark, tables_of

from benchmark.speed import network_speed, speed
from inference import prediction
from inference.command import main as run_service
from inference.network.weights import DEMONSTRATION_WEIGHTS, load_weights, save_weights
from synthetic.phantom import draw_phantom


@pytest.mark.slow
@pytest.mark.parametrize(
    ("orientation", "clip_hu"), [(0, None), (21, None), (46, None), (0, (-160, 240))]
)
def test_plain_and_service_label_alike_voxel_for_voxel(tmp_path, monkeypatch, orientation, clip_hu):
    phantom = draw_phantom((12, 250, 310), (16.0, 1.4, 1.3), seed=11)
    patient = np.ascontiguousarray(phantom.volume[:, ::-1, ::-1].transpose(2, 1, 0))  # RAS
    volume, affine = reoriented(patient, RAS_AFFINE, ORIENTATIONS[orientation])
    save_nifti(tmp_path / "a_0000.nii.gz", volume, affine)
    monkeypatch.setattr(prediction, "choose_dtype", lambda device: torch.float32)

    weights = tmp_path / "weights.safetensors"
    state_dict, metadata = load_weights(DEMONSTRATION_WEIGHTS)
    save_weights(weights, state_dict, replace(metadata, clip_hu=clip_hu))
    common = ["--input", str(tmp_path / "a_0000.nii.gz"), "--weights", str(weights)]
    common += ["--device", "cpu", "--output"]
    assert run_benchmark("plain-pipeline", *common, tmp_path / "plain").code == 0
    assert run_service([*common, str(tmp_path / "service"), "--quiet"]) == 0
    plain, service = (stored(tmp_path / name / "a.nii.gz") for name in ("plain", "service"))
    np.testing.assert_array_equal(plain, service)
    assert len(np.unique(service)) > 8


def test_weights_and_volumes_that_the_plain_pipeline_cannot_read_are_one_line(tmp_path):
    broken = tmp_path / "in/a.nii.gz"
    broken.parent.mkdir()
    broken.write_bytes(b"no gzip data")
    for weights, code in ((broken, 2), (DEMONSTRATION_WEIGHTS, 1)):
        places = ("--input", tmp_path / "in", "--output", tmp_path / "out")
        done = run_benchmark("plain-pipeline", *places, "--weights", weights, "--device", "cpu")
        assert done.code == code
        (line,) = done.err.splitlines()
        assert str(broken) in line
    assert not list((tmp_path / "out").iterdir())


def test_operations_of_the_full_network():
    """The paper's 284.39 GMAC less the classifiers of training, 2.265, and what folding saves.

    Two of the first convolution's three channels; and of the upsampling, at each of four levels, a
    2x2 transposed and a 3x3 convolution become four 2x2 convolutions with a pixel of padding.
    """
    metadata = metadata_of(trained_looking_network(), base_channels=64)
    tflop = network_speed.tflop_a_slice(metadata, (512, 512))
    first = 2 * 9 * 64 * 512**2 / 1e9
    # By level: input pixels, channels of features, channels after the reduction.
    levels = [(32, 512, 512), (64, 512, 256), (128, 256, 128), (256, 128, 64)]
    merged = sum(
        side**2 * (4 * width * width + 36 * width * out) - (side + 1) ** 2 * 16 * width * out
        for side, width, out in levels
    )
    assert tflop == pytest.approx(2e-3 * (284.39 - 2.265 - first - merged / 1e9), rel=1e-4)


@pytest.mark.slow
def test_steps_on_cuda(weights_file, cuda_device, monkeypatch):
    cuda_device()
    monkeypatch.setattr(network_speed, "_SLICES", 1)
    steps = network_speed.measure_network(weights_file, "cuda", (16, 16))["steps"]
    assert len(steps) == 4
    assert all(milliseconds > 0 for _, milliseconds in steps)


def test_tables_of_known_times():
    plain = {"wall": 20, "start": 2, "read": 4, "percentiles": 2, "predict": 8}
    service = {"wall": 4, "start": 2, "read": 1, "percentiles": 0.5, "predict": 2}
    seconds = {
        "plain": {**plain, "components": 3, "write": 1},
        "service": {**service, "components": 0.25, "write": 0.25},
    }
    steps = [["plain", 80.0], ["half", 20.0]]
    result = {"volume": [512, 512, 7], "weights": "w.safetensors", "repeat": 3, "seconds": seconds}
    result["machine"] = {"cpu": "a CPU", "cores": 2, "memory_gb": 4, "date": "today"}
    result["network"] = {"device": "CPU", "matrix": [256, 256], "steps": steps}
    result["label_agreement"] = 0.99995
    rows = {row[0]: row[1:] for row in tables_of(speed.markdown(result))}
    assert rows["reading"] == ["4.00", "1.00", "4.0"]
    assert rows["all but start and network"] == ["10.00", "2.00", "5.0"]
    assert rows["**whole process**"] == ["20.00", "4.00", "5.0"]
    assert rows["half"] == ["20.0", "4.00"]


@pytest.mark.slow
def test_a_real_comparison(tmp_path):
    words = ("--slices", "6", "--size", "64", "--repeat", "1", "--device", "cpu")
    done = run_benchmark("speed", *words, "--report", tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "speed.md").read_text() == done.out
    result = read(tmp_path / "speed.json")
    assert result["label_agreement"] > 0.98
    assert set(result["seconds"]["plain"]) == {"wall", "start", *speed.STAGES}


@pytest.mark.parametrize("option", ["--input", "--weights"])
def test_a_file_that_is_not_there(option):
    assert run_benchmark("speed", option, "nowhere").code == 2

"""The speed of the network alone: its operations, its forms on a CPU and on fake CUDA."""

import pytest
import torch
from conftest import metadata_of, trained_looking_network
from test_sampler import nvml_stub  # noqa: F401  (a fixture)

from benchmark.speed import network_speed
from inference.device import choose_device


@pytest.mark.slow
def test_operations_of_the_full_network():
    """284.39 GMAC are with the classifiers of training, 4·16·15·9·512² = 2.265 GMAC of them."""
    metadata = metadata_of(trained_looking_network(), base_channels=64)
    gflop = network_speed.gflop_a_slice(metadata, (512, 512))
    assert gflop["plain"] == pytest.approx(2 * (284.39 - 2.265), abs=0.02)
    # Two of the first convolution's three channels go, and 51 GMAC by merging the upsampling.
    channels = 2e-9 * 2 * 9 * 64 * 512**2
    assert gflop["plain"] - gflop["folded"] - channels == pytest.approx(2 * 51, rel=0.01)


@pytest.mark.slow
def test_network_sweep_on_a_cpu(weights_file):
    printed = []
    swept = network_speed.sweep(
        weights_file, torch.device("cpu"), (32, 32), batch_sizes=(1, 2), matrix=64, repeats=1,
        on_result=lambda found: printed.append(len(found["runs"])),
    )  # fmt: skip
    assert printed == [0, 1, 2]
    assert swept["failed"] == {}
    assert [run["batch_size"] for run in swept["runs"]] == [1, 2]
    for run in swept["runs"]:
        assert run["tflops"] * run["ms"] == pytest.approx(swept["gflop"]["folded"])
    assert set(swept["matrix_tflops"]) == {run["dtype"] for run in swept["runs"]}


@pytest.mark.slow
def test_network_forms_on_cuda(weights_file, cuda_device, monkeypatch):
    """Every form runs, one that fails costs itself alone, and the context is read after a pass."""
    device = cuda_device(total_mb=24000, context_mb=700)

    def fail_in_bfloat16(operator, channels):
        if torch.bfloat16 in device.types:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return True

    device.fused = fail_in_bfloat16
    swept = network_speed.sweep(
        weights_file, choose_device("cuda"), (32, 32), batch_sizes=(1, 2), matrix=16, repeats=1
    )
    forms = [(run["dtype"], run["fused"], run["searches"]) for run in swept["runs"]]
    assert forms[:2] == [("float16", True, False)] * 2
    assert {("float16", False, False), ("float16", True, True)} <= set(forms)
    assert set(swept["failed"]) == {"bfloat16, batch of 1"}
    assert swept["context_mb"] == 700 - 100  # of which the allocator has reserved 100
    assert set(swept["matrix_tflops"]) == {"float16", "bfloat16"}
    assert all(index == 0 for _, index in device.traffic.fractions)


@pytest.mark.slow
def test_steps_on_cuda(weights_file, cuda_device):
    cuda_device()
    slices = torch.randn(3, 1, 32, 32)
    steps = network_speed.measure_steps(weights_file, choose_device("cuda"), slices, 1)
    assert [name for name, _ in steps][2:4] == [
        "precision float16",
        "bias, ReLU and sum in the convolutions",
    ]
    assert len(steps) == 7

"""The network's operations and its steps on fake CUDA."""

import pytest
import torch
from conftest import metadata_of, trained_looking_network

from benchmark.speed import network_speed
from inference.device import choose_device


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
def test_steps_on_cuda(weights_file, cuda_device):
    cuda_device()
    slices = torch.randn(3, 1, 32, 32)
    steps = network_speed.measure_steps(weights_file, choose_device("cuda"), slices, 1)
    assert [name for name, _ in steps][2:4] == [
        "precision float16",
        "bias, ReLU and sum in the convolutions",
    ]
    assert len(steps) == 7

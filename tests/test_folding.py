"""The inference form against the plain network."""

import copy

import pytest
import torch
from conftest import trained_looking_network

from inference.folding import fold

# Random weights leave many pixels close to a tie between labels: here 95.5 % agree in bfloat16 and
# 98.5 % in fp16. test_phantom_weights.py holds trained weights to more.
AGREEMENT = {torch.float32: 0.9999, torch.bfloat16: 0.94, torch.float16: 0.98}


@pytest.fixture(scope="module")
def plain():
    return trained_looking_network(16, seed=3)


@pytest.fixture(scope="module")
def slices():
    torch.manual_seed(5)
    return torch.nn.functional.interpolate(torch.randn(4, 1, 12, 12), size=96, mode="bicubic")


@torch.no_grad()
def test_fp32_is_the_plain_network(plain, slices):
    expected = plain(slices.expand(-1, 3, -1, -1))
    folded = fold(copy.deepcopy(plain))(slices)
    assert (folded - expected).norm() / expected.norm() < 1e-4
    assert len(expected.argmax(dim=1).unique()) >= 10


@torch.no_grad()
@pytest.mark.parametrize("dtype", AGREEMENT)
def test_labels_agree(plain, slices, dtype):
    expected = plain(slices.expand(-1, 3, -1, -1)).argmax(dim=1)
    folded = fold(copy.deepcopy(plain)).to(dtype, memory_format=torch.channels_last)
    labels = folded(slices.to(dtype)).argmax(dim=1)
    assert (labels == expected).float().mean() >= AGREEMENT[dtype]


def test_only_what_runs_is_left(plain):
    folded = fold(copy.deepcopy(plain))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert len(folded.classifiers) == 0
    assert folded.encoder[0].in_channels == 1
    assert not any(parameter.requires_grad for parameter in folded.parameters())

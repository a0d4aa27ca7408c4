"""Winograd's convolutions against direct ones in double precision."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from inference.folding import fold
from inference.memory import MemoryBudget
from inference.prediction import Predictor
from inference.winograd import WinogradConvolution, map_weights, mapped_bytes, suits
from tests.conftest import metadata_of, trained_looking_network


def convolution(inputs=256, outputs=256, **options):
    torch.manual_seed(5)
    return nn.Conv2d(inputs, outputs, 3, **{"padding": 1, **options})


@pytest.mark.parametrize("size", [(32, 32), (37, 30), (5, 83), (4, 8)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@torch.inference_mode()
def test_it_is_the_convolution(size, bias):
    layer = convolution(256, 272, bias=bias)
    features = torch.randn(2, 256, *size).to(memory_format=torch.channels_last)
    direct = functional.conv2d(
        features.double(), layer.weight.double(), layer.bias.double() if bias else None, padding=1
    )
    found = WinogradConvolution(layer)(features)
    assert found.shape == direct.shape
    torch.testing.assert_close(found.double(), direct, rtol=0, atol=5e-5)


@torch.inference_mode()
def test_strips_and_images_do_not_mix(monkeypatch):
    layer = convolution()
    features = torch.randn(2, 256, 37, 41)
    whole = WinogradConvolution(layer)(features)
    monkeypatch.setattr("inference.winograd._STRIP_BYTES", 1)
    torch.testing.assert_close(WinogradConvolution(layer)(features), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        convolution(128, 256),
        convolution(stride=2),
        convolution(padding=0),
        convolution(groups=2),
        nn.Conv2d(256, 256, 1),
        convolution(dilation=2),
    ],
    ids=str,
)
def test_others_are_left_alone(layer):
    assert not suits(layer)
    assert suits(convolution())


@pytest.mark.slow
@torch.inference_mode()
def test_the_folded_network_gives_the_same_logits_with_it():
    slices = torch.randn(1, 1, 192, 176)
    plain = fold(trained_looking_network(base_channels=32))(slices)
    network = fold(trained_looking_network(base_channels=32))
    need = mapped_bytes(network)
    map_weights(network)
    mapped = [module for module in network.modules() if isinstance(module, WinogradConvolution)]
    assert len(mapped) >= 3
    assert need == sum(module.mapped.nbytes for module in mapped)
    found = network(slices)
    # The logits' spread is 1 (trained_looking_network), so that this is 0.01 % of it.
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)
    assert (found.argmax(dim=1) == plain.argmax(dim=1)).double().mean() > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "total", "maps"),
    [
        (torch.float32, 2 << 30, True),
        (torch.float32, 100 << 20, False),
        (torch.bfloat16, 2 << 30, False),
    ],
)
def test_in_fp32_where_there_is_memory(dtype, total, maps):
    network = trained_looking_network(base_channels=32)
    need = mapped_bytes(fold(trained_looking_network(base_channels=32)))
    budget = MemoryBudget(total)
    predictor = Predictor(
        [(network.state_dict(), metadata_of(network))],
        torch.device("cpu"),
        dtype=dtype,
        keeps_bytes=budget.keep,
    )
    kinds = [isinstance(module, WinogradConvolution) for module in predictor.network.modules()]
    assert any(kinds) == maps
    assert budget.total == total - need * maps
    predictor.release()


def test_what_is_kept_is_not_there_for_cases():
    budget = MemoryBudget(900)
    budget.take(650)
    assert not budget.keep(300)  # a case under way has it
    budget.give_back(650)
    assert not budget.keep(301)  # more than a third
    assert budget.keep(300)
    with pytest.raises(ValueError, match="it needs about"):
        budget.take(601)
    budget.take(600)

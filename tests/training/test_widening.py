"""Wide networks that begin as narrow ones: the same function, and copies that learn apart."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import trained_looking_network

from inference.intensity import normalise
from inference.network.model import AttentionUNet
from inference.network.weights import SLIM, WEIGHTS, as_stored, load_weights
from inference.prediction import Predictor, trained_network
from synthetic.phantom import draw_phantom
from training import widening
from training.widening import widen


def widened(small: AttentionUNet, **wide) -> AttentionUNet:
    large = AttentionUNet(**wide)
    widen(small, large)
    return large.eval()


@torch.no_grad()
def logits_of(network: AttentionUNet, slices: torch.Tensor) -> list[torch.Tensor]:
    """The final and the supervised logits, with the statistics of evaluation."""
    for module in network.modules():
        module.training = not isinstance(module, torch.nn.BatchNorm2d)
    final, supervised = network(slices)
    network.eval()
    return [final, *supervised]


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        ({"base_channels": 8}, {"base_channels": 8, "supervised_channels": 7}),
        ({"base_channels": 8}, {"base_channels": 16}),
        ({"base_channels": 4, "supervised_channels": 3}, {"base_channels": 12}),
        (
            {"base_channels": 8, "supervised_channels": 5, "attention": "none"},
            {"base_channels": 16, "supervised_channels": 5, "attention": "none"},
        ),
        (
            {"base_channels": 8, "supervised_channels": 5, "attention": "none"},
            {"base_channels": 16, "supervised_channels": 6},
        ),
        (
            {"base_channels": 4, "supervised_channels": 4, "attention": "none"},
            {"base_channels": 16},
        ),
    ],
)
def test_the_wide_network_computes_what_the_narrow_one_does(monkeypatch, narrow, wide):
    monkeypatch.setattr(widening, "_SPREAD", 1e-3)  # where the attention is new, exact only near 0
    small = trained_looking_network(**narrow)
    large = widened(small, **wide).double()
    slices = torch.randn(2, 3, 48, 32, dtype=torch.double)
    for found, expected in zip(
        logits_of(large, slices), logits_of(small.double(), slices), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not (WEIGHTS / SLIM).is_file(), reason="the slim network's weights are absent")
def test_the_papers_network_begins_as_the_slim_one_that_ships():
    state, metadata = load_weights(WEIGHTS / SLIM)
    small = trained_network(state, metadata)
    large = widened(small, base_channels=64, supervised_channels=metadata.supervised_channels)
    volume = draw_phantom((1, 192, 192), (5.0, 2.0, 2.0), seed=3).volume
    numbers = {"window": metadata.clip_hu, "slope": 1.0, "intercept": 0.0}
    scores = {"mean": metadata.intensity_mean, "std": metadata.intensity_std}
    slices = normalise(torch.from_numpy(volume[:, None]), **numbers, **scores).expand(-1, 3, -1, -1)
    found, expected = logits_of(large, slices), logits_of(small, slices)
    for one, other in zip(found, expected, strict=True):
        assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).double())[0, 1] > 0.999
    assert (found[0].argmax(1) == expected[0].argmax(1)).double().mean() > 0.999

    def labels(network: AttentionUNet, dtype: torch.dtype, **changes) -> np.ndarray:
        stored = {name: as_stored(name, weights) for name, weights in network.state_dict().items()}
        weights = (stored, dataclasses.replace(metadata, matrix_reduction=1, **changes))
        return Predictor([weights], torch.device("cpu"), dtype=dtype).predict(volume, **numbers)

    expected = labels(small, torch.float32)
    assert len(np.unique(expected)) > 5
    for dtype in (torch.float32, torch.bfloat16):  # folded and rounded
        found = labels(large, dtype, base_channels=64, attention="relu-sigmoid")
        assert (found == expected).mean() > 0.995


@pytest.mark.parametrize(
    ("base_channels", "attention"), [(16, "none"), (32, "none"), (16, "relu-sigmoid")]
)
def test_copies_of_a_channel_learn_apart(base_channels, attention):
    small = trained_looking_network(8, attention=attention)
    large = widened(small, base_channels=base_channels)
    large(torch.randn(2, 3, 32, 32)).square().mean().backward()
    copies = base_channels // 8
    for layer in (large.encoder[3], large.decoders[1].upsample, large.fusion[0]):
        # Of a transposed convolution the second axis is that of the channels made.
        made = (
            layer.weight.grad.transpose(0, 1) if layer.weight.shape[2] == 2 else layer.weight.grad
        )
        one, other = made[::copies], made[1::copies]
        assert (one - other).norm() > 0.1 * one.norm()


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        ({}, {"base_channels": 4}),
        ({}, {"base_channels": 12}),
        ({}, {"base_channels": 8, "supervised_channels": 1}),
        ({}, {"base_channels": 8, "num_classes": 4}),
        ({}, {"base_channels": 16, "attention": "none"}),
        ({"attention": "none"}, {"base_channels": 8}),
        ({"attention": "none"}, {"base_channels": 24}),
    ],
)
def test_what_is_not_wider_is_refused(narrow, wide):
    with pytest.raises(ValueError, match=r"width|channels|shape|attention"):
        widened(trained_looking_network(8, **narrow), **wide)

"""Wide networks that begin as narrow ones: the same function, and copies that learn apart."""

import pytest
import torch
from conftest import trained_looking_network

from inference.network.model import AttentionUNet
from training.widening import widened


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        ({"base_channels": 8}, {"base_channels": 8, "supervised_channels": 7}),
        ({"base_channels": 8}, {"base_channels": 16}),
        ({"base_channels": 4, "supervised_channels": 3}, {"base_channels": 12}),
        (
            {"base_channels": 8, "supervised_channels": 5},
            {"base_channels": 16, "supervised_channels": 5},
        ),
    ],
)
@torch.no_grad()
def test_the_wide_network_computes_what_the_narrow_one_does(narrow, wide):
    small = trained_looking_network(**narrow).double()
    large = AttentionUNet(**wide)
    large.load_state_dict(widened(small.state_dict(), large.state_dict()))
    large.double()
    slices = torch.randn(2, 3, 48, 32, dtype=torch.double)
    torch.testing.assert_close(large.eval()(slices), small(slices), rtol=1e-4, atol=1e-5)
    for network in (small, large):
        for module in network.modules():
            module.training = not isinstance(module, torch.nn.BatchNorm2d)
    for found, expected in zip(large(slices)[1], small(slices)[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_copies_of_a_channel_learn_apart():
    small, large = trained_looking_network(8), AttentionUNet(base_channels=16)
    large.load_state_dict(widened(small.state_dict(), large.state_dict()))
    large.eval()(torch.randn(2, 3, 32, 32)).square().mean().backward()
    for layer in (large.encoder[3], large.decoders[1].upsample, large.fusion[0]):
        # Of a transposed convolution the second axis is that of the channels made.
        made = (
            layer.weight.grad.transpose(0, 1) if layer.weight.shape[2] == 2 else layer.weight.grad
        )
        one, other = made[::2], made[1::2]
        assert (one - other).norm() > 0.1 * one.norm()


def test_networks_alike_are_the_same_to_the_bit():
    network = trained_looking_network(8)
    fresh = AttentionUNet(base_channels=8).state_dict()
    for name, weights in widened(network.state_dict(), fresh).items():
        assert torch.equal(weights, network.state_dict()[name])


@pytest.mark.parametrize(
    "wide",
    [
        {"base_channels": 4},
        {"base_channels": 12},
        {"base_channels": 8, "supervised_channels": 1},
        {"base_channels": 8, "num_classes": 4},
    ],
)
def test_what_is_not_wider_is_refused(wide):
    with pytest.raises(ValueError, match=r"width|channels|shape"):
        widened(trained_looking_network(8).state_dict(), AttentionUNet(**wide).state_dict())

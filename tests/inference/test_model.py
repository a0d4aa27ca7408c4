"""The network against the paper's figures and torchvision's encoder."""

import numpy as np
import pytest
import torch
from conftest import trained_looking_network
from torch.utils.flop_counter import FlopCounterMode

from inference.network.model import AttentionUNet


@pytest.fixture(scope="module")
def full_network():
    with torch.device("meta"):
        return AttentionUNet()


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_are_the_papers(full_network):
    assert parameters(full_network) == 24_496_331
    assert parameters(full_network.encoder) == 9_410_880
    assert [parameters(decoder) for decoder in full_network.decoders] == [
        10_489_856,
        3_410_176,
        853_120,
        139_456,
    ]
    assert [parameters(level) for level in full_network.supervision] == [
        73_776,
        36_912,
        18_480,
        9_264,
    ]
    assert [parameters(classifier) for classifier in full_network.classifiers] == [2_175] * 4
    assert parameters(full_network.fusion) == 37_056
    assert parameters(full_network.head) == 8_655


def gflop(network, size=512):
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 1e9


@pytest.mark.slow
def test_cost_of_a_slice_is_the_papers(full_network):
    training = gflop(full_network.train())
    assert training == pytest.approx(568.78, abs=0.005)
    assert training / 2 == pytest.approx(284.39, abs=0.005)
    # Evaluation leaves out the four classifiers: a 3x3 convolution of 16 maps to 15 each.
    classifiers = 4 * 2 * 9 * 16 * 15 * 512**2 / 1e9
    assert gflop(full_network.eval()) == pytest.approx(training - classifiers, abs=1e-6)


def test_slim_network_costs_a_sixteenth(full_network):
    with torch.device("meta"):
        slim = AttentionUNet(base_channels=16)
    assert gflop(full_network.eval()) / gflop(slim.eval()) == pytest.approx(16, rel=0.03)
    assert slim.supervision[0][0].out_channels == 4
    assert slim.fusion[0].out_channels == 16


def test_width_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        AttentionUNet(base_channels=10)


@pytest.mark.slow
def test_encoder_is_torchvisions_vgg13_bn():
    import torchvision  # a second and a half, which the quick tests need not wait for

    torch.manual_seed(0)
    reference = torchvision.models.vgg13_bn().features[:34].eval()
    network = AttentionUNet().eval()
    state = reference.state_dict()
    assert {name: tensor.shape for name, tensor in network.encoder.state_dict().items()} == {
        name: tensor.shape for name, tensor in state.items()
    }
    network.encoder.load_state_dict(state)
    slices = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        assert torch.equal(network.encoder(slices), reference(slices))


def test_skips_leave_before_each_pooling():
    network = AttentionUNet(base_channels=8)
    seen = []
    for decoder in network.decoders:
        decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    network(torch.randn(1, 3, 64, 32))
    assert [tuple(features.shape[1:]) for features, _ in seen] == [
        (64, 4, 2),
        (64, 8, 4),
        (32, 16, 8),
        (16, 32, 16),
    ]
    assert [tuple(skip.shape[1:]) for _, skip in seen] == [
        (64, 8, 4),
        (32, 16, 8),
        (16, 32, 16),
        (8, 64, 32),
    ]


def test_decoder_reduces_twice_with_the_same_weights():
    torch.manual_seed(1)
    network = AttentionUNet(base_channels=8).eval()
    decoder = network.decoders[3]
    features, skip = torch.randn(1, 16, 4, 4), torch.randn(1, 8, 8, 8)
    up = decoder.upsample(features)
    once = torch.nn.functional.conv2d(up, decoder.reduce.weight, decoder.reduce.bias, padding=1)
    merged = torch.nn.functional.conv2d(
        torch.cat([once, skip], 1), decoder.reduce.weight, decoder.reduce.bias, padding=1
    )
    expected = 1 / (1 + torch.exp(-merged.clamp(min=0)))
    torch.testing.assert_close(decoder(features, skip), expected)


def test_training_mode_returns_the_supervised_logits_too():
    network = AttentionUNet(num_classes=5, base_channels=8)
    logits, supervised = network(torch.randn(2, 3, 32, 48))
    assert [tuple(maps.shape) for maps in (logits, *supervised)] == [(2, 5, 32, 48)] * 5
    network.eval()
    assert network(torch.randn(2, 3, 32, 48)).shape == (2, 5, 32, 48)


@pytest.mark.slow
def test_full_network_takes_a_training_step_and_predicts():
    torch.manual_seed(0)
    network = AttentionUNet()
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-4)
    slices = torch.randn(2, 3, 32, 32)
    labels = torch.randint(0, 15, (2, 32, 32))

    def loss():
        logits, supervised = network(slices)
        outputs = (logits, *supervised)
        return sum(torch.nn.functional.cross_entropy(output, labels) for output in outputs) / 5

    first = loss()
    first.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    optimiser.step()
    assert loss() < first
    assert network.eval()(slices).shape == (2, 15, 32, 32)


@torch.no_grad()
def test_without_attention_nothing_is_squeezed():
    """The features that the paper's attention maps into [0.5, 1) pass unchanged, and only those."""
    attended, plain = (
        AttentionUNet(base_channels=8, attention=name) for name in ("relu-sigmoid", "none")
    )
    plain.load_state_dict(attended.state_dict())
    seen = {}
    for name, network in (("attended", attended), ("plain", plain)):
        network.eval()
        network.attention.register_forward_hook(
            lambda _, inputs, output, name=name: seen.setdefault(name, []).append(
                (inputs[0], output)
            )
        )
        network(torch.randn(1, 3, 32, 32))
    assert len(seen["attended"]) == len(seen["plain"]) == 5  # four decoders and the fusion
    for before, after in seen["plain"]:
        assert torch.equal(before, after)
    for before, after in seen["attended"]:
        expected = 1 / (1 + np.exp(-np.maximum(before.numpy(), 0)))
        assert np.abs(after.numpy() - expected).max() < 1e-6


def stated_forward(state, slices, attention):
    """The network as the paper's figures draw it, from its weights and plain functions alone."""
    f = torch.nn.functional

    def convolution(x, name):
        return f.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    def block(x, prefix, first):
        x = convolution(x, f"{prefix}.{first}")
        names = ("running_mean", "running_var", "weight", "bias")
        return f.batch_norm(x, *(state[f"{prefix}.{first + 1}.{name}"] for name in names)).relu()

    def attend(x):
        return 1 / (1 + torch.exp(-x.clamp(min=0))) if attention == "relu-sigmoid" else x

    x, skips, index = slices, [], 0
    for stage in range(5):
        if stage:
            skips.insert(0, x)
            x, index = f.max_pool2d(x, 2), index + 1
        for _ in range(2):
            x, index = block(x, "encoder", index), index + 3
    outputs = []
    for number, skip in enumerate(skips):
        prefix = f"decoders.{number}"
        weights = (state[f"{prefix}.upsample.weight"], state[f"{prefix}.upsample.bias"])
        x = f.conv_transpose2d(x, *weights, stride=2)
        if number > 0:
            x = convolution(x, f"{prefix}.reduce")
        x = attend(convolution(torch.cat([x, skip], 1), f"{prefix}.reduce"))
        if number < 3:
            x = block(block(x, f"{prefix}.refine", 0), f"{prefix}.refine", 3)
        maps = block(x, f"supervision.{number}", 0)
        outputs.append(f.interpolate(maps, slices.shape[-2:], mode="bilinear"))
    fused = attend(block(torch.cat(outputs, 1), "fusion", 0))
    return convolution(fused, "head"), [
        convolution(maps, f"classifiers.{number}") for number, maps in enumerate(outputs)
    ]


@pytest.mark.parametrize("attention", ["relu-sigmoid", "none"])
@pytest.mark.parametrize("supervised_channels", [0, 5])
def test_the_forward_pass_is_the_papers(attention, supervised_channels):
    """Final and supervised logits, with normalisation statistics that are not trivial."""
    network = trained_looking_network(attention=attention, supervised_channels=supervised_channels)
    assert network.supervision[0][0].out_channels == (supervised_channels or 2)
    slices = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        expected, of_levels = stated_forward(network.state_dict(), slices, attention)
        torch.testing.assert_close(network.eval()(slices), expected, rtol=1e-4, atol=1e-4)
        for module in network.modules():
            module.training = not isinstance(module, torch.nn.BatchNorm2d)
        logits, supervised = network(slices)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for found, wanted in zip(supervised, of_levels, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_an_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="relu-sigmoid, none"):
        AttentionUNet(attention="softmax")

"""The network against the paper's figures and torchvision's encoder."""

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
    decoders, supervision = full_network.decoders, full_network.supervision
    assert [*map(parameters, decoders)] == [10_489_856, 3_410_176, 853_120, 139_456]
    assert [*map(parameters, supervision)] == [73_776, 36_912, 18_480, 9_264]
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


@pytest.mark.parametrize("wrong", [{"base_channels": 10}, {"attention": "softmax"}])
def test_what_makes_no_network_is_refused(wrong):
    with pytest.raises(ValueError):
        AttentionUNet(**wrong)

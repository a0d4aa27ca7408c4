"""The inference form against the plain network."""

import copy
import weakref

import pytest
import torch
from conftest import metadata_of, trained_looking_network
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from inference.network import fusion
from inference.network.folding import MergedUpsampling, fold


@pytest.fixture(scope="module")
def plain():
    return trained_looking_network(16, seed=3)


@pytest.fixture(scope="module")
def slices():
    torch.manual_seed(5)
    return torch.nn.functional.interpolate(torch.randn(4, 1, 12, 12), size=96, mode="bicubic")


def as_cudnn_fuses(layer, features, total):
    """Instead of `Convolution._fused_on_cuda`: in plain torch, into memory that held NaN."""
    result = functional.conv2d(features, layer.weight, layer.bias, padding=1)
    result = result if total is None else result + total
    return torch.full_like(result, float("nan")).copy_(result.relu_())


@pytest.fixture(params=["oneDNN's kernels", "cuDNN's kernels", "torch's own layers"])
def kernels(request, monkeypatch):
    """With what oneDNN fuses on a CPU, cuDNN on CUDA, and without either."""
    if request.param != "oneDNN's kernels":
        monkeypatch.setattr(fusion, "_has_onednn_fusion", lambda device, dtype: False)
    if request.param == "cuDNN's kernels":
        monkeypatch.setattr(fusion.Convolution, "_fused_on_cuda", as_cudnn_fuses)
    return request.param


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({}, (96, 96)),
        ({}, (16, 16)),
        ({}, (32, 80)),
        ({"attention": "none"}, (96, 96)),
        ({"supervised_channels": 3}, (48, 48)),
        ({"supervised_channels": 32}, (48, 48)),
    ],
)
def test_fp32_is_the_plain_network(slices, kernels, arguments, size):
    plain = trained_looking_network(16, seed=3, **arguments)
    slices = slices[..., : size[0], : size[1]]
    expected = plain(slices.expand(-1, 3, -1, -1))
    folded = fold(copy.deepcopy(plain))(slices)
    assert (folded - expected).norm() / expected.norm() < 1e-4
    # Border pixels, where biases and padding meet, on their own.
    for edge in (slice(None, 1), slice(-1, None)):
        for part in (slice(None), edge):
            difference = (folded - expected)[..., edge, part]
            assert difference.norm() / expected[..., edge, part].norm() < 1e-4
    if size == (96, 96):
        assert len(expected.argmax(dim=1).unique()) >= 10


@pytest.mark.parametrize(
    ("device", "dtype"), [("cuda", torch.float16), ("cuda", torch.float32), ("cpu", torch.float16)]
)
def test_onednn_is_for_cpus_only(device, dtype):
    assert not fusion._has_onednn_fusion.__wrapped__(device, dtype)


def test_without_the_fused_kernels_torch_keeps_to_itself(monkeypatch):
    """Another version of torch may have renamed them."""
    monkeypatch.setattr(fusion.torch.ops, "mkldnn", object())
    assert not fusion._has_onednn_fusion.__wrapped__("cpu", torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (6, 3)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_transposed_convolution_and_the_next_are_one(size, with_bias):
    torch.manual_seed(1)
    transposed = torch.nn.ConvTranspose2d(7, 5, 2, stride=2).double()
    weight = torch.randn(4, 5, 3, 3, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64) if with_bias else None
    features = torch.randn(2, 7, *size, dtype=torch.float64)
    expected = functional.conv2d(transposed(features), weight, bias, padding=1)
    merged = MergedUpsampling(transposed, weight, bias)(features)
    assert (merged - expected).abs().max() < 1e-12


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all results that are alive at once."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, {}

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        result = operator(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            key = storage._cdata
            if key not in self.seen:
                self.seen[key] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.forget, key)
        return result

    def forget(self, key):
        self.live -= self.seen.pop(key, 0)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("supervised", "most"), [(0, 3.7), (16, 3.9), (64, 6.4)])
def test_memory_is_within_what_the_batch_size_is_chosen_by(monkeypatch, fused, supervised, most):
    """Without what cuDNN adds, which only a GPU can tell."""
    monkeypatch.setattr(fusion, "_has_onednn_fusion", lambda device, dtype: False)
    if fused:  # with a result of its own, as cuDNN makes it

        def fused_on_cuda(layer, features, total):
            result = functional.conv2d(features, layer.weight, layer.bias, padding=1)
            return (result if total is None else result.add_(total)).relu_()

        monkeypatch.setattr(fusion.Convolution, "_fused_on_cuda", fused_on_cuda)
    plain = trained_looking_network(16, supervised_channels=supervised)
    most_values = metadata_of(plain, supervised_channels=supervised).live_values
    network = fold(plain).to(torch.bfloat16, memory_format=torch.channels_last)
    with LiveBytes() as counter:
        network(torch.zeros(1, 1, 128, 128, dtype=torch.bfloat16))
    values = counter.peak / (2 * 128 * 128)
    assert values / 16 == pytest.approx(most, abs=0.1)
    assert values < most_values


def test_only_what_runs_is_left(plain):
    folded = fold(copy.deepcopy(plain))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    convolutions = [part for part in folded.modules() if isinstance(part, torch.nn.Conv2d)]
    assert convolutions[0].in_channels == 1
    # Of the five that make labels in training, the four supervised ones are gone.
    assert sum(part.out_channels == 15 for part in convolutions) == 1
    assert not any(parameter.requires_grad for parameter in folded.parameters())

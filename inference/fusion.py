"""Convolutions with what follows them in one pass over memory, where the device has such kernels.

The one place where kernels are chosen: oneDNN's on a CPU, cuDNN's on CUDA, and torch's own layers,
one after another, where there are none.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional


@cache
def _has_fused_kernels(device_type: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves and applies what follows in one pass over memory.

    torch keeps these operators for its own compiler, so that another version may lack them. They
    are worth it: 22 % of the full network's time in bfloat16 (benchmark/results/waterfall-cpu.md).
    """
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    names = ("_convolution_pointwise", "_convolution_pointwise_", "_is_mkldnn_bf16_supported")
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _cudnn_fused(layer: nn.Conv2d, features: Tensor, total: Tensor | None = None) -> Tensor | None:
    """`relu(layer(features))`, or `relu(layer(features) + total)`, in one kernel of cuDNN's.

    Without it bias, sum and ReLU each pass over memory again, which is nearly twice what the
    convolutions themselves read and write.

    Returns:
        None where the network does not fuse on CUDA, or cuDNN has no such kernel for this layer: it
        says so by an error, and is not asked again.
    """
    if features.device.type != "cuda" or not getattr(layer, "fuses_on_cuda", False):
        return None
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    try:
        if total is None:
            return torch.cudnn_convolution_relu(features, layer.weight, layer.bias, *geometry)
        return torch.cudnn_convolution_add_relu(
            features, layer.weight, total, 1.0, layer.bias, *geometry
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        layer.fuses_on_cuda = False
        return None


class ConvolutionRelu(nn.Module):
    """A convolution and a ReLU.

    Args:
        convolution: with its batch normalisation already folded in.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, features: Tensor) -> Tensor:
        """(N, in, H, W) to (N, out, H, W)."""
        layer = self.convolution
        if _has_fused_kernels(features.device.type, features.dtype):
            geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
            return torch.ops.mkldnn._convolution_pointwise(
                features, layer.weight, layer.bias, *geometry, "relu", [], None
            )
        fused = _cudnn_fused(layer, features)
        return functional.relu_(layer(features)) if fused is None else fused


def add_convolution(total: Tensor, features: Tensor, layer: nn.Conv2d, *, relu: bool) -> Tensor:
    """`total + layer(features)`, then a ReLU if asked for; `total` may be overwritten."""
    if _has_fused_kernels(features.device.type, features.dtype):
        geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
        after = "relu" if relu else None
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            total, features, layer.weight, layer.bias, *geometry, "add", 1.0, after, [], None
        )
    if relu and (fused := _cudnn_fused(layer, features, total)) is not None:
        return fused
    total.add_(layer(features))
    return total.relu_() if relu else total

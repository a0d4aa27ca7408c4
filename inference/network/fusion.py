"""Convolutions fused with the sum and the ReLU after them: oneDNN's, cuDNN's, or torch's own."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional


@cache
def _has_onednn_fusion(device_type: str, dtype: torch.dtype) -> bool:
    """Check whether oneDNN's fused convolutions are there for a device and type.

    They are private operators of torch's compiler, which another version may lack. They save 22 %
    of the full-size network's time in bfloat16 (benchmark/results/waterfall-cpu.md).
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
    """Return `relu(layer(features) + total)` from one kernel of cuDNN.

    Separate passes for bias, sum and ReLU move nearly twice the bytes of the convolutions.

    Returns:
        None if the network does not fuse on CUDA or cuDNN has no such kernel for this layer. It
        reports that by an error, after which the layer is not tried again.
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
    """A convolution, with its batch normalisation folded in, and a ReLU."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H, W)."""
        layer = self.convolution
        if _has_onednn_fusion(features.device.type, features.dtype):
            geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
            return torch.ops.mkldnn._convolution_pointwise(
                features, layer.weight, layer.bias, *geometry, "relu", [], None
            )
        fused = _cudnn_fused(layer, features)
        return functional.relu_(layer(features)) if fused is None else fused


def add_convolution(total: Tensor, features: Tensor, layer: nn.Conv2d, *, relu: bool) -> Tensor:
    """Return `total + layer(features)`, with a ReLU if `relu`; `total` may be overwritten."""
    if _has_onednn_fusion(features.device.type, features.dtype):
        geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
        after = "relu" if relu else None
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            total, features, layer.weight, layer.bias, *geometry, "add", 1.0, after, [], None
        )
    if relu and (fused := _cudnn_fused(layer, features, total)) is not None:
        return fused
    total.add_(layer(features))
    return total.relu_() if relu else total

"""Convolutions fused with the sum and the ReLU after them: oneDNN's, cuDNN's, or torch's own."""

from functools import cache

import torch
from torch import Tensor, nn


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


class Convolution(nn.Conv2d):
    """A convolution with the sum and, if `relu`, the ReLU after it; maps are padded by 1.

    If `fuses_on_cuda` cuDNN's fused kernels are tried: separate passes for bias, sum and ReLU move
    nearly twice the bytes of the convolutions.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, relu: bool = False) -> None:
        outputs, inputs, rows, columns = weight.shape
        super().__init__(inputs, outputs, (rows, columns), padding=1, bias=False, device="meta")
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.relu = relu
        self.fuses_on_cuda = False

    def forward(self, features: Tensor, total: Tensor | None = None) -> Tensor:
        """Map (N, in, H, W) to (N, out, …) and add `total`, if given, which may be overwritten."""
        if total is None and not self.relu:
            return super().forward(features)
        after = "relu" if self.relu else None
        if _has_onednn_fusion(features.device.type, features.dtype):
            layer = (features, self.weight, self.bias, (1, 1), self.stride, self.dilation, 1)
            if total is None:
                return torch.ops.mkldnn._convolution_pointwise(*layer, after, [], None)
            fused = torch.ops.mkldnn._convolution_pointwise_.binary
            return fused(total, *layer, "add", 1.0, after, [], None)
        if self.relu and (result := self._fused_on_cuda(features, total)) is not None:
            return result
        result = super().forward(features)
        if total is not None:
            result = total.add_(result)
        return result.relu_() if self.relu else result

    def _fused_on_cuda(self, features: Tensor, total: Tensor | None) -> Tensor | None:
        """Return the result from one kernel of cuDNN, None if it has none for this layer.

        It reports that by an error, after which the layer is not tried again.
        """
        if features.device.type != "cuda" or not self.fuses_on_cuda:
            return None
        geometry = self.stride, (1, 1), self.dilation, 1
        try:
            if total is None:
                return torch.cudnn_convolution_relu(features, self.weight, self.bias, *geometry)
            return torch.cudnn_convolution_add_relu(
                features, self.weight, total, 1.0, self.bias, *geometry
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            self.fuses_on_cuda = False
            return None


def fuse_on_cuda(network: nn.Module) -> None:
    """Use cuDNN's fused convolutions on CUDA; other devices are not affected."""
    for module in network.modules():
        if isinstance(module, Convolution):
            module.fuses_on_cuda = True

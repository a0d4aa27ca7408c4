"""Fold a trained network into one that computes the same, except for rounding, in less time.

Batch normalisation goes into the convolutions; the first convolution's three equal input channels
become one; a transposed convolution and the convolution after it become one at the low resolution;
a convolution over a concatenation becomes a sum of two.
"""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import fuse_conv_bn_eval

from .fusion import Convolution
from .model import Attention, AttentionUNet, Decoder


class MergedUpsampling(nn.Module):
    """A 2x2 stride-2 transposed convolution and the 3x3 convolution after it, as one linear map.

    Output pixel (2i + a, 2j + b) depends on four input pixels, rows i + a - 1 and i + a, columns
    j + b - 1 and j + b. So each of the four phases (a, b) is a 2x2 convolution at the low
    resolution: together 16 multiplications for a pair of channels and an input pixel instead of
    4 + 36. They run as one convolution with four times the output channels, whose padded output
    holds phase (a, b) shifted by (a, b).

    The 3x3 convolution pads with zeros, which the transposed convolution's bias does not reach. So
    the bias here includes that bias through all nine taps, and along the border the part of the
    taps outside the image is subtracted.

    Args:
        transposed: the 2x2 transposed convolution, stride 2.
        weight: of the 3x3 convolution, (out, transposed.out_channels, 3, 3).
        bias: of the 3x3 convolution, (out,), or None.
    """

    def __init__(self, transposed: nn.ConvTranspose2d, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        out_channels, middle_channels = weight.shape[:2]
        in_channels = transposed.in_channels
        self.out_channels = out_channels

        # Each pair of a 3x3 tap and a 2x2 tap adds to one tap of one phase.
        pairs = weight.permute(2, 3, 0, 1).reshape(-1, middle_channels) @ (
            transposed.weight.transpose(0, 1).reshape(middle_channels, -1)
        )
        pairs = pairs.view(3, 3, out_channels, in_channels, 2, 2)
        merged = weight.new_zeros(2, 2, out_channels, in_channels, 2, 2)
        for row_phase, row_tap in ((a, t) for a in range(2) for t in range(3)):
            low_row, upper_row = divmod(row_phase + row_tap - 1, 2)
            for column_phase, column_tap in ((b, t) for b in range(2) for t in range(3)):
                low_column, upper_column = divmod(column_phase + column_tap - 1, 2)
                merged[
                    row_phase, column_phase, :, :,
                    low_row - row_phase + 1, low_column - column_phase + 1,
                ] += pairs[row_tap, column_tap, :, :, upper_row, upper_column]  # fmt: skip

        through_taps = torch.einsum("omrc,m->orc", weight, transposed.bias)
        total = through_taps.sum(dim=(1, 2)) + (0 if bias is None else bias)
        self.phases = Convolution(merged.flatten(0, 2), total.repeat(4))
        # Parts of the taps above and below, left and right of the image, and outside its corners.
        self.rows_outside = nn.Parameter(through_taps[:, ::2].sum(dim=2, keepdim=True))
        self.columns_outside = nn.Parameter(through_taps[:, :, ::2].sum(dim=1, keepdim=True))
        self.corners_outside = nn.Parameter(through_taps[:, ::2, ::2].clone())

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, 2H, 2W)."""
        count, _, rows, columns = features.shape
        phases = self.phases(features).permute(0, 2, 3, 1)
        upsampled = features.new_empty(count, 2 * rows, 2 * columns, self.out_channels)
        by_phase = upsampled.view(count, rows, 2, columns, 2, self.out_channels)
        for phase, of_phase in enumerate(phases.split(self.out_channels, dim=3)):
            a, b = divmod(phase, 2)
            by_phase[:, :, a, :, b] = of_phase[:, a : a + rows, b : b + columns]
        upsampled = upsampled.permute(0, 3, 1, 2)
        # Not `x[...] -= y`, after which Python assigns to x[...] too and copies it onto itself.
        upsampled[:, :, :: 2 * rows - 1].sub_(self.rows_outside)
        upsampled[:, :, :, :: 2 * columns - 1].sub_(self.columns_outside)
        upsampled[:, :, :: 2 * rows - 1, :: 2 * columns - 1].add_(self.corners_outside)
        return upsampled


class FoldedDecoder(nn.Module):
    """One decoder level. The convolution over a concatenation is a sum over its two halves."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        weight, bias = decoder.reduce.weight, decoder.reduce.bias
        of_features, of_skip = (half.contiguous() for half in weight.chunk(2, dim=1))
        self.attends = isinstance(decoder.attention, Attention)
        self.from_features = None
        if decoder.reduces_first:
            self.upsample = MergedUpsampling(decoder.upsample, weight, bias)
            if self.attends:  # the bias belongs to the convolution that ends in the ReLU
                self.from_features = Convolution(of_features, bias, relu=True)
                bias = None
            else:
                self.from_features = Convolution(of_features, None)
        else:
            self.upsample = MergedUpsampling(decoder.upsample, of_features, None)
        self.from_skip = Convolution(of_skip, bias)
        self.refine = nn.Sequential(*_folded(decoder.refine))

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        """Map features (N, in, H, W) to (N, out, 2H, 2W); `skip` is `from_skip`'s, overwritten."""
        features = self.upsample(features)
        if self.from_features is not None:
            features = self.from_features(features, skip)
        else:
            features = skip.add_(features)
            if self.attends:
                features = features.relu_()
        return self.refine(features.sigmoid_() if self.attends else features)


def _upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate maps bilinearly to a size, as `AttentionUNet` does."""
    if maps.shape[2:] == size:
        return maps
    return functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _max_pool(features: Tensor) -> Tensor:
    """Return the largest of each 2x2 pixels."""
    if features.device.type != "cpu":
        return functional.max_pool2d(features, 2)
    # On a CPU `max_pool2d` takes 5 times as long, for it also finds which pixel was the largest.
    rows = torch.maximum(features[:, :, ::2], features[:, :, 1::2])
    return torch.maximum(rows[..., ::2], rows[..., 1::2])


class SummedFusion(nn.Module):
    """The fusion of the supervised maps as a sum of one convolution for each level.

    The concatenation is not copied together: 0.83 (bfloat16) and 0.89 (fp32) times as long in the
    full-size network on a core of an EPYC.
    """

    def __init__(self, fusion: nn.Conv2d, levels: int) -> None:
        super().__init__()
        weights = [weight.contiguous() for weight in fusion.weight.chunk(levels, dim=1)]
        biases = [*[None] * (levels - 1), fusion.bias]  # of the last, which is computed first
        self.by_level = nn.ModuleList(map(Convolution, weights, biases))
        cast(Convolution, self.by_level[0]).relu = True

    def forward(self, supervised: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Map the list of (N, width, h, w), which is emptied, to (N, out, *size)."""
        *others, last = self.by_level
        total = last(_upsample(supervised.pop(), size))
        for layer in reversed(others):
            total = layer(_upsample(supervised.pop(), size), total)
        return total


class FoldedUNet(nn.Module):
    """An `AttentionUNet` for inference only; made by `fold`."""

    def __init__(self, network: AttentionUNet) -> None:
        super().__init__()
        first, *others = _folded(network.encoder)  # two for each stage
        first = Convolution(first.weight.sum(dim=1, keepdim=True), first.bias, relu=True)
        pairs = zip([first, *others[1::2]], others[::2], strict=True)
        self.stages = nn.ModuleList(nn.Sequential(*pair) for pair in pairs)
        self.decoders = nn.ModuleList(
            FoldedDecoder(cast(Decoder, decoder)) for decoder in network.decoders
        )
        self.supervision = nn.ModuleList(_folded(level)[0] for level in network.supervision)
        self.fusion = SummedFusion(_folded(network.fusion)[0], len(self.decoders))
        self.attends = isinstance(network.attention, Attention)
        self.head = network.head

    def forward(self, slices: Tensor) -> Tensor:
        """Return logits (N, num_classes, H, W) of z-scored slices (N, 1, H, W)."""
        rows, columns = slices.shape[2:]
        features, skips = slices, []
        for index, stage in enumerate(self.stages):
            if index > 0:
                features = _max_pool(features)
            features = stage(features)
            if index < len(self.decoders):
                # Only the skip's part of the decoder's sum is needed.
                decoder = cast(FoldedDecoder, self.decoders[-1 - index])
                skips.append(decoder.from_skip(features))

        supervised = []
        for level, supervision in zip(self.decoders, self.supervision, strict=True):
            features = level(features, skips.pop())
            supervised.append(supervision(features))
        del features

        # The fusion ends in a ReLU, so the attention is only a sigmoid.
        fused = self.fusion(supervised, (rows, columns))
        return self.head(fused.sigmoid_() if self.attends else fused)


def _folded(layers: nn.Module) -> list[Convolution]:
    """Return each convolution of a sequence with its batch normalisation and ReLU."""
    folded = []
    for layer, norm in pairwise(layers.children()):
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            fused = fuse_conv_bn_eval(layer, norm)
            folded.append(Convolution(fused.weight, fused.bias, relu=True))
    return folded


@torch.no_grad()
def fold(network: AttentionUNet) -> FoldedUNet:
    """Return the inference form of a trained network, without the classifiers.

    The network must be in fp32, for folding in half precision is inexact, and must not be used
    afterwards: the result takes over its weights. H and W of slices are multiples of 16.
    """
    return FoldedUNet(network.eval()).requires_grad_(False)

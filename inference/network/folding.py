"""Fold a trained network into one that computes the same, except for rounding, in less time.

Batch normalisation goes into the convolutions; the first convolution's three equal input channels
become one; a transposed convolution and the convolution after it become one at the low resolution;
a convolution over a concatenation becomes a sum of two.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import fuse_conv_bn_eval

from .fusion import ConvolutionRelu, add_convolution
from .model import Attention, AttentionUNet, Decoder

# With fewer channels torch interpolates channels-last maps three times slower on a CPU than
# contiguous ones.
_FEW_CHANNELS = 8


def _convolution(weight: Tensor, bias: Tensor | None, *, padding: int = 1) -> nn.Conv2d:
    """Return a convolution with these weights (out, in, rows, columns)."""
    out_channels, in_channels, *size = weight.shape
    layer = nn.Conv2d(
        in_channels, out_channels, size, padding=padding, bias=bias is not None, device="meta"
    )
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    return layer


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
        self.phases = _convolution(merged.flatten(0, 2), total.repeat(4))
        # Parts of the taps above and below, left and right of the image, and beyond its corners.
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
        self.from_skip = _convolution(of_skip, bias)
        self.reduces_first = decoder.reduces_first
        if self.reduces_first:
            self.from_features = _convolution(of_features, None)
            after_upsampling = (weight, bias)
        else:
            after_upsampling = (of_features, None)
        self.upsample = MergedUpsampling(decoder.upsample, *after_upsampling)
        self.attends = isinstance(decoder.attention, Attention)
        self.refine = _folded(decoder.refine)

    def fuse_on_cuda(self) -> None:
        """Move the bias to the convolution that cuDNN fuses (`FoldedUNet.fuse_on_cuda`)."""
        if self.reduces_first and self.attends:
            self.from_features.bias, self.from_skip.bias = self.from_skip.bias, None

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        """Map features (N, in, H, W) to (N, out, 2H, 2W); `skip` is `from_skip`'s, overwritten."""
        features = self.upsample(features)
        if self.reduces_first:
            features = add_convolution(skip, features, self.from_features, relu=self.attends)
        else:
            features = skip.add_(features)
            if self.attends:
                features = features.relu_()
        return self.refine(features.sigmoid_() if self.attends else features)


def _upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate maps bilinearly to a size, as `AttentionUNet` does."""
    if maps.shape[2:] == size:
        return maps
    if maps.device.type == "cpu" and maps.shape[1] < _FEW_CHANNELS:
        maps = maps.contiguous()
    return functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _max_pool(features: Tensor) -> Tensor:
    """Return the largest of each 2x2 pixels."""
    if features.device.type != "cpu":
        return functional.max_pool2d(features, 2)
    # On a CPU `max_pool2d` takes 5 times as long, for it also finds which pixel was the largest.
    rows = torch.maximum(features[:, :, ::2], features[:, :, 1::2])
    return torch.maximum(rows[..., ::2], rows[..., 1::2])


class CopiedFusion(nn.Module):
    """The fusion of supervised maps, which are upsampled one by one into the concatenation.

    Args:
        fusion: over the concatenation of all levels.
        width: channels of each level's map.
    """

    def __init__(self, fusion: ConvolutionRelu, width: int) -> None:
        super().__init__()
        self.fusion = fusion
        self.width = width

    def forward(self, supervised: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Map the list of (N, width, h, w), which is emptied, to (N, out, *size)."""
        count, levels = len(supervised[0]), len(supervised)
        fused = supervised[0].new_empty(count, *size, levels * self.width).permute(0, 3, 1, 2)
        for level in reversed(range(levels)):
            channels = slice(level * self.width, (level + 1) * self.width)
            fused[:, channels] = _upsample(supervised.pop(), size)
        return self.fusion(fused)


class SummedFusion(nn.Module):
    """The same fusion as a sum of one convolution for each level, which copies nothing."""

    def __init__(self, fusion: ConvolutionRelu, width: int) -> None:
        super().__init__()
        convolution = fusion.convolution
        self.by_level = nn.ModuleList(
            _convolution(weight.contiguous(), None)
            for weight in convolution.weight.split(width, dim=1)
        )
        self.by_level[-1].bias = convolution.bias  # the first that runs

    def forward(self, supervised: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Map the list of (N, width, h, w), which is emptied, to (N, out, *size)."""
        *others, last = self.by_level
        total = last(_upsample(supervised.pop(), size))
        for layer in reversed(others):
            maps = _upsample(supervised.pop(), size)
            total = add_convolution(total, maps, layer, relu=not supervised)
        return total


class FoldedUNet(nn.Module):
    """An `AttentionUNet` for inference only; made by `fold`."""

    def __init__(self, network: AttentionUNet) -> None:
        super().__init__()
        layers = list(_folded(network.encoder))
        first = layers[0].convolution
        layers[0] = ConvolutionRelu(_convolution(first.weight.sum(dim=1, keepdim=True), first.bias))
        pools = [index for index, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        starts = [0, *(index + 1 for index in pools)]
        self.stages = nn.ModuleList(
            nn.Sequential(*layers[start:stop])
            for start, stop in zip(starts, [*pools, None], strict=True)
        )
        self.decoders = nn.ModuleList(map(FoldedDecoder, network.decoders))
        self.supervision = nn.ModuleList(map(_folded, network.supervision))
        (fusion,) = _folded(network.fusion)
        width = fusion.convolution.in_channels // len(self.supervision)
        # The sum takes 0.54 (bfloat16) and 0.76 (fp32) times as long as the copy with maps of 16
        # channels, 0.87 and 1.19 times with 4 (two cores of an EPYC, 16 output channels).
        sums = width >= fusion.convolution.out_channels
        self.fusion = SummedFusion(fusion, width) if sums else CopiedFusion(fusion, width)
        self.attends = isinstance(network.attention, Attention)
        self.head = network.head

    def fuse_on_cuda(self) -> None:
        """Use cuDNN's fused convolutions on CUDA; other devices are not affected."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.fuses_on_cuda = True
        for decoder in self.decoders:
            decoder.fuse_on_cuda()

    def forward(self, slices: Tensor) -> Tensor:
        """Return logits (N, num_classes, H, W) of z-scored slices (N, 1, H, W)."""
        rows, columns = slices.shape[2:]
        features, skips = slices, []
        for level, stage in enumerate(self.stages):
            if level > 0:
                features = _max_pool(features)
            features = stage(features)
            if level < len(self.decoders):
                # Only the skip's part of the decoder's sum is needed.
                skips.append(self.decoders[-1 - level].from_skip(features))

        supervised = []
        for decoder, supervision in zip(self.decoders, self.supervision, strict=True):
            features = decoder(features, skips.pop())
            supervised.append(supervision(features))
        del features

        # The fusion ends in a ReLU, so the attention is only a sigmoid.
        fused = self.fusion(supervised, (rows, columns))
        return self.head(fused.sigmoid_() if self.attends else fused)


def _folded(layers: nn.Sequential) -> nn.Sequential:
    """Return the layers with each convolution, batch normalisation and ReLU as one."""
    folded = nn.Sequential()
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            folded.append(ConvolutionRelu(fuse_conv_bn_eval(folded.pop(-1), layer)))
        elif not isinstance(layer, nn.ReLU):
            folded.append(layer)
    return folded


@torch.no_grad()
def fold(network: AttentionUNet) -> FoldedUNet:
    """Return the inference form of a trained network.

    Args:
        network: in fp32, for folding in half precision is inexact. It must not be used afterwards:
            the result takes over its weights.

    Returns:
        A module from z-scored slices (N, 1, H, W), H and W multiples of 16, to logits (N,
        num_classes, H, W), without the classifiers, which only training needs.
    """
    return FoldedUNet(network.eval()).requires_grad_(False)

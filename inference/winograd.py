"""3x3 convolutions in fp32 on a CPU with a quarter of the multiplications (Winograd's F(4x4, 3x3)).

Sixteen outputs of a 3x3 convolution take 144 multiplications for each pair of channels, as a matrix
product over them does; from a 6x6 tile, linearly mapped, 36 (A. Lavin and S. Gray, "Fast algorithms
for convolutional neural networks", CVPR 2016). The maps of tiles cost by the channel, the
products by the pair of channels, so that it pays where there are many. Exact apart from rounding.

Only where the processor has no half precision: with AMX, bfloat16 is faster still.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

_OUTPUTS = 4  # rows and columns of outputs that a tile gives
_TILE = _OUTPUTS + 2

# Fewer channels gain nothing; fewer tiles do not fill a matrix product
# (benchmark/results/waterfall-cpu.md).
_FEWEST_CHANNELS = 256
_FEWEST_TILES = 32

# Rows of tiles are mapped at once until their fp32 inputs have so many bytes: about as many as the
# mapped weights, which each strip reads through once.
_STRIP_BYTES = 16 << 20

# Lavin and Gray's matrices for the points 0, 1, -1, 2, -2 and infinity, without their common
# denominators in the inputs' map.
_INPUTS = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
_WEIGHTS = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
_SUMS = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


def suits(layer: nn.Conv2d) -> bool:
    """Whether a convolution is one of those that this makes faster."""
    return (
        (layer.kernel_size, layer.padding) == ((3, 3), (1, 1))
        and layer.stride == layer.dilation == (1, 1)
        and layer.groups == 1
        and min(layer.in_channels, layer.out_channels) >= _FEWEST_CHANNELS
    )


def mapped_bytes(network: nn.Module) -> int:
    """Bytes that `map_weights` takes for a network's weights in fp32, beside these."""
    values = sum(layer.weight.numel() for layer in network.modules() if _is_suited(layer))
    return 4 * values * _TILE**2 // 9


@torch.no_grad()
def map_weights(network: nn.Module) -> None:
    """Let those of a network's convolutions that `suits` run as `WinogradConvolution`."""
    for name, child in network.named_children():
        if _is_suited(child):
            setattr(network, name, WinogradConvolution(child).requires_grad_(False))
        else:
            map_weights(child)


def _is_suited(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and suits(layer)


class WinogradConvolution(nn.Conv2d):
    """The same function as a convolution that `suits`.

    Args:
        layer: in fp32. It gives up its weights; mapped ones take four times their memory on top.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(
            layer.in_channels,
            layer.out_channels,
            3,
            padding=1,
            bias=layer.bias is not None,
            device="meta",
        )
        self.weight, self.bias = layer.weight, layer.bias
        of_weights = torch.tensor(_WEIGHTS, dtype=torch.float64)
        of_weights = torch.kron(of_weights, of_weights)  # (points, taps)
        by_tap = layer.weight.detach().permute(2, 3, 1, 0).double().flatten(0, 1)
        mapped = (of_weights @ by_tap.flatten(1)).float().view(-1, *by_tap.shape[1:])
        self.register_buffer("mapped", mapped)  # (points, in, out)
        for name, rows in (("of_inputs", _INPUTS), ("of_sums", _SUMS)):
            matrix = torch.tensor(rows, dtype=torch.float32)
            self.register_buffer(name, torch.kron(matrix, matrix))

    def forward(self, features: Tensor) -> Tensor:
        """(N, in, H, W), fp32, to (N, out, H, W), channels last."""
        count, in_channels, rows, columns = features.shape
        tile_rows, tile_columns = -(-rows // _OUTPUTS), -(-columns // _OUTPUTS)
        if tile_rows * tile_columns < _FEWEST_TILES:
            return super().forward(features)
        below, right = tile_rows * _OUTPUTS - rows, tile_columns * _OUTPUTS - columns
        padded = functional.pad(features.permute(0, 2, 3, 1), (0, 0, 1, 1 + right, 1, 1 + below))
        image, row, column, _ = padded.stride()
        tiles = padded.as_strided(
            (count, _TILE, _TILE, tile_rows, tile_columns, in_channels),
            (image, row, column, _OUTPUTS * row, _OUTPUTS * column, 1),
        )
        convolved = features.new_empty(
            (count, tile_rows, _OUTPUTS, tile_columns, _OUTPUTS, self.out_channels)
        )
        by_tile = convolved.permute(0, 2, 4, 1, 3, 5)

        strip = max(1, _STRIP_BYTES // (4 * _TILE**2 * tile_columns * in_channels))
        for index in range(count):
            for start in range(0, tile_rows, strip):
                inputs = tiles[index, :, :, start : start + strip].reshape(_TILE**2, -1)
                mapped = (self.of_inputs @ inputs).view(_TILE**2, -1, in_channels)
                products = (mapped @ self.mapped).view(_TILE**2, -1)
                target = by_tile[index, :, :, start : start + strip]
                sums = (self.of_sums @ products).view(target.shape)
                if self.bias is None:
                    target.copy_(sums)
                else:
                    torch.add(sums, self.bias, out=target)
        convolved = convolved.flatten(3, 4).flatten(1, 2)[:, :rows, :columns]
        return convolved.permute(0, 3, 1, 2)

"""Turn logits into labels at the slice's own resolution."""

import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_SLICES_AT_ONCE = 4  # whose interpolated logits take less memory than the network's maps


def labels_of(logits: Tensor) -> Tensor:
    """Return the class of the largest logit, uint8: (..., classes) to (...)."""
    if logits.device.type == "cpu":  # numpy's argmax is nearly 3 times as fast on a short axis
        return torch.from_numpy(logits.float().numpy().argmax(axis=-1).astype(np.uint8))
    return logits.argmax(dim=-1).to(torch.uint8)


def upsampled_labels(logits: Tensor, factor: int) -> Tensor:
    """Return the labels of bilinearly upsampled logits, interpolating only along label borders.

    A pixel whose four neighbours at the low resolution have the same label has it too.

    Args:
        logits: (N, H, W, classes).
        factor: even, as for `interpolate(scale_factor=factor, align_corners=False)`.

    Returns:
        Labels (N, factor * H, factor * W), uint8.
    """
    # A cell has a low-resolution pixel at each corner. The outermost cells lie half outside the
    # image, where the values at the edge are repeated.
    rows, columns = (
        torch.arange(-1, length + 1, device=logits.device).clamp_(0, length - 1)
        for length in logits.shape[1:3]
    )
    labels = labels_of(logits)[:, rows][:, :, columns]
    corner = labels[:, :-1, :-1]
    others = (labels[:, :-1, 1:], labels[:, 1:, :-1], labels[:, 1:, 1:])
    mixed = (corner != others[0]) | (corner != others[1]) | (corner != others[2])
    n, row, column = mixed.nonzero(as_tuple=True)

    distance = (torch.arange(factor, device=logits.device) + 0.5) / factor
    shares = (1 - distance, distance)
    parts = (
        torch.kron(shares[below], shares[right])[:, None]
        * logits[n, rows[row + below], columns[column + right]].float()[:, None]
        for below in range(2)
        for right in range(2)
    )
    # (cells, pixels of a cell, classes); a matrix product would make CUDA load cuBLAS.
    interpolated = functools.reduce(torch.add, parts)
    cells = corner[..., None].repeat(1, 1, 1, factor**2)
    cells[n, row, column] = labels_of(interpolated)

    cells = cells.unflatten(3, (factor, factor)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    inside = slice(factor // 2, -(factor // 2))
    return cells[:, inside, inside]


def interpolated_labels(logits: Tensor, factor: int) -> Tensor:
    """Return the same labels by interpolating all logits.

    That is more work, but the host need not wait to learn where the borders are.
    """
    parts = []
    for few in logits.split(_SLICES_AT_ONCE):
        maps = functional.interpolate(
            few.permute(0, 3, 1, 2).float(),
            scale_factor=factor,
            mode="bilinear",
            align_corners=False,
        )
        parts.append(maps.argmax(dim=1).to(torch.uint8))
    return torch.cat(parts)

"""Labels from logits: the largest, at the slice's own resolution."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

# Slices whose logits are interpolated everywhere at once, so that they take less than a batch's
# maps.
_FEW_SLICES = 4


def labels_of(logits: Tensor) -> Tensor:
    """The class of the largest logit: (..., classes) to (...), uint8."""
    if logits.device.type == "cpu":  # numpy is nearly 3 times as fast along so short an axis
        return torch.from_numpy(logits.float().numpy().argmax(axis=-1).astype(np.uint8))
    return logits.argmax(dim=-1).to(torch.uint8)


def upsampled_labels(logits: Tensor, factor: int) -> Tensor:
    """The labels of bilinearly upsampled logits, without building those.

    Where the four pixels between which a pixel is interpolated have the same largest logit, so has
    it. Only in the cells along the labels' borders are logits interpolated.

    Args:
        logits: (N, H, W, classes).
        factor: even, as for `interpolate(scale_factor=factor, align_corners=False)`.

    Returns:
        (N, factor * H, factor * W), uint8.
    """
    # Each cell has a pixel at each corner; of those around the border half lies outside, where the
    # edge's own values go on.
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
    interpolated = sum(
        torch.kron(shares[below], shares[right])[:, None]
        * logits[n, rows[row + below], columns[column + right]].float()[:, None]
        for below in range(2)
        for right in range(2)
    )  # (cells, pixels of a cell, classes); no matrix product, for which CUDA would load cuBLAS
    cells = corner[..., None].repeat(1, 1, 1, factor**2)
    cells[n, row, column] = labels_of(interpolated)

    cells = cells.unflatten(3, (factor, factor)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    inside = slice(factor // 2, -(factor // 2))
    return cells[:, inside, inside]


def interpolated_labels(logits: Tensor, factor: int) -> Tensor:
    """The same, with all logits interpolated: more work, for which nobody has to wait.

    Where the labels' borders are, `upsampled_labels` must ask the device before it can go on.
    """
    parts = []
    for few in logits.split(_FEW_SLICES):
        maps = functional.interpolate(
            few.permute(0, 3, 1, 2).float(),
            scale_factor=factor,
            mode="bilinear",
            align_corners=False,
        )
        parts.append(maps.argmax(dim=1).to(torch.uint8))
    return torch.cat(parts)

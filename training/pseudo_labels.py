"""Pseudo-labels: what a moving average of the network is sure of, where nobody looked.

A case annotated for some labels marks all others 0. There the cross-entropy knows only "background
or any label that was not looked for". The average of the network's weights, a steadier network than
the one that is trained (the mean teacher of Tarvainen and Valpola, NeurIPS 2017), predicts the same
augmented slices; where it is confident of a label outside the annotated set, that label is taught.
What it says of annotated labels and of background counts for nothing.
"""

import torch
from torch import Tensor, nn


def fill_unmarked(
    labels: Tensor, annotated: Tensor, probabilities: Tensor, threshold: float
) -> Tensor:
    """Labels with those that a teacher is confident of where nobody looked for them.

    Args:
        labels: (N, H, W), uint8.
        annotated: (N, C) bool, 0 among them, on the same device.
        probabilities: (N, C, H, W), the teacher's.
        threshold: the least probability of a pseudo-label; above 0.5 no two labels reach it.

    Returns:
        (N, H, W), uint8: changed only where `labels` is 0.
    """
    surest, found = probabilities.masked_fill(annotated[:, :, None, None], 0).max(dim=1)
    filled = (labels == 0) & (surest >= threshold)
    return torch.where(filled, found.to(labels.dtype), labels)


@torch.no_grad()
def pseudo_labelled(
    teacher: nn.Module,
    images: Tensor,
    labels: Tensor,
    annotated: Tensor,
    partly: list[int],
    threshold: float,
) -> Tensor:
    """Ask the teacher about the slices that are not annotated for every label.

    Args:
        teacher: network; put into evaluation.
        images: (N, 3, h, w), as for the network that is trained.
        labels: (N, h, w), uint8.
        annotated: (N, C) bool, on the device.
        partly: the slices that are not annotated for every label, ascending; known to the host.
        threshold: as for `fill_unmarked`.

    Returns:
        (N, h, w), uint8.
    """
    teacher.eval()
    filled = labels.clone()
    # In runs of neighbours: an index of host numbers would have to be sent to the device.
    for start, stop in _runs(partly):
        probabilities = teacher(images[start:stop]).float().softmax(dim=1)
        filled[start:stop] = fill_unmarked(
            labels[start:stop], annotated[start:stop], probabilities, threshold
        )
    return filled


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as half-open runs of neighbours."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs

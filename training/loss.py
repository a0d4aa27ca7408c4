"""The losses: cross-entropy for partly annotated cases, and soft Dice.

Shapes: probabilities (N, C, H, W), softmax over C; labels (N, H, W) integers, `IGNORED` where
nothing is known; annotated (N, C) bool, True for the labels annotated in the slice's case, and for
0. Other labels never occur in `labels`.

Both losses take probabilities, are made of gathers and matrix products, and build no one-hot maps:
at slim size on a CPU the loss of five outputs otherwise takes as long as the network.
"""

import torch
from torch import Tensor

IGNORED = 255
"""The label of pixels that have none: padding, and what augmentation brought in from outside."""

# Below this a probability is taken as this, in fp32 87 away from 0 in logits: log(0) has no slope.
_LEAST_PROBABILITY = torch.finfo(torch.float32).tiny


def marginal_cross_entropy(probabilities: Tensor, labels: Tensor, annotated: Tensor) -> Tensor:
    """Return the cross-entropy in which 0 means "background or any label that is not annotated".

    For a pixel marked y ≠ 0 the term is −log p_y; for one marked 0 it is
    −log(p_0 + Σ p_c over the c not in A), where A are the labels annotated. With A = all labels
    this is plain cross-entropy.

    Returns:
        The mean over the pixels that are not `IGNORED`; 0 if there are none.
    """
    unmarked = (~annotated).to(probabilities.dtype)
    unmarked[:, 0] = 1
    background = torch.einsum("nc,nchw->nhw", unmarked, probabilities)
    known = labels != IGNORED
    marked = probabilities.gather(1, labels.where(known, 0).long()[:, None])[:, 0]
    agreeing = torch.where(labels == 0, background, marked)
    terms = agreeing.clamp(min=_LEAST_PROBABILITY).log().where(known, 0)
    return -terms.sum() / known.sum().clamp(min=1)


def soft_dice_loss(probabilities: Tensor, labels: Tensor, annotated: Tensor) -> Tensor:
    """Return 1 − soft Dice, the mean over the foreground labels present in the batch.

    Sums run over the slices annotated for the label, and over the batch rather than slice by slice;
    labels that are not there do not count: averaged over absent organs, the loss drives every small
    organ to exactly 0.

    Returns:
        From 0 to 1; 0 if no foreground label is present.
    """
    classes = probabilities.shape[1]
    known = labels != IGNORED
    places = labels.where(known, 0).long()
    marked = probabilities.gather(1, places[:, None])[:, 0].where(known, 0)
    # On a CPU, which adds one value after another, nothing waits.
    parts = labels.shape[0] * labels.shape[1] if labels.is_cuda else 1
    overlap = _sum_by_label(marked, places, classes, parts)
    predicted = torch.einsum("nchw,nhw->nc", probabilities, known.to(probabilities.dtype))
    predicted = (predicted * annotated).sum(dim=0)
    size = _sum_by_label(known.to(marked.dtype), places, classes, parts)
    present = size > 0
    present[0] = False
    dice = 2 * overlap / (predicted + size).clamp(min=1e-6)
    return ((1 - dice) * present).sum() / present.sum().clamp(min=1)


def _sum_by_label(values: Tensor, labels: Tensor, classes: int, parts: int) -> Tensor:
    """Return the sum of the values (N, H, W) of each label, (classes,).

    Parts are added up by themselves and then together, a row of pixels each: into one bin a label,
    all of a CUDA device's threads would wait for one another.
    """
    bins = labels.reshape(parts, -1)
    if parts > 1:
        bins = bins + torch.arange(parts, device=labels.device)[:, None] * classes
    sums = values.new_zeros(parts * classes).index_add(0, bins.flatten(), values.flatten())
    return sums.view(parts, classes).sum(dim=0)


def deep_supervision_loss(
    outputs: list[Tensor],
    labels: Tensor,
    annotated: Tensor,
    *,
    cross_entropy: str,
    dice_weight: float,
) -> Tensor:
    """Return the mean over the final and the four supervised logits (paper section 2.2).

    Logits (N, C, H, W) may have any precision; the losses are computed in fp32. A "plain"
    cross-entropy, not "marginal", takes unmarked labels as background.
    """
    known = annotated if cross_entropy == "marginal" else torch.ones_like(annotated)
    total = torch.zeros((), device=labels.device)
    for logits in outputs:
        probabilities = logits.to(torch.float32, memory_format=torch.contiguous_format).softmax(1)
        total = total + marginal_cross_entropy(probabilities, labels, known)
        if dice_weight:
            total = total + dice_weight * soft_dice_loss(probabilities, labels, annotated)
    return total / len(outputs)

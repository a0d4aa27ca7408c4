"""The losses: cross-entropy that knows what a case's annotator did not look for, and soft Dice.

Shapes: probabilities (N, C, H, W), softmax over C; labels (N, H, W) integers, `IGNORED` where
nothing is known; annotated (N, C) bool, True for the labels that the slice's annotator looked for
(label 0 counts as looked for). A label outside that set never occurs in `labels`.

Both losses take probabilities, are made of gathers and matrix products, and build no one-hot maps;
training has their gradient in closed form. At slim size on a CPU the loss of five outputs otherwise
takes as long as the network.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

IGNORED = 255
"""The label of pixels that have none: padding, and what augmentation brought in from outside."""

# Below this a probability is taken as this, in fp32 87 away from 0 in logits: log(0) has no slope.
_LEAST_PROBABILITY = torch.finfo(torch.float32).tiny


def marginal_cross_entropy(probabilities: Tensor, labels: Tensor, annotated: Tensor) -> Tensor:
    """Cross-entropy in which 0 means "background or any label that was not looked for".

    For a pixel marked y ≠ 0 the term is −log p_y; for one marked 0 it is
    −log(p_0 + Σ p_c over the c not in A), where A are the labels annotated. With A = all labels
    this is plain cross-entropy.

    Returns:
        The mean over the pixels that are not `IGNORED`; 0 if there are none.
    """
    _, background = _background(probabilities, annotated)
    known = labels != IGNORED
    marked = _of_label(probabilities, labels, known)
    agreeing = torch.where(labels == 0, background, marked)
    terms = agreeing.clamp(min=_LEAST_PROBABILITY).log().where(known, 0)
    return -terms.sum() / known.sum().clamp(min=1)


def soft_dice_loss(probabilities: Tensor, labels: Tensor, annotated: Tensor) -> Tensor:
    """1 − soft Dice, the mean over the foreground labels present in the batch.

    Sums run over the slices annotated for the label, and over the batch rather than slice by slice;
    labels that are not there do not count: averaged over absent organs, the loss drives every small
    organ to exactly 0.

    Returns:
        From 0 to 1; 0 if no foreground label is present.
    """
    return _dice_sums(probabilities, labels, annotated).loss()


def _background(probabilities: Tensor, annotated: Tensor) -> tuple[Tensor, Tensor]:
    """What a pixel marked 0 may be: (N, C), 1 or 0, and the probability of it, (N, H, W)."""
    unmarked = (~annotated).to(probabilities.dtype)
    unmarked[:, 0] = 1
    return unmarked, torch.einsum("nc,nchw->nhw", unmarked, probabilities)


class _DiceSums(NamedTuple):
    """Of each label, (C,): soft overlap, predicted and marked size together, whether it counts."""

    overlap: Tensor
    sizes: Tensor
    present: Tensor

    def loss(self) -> Tensor:
        dice = 2 * self.overlap / self.sizes
        return ((1 - dice) * self.present).sum() / self.present.sum().clamp(min=1)


def _dice_sums(probabilities: Tensor, labels: Tensor, annotated: Tensor) -> _DiceSums:
    classes = probabilities.shape[1]
    known = labels != IGNORED
    places = labels.where(known, 0).long()
    marked = _of_label(probabilities, labels, known).where(known, 0)
    # On a CPU, which adds one value after another, nothing waits.
    parts = labels.shape[0] * labels.shape[1] if labels.is_cuda else 1
    overlap = _sum_by_label(marked, places, classes, parts)
    predicted = torch.einsum("nchw,nhw->nc", probabilities, known.to(probabilities.dtype))
    predicted = (predicted * annotated).sum(dim=0)
    size = _sum_by_label(known.to(marked.dtype), places, classes, parts)
    present = size > 0
    present[0] = False
    return _DiceSums(overlap, (predicted + size).clamp(min=1e-6), present)


def _sum_by_label(values: Tensor, labels: Tensor, classes: int, parts: int) -> Tensor:
    """The sum of the values (N, H, W) of each label, (classes,).

    Args:
        values, labels: of the same shape.
        classes: number of labels.
        parts: added up by themselves and then together, a row of pixels each: into one bin a label,
            all of a CUDA device's threads would wait for one another.
    """
    bins = labels.reshape(parts, -1)
    if parts > 1:
        bins = bins + torch.arange(parts, device=labels.device)[:, None] * classes
    sums = values.new_zeros(parts * classes).index_add(0, bins.flatten(), values.flatten())
    return sums.view(parts, classes).sum(dim=0)


def _of_label(probabilities: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """The probability of each pixel's own label, (N, H, W); of 0 where it is not known."""
    return probabilities.gather(1, labels.where(known, 0).long()[:, None])[:, 0]


def deep_supervision_loss(
    outputs: list[Tensor],
    labels: Tensor,
    annotated: Tensor,
    *,
    cross_entropy: str,
    dice_weight: float,
    pseudo: Tensor | None = None,
) -> Tensor:
    """The mean over the final and the four supervised logits (paper section 2.2).

    Args:
        outputs: logits (N, C, H, W), in any precision; the losses are computed in fp32.
        labels, annotated: as in this module's head.
        cross_entropy: "marginal" or "plain"; the plain one takes unmarked labels as background.
        dice_weight: of the soft Dice loss added to each cross-entropy.
        pseudo: labels with pseudo-labels among them, of which the cross-entropy alone learns: Dice
            sums over a label's voxels, and those of a pseudo-label are never all there.
    """
    looked_for = annotated if cross_entropy == "marginal" else torch.ones_like(annotated)
    taught = labels if pseudo is None else pseudo
    total = torch.zeros((), device=labels.device)
    for logits in outputs:
        total = total + _OfLogits.apply(logits, taught, looked_for, labels, annotated, dice_weight)
    return total / len(outputs)


class _OfLogits(Function):
    """Cross-entropy of the labels taught and weighted soft Dice of the labels marked."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        logits: Tensor,
        taught: Tensor,
        looked_for: Tensor,
        labels: Tensor,
        annotated: Tensor,
        dice_weight: float,
    ) -> Tensor:
        """The loss, in fp32."""
        probabilities = logits.to(torch.float32, memory_format=torch.contiguous_format).softmax(1)
        loss = marginal_cross_entropy(probabilities, taught, looked_for)
        ctx.save_for_backward(probabilities, taught, looked_for, labels, annotated)
        ctx.dice_weight, ctx.dice, ctx.dtype = dice_weight, None, logits.dtype
        if dice_weight:
            ctx.dice = _dice_sums(probabilities, labels, annotated)
            loss = loss + dice_weight * ctx.dice.loss()
        return loss

    @staticmethod
    def backward(ctx: FunctionCtx, slope: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient in the logits, in their precision."""
        gradient = _gradient(*ctx.saved_tensors, ctx.dice, ctx.dice_weight, slope)
        return gradient.to(ctx.dtype), None, None, None, None, None


def _gradient(
    p: Tensor,
    taught: Tensor,
    looked_for: Tensor,
    labels: Tensor,
    annotated: Tensor,
    dice: _DiceSums | None,
    dice_weight: float,
    slope: Tensor,
) -> Tensor:
    """The gradient in the logits, (N, C, H, W), of a loss times a slope.

    That of the cross-entropy is p − r, divided by the number of pixels: r is 1 at the label taught;
    at pixels marked 0 it is p over the background's probability, for what is part of that. That of
    the Dice is p (g − Σ g p), g being its gradient in the probabilities: for a label with overlap O
    and sizes S, of L labels, 2 O / (L S²) wherever it was looked for, less 2 / (L S) where it is.
    """
    known = taught != IGNORED
    mean = slope / known.sum().clamp(min=1)
    unmarked, background = _background(p, looked_for)
    outside = (mean / background.clamp(min=_LEAST_PROBABILITY)).where(taught == 0, 0)
    places = [taught.where(known, 0).long()]
    drawn_up = [mean.where(known & (taught != 0), 0)]
    everywhere, of_pixel = mean.expand(unmarked.shape), torch.zeros_like(background)
    if dice:
        overlap, sizes, present = dice
        weight = 2 * dice_weight * slope * present / (present.sum().clamp(min=1) * sizes)
        of_label = (weight * overlap / sizes) * annotated
        places.append(labels.where(known, 0).long())
        drawn_up.append((weight[places[-1]] * _of_label(p, labels, known)).where(known, 0))
        of_pixel = drawn_up[-1] - torch.einsum("nc,nchw->nhw", of_label, p)
        everywhere = everywhere + of_label
    gradient = everywhere[:, :, None, None] + of_pixel[:, None]
    gradient = gradient.expand_as(p).addcmul(unmarked[:, :, None, None], outside[:, None], value=-1)
    gradient.mul_(p).mul_(known[:, None])
    return gradient.scatter_add_(1, torch.stack(places, 1), -torch.stack(drawn_up, 1))

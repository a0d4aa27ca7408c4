"""The losses against closed forms, values and gradients."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from training.loss import (
    IGNORED,
    _sum_by_label,
    deep_supervision_loss,
    marginal_cross_entropy,
    soft_dice_loss,
)


def random_case(seed=0, count=3, classes=15, size=6):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn((count, classes, size, size), generator=generator, dtype=torch.double)
    annotated = torch.rand((count, classes), generator=generator) < 0.6
    annotated[:, 0] = True
    labels = torch.randint(0, classes, (count, size, size), generator=generator)
    labels[~annotated.gather(1, labels.flatten(1)).view_as(labels)] = 0
    labels[:, 0, :2] = IGNORED
    return logits.requires_grad_(), labels.to(torch.uint8), annotated


def test_marginal_cross_entropy_against_a_loop_over_pixels():
    logits, labels, annotated = random_case()
    loss = marginal_cross_entropy(logits.softmax(1), labels, annotated)
    (gradient,) = torch.autograd.grad(loss, logits)

    p = torch.softmax(logits.detach(), 1).numpy()
    terms, expected = [], np.zeros(p.shape)
    for n, row, column in np.argwhere(labels.numpy() != IGNORED):
        label = int(labels[n, row, column])
        members = [label] if label else [0, *np.flatnonzero(~annotated[n].numpy())]
        total = p[n, members, row, column].sum()
        terms.append(-np.log(total))
        expected[n, :, row, column] = p[n, :, row, column]
        expected[n, members, row, column] -= p[n, members, row, column] / total
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-10)
    np.testing.assert_allclose(gradient.numpy(), expected / len(terms), atol=1e-14)


def test_plain_cross_entropy_teaches_unmarked_labels_as_background():
    logits, labels, annotated = random_case(7)
    found = deep_supervision_loss([logits], labels, annotated, cross_entropy="plain", dice_weight=0)
    oracle = functional.cross_entropy(logits, labels.long(), ignore_index=IGNORED)
    assert found.item() == pytest.approx(oracle.item(), rel=1e-5)


def test_a_hopeless_pixel_has_a_finite_loss_and_gradient():
    logits = torch.tensor([0.0, 500.0, -500.0]).view(1, 3, 1, 1).requires_grad_()
    every = torch.ones((1, 3), dtype=torch.bool)
    loss = marginal_cross_entropy(logits.softmax(1), torch.full((1, 1, 1), 2), every)
    loss.backward()
    assert loss.item() > 80
    assert logits.grad.isfinite().all()


def test_soft_dice_is_that_of_present_annotated_labels_summed_over_the_batch():
    logits, labels, annotated = random_case(3)
    labels[labels == 7] = 0  # label 7 is nowhere
    loss = soft_dice_loss(logits.softmax(1), labels, annotated)

    p, y = torch.softmax(logits.detach(), 1).numpy(), labels.numpy()
    dice = []
    for label in range(1, 15):
        if not (y == label).any():
            continue
        overlap = size = 0.0
        for n in np.flatnonzero(annotated[:, label]):
            known = y[n] != IGNORED
            overlap += p[n, label][y[n] == label].sum()
            size += p[n, label][known].sum() + (y[n] == label).sum()
        dice.append(2 * overlap / size)
    assert len(dice) < 14
    assert loss.item() == pytest.approx(1 - np.mean(dice), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()
    assert (gradient[:, :, 0, :2] == 0).all()  # what is ignored teaches nothing


def test_soft_dice_without_any_label_is_zero_and_teaches_nothing():
    logits, _, annotated = random_case(4)
    loss = soft_dice_loss(logits.softmax(1), torch.zeros((3, 6, 6), dtype=torch.uint8), annotated)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()


def test_deep_supervision_is_the_mean_of_its_parts():
    cases = [random_case(seed)[0].float() for seed in range(5)]
    _, labels, annotated = random_case(6)
    found = deep_supervision_loss(
        cases, labels, annotated, cross_entropy="marginal", dice_weight=0.5
    )
    expected = np.mean(
        [
            marginal_cross_entropy(logits.softmax(1), labels, annotated).item()
            + 0.5 * soft_dice_loss(logits.softmax(1), labels, annotated).item()
            for logits in cases
        ]
    )
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("parts", [1, 2, 14])
def test_sums_by_label_are_those_of_bincount(parts):
    rng = np.random.default_rng(0)
    values, labels = rng.random((2, 7, 9)), rng.integers(0, 15, (2, 7, 9))
    found = _sum_by_label(torch.from_numpy(values), torch.from_numpy(labels), 15, parts)
    expected = np.bincount(labels.ravel(), values.ravel(), minlength=15)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)

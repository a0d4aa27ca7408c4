"""Pseudo-labels against a loop over pixels, and what of them the loss learns."""

import numpy as np
import pytest
import torch
from torch import nn

from training.loss import IGNORED, deep_supervision_loss, marginal_cross_entropy, soft_dice_loss
from training.pseudo_labels import _runs, fill_unmarked, pseudo_labelled
from training.recipe import Recipe, RecipeError


def case(seed=0):
    rng = np.random.default_rng(seed)
    probabilities = torch.from_numpy(rng.dirichlet(np.full(15, 0.08), (4, 8, 8))).movedim(-1, 1)
    annotated = torch.from_numpy(rng.random((4, 15)) < 0.5)
    annotated[:, 0] = True
    annotated[2] = True  # looked at for everything
    labels = torch.from_numpy(rng.integers(0, 15, (4, 8, 8))).to(torch.uint8)
    labels[~annotated.gather(1, labels.flatten(1).long()).view_as(labels)] = 0
    labels[:, 0] = IGNORED
    return probabilities, annotated, labels


def test_only_unmarked_pixels_get_labels_that_nobody_looked_for():
    probabilities, annotated, labels = case()
    found = fill_unmarked(labels, annotated, probabilities, 0.8).numpy()
    expected = labels.numpy().copy()
    for n, row, column in np.argwhere(expected == 0):
        for label in range(1, 15):
            if not annotated[n, label] and probabilities[n, label, row, column] >= 0.8:
                expected[n, row, column] = label
    assert np.array_equal(found, expected)
    assert (found[2] == labels[2].numpy()).all()
    assert (found != labels.numpy()).sum() > 10


class Teacher(nn.Module):
    """Says what it was told to say, of as many slices as it is asked about."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits, self.asked = probabilities.log(), []

    def forward(self, images):
        assert not self.training
        numbers = images[:, 0, 0, 0].long()
        self.asked += numbers.tolist()
        return self.logits[numbers]


def test_the_teacher_is_asked_about_partly_annotated_slices_alone():
    probabilities, annotated, labels = case()
    teacher = Teacher(probabilities)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8)
    found = pseudo_labelled(teacher, images, labels, annotated, [0, 1, 3], 0.8)
    assert teacher.asked == [0, 1, 3]
    assert torch.equal(found, fill_unmarked(labels, annotated, probabilities, 0.8))
    assert _runs([0, 1, 3, 4, 5, 9]) == [(0, 2), (3, 6), (9, 10)]


def test_the_cross_entropy_learns_pseudo_labels_and_dice_does_not():
    probabilities, annotated, labels = case(1)
    logits = probabilities.log().float()
    pseudo = fill_unmarked(labels, annotated, probabilities, 0.6)
    numbers = {"cross_entropy": "marginal", "dice_weight": 0.5}
    found = deep_supervision_loss([logits], labels, annotated, **numbers, pseudo=pseudo)
    p = logits.softmax(1)
    expected = marginal_cross_entropy(p, pseudo, annotated)
    expected = expected + 0.5 * soft_dice_loss(p, labels, annotated)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    without = deep_supervision_loss([logits], labels, annotated, **numbers)
    assert found.item() != pytest.approx(without.item(), rel=1e-3)


@pytest.mark.parametrize(
    "numbers",
    [
        {"pseudo_label_threshold": 0.9},
        {"pseudo_label_threshold": 0.3, "ema_decay": 0.9},
        {"pseudo_label_threshold": 0.9, "ema_decay": 0.9, "cross_entropy": "plain"},
    ],
)
def test_pseudo_labels_that_cannot_be_are_refused(numbers):
    with pytest.raises(RecipeError, match="pseudo"):
        Recipe(**numbers)

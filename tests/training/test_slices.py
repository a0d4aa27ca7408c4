"""Which slices are sampled, and how they are stacked, on the host and on the device."""

from collections import Counter

import numpy as np
import pytest
import torch
from small_data import cached, describe, labelled, write_case

from training.cases import annotated_mask
from training.loss import IGNORED
from training.recipe import Recipe
from training.slices import Slice, Slices, collate


def slices_of(cases, synthetic=(), **named):
    device = named.pop("device", None)
    return Slices(list(cases), list(synthetic), Recipe(**named), device)


def test_slices_depend_on_seed_and_position_alone(tmp_path):
    for seed, name in enumerate("abc"):
        write_case(tmp_path, name, seed=seed)
    cases = cached(tmp_path, tmp_path / "cache")
    slices = slices_of(cases, seed=3, label_balanced_fraction=0.5)
    forwards = [slices.slice_at(position) for position in range(20)]
    backwards = [slices.slice_at(position) for position in range(19, -1, -1)][::-1]
    assert all(torch.equal(a.hu, b.hu) for a, b in zip(forwards, backwards, strict=True))
    other = slices_of(cases, seed=4, label_balanced_fraction=0.5)
    assert any(not torch.equal(other.slice_at(p).hu, forwards[p].hu) for p in range(20))


def test_labels_then_patients_then_slices_are_sampled(tmp_path):
    """Label 1 in three cases of P and one of Q, whose labels are a model's; 7 in Q alone."""
    for name in "abcd":
        labels = labelled()
        labels[4:6, 3:6, 4] = 7 * (name == "d")
        write_case(tmp_path, name, labels)
    about = {name: {"patient": "P", "annotated_labels": [1, 7]} for name in "abc"}
    about["d"] = {"patient": "Q", "annotated_labels": [1, 7], "label_quality": "a model"}
    cases = cached(describe(tmp_path, **about), tmp_path / "cache")
    balanced = slices_of(cases, label_balanced_fraction=1.0)
    places = [balanced.locate(position) for position in range(1200)]
    counts = Counter((cases[number].patient, index == 4) for number, index in places)
    expected = {("Q", True): 1 / 2, ("P", False): 1 / 3, ("Q", False): 1 / 6}
    assert set(counts) == set(expected)
    for key, share in expected.items():
        assert counts[key] / 1200 == pytest.approx(share, abs=0.05)
    for places in (
        [slices_of(cases).locate(position) for position in range(1200)],
        [balanced.locate(position, plain=True) for position in range(1200)],
    ):
        assert max(Counter(places).values()) < 90  # of 24 slices, 50 each


def test_synthetic_slices_are_mixed_in(tmp_path):
    for name in "abcd":
        write_case(tmp_path, name)
    cases = cached(tmp_path, tmp_path / "cache")
    slices = slices_of(cases[:1], cases[1:], synthetic_fraction=0.3)
    counts = Counter(slices.locate(position)[0] for position in range(1200))
    for number, share in enumerate((0.7, 0.1, 0.1, 0.1)):
        assert counts[number] / 1200 == pytest.approx(share, abs=0.05)
    assert {slices.locate(p, plain=True)[0] for p in range(50)} == {0}
    alone = slices_of([], cases, synthetic_fraction=1.0)
    assert {alone.locate(p, plain=p % 2 == 0) for p in range(100)} == {(n, 0) for n in range(4)}


def test_slices_of_a_batch_share_their_middle():
    sizes = [(20, 40), (33, 17)]
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-999, 999, size, np.int16) for size in sizes]
    slices = [
        Slice(
            torch.from_numpy(hu),
            torch.ones(hu.shape, dtype=torch.uint8),
            annotated_mask((1,)),
            (-9.0, 9.0),
            1.5,
        )
        for hu in arrays
    ]
    batch = collate(slices, multiple=16)
    assert batch.hu.shape == (2, 1, 48, 48)
    around = [((14, 14), (4, 4)), ((7, 8), (15, 16))]
    for index, (rows, columns) in enumerate(sizes):
        padded = np.pad(arrays[index], around[index], mode="edge")
        assert np.array_equal(batch.hu[index, 0], padded)
        assert (batch.labels[index] == 1).sum() == rows * columns
        assert (batch.labels[index] == IGNORED).sum() == 48 * 48 - rows * columns


def test_slices_on_the_device_are_those_of_the_host(tmp_path):
    """One case is annotated for less than it shows: its label 7 counts as unmarked."""
    for seed, shape in enumerate([(12, 10, 6), (30, 25, 5), (9, 40, 5)]):
        labels = labelled(shape=shape)
        labels[4:6, 3:6, 4] = 7
        write_case(tmp_path, "abc"[seed], labels, seed=seed)
    describe(tmp_path, b={"annotated_labels": [1, 2]})
    cases = cached(tmp_path, tmp_path / "cache")
    host, device = (
        slices_of(cases, label_balanced_fraction=0.5, device=device)
        for device in (None, torch.device("cpu"))
    )
    seen = set()
    for position in range(40):
        one, other = host.slice_at(position), device.slice_at(position)
        assert torch.equal(one.hu, other.hu)
        assert torch.equal(one.labels, other.labels)
        annotated = tuple(np.flatnonzero(one.annotated).tolist())
        seen |= {(annotated, label) for label in one.labels.unique().tolist()}
    assert seen == {((0, 1, 2), 0), ((0, 1, 2), 1), *(((0, 1, 7), label) for label in (0, 1, 7))}

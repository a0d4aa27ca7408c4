"""Random slices of cached cases, and batches of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from training.cases import Case
from training.label_mapping import NUM_LABELS
from training.loss import IGNORED

_MODEL_LABELS_WEIGHT = 0.5


class Slice(NamedTuple):
    """One slice to train on, whether read or drawn.

    Attributes:
        hu: (rows, columns), int16.
        labels: (rows, columns), uint8; 0 where no annotated label is.
        annotated: (15,), bool: the labels looked for, 0 among them.
        window: to which the HU are clipped.
        pixel_mm: size of a pixel.
    """

    hu: np.ndarray
    labels: np.ndarray
    annotated: np.ndarray
    window: tuple[float, float]
    pixel_mm: float


def annotated_mask(labels: tuple[int, ...]) -> np.ndarray:
    """(15,) bool: True for the labels given and for 0."""
    mask = np.zeros(NUM_LABELS, bool)
    mask[[0, *labels]] = True
    return mask


def annotated_only(labels: np.ndarray, annotated: np.ndarray) -> np.ndarray:
    """A label map in which labels that nobody looked for are 0, as if they were unmarked."""
    return np.where(annotated, np.arange(NUM_LABELS), 0).astype(np.uint8)[labels]


@dataclass
class SliceDataset(Dataset):
    """An endless sequence of random slices: the one at a position depends on the seed alone.

    So a run that is taken up again, or divided over processes, draws the very slices that it would
    have drawn.

    Attributes:
        cases: cached.
        seed: of the draws.
        label_balanced_fraction: of the slices that are sampled by label: a label uniformly, then a
            patient that shows it (`_MODEL_LABELS_WEIGHT` for labels by a model), then one of the
            patient's slices; the others are sampled uniformly from all slices.
        synthesise: draws a slice with a generator, or None.
        synthetic_fraction: of the slices that come from it.
    """

    cases: list[Case]
    seed: int = 0
    label_balanced_fraction: float = 0.0
    synthesise: Callable[[np.random.Generator], Slice] | None = None
    synthetic_fraction: float = 0.0
    _all: np.ndarray = field(init=False, repr=False)
    _showing: list[tuple[list[np.ndarray], np.ndarray]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.cases:  # every slice is drawn
            return
        masks = [np.array(case.cached.slice_labels, np.int64) for case in self.cases]
        self._all = np.array(
            [(number, index) for number, mask in enumerate(masks) for index in range(len(mask))]
        )
        self._showing = []
        for label in range(1, NUM_LABELS):
            of_patient: dict[str, list[tuple[int, int]]] = {}
            weights: dict[str, float] = {}
            for number, (case, mask) in enumerate(zip(self.cases, masks, strict=True)):
                shown = np.flatnonzero(mask >> label & 1)
                if label in case.annotated and len(shown):
                    of_patient.setdefault(case.patient, []).extend((number, i) for i in shown)
                    weights[case.patient] = 1.0 if case.expert else _MODEL_LABELS_WEIGHT
            if of_patient:
                share = np.array(list(weights.values()))
                rows = [np.array(of_patient[patient]) for patient in weights]
                self._showing.append((rows, share / share.sum()))

    def locate(self, position: int) -> tuple[int, int] | np.random.Generator:
        """Return the case and the slice at a position, or the generator to draw a slice with."""
        rng, synthetic = np.random.default_rng((self.seed, position)).spawn(2)
        if rng.random() < self.synthetic_fraction:
            return synthetic
        rows = self._all
        if rng.random() < self.label_balanced_fraction and self._showing:
            patients, share = self._showing[rng.integers(len(self._showing))]
            rows = patients[rng.choice(len(patients), p=share)]
        number, index = rows[rng.integers(len(rows))]
        return int(number), int(index)

    def __getitem__(self, position: int) -> Slice:
        """Return the slice at a position, 0 or more, of the sequence."""
        place = self.locate(position)
        if isinstance(place, np.random.Generator):
            return self.synthesise(place)
        number, index = place
        case = self.cases[number]
        annotated = annotated_mask(case.annotated)
        return Slice(
            hu=np.array(case.cached.hu[index]),
            labels=annotated_only(case.cached.label_map[index], annotated),
            annotated=annotated,
            window=case.cached.window,
            pixel_mm=case.cached.pixel_mm,
        )


class Batch(NamedTuple):
    """Slices stacked.

    Attributes:
        hu: (N, 1, H, W), int16.
        labels: (N, H, W), uint8, `IGNORED` in the padding.
        annotated: (N, 15), bool.
        window: (N, 2), float32, HU.
        pixel_mm: (N,), float32.
    """

    hu: Tensor
    labels: Tensor
    annotated: Tensor
    window: Tensor
    pixel_mm: Tensor


def collate(slices: list[Slice], multiple: int) -> Batch:
    """Stack slices, padded on all sides to the largest of them: their middles are in one place.

    The image's padding repeats its edge, as in inference; the labels' is `IGNORED`.

    Args:
        slices: of any sizes.
        multiple: of which rows and columns are to be.
    """
    rows, columns = (
        -(-max(part.hu.shape[axis] for part in slices) // multiple) * multiple for axis in (0, 1)
    )
    hu = np.empty((len(slices), 1, rows, columns), np.int16)
    labels = np.full((len(slices), rows, columns), IGNORED, np.uint8)
    for index, part in enumerate(slices):
        height, width = part.hu.shape
        top, left = (rows - height) // 2, (columns - width) // 2
        around = ((top, rows - height - top), (left, columns - width - left))
        hu[index, 0] = np.pad(part.hu, around, mode="edge")
        labels[index, top : top + height, left : left + width] = part.labels
    return Batch(
        hu=torch.from_numpy(hu),
        labels=torch.from_numpy(labels),
        annotated=torch.from_numpy(np.stack([part.annotated for part in slices])),
        window=torch.tensor([part.window for part in slices], dtype=torch.float32),
        pixel_mm=torch.tensor([part.pixel_mm for part in slices], dtype=torch.float32),
    )

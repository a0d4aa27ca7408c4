"""Random slices of cases that were read, and batches of them."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from training.cases import Case, annotated_mask, annotated_only
from training.label_mapping import NUM_LABELS
from training.loss import IGNORED
from training.recipe import Recipe

_MODEL_LABELS_WEIGHT = 0.5

_BYTES = 3  # of a pixel: int16 HU and uint8 label
_LARGEST_PART = 0.3  # of a device's free memory, the rest is for the network


class Slice(NamedTuple):
    """One slice to train on: labels are 0 where no annotated label is, window in HU."""

    hu: Tensor  # (rows, columns), int16
    labels: Tensor  # (rows, columns), uint8
    annotated: np.ndarray  # (15,), bool: the labels annotated, and 0
    window: tuple[float, float]  # to which the HU are clipped
    pixel_mm: float


class Batch(NamedTuple):
    """Slices stacked."""

    hu: Tensor  # (N, 1, H, W), int16
    labels: Tensor  # (N, H, W), uint8, `IGNORED` in the padding
    annotated: Tensor  # (N, 15), bool
    window: Tensor  # (N, 2), float32
    pixel_mm: Tensor  # (N,), float32


def fit_on(cases: list[Case], device: torch.device) -> bool:
    """Return whether all slices leave a CUDA device enough memory to train with them."""
    if device.type != "cuda":
        return False
    pixels = sum(int(np.prod(case.cached.shape)) for case in cases)
    return pixels * _BYTES < _LARGEST_PART * torch.cuda.mem_get_info(device)[0]


class Slices:
    """An endless sequence of random slices: the one at a position depends on the seed alone.

    So a run that is resumed, or divided over processes, gets the slices that it would have had.
    """

    def __init__(
        self,
        cases: list[Case],
        synthetic: list[Case],
        recipe: Recipe,
        device: torch.device | None = None,
    ) -> None:
        """Take the cases; synthetic ones are of one slice each.

        Of the slices of `cases`, the recipe's `label_balanced_fraction` are sampled by label: a
        label uniformly, then a patient that shows it (`_MODEL_LABELS_WEIGHT` for labels by a
        model), then one of the patient's slices; the others are sampled uniformly. A device holds
        all slices; without one they are read when they are needed.
        """
        self.cases, self.real, self.recipe = [*cases, *synthetic], len(cases), recipe
        self._resident: list[tuple[Tensor, Tensor]] = []
        for case in self.cases if device else ():
            labels = annotated_only(case.cached.label_map, case.annotated)
            hu = torch.from_numpy(np.array(case.cached.hu))
            self._resident.append((hu.to(device), torch.from_numpy(labels).to(device)))
        masks = [np.array(case.cached.slice_labels, np.int64) for case in cases]
        self._all = np.array(
            [(number, index) for number, mask in enumerate(masks) for index in range(len(mask))]
        )
        self._showing: list[tuple[list[np.ndarray], np.ndarray]] = []  # patients' slices, by label
        for label in range(1, NUM_LABELS):
            of_patient: dict[str, list[tuple[int, int]]] = {}
            weights: dict[str, float] = {}
            for number, (case, mask) in enumerate(zip(cases, masks, strict=True)):
                shown = np.flatnonzero(mask >> label & 1).tolist()
                if label in case.annotated and shown:
                    of_patient.setdefault(case.patient, []).extend((number, i) for i in shown)
                    weights[case.patient] = 1.0 if case.files.expert else _MODEL_LABELS_WEIGHT
            if of_patient:
                share = np.array(list(weights.values()))
                rows = [np.array(of_patient[patient]) for patient in weights]
                self._showing.append((rows, share / share.sum()))

    def locate(self, position: int, *, plain: bool = False) -> tuple[int, int]:
        """Return the numbers of the case and the slice at a position.

        Plain ones are sampled uniformly, and synthetic only where there are no others.
        """
        rng, synthetic = np.random.default_rng((self.recipe.seed, position)).spawn(2)
        is_synthetic = rng.random() < self.recipe.synthetic_fraction and not plain
        if is_synthetic or not self.real:
            return int(synthetic.integers(self.real, len(self.cases))), 0
        rows = self._all
        balanced = rng.random() < self.recipe.label_balanced_fraction
        if balanced and self._showing and not plain:
            patients, share = self._showing[rng.integers(len(self._showing))]
            rows = patients[rng.choice(len(patients), p=share)]
        number, index = rows[rng.integers(len(rows))]
        return int(number), int(index)

    def slice_at(self, position: int, *, plain: bool = False) -> Slice:
        """Return the slice at a position, sampled as `locate` does."""
        number, index = self.locate(position, plain=plain)
        case = self.cases[number]
        if self._resident:
            hu, labels = (part[index] for part in self._resident[number])
        else:
            known = annotated_only(case.cached.label_map[index], case.annotated)
            hu, labels = torch.from_numpy(np.array(case.cached.hu[index])), torch.from_numpy(known)
        annotated, (_, row_mm, column_mm) = annotated_mask(case.annotated), case.cached.spacing
        return Slice(hu, labels, annotated, case.cached.window, (row_mm * column_mm) ** 0.5)


def collate(slices: list[Slice], multiple: int) -> Batch:
    """Stack slices, padded on all sides to the largest of them: their middles are in one place.

    The image's padding repeats its edge, as in inference; the labels' is `IGNORED`. Rows and
    columns become a multiple of `multiple`.
    """
    rows, columns = (
        -(-max(part.hu.shape[axis] for part in slices) // multiple) * multiple for axis in (0, 1)
    )
    hu, labels = [], []
    for part in slices:
        height, width = part.hu.shape
        top, left = (rows - height) // 2, (columns - width) // 2
        around = (left, columns - width - left, top, rows - height - top)
        # In float32, which torch can pad by the edge and which holds int16 exactly.
        hu.append(functional.pad(part.hu[None].float(), around, mode="replicate").short())
        labels.append(functional.pad(part.labels, around, value=IGNORED))
    return Batch(
        hu=torch.stack(hu),
        labels=torch.stack(labels),
        annotated=torch.from_numpy(np.stack([part.annotated for part in slices])),
        window=torch.tensor([part.window for part in slices], dtype=torch.float32),
        pixel_mm=torch.tensor([part.pixel_mm for part in slices], dtype=torch.float32),
    )

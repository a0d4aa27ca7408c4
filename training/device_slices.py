"""The slices of a training set on the device: a step waits for no reader."""

import dataclasses

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from inference.memory import cpu_limit
from training.draws import to_device
from training.loss import IGNORED
from training.slices import Batch, SliceDataset, annotated_mask, annotated_only

DRAWN = 1000
"""Synthetic slices, which are drawn beforehand and used again and again."""

_BYTES = 3  # of a pixel: int16 HU and uint8 label
_LARGEST_PART = 0.3  # of a device's free memory, the rest is for the network


def fits(dataset: SliceDataset, device: torch.device) -> bool:
    """Return whether a data set's slices leave a CUDA device enough memory to train with them."""
    if device.type != "cuda":
        return False
    pixels = sum(int(np.prod(case.cached.shape)) for case in dataset.cases)
    pixels += DRAWN * 512 * 512 * bool(dataset.synthetic_fraction)
    return pixels * _BYTES < _LARGEST_PART * torch.cuda.mem_get_info(device)[0]


class DeviceSlices:
    """All slices of a data set, one after another in one array of HU and one of labels."""

    def __init__(self, dataset: SliceDataset, device: torch.device, multiple: int) -> None:
        """Send them; synthetic ones are drawn before, by all cores.

        Args:
            dataset: of which slices will be asked for.
            device: to hold them.
            multiple: of which a batch's rows and columns are to be.
        """
        self.device, self.multiple = device, multiple
        entries = [
            (
                known.hu,
                known.label_map,
                annotated_mask(case.annotated),
                known.window,
                known.pixel_mm,
            )
            for case in dataset.cases
            for known in [case.cached]
        ]
        self.real = len(entries)
        if dataset.synthetic_fraction:
            drawing = dataclasses.replace(dataset, cases=[], synthetic_fraction=1.0)
            loader = DataLoader(
                drawing, None, sampler=range(DRAWN), num_workers=cpu_limit(), collate_fn=tuple
            )
            entries += [(hu[None], labels[None], *rest) for hu, labels, *rest in loader]
        counts = [len(hu) for hu, *_ in entries]
        self.first = np.concatenate([[0], np.cumsum(counts)])
        self.sizes = np.repeat(np.array([hu.shape[1:] for hu, *_ in entries]), counts, axis=0)
        ends = np.cumsum(self.sizes.prod(axis=1))
        starts = ends - self.sizes.prod(axis=1)
        self.places = to_device(np.concatenate([starts[:, None], self.sizes], axis=1), device)
        self.annotated, self.window, self.pixel_mm = (
            torch.from_numpy(np.repeat(np.array(values), counts, axis=0))
            for values in list(zip(*entries, strict=True))[2:]
        )
        self.hu = torch.empty(int(ends[-1]), dtype=torch.int16, device=device)
        self.labels = torch.empty(int(ends[-1]), dtype=torch.uint8, device=device)
        for first, (hu, labels, annotated, *_) in zip(self.first, entries, strict=False):
            part = slice(starts[first], starts[first] + hu.size)
            self.hu[part] = torch.from_numpy(np.array(hu).reshape(-1))
            self.labels[part] = torch.from_numpy(annotated_only(labels, annotated).reshape(-1))

    def batch(self, dataset: SliceDataset, positions: range) -> Batch:
        """Return the slices at some positions of a data set's sequence, as `collate` stacks them.

        Args:
            dataset: of the same cases as that of which this was made.
            positions: of the sequence; a synthetic slice is any of those drawn beforehand.
        """
        numbers = np.empty(len(positions), np.int64)
        for row, place in enumerate(map(dataset.locate, positions)):
            if isinstance(place, tuple):
                numbers[row] = self.first[place[0]] + place[1]
            else:
                numbers[row] = place.integers(self.first[self.real], self.first[-1])
        rows, columns = -(-self.sizes[numbers].max(axis=0) // self.multiple) * self.multiple
        start, height, width = self.places[to_device(numbers, self.device)].unbind(1)
        y, inside_y = _centred(int(rows), height)
        x, inside_x = _centred(int(columns), width)
        pixels = (start[:, None] + y * width[:, None])[:, :, None] + x[:, None, :]
        inside = inside_y[:, :, None] & inside_x[:, None, :]
        return Batch(
            hu=self.hu[pixels][:, None],
            labels=torch.where(inside, self.labels[pixels], IGNORED),
            annotated=self.annotated[numbers],
            window=self.window[numbers].float(),
            pixel_mm=self.pixel_mm[numbers].float(),
        )


def _centred(count: int, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each of `count` places the nearest one of lines (N,) centred there, (N, count).

    Also whether it is inside the line: outside, its ends repeat.
    """
    last = sizes[:, None] - 1
    places = torch.arange(count, device=sizes.device) - (count - 1 - last) // 2
    nearest = places.clamp(min=0).minimum(last)
    return nearest, places == nearest

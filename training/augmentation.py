"""What happens to a batch on the device before the network sees it.

Slices are clipped to their volume's window, moved and deformed, area-averaged by the matrix
reduction, changed in intensity, and z-scored. Nothing is ever mirrored: in an abdomen left is not
right, and a patient lying prone is turned, not reflected. Parameters are drawn from one generator
per slice on the host (`draws.py`); noise, the elastic deformation and the factor of low resolution
are drawn for what of a batch a process has.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from inference.network.model import DOWNSAMPLING
from training.draws import Draws, draw
from training.loss import IGNORED
from training.recipe import Recipe
from training.slices import Batch


@dataclass(frozen=True)
class Intensities:
    """Mean and standard deviation, HU, of the training set's clipped voxels."""

    mean: float
    std: float

    @classmethod
    def within(cls, clip_hu: tuple[float, float]) -> "Intensities":
        """Return those for a range that all voxels are clipped to, whatever the data.

        The mean is the range's low end, so that the zeros by which convolutions pad are air.
        """
        low, high = clip_hu
        return cls(low, (high - low) / 4)


def prepare(
    batch: Batch,
    device: torch.device,
    recipe: Recipe,
    intensities: Intensities,
    rngs: list[np.random.Generator],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Turn a batch of slices into what the network and the loss take.

    Args:
        batch: on the host.
        device: of the network.
        recipe: its augmentation, `slice_size` and `matrix_reduction`.
        intensities: for the z-score.
        rngs: one for each slice.
        generator: on the device, for what is drawn there.

    Returns:
        Images (N, 3, h, w), float32, channels last, the channels alike; labels (N, h, w), uint8;
        h and w are the slice's rows and columns divided by the matrix reduction. There, a label is
        that of one pixel, at a place drawn anew for each slice, of each block of pixels averaged,
        so that the expected cross-entropy is that against the labels' parts of the block.
    """
    pixel_mm = batch.pixel_mm.tolist()
    window = batch.window.numpy()
    if recipe.clips:
        window = window.clip(*recipe.clips)
    draws = draw(recipe, window, pixel_mm, rngs, device)
    hu, labels = (part.to(device, non_blocking=True) for part in (batch.hu, batch.labels))
    low, high = (draws.window[:, index, None, None, None] for index in (0, 1))
    images = hu.float()
    if recipe.window_probability:
        images = _clip_tissue(images, draws.soft_tissue)
    images = images.clamp(low, high)
    images, labels = _move(images, labels, max(pixel_mm), recipe, draws, generator)
    step = recipe.matrix_reduction
    if step > 1:
        images = functional.avg_pool2d(images, step)
        labels = torch.stack(
            [
                part[row::step, column::step]
                for part, (row, column) in zip(labels, draws.places, strict=True)
            ]
        )
    if recipe.intensity_probability:
        images = _change_intensities(images, labels, low, high, recipe, draws, generator)
    images = (images - intensities.mean) / intensities.std
    images = images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    return images, labels


_AIR_BELOW_HU = -300.0
_BODY_ABOVE_HU = -200.0


def _clip_tissue(images: Tensor, soft_tissue: Tensor) -> Tensor:
    """Clip tissue to a window and keep gas, lung and what surrounds the body as they are.

    So look whole volumes whose HU were lost outside a window (`window_hu` in `training/cases.py`).

    Args:
        images: (N, C, H, W), HU.
        soft_tissue: (N, 2), the windows, HU; infinite where there is none.
    """
    low, high = (soft_tissue[:, index, None, None, None] for index in (0, 1))
    tissue = images > _AIR_BELOW_HU
    return torch.where(tissue, images.maximum(low).minimum(high), images)


def _move(
    images: Tensor,
    labels: Tensor,
    largest_pixel_mm: float,
    recipe: Recipe,
    draws: Draws,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Affine and elastic deformation, and the crop to `slice_size`, in one resampling.

    Images are interpolated bilinearly and continued by their edge; labels come from the nearest
    pixel and are `IGNORED` outside the slice.
    """
    rows, columns = images.shape[-2:]
    if not recipe.slice_size and not recipe.spatial_probability:
        return images, labels
    multiple = DOWNSAMPLING * recipe.matrix_reduction
    out_rows = out_columns = -(-recipe.slice_size // multiple) * multiple
    if not recipe.slice_size:
        out_rows, out_columns = rows, columns

    y = torch.arange(out_rows, device=images.device) - (out_rows - 1) / 2
    x = torch.arange(out_columns, device=images.device) - (out_columns - 1) / 2
    shifts = None
    if recipe.elastic_mm:
        distance = recipe.elastic_grid_mm / largest_pixel_mm
        points = [max(2, math.ceil(size / distance) + 1) for size in (out_rows, out_columns)]
        shape = (len(images), 2, *points)
        shifts = torch.randn(shape, generator=generator, device=images.device)
        # Smooth on an eighth of the pixels, then linear: cubic everywhere is slow on a CPU.
        eighth = (-(-out_rows // 8), -(-out_columns // 8))
        shifts = functional.interpolate(shifts, size=eighth, mode="bicubic", align_corners=True)
        shifts = functional.interpolate(
            shifts, size=(out_rows, out_columns), mode="bilinear", align_corners=True
        )
        shifts = shifts * _each(draws.elastic)
    # Where each pixel comes from, from -1 to 1 over the slice: (N, rows, columns, xy).
    grid = images.new_empty((len(images), out_rows, out_columns, 2))
    for axis, size in enumerate((columns, rows)):
        along_x, along_y, shift = draws.affine[:, axis, :, None, None].unbind(dim=1)
        part = along_x * x + along_y * y[:, None]
        if shifts is not None:
            part = part + shifts[:, axis]
        grid[..., axis] = part * (2 / size) + 2 * shift

    images = functional.grid_sample(
        images, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    # One is added, and 255 becomes 0: the zeros that come from outside are then IGNORED as well.
    shifted = (labels + 1).float()[:, None]
    shifted = functional.grid_sample(shifted, grid, mode="nearest", align_corners=False)
    return images, shifted[:, 0].to(torch.uint8) - 1


def _each(values: Tensor) -> Tensor:
    """One value for each slice, (N,), as (N, 1, 1, 1)."""
    return values[:, None, None, None]


def _change_intensities(
    images: Tensor,
    labels: Tensor,
    low: Tensor,
    high: Tensor,
    recipe: Recipe,
    draws: Draws,
    generator: torch.Generator,
) -> Tensor:
    """Change organs, contrast, brightness, gamma, blur, resolution and noise, each of some slices.

    Contrast turns around the mean of the body, not of the air beside it. What is at the window's
    low end stays there, as inference shows air.

    Args:
        images: (N, C, h, w), HU, within the windows.
        labels: (N, h, w), uint8.
        low, high: (N, 1, 1, 1), the volumes' windows, HU.
        recipe, draws, generator: as in `prepare`.
    """
    if recipe.organ_shift_hu:
        known = labels.where(labels != IGNORED, 0).flatten(1).long()
        shift = draws.organs.gather(1, known).view(labels.shape)[:, None]
        # Smoothed: a sharp step along the annotation would give the organ away.
        shift = functional.avg_pool2d(shift, 5, stride=1, padding=2, count_include_pad=False)
        images = images + shift * (images > _BODY_ABOVE_HU)  # not the gas in stomach and bowel
    body = images > _BODY_ABOVE_HU
    total = (images * body).sum(dim=(1, 2, 3), keepdim=True)
    mean = total / body.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    change = (images - mean) * (_each(draws.contrast) - 1) + _each(draws.brightness)
    # All of it from fat on, nothing of it in air: inference shows air at the window's low end.
    images = images + change * ((images - _AIR_BELOW_HU) / 200).clamp(0, 1)
    width = (high - low).clamp(min=1)
    images = ((images - low) / width).clamp(0, 1) ** _each(draws.gamma) * width + low
    if draws.largest_blur:
        images = _blur(images, draws.blur, draws.largest_blur)
    if draws.coarseness > 1:
        images = _coarsen(images, draws.coarseness, draws.coarse)
    if recipe.noise_hu:
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        images = images + noise * _each(draws.noise) * (images > low)
    return images.minimum(high).maximum(low)


def _blur(images: Tensor, sigmas: Tensor, largest: float) -> Tensor:
    """Gaussian blur, each slice by its own standard deviation in pixels (0: unchanged).

    Args:
        images: (N, C, h, w).
        sigmas: (N,).
        largest: of them, known to the host.
    """
    radius = max(1, math.ceil(3 * largest))
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernels = torch.exp(-0.5 * (offsets / sigmas.clamp(min=1e-3)[:, None]) ** 2)
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    count = len(images)
    stacked = functional.pad(images.transpose(0, 1), (radius,) * 4, mode="replicate")
    stacked = functional.conv2d(stacked, kernels[:, None, None, :], groups=count)
    stacked = functional.conv2d(stacked, kernels[:, None, :, None], groups=count)
    return stacked.transpose(0, 1)


def _coarsen(images: Tensor, factor: float, chosen: Tensor) -> Tensor:
    """The slices chosen (N,), 0 or 1, as if their pixels were larger by a factor."""
    rows, columns = images.shape[-2:]
    small = (max(1, round(rows / factor)), max(1, round(columns / factor)))
    coarse = functional.interpolate(images, size=small, mode="area")
    coarse = functional.interpolate(coarse, size=(rows, columns), mode="bilinear")
    return torch.where(_each(chosen) > 0, coarse, images)

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

from inference.model import DOWNSAMPLING
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
        """Of a range that all voxels are clipped to: its middle and a quarter of it, for any data.

        A network that begins with a convolution and batch normalisation does not depend on them.
        """
        low, high = clip_hu
        return cls((low + high) / 2, (high - low) / 4)


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
        images = _show_pictures(images, draws.picture)
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


_AIR_HU, _FAT_HU = -1000.0, -100.0


def _show_pictures(images: Tensor, picture: Tensor) -> Tensor:
    """Some slices as if they came from 8-bit pictures of a soft tissue window.

    Above the window they are clipped; below it, what is dense enough to be tissue becomes fat and
    the rest air, as in data sets put back from such pictures (`window_hu` in `training/cases.py`);
    a slice that is windowed already stays as it is but for a lower top.

    Args:
        images: (N, 1, H, W), HU.
        picture: (N, 2), the windows; infinite where there is none.
    """
    low, high = (picture[:, index, None, None, None] for index in (0, 1))
    filled = torch.where(images < -300, _AIR_HU, _FAT_HU)
    return torch.where(images < low, filled, images).minimum(high)


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
    """Organs, contrast, brightness, gamma, blur, low resolution and noise, each on some slices.

    Args:
        images: (N, 1, h, w), HU.
        labels: (N, h, w), uint8.
        low, high: (N, 1, 1, 1), the volumes' windows, HU.
        recipe, draws, generator: as in `prepare`.
    """
    if recipe.organ_shift_hu:
        known = labels.where(labels != IGNORED, 0).flatten(1).long()
        shift = draws.organs.gather(1, known).view_as(images)
        images = images + shift * (images > -200)  # not the gas in stomach and bowel
    mean = images.mean(dim=(2, 3), keepdim=True)
    images = (images - mean) * _each(draws.contrast) + (mean + _each(draws.brightness))
    width = (high - low).clamp(min=1)
    images = ((images - low) / width).clamp(0, 1) ** _each(draws.gamma) * width + low
    if draws.largest_blur:
        images = _blur(images, draws.blur, draws.largest_blur)
    if draws.coarseness > 1:
        images = _coarsen(images, draws.coarseness, draws.coarse)
    if recipe.noise_hu:
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        images = images + noise * _each(draws.noise)
    return images


def _blur(images: Tensor, sigmas: Tensor, largest: float) -> Tensor:
    """Gaussian blur, each slice by its own standard deviation in pixels (0: unchanged).

    Args:
        images: (N, 1, h, w).
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

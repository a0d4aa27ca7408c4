"""What happens to a batch on the device before the network sees it.

Slices are clipped to their volume's window, moved and deformed, area-averaged by the matrix
reduction, changed in intensity, and z-scored. Nothing is ever mirrored: in an abdomen left is not
right, and a patient lying prone is turned, not reflected. Parameters are drawn from one generator
per slice on the host, where nothing waits for the device; noise, the elastic deformation and the
factor of low resolution are drawn for what of a batch a process has.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from inference.model import DOWNSAMPLING
from training.recipe import Recipe
from training.slices import Batch


@dataclass(frozen=True)
class Intensities:
    """Mean and standard deviation, HU, of the training set's clipped voxels."""

    mean: float
    std: float


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
    batch = batch.to(device)
    low, high = (batch.window[:, index, None, None, None] for index in (0, 1))
    images = _draw_windows(batch.hu.float().clamp(low, high), recipe, rngs)
    images, labels = _move(images, batch.labels, pixel_mm, recipe, rngs, generator)
    step = recipe.matrix_reduction
    if step > 1:
        images = functional.avg_pool2d(images, step)
        places = [rng.integers(step, size=2) for rng in rngs]
        labels = torch.stack(
            [
                part[row::step, column::step]
                for part, (row, column) in zip(labels, places, strict=True)
            ]
        )
    images = _change_intensities(images, labels, low, high, recipe, rngs, generator)
    images = (images - intensities.mean) / intensities.std
    images = images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    return images, labels


_AIR_HU, _FAT_HU = -1000.0, -100.0


def _draw_windows(images: Tensor, recipe: Recipe, rngs: list[np.random.Generator]) -> Tensor:
    """Some slices as if they came from 8-bit pictures of a soft tissue window.

    Above the window they are clipped; below it, what is dense enough to be tissue becomes fat and
    the rest air, as in data sets put back from such pictures (`window_hu` in `training/cases.py`);
    a slice that is windowed already stays as it is but for a lower top.
    """
    if not recipe.window_probability:
        return images
    low, high = np.full((2, len(rngs)), np.inf, np.float32)
    low[:] = -np.inf
    for index, rng in enumerate(rngs):
        if rng.random() < recipe.window_probability:
            low[index], high[index] = rng.uniform(-160, 0), rng.uniform(240, 300)
    low, high = (_each(list(values), images) for values in (low, high))
    filled = torch.where(images < -300, _AIR_HU, _FAT_HU)
    return torch.where(images < low, filled, images).minimum(high)


def _uniform(rng: np.random.Generator, largest: float) -> float:
    return rng.uniform(-largest, largest)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _draw_affine(recipe: Recipe, pixel_mm: float, rng: np.random.Generator) -> np.ndarray:
    """2x3: where in the slice a pixel (x, y, 1) of the result comes from.

    x and y are pixels from the centre; the shift is a part of the slice's size.
    """
    if rng.random() >= recipe.spatial_probability:
        return np.eye(2, 3)
    angle = math.radians(_uniform(rng, recipe.rotation_degrees))
    enlargement = _log_uniform(rng, *recipe.scale)
    if recipe.pixel_mm[1] > 0:
        enlargement *= pixel_mm / _log_uniform(rng, *recipe.pixel_mm)
    stretch = math.sqrt(_log_uniform(rng, 1 / recipe.anisotropy, recipe.anisotropy))
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shear = np.array([[1, _uniform(rng, recipe.shear)], [0, 1]])
    forward = enlargement * rotation @ shear @ np.diag([stretch, 1 / stretch])
    shift = rng.uniform(-recipe.shift, recipe.shift, size=(2, 1))
    return np.hstack([np.linalg.inv(forward), shift])


def _move(
    images: Tensor,
    labels: Tensor,
    pixel_mm: list[float],
    recipe: Recipe,
    rngs: list[np.random.Generator],
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

    drawn = [_draw_affine(recipe, size, rng) for size, rng in zip(pixel_mm, rngs, strict=True)]
    affine = torch.from_numpy(np.stack(drawn)).float().to(images.device)
    y = torch.arange(out_rows, device=images.device) - (out_rows - 1) / 2
    x = torch.arange(out_columns, device=images.device) - (out_columns - 1) / 2
    pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (rows, columns, xy)
    grid = torch.einsum("nij,hwj->nhwi", affine[:, :, :2], pixels)
    if recipe.elastic_mm:
        # In pixels of the slice, and only where the affine moved it as well.
        strength = [
            recipe.elastic_mm / size if (matrix != np.eye(2, 3)).any() else 0.0
            for size, matrix in zip(pixel_mm, drawn, strict=True)
        ]
        distance = recipe.elastic_grid_mm / max(pixel_mm)
        points = [max(2, math.ceil(size / distance) + 1) for size in (out_rows, out_columns)]
        shape = (len(images), 2, *points)
        shifts = torch.randn(shape, generator=generator, device=images.device)
        # Smooth on an eighth of the pixels, then linear: cubic everywhere is slow on a CPU.
        eighth = (-(-out_rows // 8), -(-out_columns // 8))
        shifts = functional.interpolate(shifts, size=eighth, mode="bicubic", align_corners=True)
        shifts = functional.interpolate(
            shifts, size=(out_rows, out_columns), mode="bilinear", align_corners=True
        )
        grid = grid + (shifts * _each(strength, images)).permute(0, 2, 3, 1)
    size = torch.tensor([columns, rows], dtype=torch.float32, device=images.device)
    grid = 2 * (grid / size + affine[:, None, None, :, 2])

    images = functional.grid_sample(
        images, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    # One is added, and 255 becomes 0: the zeros that come from outside are then IGNORED as well.
    shifted = (labels + 1).float()[:, None]
    shifted = functional.grid_sample(shifted, grid, mode="nearest", align_corners=False)
    return images, shifted[:, 0].to(torch.uint8) - 1


def _each(values: list[float], images: Tensor) -> Tensor:
    """One value for each slice, (N, 1, 1, 1), on the images' device."""
    return torch.tensor(values, dtype=torch.float32, device=images.device)[:, None, None, None]


def _change_intensities(
    images: Tensor,
    labels: Tensor,
    low: Tensor,
    high: Tensor,
    recipe: Recipe,
    rngs: list[np.random.Generator],
    generator: torch.Generator,
) -> Tensor:
    """Organs, contrast, brightness, gamma, blur, low resolution and noise, each on some slices.

    Args:
        images: (N, 1, h, w), HU.
        labels: (N, h, w), uint8.
        low, high: (N, 1, 1, 1), the volumes' windows, HU.
        recipe, rngs, generator: as in `prepare`.
    """
    probability = recipe.intensity_probability
    if not probability:
        return images

    def chosen() -> list[bool]:
        return [bool(rng.random() < probability) for rng in rngs]

    if recipe.organ_shift_hu:
        shifts = [
            rng.normal(0, recipe.organ_shift_hu, 256) * (rng.random() < probability) for rng in rngs
        ]
        table = torch.from_numpy(np.stack(shifts)).float()
        table[:, [0, 255]] = 0  # what is not an organ stays
        table = table.to(images.device)
        shift = table.gather(1, labels.flatten(1).long()).view_as(images)
        images = images + shift * (images > -200)  # not the gas in stomach and bowel

    def factors(bounds: tuple[float, float]) -> Tensor:
        drawn = [_log_uniform(rng, *bounds) for rng in rngs]
        kept = [value if yes else 1.0 for value, yes in zip(drawn, chosen(), strict=True)]
        return _each(kept, images)

    def amounts(largest: float, lowest: float = 0.0) -> list[float]:
        drawn = [rng.uniform(lowest, largest) for rng in rngs]
        return [value if yes else 0.0 for value, yes in zip(drawn, chosen(), strict=True)]

    mean = images.mean(dim=(2, 3), keepdim=True)
    images = (images - mean) * factors(recipe.contrast) + mean
    images = images + _each(amounts(recipe.brightness_hu, -recipe.brightness_hu), images)
    width = (high - low).clamp(min=1)
    exponent = factors(recipe.gamma)
    images = ((images - low) / width).clamp(0, 1) ** exponent * width + low
    if recipe.blur_pixels:
        images = _blur(images, amounts(recipe.blur_pixels))
    if recipe.low_resolution > 1:
        images = _coarsen(images, _log_uniform(rngs[0], 1, recipe.low_resolution), chosen())
    if recipe.noise_hu:
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        images = images + noise * _each(amounts(recipe.noise_hu), images)
    return images


def _blur(images: Tensor, sigmas: list[float]) -> Tensor:
    """Gaussian blur, each slice by its own standard deviation in pixels (0: unchanged)."""
    radius = max(1, math.ceil(3 * max(sigmas)))
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / np.maximum(np.array(sigmas)[:, None], 1e-3)) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    kernels = torch.from_numpy(weights).float().to(images.device)
    count = len(images)
    stacked = functional.pad(images.transpose(0, 1), (radius,) * 4, mode="replicate")
    stacked = functional.conv2d(stacked, kernels[:, None, None, :], groups=count)
    stacked = functional.conv2d(stacked, kernels[:, None, :, None], groups=count)
    return stacked.transpose(0, 1)


def _coarsen(images: Tensor, factor: float, chosen: list[bool]) -> Tensor:
    """The slices chosen as if their pixels were larger by a factor."""
    rows, columns = images.shape[-2:]
    small = (max(1, round(rows / factor)), max(1, round(columns / factor)))
    coarse = functional.interpolate(images, size=small, mode="area")
    coarse = functional.interpolate(coarse, size=(rows, columns), mode="bilinear")
    return torch.where(
        torch.tensor(chosen, device=images.device)[:, None, None, None], coarse, images
    )

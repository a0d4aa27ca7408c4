"""What happens to a batch on the device before the network sees it.

Slices are clipped to their volume's window, moved and deformed, area-averaged by the matrix
reduction, changed in intensity, and z-scored. Nothing is ever mirrored: in an abdomen left is not
right, and a patient lying prone is turned, not reflected. Parameters are drawn on the host from one
generator per slice; noise, the elastic deformation and the factor of low resolution are of the part
of a batch that a process has.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from inference.network.model import DOWNSAMPLING
from training.label_mapping import NUM_LABELS
from training.loss import IGNORED
from training.recipe import Recipe
from training.slices import Batch

_AIR_BELOW_HU = -300.0
_BODY_ABOVE_HU = -200.0

# Each small tensor made of new host numbers would stop a CUDA device's queue until it is copied. So
# everything that is drawn for a slice is a row of numbers, and a batch's rows are copied at once.
_ROW = np.dtype(
    [
        ("window", "f4", 2),  # the volume's own, HU
        ("soft_tissue", "f4", 2),  # to which tissue is clipped, HU; infinite where it is not
        # Where in the slice a pixel (x, y, 1) of the result comes from: x and y are pixels from the
        # centre, the shift is a part of the slice's size.
        ("affine", "f4", (2, 3)),
        ("elastic", "f4"),  # standard deviation of the elastic deformation, pixels
        ("place", "f4", 2),  # row and column of the pixel whose label is a reduced pixel's
        ("organs", "f4", NUM_LABELS),  # shift of each label, HU
        ("contrast", "f4"),  # factor around the body's mean
        ("brightness", "f4"),  # HU
        ("gamma", "f4"),  # exponent on the window
        ("blur", "f4"),  # standard deviation, pixels
        ("noise", "f4"),  # standard deviation, HU
        ("coarse", "f4"),  # 1 where the slice is sampled more coarsely
    ]
)


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

    There is a generator of `rngs` for each slice; the other one is on the device, for what is drawn
    there. The batch may be on the host or the device.

    Returns:
        Images (N, 3, h, w), float32, channels last, the channels alike; labels (N, h, w), uint8;
        h and w are the slice's rows and columns divided by the matrix reduction. There, a label is
        that of one pixel, at a place drawn anew for each slice, of each block of pixels averaged,
        so that the expected cross-entropy is that against the labels' parts of the block.
    """
    pixel_mm = batch.pixel_mm.tolist()
    rows, coarseness = _draw(recipe, batch.window.numpy(), pixel_mm, rngs)
    flat = to_device(torch.from_numpy(rows.view(np.float32).reshape(len(rows), -1)), device)
    draws = {}
    for name, (kind, offset, *_) in (_ROW.fields or {}).items():
        part = flat[:, offset // 4 : (offset + kind.itemsize) // 4]
        draws[name] = part.reshape(len(rows), *(kind.shape or (1, 1, 1)))
    low, high = draws["window"][:, :, None, None, None].unbind(1)
    images, labels = to_device(batch.hu, device).float(), to_device(batch.labels, device)
    if recipe.window_probability:
        images = _clip_tissue(images, draws["soft_tissue"])
    images = images.clamp(low, high)
    images, labels = _move(images, labels, max(pixel_mm), recipe, draws, generator)
    step = recipe.matrix_reduction
    if step > 1:
        images = functional.avg_pool2d(images, step)
        places = zip(labels, rows["place"].astype(int), strict=True)
        labels = torch.stack([part[row::step, column::step] for part, (row, column) in places])
    if recipe.intensity_probability:
        largest_blur = float(rows["blur"].max())
        images = _change_intensities(
            images, labels, recipe, draws, largest_blur, coarseness, generator
        )
    images = (images - intensities.mean) / intensities.std
    images = images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    return images, labels


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, copied while the host works on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _draw(
    recipe: Recipe,
    window: np.ndarray,
    pixel_mm: list[float],
    rngs: list[np.random.Generator],
) -> tuple[np.ndarray, float]:
    """Draw what a recipe's augmentation does to slices of `window` (N, 2), HU.

    Returns:
        A row of `_ROW` for each slice, and the factor of coarser sampling, one for the batch.
    """
    rows, coarseness = np.zeros(len(rngs), _ROW), 1.0
    rows["window"] = window.clip(*recipe.clips) if recipe.clips else window
    for number, (row, mm, rng) in enumerate(zip(rows, pixel_mm, rngs, strict=True)):
        # A stream for each transform: switching one off leaves what the others draw.
        tissue, affine, place, intensities, resolution = rng.spawn(5)
        row["soft_tissue"] = -math.inf, math.inf
        if tissue.random() < recipe.window_probability:
            row["soft_tissue"] = tissue.uniform(-165, -100), tissue.uniform(230, 300)
        moved = draw_affine(recipe, mm, affine)
        row["affine"] = moved
        # The deformation is of those slices only that the affine moved as well.
        row["elastic"] = recipe.elastic_mm / mm * (moved != np.eye(2, 3)).any()
        row["place"] = place.integers(recipe.matrix_reduction, size=2)
        _draw_intensities(row, recipe, intensities)
        if number == 0 and recipe.intensity_probability and recipe.low_resolution > 1:
            coarseness = log_uniform(resolution, 1, recipe.low_resolution)
    return rows, coarseness


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def draw_affine(recipe: Recipe, pixel_mm: float, rng: np.random.Generator) -> np.ndarray:
    """Return (2, 3): the affine of a slice, as in `_ROW`; the identity where it is not moved."""
    if rng.random() >= recipe.spatial_probability:
        return np.eye(2, 3)
    angle = math.radians(rng.uniform(-recipe.rotation_degrees, recipe.rotation_degrees))
    enlargement = log_uniform(rng, *recipe.scale)
    if recipe.pixel_mm[1] > 0:
        enlargement *= pixel_mm / log_uniform(rng, *recipe.pixel_mm)
    stretch = math.sqrt(log_uniform(rng, 1 / recipe.anisotropy, recipe.anisotropy))
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shear = np.array([[1, rng.uniform(-recipe.shear, recipe.shear)], [0, 1]])
    forward = enlargement * rotation @ shear @ np.diag([stretch, 1 / stretch])
    shift = rng.uniform(-recipe.shift, recipe.shift, size=(2, 1))
    return np.hstack([np.linalg.inv(forward), shift])


def _draw_intensities(row: np.void, recipe: Recipe, rng: np.random.Generator) -> None:
    """Draw what happens to a slice's intensities, each of it with the recipe's probability."""

    def chosen() -> bool:
        return bool(rng.random() < recipe.intensity_probability)

    row["organs"] = rng.normal(0, recipe.organ_shift_hu, NUM_LABELS) * chosen()
    row["organs"][0] = 0  # what is not an organ stays
    contrast, gamma = log_uniform(rng, *recipe.contrast), log_uniform(rng, *recipe.gamma)
    brightness = rng.uniform(-recipe.brightness_hu, recipe.brightness_hu)
    blur, noise = rng.uniform(0, recipe.blur_pixels), rng.uniform(0, recipe.noise_hu)
    row["contrast"] = contrast if chosen() else 1.0
    row["brightness"] = brightness if chosen() else 0.0
    row["gamma"] = gamma if chosen() else 1.0
    row["blur"] = blur if chosen() else 0.0
    row["noise"] = noise if chosen() else 0.0
    row["coarse"] = float(chosen())


def _clip_tissue(images: Tensor, soft_tissue: Tensor) -> Tensor:
    """Clip tissue of (N, C, H, W), HU, to windows (N, 2), HU, infinite where there is none.

    Gas, lung and what surrounds the body stay as they are, as in whole volumes whose HU were lost
    outside a window (`window_hu` in `training/cases.py`).
    """
    low, high = soft_tissue[:, :, None, None, None].unbind(1)
    tissue = images > _AIR_BELOW_HU
    return torch.where(tissue, images.maximum(low).minimum(high), images)


def _move(
    images: Tensor,
    labels: Tensor,
    largest_pixel_mm: float,
    recipe: Recipe,
    draws: dict[str, Tensor],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Move and deform slices, and crop them to `slice_size`, in one resampling.

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
        shifts = shifts * draws["elastic"]
    # Where each pixel comes from, from -1 to 1 over the slice: (N, rows, columns, xy).
    grid = images.new_empty((len(images), out_rows, out_columns, 2))
    for axis, size in enumerate((columns, rows)):
        along_x, along_y, shift = draws["affine"][:, axis, :, None, None].unbind(dim=1)
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


def _change_intensities(
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    draws: dict[str, Tensor],
    largest_blur: float,
    coarseness: float,
    generator: torch.Generator,
) -> Tensor:
    """Change organs, contrast, brightness, gamma, blur, resolution and noise, each of some slices.

    Contrast turns around the mean of the body, not of the air beside it. What is at the window's
    low end stays there, as inference shows air. Images are (N, C, h, w), HU, within their windows.
    The largest blur and the coarseness are the batch's, known to the host.
    """
    low, high = draws["window"][:, :, None, None, None].unbind(1)
    if recipe.organ_shift_hu:
        known = labels.where(labels != IGNORED, 0).flatten(1).long()
        shift = draws["organs"].gather(1, known).view(labels.shape)[:, None]
        # Smoothed: a sharp step along the annotation would give the organ away.
        shift = functional.avg_pool2d(shift, 5, stride=1, padding=2, count_include_pad=False)
        images = images + shift * (images > _BODY_ABOVE_HU)  # not the gas in stomach and bowel
    body = images > _BODY_ABOVE_HU
    total = (images * body).sum(dim=(1, 2, 3), keepdim=True)
    mean = total / body.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    change = (images - mean) * (draws["contrast"] - 1) + draws["brightness"]
    # All of it from fat on, nothing of it in air: inference shows air at the window's low end.
    images = images + change * ((images - _AIR_BELOW_HU) / 200).clamp(0, 1)
    width = (high - low).clamp(min=1)
    images = ((images - low) / width).clamp(0, 1) ** draws["gamma"] * width + low
    if largest_blur:
        images = _blur(images, draws["blur"].flatten(), largest_blur)
    if coarseness > 1:
        images = torch.where(draws["coarse"] > 0, _coarsened(images, coarseness), images)
    if recipe.noise_hu:
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        images = images + noise * draws["noise"] * (images > low)
    return images.minimum(high).maximum(low)


def _blur(images: Tensor, sigmas: Tensor, largest: float) -> Tensor:
    """Blur each slice (N, C, h, w) by its own standard deviation (N,) in pixels (0: unchanged).

    The largest of them is known to the host.
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


def _coarsened(images: Tensor, factor: float) -> Tensor:
    """Return slices as if their pixels were larger by a factor."""
    rows, columns = images.shape[-2:]
    small = (max(1, round(rows / factor)), max(1, round(columns / factor)))
    coarse = functional.interpolate(images, size=small, mode="area")
    return functional.interpolate(coarse, size=(rows, columns), mode="bilinear")

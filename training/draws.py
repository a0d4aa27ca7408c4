"""What is random in a batch's augmentation: drawn on the host, sent to the device in one piece.

Each small tensor that is made of fresh host numbers would stop a CUDA device's queue until it has
been copied. So everything that one generator per slice decides is drawn first, as a row of numbers
a slice, and goes over in one pinned array while the host works on.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.label_mapping import NUM_LABELS
from training.recipe import Recipe


class Draws(NamedTuple):
    """What was drawn for N slices; tensors are float32 on the device.

    Attributes:
        window: (N, 2), the volumes' own windows, HU.
        soft_tissue: (N, 2), a window to which tissue is clipped, HU; infinite where it is not.
        affine: (N, 2, 3), where in the slice a pixel (x, y, 1) of the result comes from: x and y
            are pixels from the centre, the shift is a part of the slice's size.
        elastic: (N,), standard deviation of the elastic deformation, pixels.
        organs: (N, 15), shift of each label, HU.
        contrast, brightness, gamma, blur, noise: (N,), factor around the mean, HU, exponent,
            standard deviation in pixels and in HU.
        coarse: (N,), 1 where the slice is sampled more coarsely.
        places: of each slice, the row and column in a block of pixels whose label is taken.
        largest_blur: of `blur`.
        coarseness: factor of the coarse sampling, one for the batch.
    """

    window: Tensor
    soft_tissue: Tensor
    affine: Tensor
    elastic: Tensor
    organs: Tensor
    contrast: Tensor
    brightness: Tensor
    gamma: Tensor
    blur: Tensor
    noise: Tensor
    coarse: Tensor
    places: list[tuple[int, int]]
    largest_blur: float
    coarseness: float


def draw(
    recipe: Recipe,
    window: np.ndarray,
    pixel_mm: list[float],
    rngs: list[np.random.Generator],
    device: torch.device,
) -> Draws:
    """Draw what a recipe's augmentation does to each slice.

    Args:
        recipe: its augmentation.
        window: (N, 2), of the volumes, HU.
        pixel_mm: of the slices.
        rngs: one for each slice.
        device: for the result.
    """
    # A stream for each transform: switching one off leaves what the others draw.
    spawned = zip(*(rng.spawn(5) for rng in rngs), strict=True)
    for_soft_tissue, for_affine, for_places, for_intensities, for_coarseness = spawned
    soft_tissue = np.array([_soft_tissue(recipe, rng) for rng in for_soft_tissue])
    affine = np.stack(
        [draw_affine(recipe, mm, rng) for mm, rng in zip(pixel_mm, for_affine, strict=True)]
    )
    # The deformation is of those slices only that the affine moved as well.
    moved = (affine != np.eye(2, 3)).any(axis=(1, 2))
    step = recipe.matrix_reduction
    places = [tuple(rng.integers(step, size=2).tolist()) for rng in for_places]
    intensities = [_intensities(recipe, rng) for rng in for_intensities]
    coarseness = 1.0
    if recipe.intensity_probability and recipe.low_resolution > 1:
        coarseness = _log_uniform(for_coarseness[0], 1, recipe.low_resolution)
    columns = {
        "window": window,
        "soft_tissue": soft_tissue,
        "affine": affine.reshape(len(rngs), 6),
        "elastic": moved * recipe.elastic_mm / np.array(pixel_mm),
        **{name: [drawn[name] for drawn in intensities] for name in intensities[0]},
    }
    columns = {
        name: np.asarray(values, np.float32).reshape(len(rngs), -1)
        for name, values in columns.items()
    }
    widths = [values.shape[1] for values in columns.values()]
    sent = to_device(np.concatenate(list(columns.values()), axis=1), device).split(widths, dim=1)
    tensors = dict(zip(columns, sent, strict=True))
    for name, tensor in tensors.items():
        if tensor.shape[1] == 1:
            tensors[name] = tensor[:, 0]
    tensors["affine"] = tensors["affine"].reshape(-1, 2, 3)
    return Draws(
        **tensors,
        places=places,
        largest_blur=float(columns["blur"].max()),
        coarseness=coarseness,
    )


def to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Return an array of the host on the device, copied while the host works on."""
    tensor = torch.from_numpy(numbers)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _uniform(rng: np.random.Generator, largest: float) -> float:
    return rng.uniform(-largest, largest)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _soft_tissue(recipe: Recipe, rng: np.random.Generator) -> tuple[float, float]:
    if rng.random() < recipe.window_probability:
        return rng.uniform(-165, -100), rng.uniform(230, 300)
    return -math.inf, math.inf


def draw_affine(recipe: Recipe, pixel_mm: float, rng: np.random.Generator) -> np.ndarray:
    """(2, 3): the affine of one slice, as `Draws` says; the identity where it is not moved."""
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


def _intensities(recipe: Recipe, rng: np.random.Generator) -> dict[str, float | np.ndarray]:
    """What happens to one slice's intensities, each of it with the recipe's probability."""

    def chosen() -> bool:
        return bool(rng.random() < recipe.intensity_probability)

    organs = rng.normal(0, recipe.organ_shift_hu, NUM_LABELS) * chosen()
    organs[0] = 0  # what is not an organ stays
    contrast, gamma = _log_uniform(rng, *recipe.contrast), _log_uniform(rng, *recipe.gamma)
    brightness = _uniform(rng, recipe.brightness_hu)
    blur, noise = rng.uniform(0, recipe.blur_pixels), rng.uniform(0, recipe.noise_hu)
    return {
        "organs": organs,
        "contrast": contrast if chosen() else 1.0,
        "brightness": brightness if chosen() else 0.0,
        "gamma": gamma if chosen() else 1.0,
        "blur": blur if chosen() else 0.0,
        "noise": noise if chosen() else 0.0,
        "coarse": float(chosen()),
    }

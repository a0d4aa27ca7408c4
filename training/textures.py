"""Smooth random fields, and the marks that a scanner leaves in a slice."""

from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage


@lru_cache(maxsize=64)
def _splines(count: int, step: float) -> np.ndarray:
    """(count, cells) float32: cubic B-spline weights of pixels for control points `step` apart."""
    places = np.arange(count) / step
    cells = int(np.ceil(places[-1])) + 3
    distance = np.abs(places[:, None] - (np.arange(cells) - 1))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clip(0) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


def smooth_noise(rng: np.random.Generator, size: int, step: float) -> np.ndarray:
    """(size, size) float32: noise of mean 0 and deviation about 1, smooth over `step` pixels."""
    weights = torch.from_numpy(_splines(size, step))
    cells = weights.shape[1]
    control = torch.from_numpy(rng.standard_normal((cells, cells), dtype=np.float32))
    # By torch, which keeps to one thread in a process that reads slices; numpy's BLAS takes all
    # cores there, and waits for those that train.
    return (weights @ control @ weights.T / 0.5).numpy()


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian blur by `sigma` pixels; one too small to be seen is left out."""
    return ndimage.gaussian_filter(image, sigma, truncate=2.5) if sigma > 0.2 else image


def doubled(image: np.ndarray) -> np.ndarray:
    """Twice the rows, linearly between them; five times as fast as scipy's zoom."""
    before, after = np.concatenate([image[:1], image[:-1]]), np.concatenate([image[1:], image[-1:]])
    doubled = np.empty((2 * len(image), image.shape[1]), image.dtype)
    doubled[::2] = 0.75 * image + 0.25 * before
    doubled[1::2] = 0.75 * image + 0.25 * after
    return doubled


def scanner(image: np.ndarray, rng: np.random.Generator, pixel_mm: float) -> np.ndarray:
    """Add noise with a kernel's correlation, cupping and streaks to a slice, HU."""
    size = len(image)
    deviation = np.exp(rng.uniform(np.log(3), np.log(40)))
    noise = rng.standard_normal((size, size), dtype=np.float32)
    sigma = rng.uniform(0.3, 1.3) / pixel_mm
    soft = blurred(noise, sigma)
    if rng.random() < 0.3:  # a sharp kernel strengthens what is fine
        soft = noise - 0.7 * soft
    image = image + soft * np.float32(deviation / max(soft.std(), 1e-6))
    if rng.random() < 0.3:  # beam hardening: darker or brighter toward the middle, and streaks
        line = np.linspace(-1, 1, size, dtype=np.float32)
        image += rng.normal(0, 8) * (1 - np.add.outer(line**2, line**2))
        across = ndimage.gaussian_filter1d(rng.standard_normal(size).astype(np.float32), 2)
        image += rng.uniform(0, 25) * across[:, None] * (1 - line**2)
    return image

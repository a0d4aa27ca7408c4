"""Label maps of the scoring tests, and their files."""

import nibabel
import numpy as np

SPACING = (0.8, 1.1, 2.5)


def save(path, labels, affine=None, dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-0.8, -1.1, 2.5, 1]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(labels.astype(dtype), affine), path)
    return path


def blobs(seed, shape=(40, 36, 24), noise=0.0):
    """A label map of 14 overlapping boxes, some at the array's borders, and stray voxels."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    for label in rng.permutation(np.arange(1, 15)):
        start = [rng.integers(-3, size - 3) for size in shape]
        stop = [first + rng.integers(4, 15) for first in start]
        box = tuple(slice(max(a, 0), b) for a, b in zip(start, stop, strict=True))
        labels[box] = label
    stray = rng.random(shape) < noise
    labels[stray] = rng.integers(0, 15, stray.sum())
    return labels

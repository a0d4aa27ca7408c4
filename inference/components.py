"""The largest connected component of each organ (paper section 2.3)."""

import cc3d
import numpy as np

from inference.labels import ORGANS


def _bounding_box(mask: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box around a mask's True voxels, of which there is at least one."""
    plane = mask.any(axis=0)
    profiles = (mask.any(axis=(1, 2)), plane.any(axis=1), plane.any(axis=0))
    occupied = [np.flatnonzero(profile) for profile in profiles]
    return tuple(slice(indices[0], indices[-1] + 1) for indices in occupied)


def keep_largest_components(label_map: np.ndarray) -> None:
    """Clear all but the largest 6-connected component of each of the 13 organs, in place.

    Tumor keeps all its components. Of two components of the same size the one met first is kept:
    the one with the voxel of the lowest slice, then row, then column.

    Args:
        label_map: (slices, rows, columns), uint8.
    """
    labelled = label_map != 0
    if not labelled.any():
        return
    box = _bounding_box(labelled)
    labelled, inside = labelled[box], np.ascontiguousarray(label_map[box])

    # One pass for all labels. Components are numbered from 1 in the order they are met.
    components, count = cc3d.connected_components(inside, connectivity=6, return_N=True)
    components, labels = components[labelled], inside[labelled]
    sizes = np.bincount(components, minlength=count + 1)
    label_of = np.zeros(count + 1, np.uint8)
    label_of[components] = labels

    kept = ~np.isin(label_of, ORGANS)
    for organ in ORGANS:
        candidates = np.flatnonzero(label_of == organ)
        if candidates.size:
            kept[candidates[np.argmax(sizes[candidates])]] = True
    label_map[box][labelled] = labels * kept[components]

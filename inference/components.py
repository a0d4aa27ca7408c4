"""The largest connected component of each organ (paper section 2.3)."""

from typing import NamedTuple

import cc3d
import numpy as np

from .labels import LABEL_NAMES, ORGANS

# Slices labelled at once. Component numbers take four bytes a voxel, so a slab's stay small enough
# for the allocator to use the same memory for each, and the whole volume's never exist.
_SLAB = 16


class ComponentSizes(NamedTuple):
    """Voxels that are left of each label, and those of the largest component that was cleared."""

    kept: np.ndarray  # (labels,)
    next_largest: np.ndarray  # (labels,), 0 where none was cleared


def _bounding_box(label_map: np.ndarray) -> tuple[slice, ...]:
    """Return the smallest box around a map's labels; empty if there is none."""
    plane = label_map.max(axis=0)
    profiles = (label_map.max(axis=(1, 2)), plane.max(axis=1), plane.max(axis=0))
    occupied = [np.flatnonzero(profile) for profile in profiles]
    return tuple(
        slice(indices[0], indices[-1] + 1) if indices.size else slice(0) for indices in occupied
    )


def _join(count: int, pairs: np.ndarray) -> np.ndarray:
    """Return for each of `count` parts the lowest connected to it, by pairs (n, 2) that touch."""
    joined = np.arange(count)
    while True:
        ends = joined[pairs]
        lower = joined.copy()
        for end in ends.T:
            np.minimum.at(lower, end, ends.min(axis=1))
        lower = lower[lower]
        if np.array_equal(lower, joined):
            return joined
        joined = lower


def keep_largest_components(label_map: np.ndarray) -> ComponentSizes:
    """Clear all but the largest 6-connected component of each of the 13 organs, in place.

    Tumor keeps all its components. Of two components of the same size the one met first is kept:
    the one with the voxel of the lowest slice, then row, then column.

    Args:
        label_map: (slices, rows, columns), uint8.

    Returns:
        The sizes that were found on the way.
    """
    found = ComponentSizes(*np.zeros((2, len(LABEL_NAMES)), np.int64))
    inside = label_map[_bounding_box(label_map)]
    slabs = [inside[start : start + _SLAB] for start in range(0, len(inside), _SLAB)]
    if not slabs:
        return found

    # A slab's components are parts of the whole's, numbered in the order they are met.
    parts, slab_labels, slab_sizes, pairs = [], [], [], [np.empty((0, 2), np.int64)]
    count = 0
    last: tuple[np.ndarray, np.ndarray] | None = None  # labels and parts of the slice before
    for slab in slabs:
        labelled = slab != 0
        # One pass for all labels; they are numbered from 1, and 0 is the background.
        components, slab_count = cc3d.connected_components(
            np.ascontiguousarray(slab), connectivity=6, return_N=True
        )
        in_slab = components[labelled]
        of_component = np.zeros(slab_count + 1, np.uint8)
        of_component[in_slab] = slab[labelled]
        slab_labels.append(of_component[1:])
        slab_sizes.append(np.bincount(in_slab, minlength=slab_count + 1)[1:])
        first = np.int64(count - 1)
        parts.append((in_slab + first).astype(np.uint32))
        if last is not None:
            touching = labelled[0] & (slab[0] == last[0])
            both = np.stack([last[1][touching], components[0][touching] + first], axis=1)
            # The same pair goes on from pixel to pixel: once for each run is enough.
            is_new = (both[1:] != both[:-1]).any(axis=1)
            pairs += [both[:1], both[1:][is_new]]
        last = slab[-1], components[-1] + first
        count += slab_count

    label_of, sizes = np.concatenate(slab_labels), np.concatenate(slab_sizes)
    first_part = _join(count, np.concatenate(pairs))
    whole_sizes = np.zeros(count, np.int64)
    np.add.at(whole_sizes, first_part, sizes)
    kept = ~np.isin(label_of, ORGANS)
    for label in range(1, len(LABEL_NAMES)):
        candidates = np.flatnonzero((label_of == label) & (first_part == np.arange(count)))
        if label not in ORGANS:
            found.kept[label] = whole_sizes[candidates].sum()
        elif candidates.size:
            largest = candidates[np.argmax(whole_sizes[candidates])]
            kept[largest] = True
            found.kept[label] = whole_sizes[largest]
            others = candidates[candidates != largest]
            found.next_largest[label] = whole_sizes[others].max(initial=0)
    kept = kept[first_part]
    for slab, part in zip(slabs, parts, strict=True):
        keeps = kept[part]
        if not keeps.all():
            labelled = slab != 0
            slab[labelled] = slab[labelled] * keeps
    return found

"""DSC and NSD of one case, as the challenge's own script computes them."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy import ndimage
from surface_distance import compute_dice_coefficient, compute_surface_distances, lookup_tables

from benchmark.scoring.label_map import LabelMapError, affine_difference, joined, read_label_map
from benchmark.scoring.protocol import PROTOCOLS, SLICE_LIMITED, Protocol
from inference.labels import LABEL_NAMES


@dataclass
class CaseScores:
    """The scores of one case.

    Attributes:
        name: the reference's file name, as in the official tables.
        dsc: label to Dice similarity coefficient, 0 to 1, rounded to 4 decimals.
        nsd: label to normalised surface distance (surface Dice), 0 to 1, rounded to 4 decimals.
        in_reference: the labels scored that the reference has; where it has not, DSC and NSD only
            show whether the prediction has none either.
        warnings: what to know about the numbers.
        failure: why there was nothing to score and all scores are 0, or None.
        seconds: what the scoring took.
    """

    name: str
    dsc: dict[int, float]
    nsd: dict[int, float]
    in_reference: frozenset[int] = frozenset()
    warnings: list[str] = field(default_factory=list)
    failure: str | None = None
    seconds: float = 0.0


def score_label_maps(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: tuple[float, float, float],
    protocol: Protocol = PROTOCOLS["flare23"],
    name: str = "",
) -> CaseScores:
    """Score one label map as the challenge does.

    Args:
        reference: (columns, rows, slices) as stored in a NIfTI file, integers. An SPL array of
            (slices, rows, columns) is passed as `array.T`, with its spacing reversed.
        prediction: the same shape.
        spacing: millimetres along the three axes, in the array's order.

    Returns:
        The scores of the protocol's labels. Both masks empty: 1; one empty: 0. Aorta, inferior vena
        cava and esophagus count from the reference's first labelled slice to the one before its
        last, as the official script has it.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"shapes differ: {reference.shape} and {prediction.shape}")
    highest = max(protocol.tolerances_mm)
    reference_boxes, prediction_boxes = (
        _bounding_boxes(labels, highest) for labels in (reference, prediction)
    )
    scores = CaseScores(name, {}, {}, _labels_in(reference_boxes, protocol))
    for label, tolerance_mm in protocol.tolerances_mm.items():
        reference_box, prediction_box = reference_boxes[label - 1], prediction_boxes[label - 1]
        if not reference_box or not prediction_box:
            scores.dsc[label] = scores.nsd[label] = float(reference_box == prediction_box)
            continue
        box = [
            slice(min(ours.start, theirs.start), max(ours.stop, theirs.stop))
            for ours, theirs in zip(reference_box, prediction_box, strict=True)
        ]
        if label in SLICE_LIMITED:
            first, last = reference_box[2].start, reference_box[2].stop - 1
            if first == last:
                scores.warnings.append(
                    f"{LABEL_NAMES[label]}: the reference has one labelled slice; scored on it"
                )
            box[2] = slice(first, max(last, first + 1))
        in_reference = reference[tuple(box)] == label
        in_prediction = prediction[tuple(box)] == label
        dsc = compute_dice_coefficient(in_reference, in_prediction)
        nsd = 0.0
        if dsc >= protocol.nsd_floor:
            nsd = surface_dice(in_reference, in_prediction, spacing, tolerance_mm)
        scores.dsc[label], scores.nsd[label] = float(np.round(dsc, 4)), float(np.round(nsd, 4))
    return scores


def surface_dice(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: tuple[float, float, float],
    tolerance_mm: float,
) -> float:
    """Return the NSD: the part of both surfaces within the tolerance of the other.

    Distances are computed in the reference's bounding box widened by the tolerance: farther off no
    surface element can be within it, so that of the prediction's outer parts only the area counts.
    One stray voxel would otherwise stretch two distance transforms over the whole volume.

    Args:
        reference: 3D bool, not empty.
        prediction: 3D bool, the same shape; outside the arrays neither has any voxel.
        spacing: millimetres along the three axes.
        tolerance_mm: the largest distance that counts as agreement.

    Returns:
        The same as `surface_distance.compute_surface_dice_at_tolerance` of the whole masks.
    """
    # One voxel more than the tolerance: the crop's own faces must be outside it.
    margins = [int(np.ceil(tolerance_mm / step)) + 1 for step in spacing]
    near = tuple(
        slice(max(extent.start - margin, 0), extent.stop + margin)
        for extent, margin in zip(_bounding_boxes(reference, 1)[0], margins, strict=True)
    )
    if not prediction[near].any():
        return 0.0
    found = compute_surface_distances(reference[near], prediction[near], spacing)
    agreeing = sum(
        found[areas][found[distances] <= tolerance_mm].sum()
        for distances, areas in (
            ("distances_gt_to_pred", "surfel_areas_gt"),
            ("distances_pred_to_gt", "surfel_areas_pred"),
        )
    )
    return agreeing / (found["surfel_areas_gt"].sum() + surface_area(prediction, spacing))


def surface_area(mask: np.ndarray, spacing: tuple[float, float, float]) -> float:
    """Return the surface of a 3D mask, mm², by the surface-distance package's table of cells."""
    # The package's kernel of cell codes is the product of [16, 1], [4, 1] and [2, 1]: three sums in
    # place of a correlation with eight weights, which takes three times as long.
    codes = np.pad(mask.view(np.uint8), 1)
    codes = codes[:-1] * np.uint8(16) + codes[1:]
    codes = codes[:, :-1] * np.uint8(4) + codes[:, 1:]
    codes = codes[:, :, :-1] * np.uint8(2) + codes[:, :, 1:]
    areas = lookup_tables.create_table_neighbour_code_to_surface_area(spacing)
    return float(areas[codes[codes != 0]].sum())


def failed_case(
    name: str, protocol: Protocol, failure: str, in_reference: frozenset[int] = frozenset()
) -> CaseScores:
    """Return the scores of a case that failed: DSC 0 and NSD 0 of every structure."""
    zeros = dict.fromkeys(protocol.tolerances_mm, 0.0)
    return CaseScores(name, zeros, zeros.copy(), in_reference, failure=failure)


def score_case(
    reference_path: Path, prediction_path: Path, protocol: Protocol = PROTOCOLS["flare23"]
) -> CaseScores:
    """Score one prediction file; the result's name is the reference's.

    A prediction that is missing, unreadable or of another shape scores 0 throughout, and `failure`
    has the reason.

    Raises:
        LabelMapError: the reference itself cannot be used.
    """
    start = time.perf_counter()
    reference = read_label_map(reference_path)
    if not all(np.isfinite(step) and step > 0 for step in reference.spacing):
        raise LabelMapError(f"its voxel spacing is {joined(reference.spacing)} mm")
    boxes = _bounding_boxes(reference.labels, max(protocol.tolerances_mm))
    present = _labels_in(boxes, protocol)
    name = reference_path.name
    try:
        prediction = read_label_map(prediction_path)
    except LabelMapError as error:
        return failed_case(name, protocol, f"prediction: {error}", present)
    if prediction.labels.shape != reference.labels.shape:
        shapes = [joined(label_map.labels.shape) for label_map in (prediction, reference)]
        failure = "prediction: its shape is {}, the reference {}".format(*shapes)
        return failed_case(name, protocol, failure, present)
    both = (reference.labels, prediction.labels)
    scores = score_label_maps(*both, reference.spacing, protocol, name)
    warnings = [f"reference: {warning}" for warning in reference.warnings]
    warnings += [f"prediction: {warning}" for warning in prediction.warnings]
    if shift := affine_difference(reference, prediction):
        warnings.append(f"prediction: its affine is {shift} away from the reference's")
    return replace(scores, warnings=warnings + scores.warnings, seconds=time.perf_counter() - start)


def _labels_in(boxes: list[tuple[slice, ...]], protocol: Protocol) -> frozenset[int]:
    return frozenset(label for label in protocol.tolerances_mm if boxes[label - 1])


def _bounding_boxes(labels: np.ndarray, highest: int) -> list[tuple[slice, ...]]:
    """Return for labels 1 to `highest` the smallest box around each, () without any voxel."""
    # Reversing the axes makes a file's array, whose first axis is the fastest, C-contiguous.
    integers = labels.view(np.uint8) if labels.dtype == bool else labels
    boxes = ndimage.find_objects(integers.T, max_label=highest)
    return [(box or ())[::-1] for box in (*boxes, *[()] * (highest - len(boxes)))]

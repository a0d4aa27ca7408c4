"""Score predicted label maps against references: DSC and NSD of 13 organs and tumor.

Every number agrees with the challenge's own script (FLARE23_DSC_NSD_Eval.py, and
FLARE22_DSC_NSD_Eval.py with --protocol flare22) to its 4 decimals. Where that script stops or says
nothing, this one goes on and says so:

  prediction missing, unreadable,  DSC 0 and NSD 0 for every structure; exit code 1
  or of another shape
  affine unlike the reference's    warned; arrays are compared as stored, as the challenge does
  float labels                     taken; fractions are cut off as the challenge does, and warned
  labels outside 0 to 14, NaN      counted as background, and warned
  aorta, inferior vena cava or     scored on that slice, and warned (the challenge's slice range
  esophagus on a single slice      would be empty)
"""

import argparse
import csv
import io
import json
import os
import platform
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
from nibabel.spatialimages import HeaderDataError
from scipy import ndimage
from surface_distance import compute_dice_coefficient, compute_surface_distances, lookup_tables

from inference.labels import LABEL_NAMES, ORGANS, TUMOR
from inference.volume import SUFFIXES, VolumeError, find_cases, read_stored, write_atomically

COLUMNS = (
    *("Liver", "RK", "Spleen", "Pancreas", "Aorta", "IVC", "RAG", "LAG", "Gallbladder"),
    *("Esophagus", "Stomach", "Duodenum", "LK", "Lesion"),
)
"""The official name of labels 1 to 14 in tables."""

SLICE_LIMITED = (5, 6, 10)
"""Aorta, inferior vena cava and esophagus are scored on the reference's labelled slices only."""

PER_CASE_CSV = "accuracy_per_case.csv"
"""The file that `rank`, `compare` and `report` read."""


@dataclass(frozen=True)
class Protocol:
    """The scoring rules of one year.

    Attributes:
        name: as on the command line.
        tolerances_mm: label to the distance within which two surfaces agree; its keys are the
            labels scored.
        nsd_floor: NSD is set to 0 where DSC is below this.
    """

    name: str
    tolerances_mm: dict[int, float]
    nsd_floor: float


_ORGAN_TOLERANCES_MM = dict(zip(ORGANS, (5, 3, 3, 5, 2, 2, 2, 2, 2, 3, 5, 7, 3), strict=True))

PROTOCOLS = {
    "flare23": Protocol("flare23", {**_ORGAN_TOLERANCES_MM, TUMOR: 2}, nsd_floor=0.2),
    "flare22": Protocol("flare22", _ORGAN_TOLERANCES_MM, nsd_floor=0.0),
}
"""FLARE 2023: 13 organs and tumor; its script's floor was 0.1 until March 2024, when the 2023
results were out, and 0.2 since. FLARE 2022: the same organs, numbers and tolerances; no floor."""


@dataclass
class CaseScores:
    """The scores of one case.

    Attributes:
        name: the reference's file name, as in the official tables.
        dsc: label to Dice similarity coefficient, 0 to 1, rounded to 4 decimals.
        nsd: label to normalised surface distance (surface Dice), 0 to 1, rounded to 4 decimals.
        warnings: what to know about the numbers.
        failure: why there was nothing to score and all scores are 0, or None.
        seconds: what the scoring took.
    """

    name: str
    dsc: dict[int, float]
    nsd: dict[int, float]
    warnings: list[str] = field(default_factory=list)
    failure: str | None = None
    seconds: float = 0.0


class LabelMapError(ValueError):
    """A file that holds no label map; the message is the reason, in one line."""


@dataclass(frozen=True)
class LabelMap:
    """A label map as stored on disk.

    Attributes:
        labels: 3D uint8 in the file's own axis order, 0 to 14.
        affine: 4x4, voxel indices to millimetres.
        spacing: millimetres along each array axis.
        warnings: what had to be done to the file's values.
    """

    labels: np.ndarray
    affine: np.ndarray
    spacing: tuple[float, float, float]
    warnings: list[str]


def read_label_map(path: Path) -> LabelMap:
    """Read a NIfTI label map without turning its axes.

    Raises:
        LabelMapError: missing, damaged, not NIfTI, not 3D.
    """
    try:
        stored = read_stored(path)
        affine = stored.header.get_best_affine()
    except FileNotFoundError as error:
        raise LabelMapError("the file is missing") from error
    except (OSError, VolumeError, HeaderDataError) as error:
        raise LabelMapError(f"cannot be read ({' '.join(str(error).split())})") from error
    values = stored.voxels
    if (stored.slope, stored.intercept) != (1.0, 0.0):
        values = values * stored.slope + stored.intercept
    labels, warnings = as_labels(values)
    return LabelMap(
        labels=labels,
        affine=affine,
        spacing=tuple(float(zoom) for zoom in (*stored.header.get_zooms(), 1.0, 1.0)[:3]),
        warnings=warnings,
    )


def as_labels(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Turn the values of a label map into uint8 from 0 to 14, and say what to warn of.

    Fractions are cut off, as the official script's conversion does. Values outside 0 to 14 and NaN
    become background: the official conversion to 8 bits would turn 257 into liver.
    """
    warnings = []
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        if not finite.all():
            warnings.append(f"{np.count_nonzero(~finite)} voxels are NaN or infinite: background")
            values = np.where(finite, values, 0)
        whole = np.trunc(values)
        if fractional := np.count_nonzero(whole != values):
            warnings.append(f"{fractional} voxels hold fractions, not labels: cut off to integers")
        values = whole
    outside = (values < 0) | (values >= len(LABEL_NAMES))
    if outside.any():
        found = np.unique(values[outside])
        shown = ", ".join(f"{value:g}" for value in found[:5]) + (", …" if len(found) > 5 else "")
        warnings.append(
            f"{np.count_nonzero(outside)} voxels hold labels outside 0 to {len(LABEL_NAMES) - 1} "
            f"({shown}): background"
        )
        values = np.where(outside, 0, values)
    return values.astype(np.uint8, copy=False), warnings


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
        protocol: tolerances and rules.
        name: for the result.

    Returns:
        The scores of the protocol's labels. Both masks empty: 1; one empty: 0. Aorta, inferior vena
        cava and esophagus count from the reference's first labelled slice to the one before its
        last, as the official script has it.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"shapes differ: {reference.shape} and {prediction.shape}")
    scores = CaseScores(name, {}, {})
    highest = max(protocol.tolerances_mm)
    reference_boxes = _bounding_boxes(reference, highest)
    prediction_boxes = _bounding_boxes(prediction, highest)
    for label, tolerance_mm in protocol.tolerances_mm.items():
        reference_box, prediction_box = reference_boxes[label - 1], prediction_boxes[label - 1]
        if reference_box is None or prediction_box is None:
            scores.dsc[label] = scores.nsd[label] = float(reference_box is prediction_box)
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
    """NSD: the part of both surfaces that lies within the tolerance of the other.

    Distances are computed in the reference's bounding box widened by the tolerance: farther off no
    surface element can be within it, so that of the prediction's outer parts only the area counts.
    One stray voxel would otherwise stretch two distance transforms over the whole volume.

    Args:
        reference: 3D bool, not empty.
        prediction: 3D bool, the same shape; beyond the arrays there is nothing of either.
        spacing: millimetres along the three axes.
        tolerance_mm: the largest distance that counts as agreement.

    Returns:
        What `surface_distance.compute_surface_dice_at_tolerance` says of the whole masks.
    """
    # One voxel more than the tolerance: the crop's own faces must lie beyond it.
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
    """Sum the surface of a 3D mask, mm², by the surface-distance package's table of 2x2x2 cells."""
    # The package's kernel of cell codes is the product of [16, 1], [4, 1] and [2, 1]: three sums in
    # place of a correlation with eight weights, which takes three times as long.
    codes = np.pad(mask.view(np.uint8), 1)
    codes = codes[:-1] * np.uint8(16) + codes[1:]
    codes = codes[:, :-1] * np.uint8(4) + codes[:, 1:]
    codes = codes[:, :, :-1] * np.uint8(2) + codes[:, :, 1:]
    areas = lookup_tables.create_table_neighbour_code_to_surface_area(spacing)
    return float(areas[codes[codes != 0]].sum())


def score_case(
    reference_path: Path, prediction_path: Path, protocol: Protocol = PROTOCOLS["flare23"]
) -> CaseScores:
    """Score one prediction file.

    A prediction that is missing, unreadable or of another shape scores 0 throughout, and `failure`
    says why.

    Raises:
        LabelMapError: the reference itself cannot be used.
    """
    start = time.perf_counter()
    reference = read_label_map(reference_path)
    if not all(np.isfinite(step) and step > 0 for step in reference.spacing):
        raise LabelMapError(f"its voxel spacing is {_text(reference.spacing)} mm")
    zeros = dict.fromkeys(protocol.tolerances_mm, 0.0)
    failed = CaseScores(reference_path.name, zeros, zeros.copy())
    try:
        prediction = read_label_map(prediction_path)
    except LabelMapError as error:
        return replace(failed, failure=f"prediction: {error}")
    if prediction.labels.shape != reference.labels.shape:
        shapes = f"{_text(prediction.labels.shape)}, the reference {_text(reference.labels.shape)}"
        return replace(failed, failure=f"prediction: its shape is {shapes}")
    scores = score_label_maps(
        reference.labels, prediction.labels, reference.spacing, protocol, reference_path.name
    )
    warnings = [f"reference: {warning}" for warning in reference.warnings]
    warnings += [f"prediction: {warning}" for warning in prediction.warnings]
    if shift := affine_difference(reference, prediction):
        warnings.append(f"prediction: its affine is {shift} away from the reference's")
    return replace(scores, warnings=warnings + scores.warnings, seconds=time.perf_counter() - start)


def affine_difference(reference: LabelMap, prediction: LabelMap) -> str | None:
    """How far apart two affines put the volume's corners, or None within a tenth of a voxel."""
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)], float)
    corners[:, :3] *= np.array(reference.labels.shape) - 1
    shift = np.linalg.norm(corners @ (prediction.affine - reference.affine).T, axis=1).max()
    return None if shift <= 0.1 * min(reference.spacing) else f"up to {shift:.3g} mm"


def official_summary(cases: list[CaseScores]) -> dict[str, float]:
    """Average as the official scores.txt does: over cases, and then over the 13 organs."""
    summary = {}
    for metric in ("dsc", "nsd"):
        for label in getattr(cases[0], metric):
            mean = np.mean([getattr(case, metric)[label] for case in cases])
            summary[f"{COLUMNS[label - 1]}_{metric.upper()}"] = float(np.round(mean, 4))
    for metric in ("DSC", "NSD"):
        organs = [summary[f"{COLUMNS[label - 1]}_{metric}"] for label in ORGANS]
        summary[f"Organ_{metric}"] = float(np.round(np.mean(organs), 4))
    return summary


def per_case_csv(cases: list[CaseScores]) -> str:
    """Write the official table: a row for each case, first each label's DSC, then each NSD."""
    labels = list(cases[0].dsc)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    columns = [f"{COLUMNS[label - 1]}_{metric}" for metric in ("DSC", "NSD") for label in labels]
    table.writerow(["Name", *columns])
    for case in cases:
        table.writerow([case.name, *case.dsc.values(), *case.nsd.values()])
    return text.getvalue()


def markdown_report(
    cases: list[CaseScores], unscored: dict[str, str], unmatched: list[str], protocol: Protocol
) -> str:
    """Write the paper's Table 3, and what to know about the numbers.

    Args:
        cases: at least one.
        unscored: file name of each reference that could not be used, and why.
        unmatched: file names of predictions without a reference.
        protocol: the rules used.
    """
    rows = {LABEL_NAMES[label].capitalize(): [label] for label in cases[0].dsc}
    rows["**Average of 13 organs**"] = list(ORGANS)
    if TUMOR in cases[0].dsc:
        rows["**Average of organs and tumor**"] = list(cases[0].dsc)
    lines = [
        "# Accuracy",
        "",
        f"{len(cases)} cases, rules of {protocol.name}, NSD 0 where DSC is below "
        f"{protocol.nsd_floor:g}. Mean ± standard deviation over the cases (n − 1), in percent; "
        "averages are of each case's mean. Failed cases count as 0.",
        "",
        "| Structure | NSD tolerance (mm) | DSC (%) | NSD (%) |",
        "|---|---:|---:|---:|",
    ]
    for title, labels in rows.items():
        tolerance = f"{protocol.tolerances_mm[labels[0]]:g}" if len(labels) == 1 else ""
        means = [
            np.array([np.mean([scores[label] for label in labels]) for scores in column])
            for column in ([case.dsc for case in cases], [case.nsd for case in cases])
        ]
        cells = " | ".join(
            f"{100 * values.mean():.2f} ± {100 * values.std(ddof=1):.2f}"
            if len(values) > 1
            else f"{100 * values.mean():.2f}"
            for values in means
        )
        lines.append(f"| {title} | {tolerance} | {cells} |")
    remarks = [f"{case.name}: **failed**, {case.failure}" for case in cases if case.failure]
    remarks += [f"{case.name}: {warning}" for case in cases for warning in case.warnings]
    remarks += [f"{name}: **not scored**, reference: {why}" for name, why in unscored.items()]
    remarks += [f"{name}: a prediction without a reference, left out" for name in unmatched]
    if remarks:
        lines += ["", "## Remarks", "", *(f"- {remark}" for remark in remarks)]
    return "\n".join(lines) + "\n"


def box_plot(cases: list[CaseScores], metric: str) -> bytes:
    """Draw a PNG with a box for each label over all cases, and the cases as points.

    Args:
        cases: at least one.
        metric: "dsc" or "nsd".
    """
    import matplotlib  # here, for `training` scores volumes and draws nothing

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = list(cases[0].dsc)
    columns = [[getattr(case, metric)[label] for case in cases] for label in labels]
    figure, axes = pyplot.subplots(figsize=(10, 4.6), layout="constrained")
    places = np.arange(len(labels))
    axes.boxplot(
        columns,
        positions=places,
        widths=0.6,
        showfliers=False,
        showmeans=True,
        patch_artist=True,
        boxprops={"facecolor": "#dbe7f3", "edgecolor": "#3b6ea5"},
        whiskerprops={"color": "#3b6ea5"},
        capprops={"color": "#3b6ea5"},
        medianprops={"color": "#12395f", "linewidth": 1.6},
        meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": "#12395f"},
    )
    spread = np.random.default_rng(0).uniform(-0.18, 0.18, len(cases))  # so that points part
    for place, column in zip(places, columns, strict=True):
        axes.plot(place + spread, column, ".", color="#c2571a", alpha=0.55, markersize=5)
    axes.set_xticks(places, [LABEL_NAMES[label] for label in labels], rotation=35, ha="right")
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel(metric.upper())
    axes.set_title(f"{metric.upper()} of {len(cases)} cases (line: median, diamond: mean)")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    pyplot.close(figure)
    return png.getvalue()


def write_report(
    folder: Path,
    cases: list[CaseScores],
    unscored: dict[str, str],
    unmatched: list[str],
    protocol: Protocol,
) -> None:
    """Write every file of the report; see `markdown_report` for the arguments."""
    summary = official_summary(cases)
    content = {
        "protocol": {
            "name": protocol.name,
            "nsd_floor": protocol.nsd_floor,
            "tolerances_mm": {
                COLUMNS[label - 1]: mm for label, mm in protocol.tolerances_mm.items()
            },
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{
                package: metadata.version(package)
                for package in ("surface-distance", "numpy", "scipy", "nibabel")
            },
        },
        "summary": summary,
        "cases": [
            {
                "name": case.name,
                "dsc": {COLUMNS[label - 1]: value for label, value in case.dsc.items()},
                "nsd": {COLUMNS[label - 1]: value for label, value in case.nsd.items()},
                "failure": case.failure,
                "warnings": case.warnings,
                "seconds": round(case.seconds, 3),
            }
            for case in cases
        ],
        "references_not_scored": unscored,
        "predictions_without_reference": unmatched,
    }
    files = {
        PER_CASE_CSV: per_case_csv(cases).encode(),
        "accuracy.json": json.dumps(content, indent=1).encode(),
        "accuracy.md": markdown_report(cases, unscored, unmatched, protocol).encode(),
        "accuracy_official.txt": "".join(
            f"{key}: {value:.4f}\n" for key, value in summary.items()
        ).encode(),
        "accuracy_dsc.png": box_plot(cases, "dsc"),
        "accuracy_nsd.png": box_plot(cases, "nsd"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomically(folder / name, data)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmark accuracy`."""
    parser.add_argument(
        "--reference",
        type=Path,
        required=True,
        metavar="DIR",
        help="reference label maps, NAME.nii.gz or NAME.nii",
    )
    parser.add_argument(
        "--prediction",
        type=Path,
        required=True,
        metavar="DIR",
        help="predicted label maps under the same names",
    )
    parser.add_argument(
        "--report", type=Path, required=True, metavar="DIR", help="folder for tables and plots"
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="flare23",
        help="the year's rules (default: %(default)s; flare22 has no tumor and no NSD floor)",
    )
    parser.add_argument(
        "--nsd-floor",
        type=float,
        metavar="DSC",
        help="NSD is 0 where DSC is below this (default: 0.2 in flare23, 0 in flare22; the results "
        "published in 2023 had 0.1)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="cases scored at once (default: the number of cores, %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Score a folder and write the report.

    Returns:
        0 all cases scored; 1 some failed, and the rest is written; 2 nothing to do.
    """
    for folder in (arguments.reference, arguments.prediction):
        if not folder.is_dir():
            print(f"benchmark accuracy: there is no folder {folder}", file=sys.stderr)
            return 2
    references = find_cases(arguments.reference)
    if not references:
        print(f"benchmark accuracy: no .nii.gz or .nii in {arguments.reference}", file=sys.stderr)
        return 2
    if arguments.workers < 1:
        print("benchmark accuracy: --workers must be at least 1", file=sys.stderr)
        return 2
    protocol = PROTOCOLS[arguments.protocol]
    if arguments.nsd_floor is not None:
        protocol = replace(protocol, nsd_floor=arguments.nsd_floor)

    pairs = {path: prediction_of(path, arguments.prediction) for path in references}
    unmatched = [
        path.name for path in find_cases(arguments.prediction) if path not in pairs.values()
    ]
    try:
        cases, unscored = score_cases(pairs, protocol, arguments.workers)
    except BrokenProcessPool:
        print(
            "benchmark accuracy: a worker was killed; with little memory, lower --workers",
            file=sys.stderr,
        )
        return 1
    if not cases:
        print("benchmark accuracy: no reference could be used", file=sys.stderr)
        return 1
    write_report(arguments.report, cases, unscored, unmatched, protocol)
    for name in unmatched:
        print(f"  warning: {name} has no reference and was left out")
    summary = official_summary(cases)
    shown = [key for key in summary if key.startswith(("Organ", "Lesion"))]
    print(", ".join(f"{key} {summary[key]:.4f}" for key in shown))
    print(f"report: {arguments.report / 'accuracy.md'}")
    return int(bool(unscored) or any(case.failure for case in cases))


def prediction_of(reference: Path, folder: Path) -> Path:
    """Name the prediction's path: the reference's name, `.nii.gz` or `.nii`."""
    stem = reference.name.removesuffix(".gz").removesuffix(".nii")
    names = (reference.name, *(stem + suffix for suffix in SUFFIXES))
    return next(
        (folder / name for name in names if (folder / name).is_file()), folder / reference.name
    )


def score_cases(
    pairs: dict[Path, Path], protocol: Protocol, workers: int
) -> tuple[list[CaseScores], dict[str, str]]:
    """Score reference and prediction files in parallel, saying how it goes.

    Returns:
        The scores in the order of `pairs`, and for each reference that could not be used its file
        name and the reason.
    """
    scored, unscored = {}, {}
    with ProcessPoolExecutor(min(workers, len(pairs))) as pool:
        futures = {pool.submit(score_case, *pair, protocol): pair[0] for pair in pairs.items()}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                reference = futures[future]
                try:
                    scored[reference] = future.result()
                    lines = _progress(scored[reference])
                except LabelMapError as error:
                    unscored[reference.name] = str(error)
                    lines = [f"{reference.name}: not scored, reference: {error}"]
                print(f"[{done}/{len(pairs)}]", *lines, sep=" ", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [scored[path] for path in pairs if path in scored], unscored


def _progress(case: CaseScores) -> list[str]:
    if case.failure:
        return [f"{case.name}: failed, {case.failure}"]
    means = (np.mean([scores[label] for label in ORGANS]) for scores in (case.dsc, case.nsd))
    line = "{}: organs DSC {:.4f} NSD {:.4f}, {:.1f} s".format(case.name, *means, case.seconds)
    return [line, *(f"\n  warning: {warning}" for warning in case.warnings)]


def _bounding_boxes(labels: np.ndarray, highest: int) -> list[tuple[slice, ...] | None]:
    """For labels 1 to `highest` the smallest box that holds them, or None."""
    # Reversing the axes makes a file's array, whose first axis is the fastest, C-contiguous.
    integers = labels.view(np.uint8) if labels.dtype == bool else labels
    boxes = ndimage.find_objects(integers.T, max_label=highest)
    boxes += [None] * (highest - len(boxes))
    return [box and box[::-1] for box in boxes]


def _text(numbers: Iterable[float]) -> str:
    return "x".join(f"{number:g}" for number in numbers)

"""A dry check of data sets: what training would make of them, and of what it would make nothing.

Every volume is read as training reads it, and nothing is written.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from inference.labels import LABEL_NAMES
from inference.memory import cpu_limit
from inference.volume import VolumeError
from training.cache import read_case
from training.cases import (
    CachedVolume,
    Case,
    find_training_cases,
    label_table,
    never_present,
    paired_files,
    read_description,
)
from training.label_mapping import LabelMapping

_REPORT_EVERY_S = 5.0
_MOST_NAMES = 5
_USUAL_PIXEL_MM = (0.3, 3.5)
_THICKEST_MM = 15.0
_LEAST_AIR_HU = -300  # a CT shows air: its 1st percentile lies far below this, or it was windowed


@dataclass
class DataSetCheck:
    """What was found in one data set.

    Attributes:
        folder: of the data set.
        cases: that would be trained on, or held out, with what is known of each.
        left_out: number of cases whose split is `left_out`, which are only scored.
        lost: what would not be used, by reason; each with the names of its cases.
        cautions: what would be used and is doubtful, in the same way.
    """

    folder: Path
    cases: list[Case] = field(default_factory=list)
    left_out: int = 0
    lost: dict[str, list[str]] = field(default_factory=dict)
    cautions: dict[str, list[str]] = field(default_factory=dict)


def _note(table: dict[str, list[str]], reason: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        table.setdefault(reason, []).extend(names)


def _doubts(case: Case) -> list[str]:
    """Return what is doubtful of a case that can be used."""
    known, doubts = case.cached, []
    if known.remark:
        doubts.append(f"headers disagree: {known.remark}")
    unlisted = [LABEL_NAMES[label] for label in known.present if label not in case.annotated]
    if unlisted:
        doubts.append(f"marked but not in annotated_labels, so not taught: {', '.join(unlisted)}")
    slice_mm, *pixel_mm = known.spacing
    low, high = _USUAL_PIXEL_MM
    if not all(low <= size <= high for size in pixel_mm):
        doubts.append(f"pixels outside {low} to {high} mm: is the header's spacing right?")
    if slice_mm > _THICKEST_MM and not case.stack:
        doubts.append(f'slices over {_THICKEST_MM:g} mm apart and not described as a "stack"')
    if known.window[0] > _LEAST_AIR_HU and case.window_hu is None:
        doubts.append(
            f"no air below {_LEAST_AIR_HU} HU: not HU, or from a window (window_hu in cases.json)"
        )
    return doubts


def _read(case: Case) -> tuple[list[str], str]:
    """Read a case; its doubts, and the reason why it cannot be used or ""."""
    try:
        _, _, about = read_case(case)
    except VolumeError as error:
        return [], str(error).splitlines()[0]
    case.cached = CachedVolume.of(case.image, case.label, about)
    if case.annotated is None:
        case.annotated = case.cached.present
    if not case.annotated:
        return [], "nothing is labelled"
    return _doubts(case), ""


def check_data_set(
    folder: Path, mapping: LabelMapping | None, report: Callable[[str], None] = print
) -> DataSetCheck:
    """Read a data set as training would.

    Args:
        folder: in one of the layouts of `training/cases.py`.
        mapping: of its label numbers, or None.
        report: gets a line of progress every few seconds.

    Raises:
        DataError: not a data set, or its description cannot be understood.
    """
    images, labels = paired_files(folder)
    described = read_description(folder)
    names = [name for name, _ in images]
    result = DataSetCheck(folder)
    _note(result.lost, "no label map", set(names) - set(labels))
    _note(result.lost, "a label map without an image", set(labels) - set(names))
    _note(result.lost, "in cases.json without an image", set(described) - set(names))
    _note(
        result.lost,
        "described as unlabelled (annotated_labels is empty)",
        (
            name
            for name in set(names) & set(labels)
            if described.get(name, {}).get("annotated_labels") == []
        ),
    )
    twice = [name for name, count in Counter(names).items() if count > 1]
    _note(result.lost, "the image is there twice: training refuses that", twice)
    result.left_out = len(find_training_cases(folder, mapping, left_out=True))
    found = find_training_cases(folder, mapping)
    told = time.monotonic()
    with ThreadPoolExecutor(min(4, cpu_limit())) as pool:
        for done, (case, (doubts, reason)) in enumerate(
            zip(found, pool.map(_read, found), strict=True), 1
        ):
            if reason:
                _note(result.lost, reason, [case.name])
            else:
                result.cases.append(case)
            for doubt in doubts:
                _note(result.cautions, doubt, [case.name])
            if time.monotonic() - told > _REPORT_EVERY_S:
                told = time.monotonic()
                report(f"{folder}: read {done} of {len(found)} cases")
    if absent := never_present(result.cases):
        _note(result.cautions, absent, [case.name for case in result.cases])
    return result


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{', '.join(names[:_MOST_NAMES])}{more}"


def _span(values: Iterable[float]) -> str:
    low, high = min(values := list(values)), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _geometry(cases: list[Case]) -> list[str]:
    known = [case.cached for case in cases]
    sizes = Counter(f"{volume.shape[1]}x{volume.shape[2]}" for volume in known)
    shown = [f"{size} ({count})" for size, count in sizes.most_common(_MOST_NAMES)]
    return [
        f"  slices {_span(volume.shape[0] for volume in known)}, "
        f"{sum(volume.shape[0] for volume in known):,} in all; rows x columns {', '.join(shown)}",
        f"  spacing of slices {_span(round(volume.spacing[0], 2) for volume in known)} mm, "
        f"of pixels {_span(round(volume.spacing[2], 2) for volume in known)} mm; "
        f"1st percentile {_span(round(volume.window[0]) for volume in known)} HU, "
        f"99th {_span(round(volume.window[1]) for volume in known)} HU",
    ]


def describe(check: DataSetCheck) -> list[str]:
    """A data set's check, as lines."""
    patients = len({case.patient for case in check.cases})
    stacks = sum(case.stack for case in check.cases)
    lines = [
        f"{check.folder}: {len(check.cases)} cases of {patients} patients to train on"
        + (f", {stacks} of them stacks of slices" if stacks else "")
        + (f"; {check.left_out} left out for a last score (split)" if check.left_out else "")
    ]
    if check.cases:
        lines += _geometry(check.cases)
    for word, table in (("not used", check.lost), ("caution", check.cautions)):
        for reason, names in table.items():
            lines.append(f"  {word}: {reason}: {len(names)} ({_names(names)})")
    return lines


def table(checks: list[DataSetCheck]) -> str:
    """Cases and slices for each label over all data sets."""
    return label_table([case for check in checks for case in check.cases], [])

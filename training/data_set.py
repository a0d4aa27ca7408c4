"""Data sets read for training: which cases can be used, and what is doubtful of them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from inference.labels import LABEL_NAMES
from inference.memory import cpu_limit
from inference.volume import VolumeError
from training.cache import cache_case, read_case
from training.cases import CachedVolume, Case, find_files

_MOST_NAMES = 5
_USUAL_PIXEL_MM = (0.3, 3.5)
_THICKEST_MM = 15.0
_LEAST_AIR_HU = -300  # a CT shows air: its 1st percentile lies far below this, or it was windowed


@dataclass
class DataSet:
    """A data set that was read.

    Attributes:
        folder: of it.
        cases: that can be used, read, by name.
        lost: names of those that cannot, by reason.
        doubts: names of those that can and should be looked at, by reason.
    """

    folder: Path
    cases: list[Case] = field(default_factory=list)
    lost: dict[str, list[str]] = field(default_factory=dict)
    doubts: dict[str, list[str]] = field(default_factory=dict)

    def describe(self) -> list[str]:
        """Return what was found, as lines."""
        patients = {case.patient for case in self.cases}
        slices = sum(case.cached.shape[0] for case in self.cases)
        lines = [
            f"{self.folder}: {len(self.cases)} cases, {len(patients)} patients, {slices:,} slices"
        ]
        for word, table in (("not used", self.lost), ("caution", self.doubts)):
            for reason, names in table.items():
                more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
                shown = ", ".join(sorted(names)[:_MOST_NAMES])
                lines.append(f"  {word}: {reason}: {len(names)} ({shown}{more})")
        return lines


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


def read_data_set(
    folder: Path, cases: list[Case], cache: Path | None, report: Callable[[str], None] = print
) -> DataSet:
    """Read the cases of a data set, and set their `annotated` where it was open.

    Args:
        folder: of the data set.
        cases: found in it.
        cache: folder to keep what is read, or None to keep nothing but what is known of it.
        report: gets a line for each damaged file of the cache.

    Raises:
        OSError: the cache cannot be written.
    """
    result = DataSet(folder)
    if cache:
        cache.mkdir(parents=True, exist_ok=True)

    def read(case: Case) -> str:
        """Read a case; returns why it cannot be used, or ""."""
        try:
            if cache:
                case.cached = cache_case(case, cache, report)
            else:
                case.cached = CachedVolume.of(case.image, case.label, read_case(case)[2])
        except VolumeError as error:
            return str(error).splitlines()[0]
        if case.annotated is None:
            case.annotated = case.cached.present
        return "" if case.annotated else "nothing is labelled"

    pool = ThreadPoolExecutor(min(8, cpu_limit()))
    try:
        outcomes = tqdm(pool.map(read, cases), str(folder), len(cases), leave=False, disable=None)
        for case, reason in zip(cases, outcomes, strict=True):
            if reason:
                result.lost.setdefault(reason, []).append(case.name)
                continue
            result.cases.append(case)
            for doubt in _doubts(case):
                result.doubts.setdefault(doubt, []).append(case.name)
    finally:
        pool.shutdown(cancel_futures=True)
    if result.cases:
        everywhere = set.intersection(*(set(case.annotated) for case in result.cases))
        absent = everywhere.difference(*(case.cached.present for case in result.cases))
        if absent:
            names = ", ".join(LABEL_NAMES[label] for label in sorted(absent))
            reason = f"annotated in every case and present in none: {names}"
            result.doubts[reason] = [case.name for case in result.cases]
    return result


def unpaired(folder: Path) -> dict[str, list[str]]:
    """Return the names in a data set's folder of which no case is made, by reason.

    Raises:
        TrainingError: not a data set, or its description is damaged.
    """
    images, labels, described = find_files(folder)
    names = {name for name, _ in images}
    unlabelled = {name for name, about in described.items() if about.get("annotated_labels") == []}
    reasons = {
        "no label map": names - set(labels),
        "a label map without an image": set(labels) - names,
        "in cases.json without an image": set(described) - names,
        "described as unlabelled (annotated_labels is empty)": names & set(labels) & unlabelled,
    }
    return {reason: list(found) for reason, found in reasons.items() if found}

"""Data sets read for training: which cases can be used, and which of them should be checked."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from benchmark.text import listed
from inference.files import printable
from inference.labels import LABEL_NAMES
from inference.memory import cpu_limit
from inference.volume import VolumeError
from training.cache import cache_case, read_case
from training.cases import CachedVolume, Case, CaseFiles

_USUAL_PIXEL_MM = (0.3, 3.5)
_THICKEST_MM = 15.0
_LEAST_AIR_HU = -300  # a CT shows air: its 1st percentile lies far below this, or it was windowed


@dataclass
class DataSet:
    """A data set: the cases found in it and, once they are read, those that can be used."""

    folder: Path
    files: list[CaseFiles]  # found in it
    unused: dict[str, list[str]]  # names of cases that cannot be used, by reason
    cases: list[Case] = field(default_factory=list)  # that can be used, by name
    doubts: dict[str, list[str]] = field(default_factory=dict)  # of those to be checked, by reason

    def describe(self) -> str:
        """Return what was found, as lines."""
        patients = {case.patient for case in self.cases}
        slices = sum(case.cached.shape[0] for case in self.cases)
        lines = [
            f"{self.folder}: {len(self.cases)} cases, {len(patients)} patients, {slices:,} slices"
        ]
        for word, table in (("not used", self.unused), ("caution", self.doubts)):
            lines += [
                f"  {word}: {reason}: {len(names)} ({listed(sorted(map(printable, names)), 5)})"
                for reason, names in table.items()
            ]
        return "\n".join(lines)

    def read(self, cache: Path | None, report: Callable[[str], None] = print) -> "DataSet":
        """Read the cases into a cache, or without one and without writing; returns itself.

        `report` gets a line for each damaged file of the cache.

        Raises:
            OSError: the cache cannot be written.
        """
        if cache:
            cache.mkdir(parents=True, exist_ok=True)

        def read_one(case: CaseFiles) -> Case | str:
            """Return the case, or why it cannot be used."""
            try:
                if cache:
                    volume = cache_case(case, cache, report)
                else:
                    volume = CachedVolume.of(case.image, case.label, read_case(case)[2])
            except VolumeError as error:
                return str(error).splitlines()[0]
            annotated = volume.present if case.annotated is None else case.annotated
            return Case(case, annotated, volume) if annotated else "nothing is labelled"

        pool = ThreadPoolExecutor(min(8, cpu_limit()))
        try:
            read, count = pool.map(read_one, self.files), len(self.files)
            outcomes = tqdm(read, str(self.folder), count, leave=False, disable=None)
            for known, case in zip(self.files, outcomes, strict=True):
                if isinstance(case, str):
                    self.unused.setdefault(case, []).append(known.name)
                    continue
                self.cases.append(case)
                for doubt in _doubts(case):
                    self.doubts.setdefault(doubt, []).append(case.name)
        finally:
            pool.shutdown(cancel_futures=True)
        if self.cases:
            everywhere = set.intersection(*(set(case.annotated) for case in self.cases))
            absent = everywhere.difference(*(case.cached.present for case in self.cases))
            if absent:
                names = ", ".join(LABEL_NAMES[label] for label in sorted(absent))
                reason = f"annotated in every case and present in none: {names}"
                self.doubts[reason] = [case.name for case in self.cases]
        return self


def _doubts(case: Case) -> list[str]:
    """Return what is doubtful of a case that can be used."""
    known = case.cached
    unlisted = [LABEL_NAMES[label] for label in known.present if label not in case.annotated]
    slice_mm, *pixel_mm = known.spacing
    low, high = _USUAL_PIXEL_MM
    doubts = {
        f"headers disagree: {known.remark}": known.remark,
        f"marked but not in annotated_labels, so not taught: {', '.join(unlisted)}": unlisted,
        f"pixels outside {low} to {high} mm: is the header's spacing right?": (
            min(pixel_mm) < low or max(pixel_mm) > high
        ),
        f'slices over {_THICKEST_MM:g} mm apart and not described as a "stack"': (
            slice_mm > _THICKEST_MM and not case.files.stack
        ),
        f"no air below {_LEAST_AIR_HU} HU: not HU, or from a window (window_hu in cases.json)": (
            known.window[0] > _LEAST_AIR_HU and case.files.window_hu is None
        ),
    }
    return [doubt for doubt, holds in doubts.items() if holds]

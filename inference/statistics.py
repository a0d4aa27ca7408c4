"""Volume and mean intensity of each label of a case."""

import csv
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path

import numpy as np

from inference.files import locked, spreadsheet_text, write_atomically
from inference.flags import Flag
from inference.labels import LABEL_NAMES
from inference.volume import Volume


@dataclass(frozen=True)
class LabelStatistics:
    """One label of one case.

    Attributes:
        case: its name.
        label: number, 1 to 14.
        name: of the label.
        voxels: their number.
        volume_ml: millilitres; 0 where the label is absent.
        mean_hu: mean HU of its voxels; None where the label is absent or a voxel is no number.
        flags: doubts about the label, names of `inference.flags.KINDS` separated by semicolons.
        case_flags: doubts about the whole case, the same in all its rows.
    """

    case: str
    label: int
    name: str
    voxels: int
    volume_ml: float
    mean_hu: float | None
    flags: str = ""
    case_flags: str = ""


_COLUMNS = list(LabelStatistics.__annotations__)
_LABELS = len(LABEL_NAMES)


def _finite(value: float | None) -> float | None:
    """A number that JSON knows, or None."""
    return None if value is None or not math.isfinite(value) else float(value)


def label_statistics(
    case: str, label_map: np.ndarray, volume: Volume, flags: Iterable[Flag] = ()
) -> list[LabelStatistics]:
    """Statistics of every label but background.

    Args:
        case: name of the case.
        label_map: (slices, rows, columns), SPL, uint8.
        volume: the CT volume it labels.
        flags: of the case.
    """
    named = [[flag.name for flag in flags if flag.label == label] for label in range(_LABELS)]
    labelled = label_map != 0
    labels = label_map[labelled]
    voxels = np.bincount(labels, minlength=_LABELS)
    sums = np.bincount(labels, weights=volume.voxels[labelled], minlength=_LABELS)
    return [
        LabelStatistics(
            case=case,
            label=label,
            name=LABEL_NAMES[label],
            voxels=int(voxels[label]),
            volume_ml=round(float(voxels[label] * volume.voxel_ml), 3),
            mean_hu=_finite(
                round(volume.slope * sums[label] / voxels[label] + volume.intercept, 2)
                if voxels[label]
                else None
            ),
            flags="; ".join(named[label]),
            case_flags="; ".join(named[0]),
        )
        for label in range(1, _LABELS)
    ]


class StatisticsTable:
    """The table of a run, on disk after every few cases, beside the rows of other runs.

    Runs that share a table write it one after another, and each keeps the rows of the others.

    Args:
        path: `.csv` or `.json`.
        keep: whether rows that are there already stay, but for those of cases that end anew.

    Raises:
        OSError: the file cannot be written; told before any case is predicted.
        ValueError: rows are to be kept and the file is no such table.
    """

    SECONDS_BETWEEN = 2.0
    """A long table is not written anew after each of many short cases."""

    _LEAST_REST = 20  # a longer one not before so many times what writing it took have passed

    def __init__(self, path: Path, *, keep: bool = False) -> None:
        self.path = path
        self._texts: dict[str, str] = {}  # own rows as they are written: a small part of their size
        self._before: set[str] = set()
        self.write(keep=keep)

    def __contains__(self, case: str) -> bool:
        return spreadsheet_text(case) in self._before | self._texts.keys()

    def add(self, statistics: list[LabelStatistics]) -> None:
        """Take the rows of one case that has ended.

        Raises:
            OSError: the file cannot be written.
            ValueError: it has become something else than such a table.
        """
        rows = [asdict(row) | {"case": spreadsheet_text(row.case)} for row in statistics]
        if rows:
            self._texts[rows[0]["case"]] = self._text(rows)
        if time.monotonic() - self._written >= self._rest:
            self.write()

    def write(self, *, keep: bool = True) -> None:
        """Write the table, sorted by case, whole or not at all.

        Args:
            keep: the rows of other cases that are there.

        Raises:
            OSError, ValueError: as `add`.
        """
        start = time.monotonic()
        with locked(self.path):
            texts = self._others() if keep and self.path.exists() else {}
            self._before = set(texts)
            texts |= self._texts
            ordered = [texts[case] for case in sorted(texts)]
            if self.path.suffix == ".json":
                text = "[\n" + ",\n".join(ordered) + "\n]\n"
            else:
                text = ",".join(_COLUMNS) + "\n" + "".join(ordered)
            write_atomically(self.path, text.encode())
        self._written = time.monotonic()
        self._rest = max(self.SECONDS_BETWEEN, self._LEAST_REST * (self._written - start))

    def _others(self) -> dict[str, str]:
        """The rows that are on disk, by case, as they stand there."""
        rows: dict[str, list[dict]] = {}
        for row in _read_rows(self.path):
            rows.setdefault(row["case"], []).append(row)
        return {case: self._text(records) for case, records in rows.items()}

    def _text(self, rows: list[dict]) -> str:
        """The rows of one case as they stand in the file."""
        if self.path.suffix == ".json":
            return ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
        table = StringIO()
        csv.DictWriter(table, _COLUMNS, lineterminator="\n").writerows(rows)
        return table.getvalue()


def _read_rows(path: Path) -> list[dict]:
    """The rows of a table that an earlier run wrote.

    Raises:
        ValueError: it is no such table.
        OSError: the file cannot be read.
    """
    try:
        if path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
        else:
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
        if any(list(row) != _COLUMNS for row in rows):
            raise ValueError("other columns")
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"not a table of label statistics ({error})") from error
    return rows

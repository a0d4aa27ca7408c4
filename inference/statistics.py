"""Volume and mean intensity of each label of a case."""

import csv
import json
import math
import time
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np

from inference.files import spreadsheet_text, write_atomically
from inference.labels import LABEL_NAMES
from inference.volume import Volume


@dataclass(frozen=True)
class LabelStatistics:
    """One label of one case.

    Attributes:
        case: its name.
        label: number, 1 to 14.
        name: of the label.
        volume_ml: millilitres; 0 where the label is absent; None where the header has no spacing.
        mean_hu: mean HU of its voxels; None where the label is absent or a voxel is no number.
    """

    case: str
    label: int
    name: str
    volume_ml: float | None
    mean_hu: float | None


_COLUMNS = list(LabelStatistics.__annotations__)


def _finite(value: float | None) -> float | None:
    """A number that JSON knows, or None."""
    return None if value is None or not math.isfinite(value) else float(value)


def label_statistics(case: str, label_map: np.ndarray, volume: Volume) -> list[LabelStatistics]:
    """Statistics of every label but background.

    Args:
        case: name of the case.
        label_map: (slices, rows, columns), SPL, uint8.
        volume: the CT volume it labels; its header's spacing gives a voxel's size.
    """
    labelled = label_map != 0
    labels = label_map[labelled]
    count = len(LABEL_NAMES)
    voxels = np.bincount(labels, minlength=count)
    sums = np.bincount(labels, weights=volume.voxels[labelled], minlength=count)
    voxel_ml = float(np.prod(volume.spacing)) / 1000
    return [
        LabelStatistics(
            case=case,
            label=label,
            name=LABEL_NAMES[label],
            volume_ml=_finite(round(voxels[label] * voxel_ml, 3)),
            mean_hu=_finite(
                round(volume.slope * sums[label] / voxels[label] + volume.intercept, 2)
                if voxels[label]
                else None
            ),
        )
        for label in range(1, count)
    ]


class StatisticsTable:
    """The table of a run, on disk after every few cases, with the rows of a run before.

    Args:
        path: `.csv` or `.json`.
        keep: whether rows that are there already stay, but for those of cases that end anew.

    Raises:
        OSError: the file cannot be written; told before any case is predicted.
        ValueError: rows are to be kept and the file is no such table.
    """

    SECONDS_BETWEEN = 2.0
    """A long table is not written anew after each of many short cases."""

    def __init__(self, path: Path, *, keep: bool = False) -> None:
        self.path = path
        self._rows: dict[str, list[dict]] = {}
        if keep and path.exists():
            for row in _read_rows(path):
                self._rows.setdefault(row["case"], []).append(row)
        self.write()

    def add(self, statistics: list[LabelStatistics]) -> None:
        """Take the rows of a case that has ended.

        Raises:
            OSError: the file cannot be written.
        """
        for row in statistics:
            self._rows.pop(spreadsheet_text(row.case), None)
        for row in statistics:
            record = vars(row) | {"case": spreadsheet_text(row.case)}
            self._rows.setdefault(record["case"], []).append(record)
        if time.monotonic() - self._written >= self.SECONDS_BETWEEN:
            self.write()

    def write(self) -> None:
        """Write the table, sorted by case, whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        records = [row for case in sorted(self._rows) for row in self._rows[case]]
        if self.path.suffix == ".json":
            text = json.dumps(records, indent=1, allow_nan=False) + "\n"
        else:
            table = StringIO()
            writer = csv.DictWriter(table, _COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)
            text = table.getvalue()
        write_atomically(self.path, text.encode())
        self._written = time.monotonic()


def _read_rows(path: Path) -> list[dict]:
    """The rows of a table that an earlier run wrote.

    Raises:
        ValueError: it is no such table.
        OSError: the file cannot be read.
    """
    try:
        if path.suffix == ".json":
            rows = json.loads(path.read_text())
        else:
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        if any(list(row) != _COLUMNS for row in rows):
            raise ValueError("other columns")
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"not a table of label statistics ({error})") from error
    return rows

"""Volume and mean intensity of each label of a case, and the table of them."""

import csv
import json
import math
import time
from io import StringIO
from pathlib import Path

import numpy as np

from ..files import locked, spreadsheet_text, write_atomically
from ..labels import LABEL_NAMES
from ..volume import Volume

_LABELS = len(LABEL_NAMES)

_COLUMNS = ["case", "label", "name", "voxels", "volume_ml", "mean_hu", "flags", "case_flags"]


def label_statistics(label_map: np.ndarray, volume: Volume) -> dict[str, dict]:
    """Return the statistics of every label but background, as a record has them.

    Args:
        label_map: (slices, rows, columns), SPL, uint8.
        volume: the CT volume it labels.

    Returns:
        Each by label name: `voxels`, their number; `volumes_ml`; `mean_hu`, None where the label is
        absent or a voxel is no number.
    """
    labelled = label_map != 0
    labels = label_map[labelled]
    voxels = np.bincount(labels, minlength=_LABELS)
    sums = np.bincount(labels, weights=volume.voxels[labelled], minlength=_LABELS)

    def mean_hu(label: int) -> float | None:
        mean = volume.slope * float(sums[label]) / max(voxels[label], 1) + volume.intercept
        return round(mean, 2) if voxels[label] and math.isfinite(mean) else None

    names = list(enumerate(LABEL_NAMES))[1:]
    return {
        "voxels": {name: int(voxels[label]) for label, name in names},
        "volumes_ml": {
            name: round(float(voxels[label] * volume.voxel_ml), 3) for label, name in names
        },
        "mean_hu": {name: mean_hu(label) for label, name in names},
    }


def _rows(record: dict) -> list[dict]:
    """Return the rows of a case by its record: one for each label, with the names of its flags."""
    flags: dict[str | None, list[str]] = {}
    for flag in record["flags"]:
        flags.setdefault(flag["label"], []).append(flag["flag"])
    case, case_flags = spreadsheet_text(record["case"]), "; ".join(flags.get(None, []))
    return [
        {
            "case": case,
            "label": label,
            "name": name,
            "voxels": record["voxels"][name],
            "volume_ml": record["volumes_ml"][name],
            "mean_hu": record["mean_hu"][name],
            "flags": "; ".join(flags.get(name, [])),
            "case_flags": case_flags,
        }
        for label, name in enumerate(LABEL_NAMES)
        if label
    ]


class StatisticsTable:
    """The table of a run, on disk after every few cases, beside the rows of other runs.

    Runs that share a table write it one after another, and each keeps the rows of the others.

    Args:
        path: `.csv` or `.json`.
        keep: whether to keep the rows on disk, but for those of cases that are added.

    Raises:
        OSError: the file cannot be written; raised before any case is predicted.
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

    def add(self, record: dict) -> None:
        """Add the rows of a case.

        Args:
            record: with `case`, `flags` and what `label_statistics` returns.

        Raises:
            OSError, ValueError: as `write`.
        """
        rows = _rows(record)
        self._texts[rows[0]["case"]] = self._text(rows)
        if time.monotonic() - self._written >= self._rest:
            self.write()

    def write(self, *, keep: bool = True) -> None:
        """Write the table, sorted by case, whole or not at all.

        Args:
            keep: the rows of other cases that are there.

        Raises:
            OSError: the file cannot be written.
            ValueError: it has become something else than such a table.
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
            write_atomically(self.path, text)
        self._written = time.monotonic()
        self._rest = max(self.SECONDS_BETWEEN, self._LEAST_REST * (self._written - start))

    def _others(self) -> dict[str, str]:
        """Return the rows on disk, by case, as they stand there."""
        cases: dict[str, list[dict]] = {}
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                is_json = self.path.suffix == ".json"
                for row in json.load(file) if is_json else csv.DictReader(file):
                    if list(row) != _COLUMNS:
                        raise ValueError("other columns")
                    cases.setdefault(row["case"], []).append(row)
        except (ValueError, TypeError, csv.Error) as error:
            raise ValueError(f"not a table of label statistics ({error})") from error
        return {case: self._text(rows) for case, rows in cases.items()}

    def _text(self, rows: list[dict]) -> str:
        """Return the rows of one case as they stand in the file."""
        if self.path.suffix == ".json":
            return ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
        table = StringIO()
        csv.DictWriter(table, _COLUMNS, lineterminator="\n").writerows(rows)
        return table.getvalue()

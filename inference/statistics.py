"""Volume and mean intensity of each label of a case."""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np

from inference.labels import LABEL_NAMES
from inference.volume import Volume, write_atomically


@dataclass(frozen=True)
class LabelStatistics:
    """One label of one case.

    Attributes:
        case: its name.
        label: number, 1 to 14.
        name: of the label.
        volume_ml: millilitres; 0 where the label is absent.
        mean_hu: mean HU of its voxels; None where the label is absent.
    """

    case: str
    label: int
    name: str
    volume_ml: float
    mean_hu: float | None


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
            volume_ml=round(voxels[label] * voxel_ml, 3),
            mean_hu=round(volume.slope * sums[label] / voxels[label] + volume.intercept, 2)
            if voxels[label]
            else None,
        )
        for label in range(1, count)
    ]


def write_statistics(path: Path, rows: Iterable[LabelStatistics]) -> None:
    """Write a table with a row per case and label, as `.json` or `.csv` by the path's ending.

    Raises:
        OSError: the file cannot be written.
    """
    records = [vars(row) for row in rows]
    if path.suffix == ".json":
        text = json.dumps(records, indent=1) + "\n"
    else:
        table = StringIO()
        writer = csv.DictWriter(table, list(LabelStatistics.__annotations__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        text = table.getvalue()
    write_atomically(path, text.encode())

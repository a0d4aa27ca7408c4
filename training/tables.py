"""The tables of a run: rows of `metrics.csv`, of `held_out.csv` and of left-out scores."""

import csv
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import NamedTuple, get_type_hints

import numpy as np

from inference.files import write_atomically
from inference.labels import LABEL_NAMES, ORGANS


class Metrics(NamedTuple):
    """The mean loss since the row before, the rate, and the seconds of training so far."""

    step: int
    loss: float
    learning_rate: float
    slices_per_s: float
    seconds: float


class Score(NamedTuple):
    """DSC and NSD of one label of one case at one step of training; a stack's NSD is NaN."""

    step: int
    data_set: str
    case: str
    label: int
    dsc: float
    nsd: float

    @property
    def name(self) -> str:
        """The label's name."""
        return LABEL_NAMES[self.label]


def write_table(
    path: Path, kind: type[Metrics | Score], rows: Sequence[Metrics] | Sequence[Score]
) -> None:
    """Write rows as CSV, whole: some file systems cannot append; of scores the label's name too.

    Raises:
        OSError: the file cannot be written.
    """
    table = StringIO()
    columns = (*kind._fields, "name") if kind is Score else kind._fields
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([columns, *([getattr(row, name) for name in columns] for row in rows)])
    write_atomically(path, table.getvalue().encode(errors="surrogateescape"))


def read_scores(path: Path) -> list[Score]:
    """Read a table of scores.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is another file.
    """
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        kinds = get_type_hints(Score)
        return [Score(**{name: kind(row[name]) for name, kind in kinds.items()}) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a table of scores") from error


def mean_by_label(scores: list[Score]) -> dict[int, tuple[float, float, int]]:
    """Return for each label scored its mean DSC, mean NSD (NaN without one) and number of cases."""
    means = {}
    for label in sorted({score.label for score in scores}):
        dsc, nsd = np.array([(s.dsc, s.nsd) for s in scores if s.label == label]).T
        surfaces = nsd[~np.isnan(nsd)]
        mean_nsd = float(surfaces.mean()) if surfaces.size else float("nan")
        means[label] = float(dsc.mean()), mean_nsd, len(dsc)
    return means


def mean_organ_dsc(scores: list[Score]) -> float:
    """Return the mean over the organs scored of their mean DSC; NaN if there are none."""
    organs = [dsc for label, (dsc, _, _) in mean_by_label(scores).items() if label in ORGANS]
    return float(np.mean(organs)) if organs else float("nan")


def summary(scores: list[Score]) -> str:
    """Return a line for each label: mean DSC, mean NSD and the number of cases."""
    rows = [
        f"  {LABEL_NAMES[label]:<22} DSC {dsc:.3f}  NSD {nsd:.3f}  n {count}"
        for label, (dsc, nsd, count) in mean_by_label(scores).items()
    ]
    return "\n".join([*rows, f"  {'mean of organs':<22} DSC {mean_organ_dsc(scores):.3f}"])

"""Tables of scores: written, read, and runs side by side."""

import csv
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import NamedTuple, get_type_hints

import numpy as np

from benchmark.text import table
from inference.files import write_atomically
from inference.labels import LABEL_NAMES, ORGANS
from training import TrainingError
from training.recipe import MAY_CHANGE_ON_RESUME
from training.run_folder import Metrics, read_run


class Score(NamedTuple):
    """DSC and NSD of one label of one case at one step of training; a stack's NSD is NaN."""

    step: int
    data_set: str
    case: str
    label: int
    dsc: float
    nsd: float


def write_table(
    path: Path, kind: type[Metrics | Score], rows: Sequence[Metrics] | Sequence[Score]
) -> None:
    """Write rows as CSV, whole: some file systems cannot append; of scores the label's name too.

    Raises:
        OSError: the file cannot be written.
    """
    content = StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(kind._fields + ("name",) * (kind is Score))
    for row in rows:
        writer.writerow((*row, LABEL_NAMES[row.label]) if isinstance(row, Score) else row)
    write_atomically(path, content.getvalue().encode(errors="surrogateescape"))


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


def comparison_table(runs: list[Path], number: str) -> str:
    """Return a Markdown table of the DSC at the last scored step of runs, by a recipe's number.

    The last step, not the best: to choose a step by the very cases that are reported would flatter.
    Runs with the same value of the number (such as `fold` or `attention`) share a column; in others
    of the recipe's numbers they must not differ, but for the seed where it is not folds.

    Returns:
        By label the mean over the cases of each column; of all, the mean, the standard deviation
        between cases, and their number; a case counts once a run. Where two columns have the same
        cases, their difference and its standard error over patients as well.

    Raises:
        TrainingError: a run cannot be read, was never scored, or differs in other numbers.
    """
    columns: dict[str, list[list[Score]]] = {}
    patients: dict[str, str] = {}
    first: dict | None = None
    for run in runs:
        about, recipe = read_run(run)
        numbers = vars(recipe)
        if number not in numbers:
            raise TrainingError(f"there is no {number} in a recipe")
        free = {number, *MAY_CHANGE_ON_RESUME, *(() if number == "fold" else ("seed",))}
        rest = {name: value for name, value in numbers.items() if name not in free}
        first = first or rest
        if differing := [name for name in rest if rest[name] != first[name]]:
            raise TrainingError(f"{run}: another recipe than {runs[0]}: {', '.join(differing)}")
        patients |= {case["name"]: case["patient"] for case in about["held_out"]}
        try:
            scores = read_scores(run / "held_out.csv")
        except (OSError, ValueError) as error:
            raise TrainingError(f"{run}: no held-out scores ({error})") from error
        last = max((score.step for score in scores), default=0)
        columns.setdefault(str(numbers[number]), []).append([s for s in scores if s.step == last])
    names = sorted(columns, key=lambda value: (len(value), value))
    head = [number, *names, "all", "sd", "n"] + ["difference (standard error)"] * (len(names) == 2)
    lines = []
    labels = {score.label for of_column in columns.values() for run in of_column for score in run}
    rows = [(LABEL_NAMES[label], (label,)) for label in sorted(labels)]
    for title, chosen in (*rows, ("**mean of organs**", ORGANS)):
        # Of each column the cases that have any of these labels, by run, and their mean DSC.
        values = [
            [
                pair
                for scores in columns[name]
                for pair in _means((s.case, s.dsc) for s in scores if s.label in chosen).items()
            ]
            for name in names
        ]
        by_column = [[dsc for _, dsc in part] for part in values]
        every = [dsc for part in by_column for dsc in part]
        means = [f"{np.mean(part):.3f}" if part else "–" for part in (*by_column, every)]
        spread = f"{np.std(every, ddof=1):.3f}" if len(every) > 1 else "–"
        cells = [title, *means, spread, str(len(every))]
        if len(names) == 2:
            one, other = (_means((patients[case], dsc) for case, dsc in part) for part in values)
            cells.append("–")
            if one.keys() == other.keys() and len(one) > 1:  # paired by patient
                apart = np.array([other[patient] - one[patient] for patient in one])
                cells[-1] = f"{apart.mean():+.3f} ({apart.std(ddof=1) / len(apart) ** 0.5:.3f})"
        lines.append(cells)
    return table(head, "l" * len(head), lines)


def _means(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the mean of the values of each name."""
    by_name: dict[str, list[float]] = {}
    for name, value in values:
        by_name.setdefault(name, []).append(value)
    return {name: float(np.mean(of_name)) for name, of_name in by_name.items()}

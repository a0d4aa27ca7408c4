"""Runs side by side: folds of one recipe, or runs that differ in one of its numbers."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmark.text import table
from inference.labels import LABEL_NAMES, ORGANS
from training import TrainingError
from training.recipe import MAY_CHANGE_ON_RESUME
from training.run_folder import read_run
from training.tables import Score, read_scores


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

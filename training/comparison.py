"""Runs side by side: folds of one recipe, or runs that differ in one of its numbers."""

from pathlib import Path

import numpy as np

from inference.labels import LABEL_NAMES, ORGANS
from training import TrainingError
from training.evaluation import Score, read_scores
from training.recipe import MAY_CHANGE_ON_RESUME
from training.run_folder import read_run


def comparison_table(runs: list[Path], number: str) -> str:
    """Return a Markdown table of the DSC at the last scored step of runs, by a recipe's number.

    The last step, not the best: to choose a step by the very cases that are reported would flatter.

    Args:
        runs: their folders; but for this number their recipes are alike (and, but for folds, the
            seed).
        number: such as `fold` or `attention`; runs with the same value share a column.

    Returns:
        By label the mean over the cases of each column; of all, the mean, the standard deviation
        between cases, and their number. Where two columns have the same cases, their difference and
        its standard error over patients as well. A case counts once a run.

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
        # Folds are dealt by the seed; other runs may be repeated with several.
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
    every = [scores for name in names for scores in columns[name]]
    head = [number, *names, "all", "sd", "n"]
    if pair := len(names) == 2:
        head.append("difference (standard error)")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    labels = sorted({score.label for scores in every for score in scores})
    for title, chosen in (
        *((LABEL_NAMES[label], (label,)) for label in labels),
        ("**mean of organs**", ORGANS),
    ):
        of_column = [[_by_case(scores, chosen) for scores in columns[name]] for name in names]
        values = [list(np.concatenate([list(one.values()) for one in part])) for part in of_column]
        together = [value for part in values for value in part]
        spread = f"{np.std(together, ddof=1):.3f}" if len(together) > 1 else "–"
        cells = [title, *map(_mean, values), _mean(together), spread, str(len(together))]
        if pair:
            cells.append(_difference(*of_column, patients))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_case(scores: list[Score], labels: tuple[int, ...]) -> dict[str, float]:
    """Return the mean DSC of some labels of each case that has any of them."""
    found: dict[str, list[float]] = {}
    for score in scores:
        if score.label in labels:
            found.setdefault(score.case, []).append(score.dsc)
    return {case: float(np.mean(values)) for case, values in found.items()}


def _mean(values: list[float]) -> str:
    return f"{np.mean(values):.3f}" if values else "–"


def _difference(
    one: list[dict[str, float]], other: list[dict[str, float]], patients: dict[str, str]
) -> str:
    """Return the mean difference of the other runs and the one's, paired by patient."""
    means = []
    for runs in (one, other):
        by_patient: dict[str, list[float]] = {}
        for scores in runs:
            for case, dsc in scores.items():
                by_patient.setdefault(patients.get(case, case), []).append(dsc)
        means.append({patient: np.mean(values) for patient, values in by_patient.items()})
    if means[0].keys() != means[1].keys() or len(means[0]) < 2:
        return "–"
    apart = np.array([means[1][patient] - means[0][patient] for patient in means[0]])
    return f"{apart.mean():+.3f} ({apart.std(ddof=1) / len(apart) ** 0.5:.3f})"

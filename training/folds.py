"""Cross-validation: runs of one recipe on the folds of the same patients, in one table."""

import json
from pathlib import Path

import numpy as np

from inference.labels import LABEL_NAMES, ORGANS
from training.evaluation import Score, read_scores


def fold_table(runs: list[Path]) -> str:
    """A Markdown table of the last held-out scores of each fold, and over all cases.

    Each run is scored at its last scored step, not at its best: to choose a step by the very cases
    that are reported would flatter.

    Args:
        runs: folders of runs with `--folds K --fold 0` to `K - 1`, in any order; some may lack.

    Returns:
        By label the mean DSC of each fold, and over the cases of all folds the mean, its standard
        deviation between the cases, and their number.

    Raises:
        OSError: a run's files cannot be read.
        ValueError: the runs are not folds of one recipe, or one of them was never scored.
    """
    folds: dict[int, list[Score]] = {}
    steps: dict[int, int] = {}
    first: dict | None = None
    for run in runs:
        recipe = json.loads((run / "run.json").read_text(encoding="utf-8"))["recipe"]
        fold = recipe.get("fold", 0)
        if not recipe.get("folds", 0):
            raise ValueError(f"{run}: not a fold: it was trained without --folds")
        if fold in folds:
            raise ValueError(f"{run}: fold {fold} is there twice")
        without_fold = {name: value for name, value in recipe.items() if name != "fold"}
        first = first or without_fold
        differing = [name for name in first if first[name] != without_fold.get(name)]
        if differing:
            raise ValueError(f"{run}: another recipe than {runs[0]}: {', '.join(differing)}")
        table = run / "held_out.csv"
        scores = read_scores(table) if table.is_file() else []
        if not scores:
            raise ValueError(f"{run}: never scored: train it to its first evaluation_interval")
        steps[fold] = max(score.step for score in scores)
        folds[fold] = [score for score in scores if score.step == steps[fold]]
    numbers = sorted(folds)
    lines = [
        "| label | "
        + " | ".join(f"fold {n}, step {steps[n]}" for n in numbers)
        + " | all | sd | n |",
        "|---" * (len(numbers) + 4) + "|",
    ]
    every = [score for fold in numbers for score in folds[fold]]
    for label in sorted({score.label for score in every}):
        cells = [_mean([s.dsc for s in folds[fold] if s.label == label]) for fold in numbers]
        values = [score.dsc for score in every if score.label == label]
        lines.append(_row(LABEL_NAMES[label], cells, values))
    # Of the organs, the mean of each case's mean, so that a case counts once.
    by_fold = [_organ_means(folds[fold]) for fold in numbers]
    values = [value for of_fold in by_fold for value in of_fold]
    lines.append(_row("**mean of organs**", [_mean(of_fold) for of_fold in by_fold], values))
    if missing := sorted(set(range(first["folds"])) - set(numbers)):
        lines += ["", f"Missing: fold {', '.join(map(str, missing))} of {first['folds']}."]
    return "\n".join(lines)


def _organ_means(scores: list[Score]) -> list[float]:
    cases = sorted({score.case for score in scores})
    of_case = [[s.dsc for s in scores if s.case == case and s.label in ORGANS] for case in cases]
    return [float(np.mean(values)) for values in of_case if values]


def _mean(values: list[float]) -> str:
    return f"{np.mean(values):.3f}" if values else "–"


def _row(name: str, cells: list[str], values: list[float]) -> str:
    spread = f"{np.std(values, ddof=1):.3f}" if len(values) > 1 else "–"
    return f"| {name} | {' | '.join(cells)} | {_mean(values)} | {spread} | {len(values)} |"

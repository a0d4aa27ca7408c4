"""Compare two runs, case by case: how many times faster, leaner, better A is than B.

Times, memory and areas are compared as paired ratios A / B (below 1: A needs less), scores as
paired differences A - B (above 0: A is better). The geometric mean of the ratios (mean of the
differences) has a 95 % interval by Student's t over the cases, wide where they are few; an interval
with 1 in it (for scores 0) shows no difference. Failed cases count as in every table; the cases
that both finished are compared once more alone. Several runs of a case are its median run. RAM of a
container and of a command are read in two ways, and are not compared with one another.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from benchmark.containers.results import FIGURES
from benchmark.judging.ranking import SCORES
from benchmark.judging.runs import FEW_CASES, Run, RunError, read_runs, remarks
from benchmark.text import bullets, cell, plural, show, table
from inference.labels import TUMOR


class Spread(NamedTuple):
    """A paired comparison over cases."""

    cases: int
    mean: float  # of differences; the geometric mean of ratios
    interval: tuple[float, float] | None  # 95 % of the mean, Student's t; None below two cases
    median: float
    low: float
    high: float


def spread(pairs: np.ndarray, *, ratios: bool) -> Spread:
    """Compare pairs (cases, 2) of A and B by ratios A / B, if all are positive, or by A - B."""
    ours, theirs = pairs.T
    values = np.log(ours / theirs) if ratios else ours - theirs
    back = np.exp if ratios else np.asarray
    interval = None
    if len(values) > 1:
        ends = values[:2]  # without any spread, of which scipy has no interval
        if np.ptp(values):
            ends = np.array(stats.ttest_1samp(values, 0).confidence_interval(0.95))
        interval = (float(back(ends[0])), float(back(ends[1])))
    middle = [values.mean(), np.median(values), values.min(), values.max()]
    mean, *others = back(middle).tolist()
    return Spread(len(values), mean, interval, *others)


def compare(
    cases: Iterable[str],
    runs: tuple[Run, Run],
    value: Callable[[Run, str, str], float | None],
    key: str,
    *,
    ratios: bool,
) -> Spread | None:
    """Compare the cases in which both runs have a value; None where there is none.

    Args:
        cases, runs: names of cases; A and B.
        value, key: `Run.measured` and a column, or `Run.score` and a metric.
        ratios: as in `spread`; pairs with a value of 0, of which there is no ratio, are skipped.
    """
    pairs = np.array([[value(run, case, key) for run in runs] for case in cases], float)
    usable = pairs[(pairs > 0 if ratios else np.isfinite(pairs)).all(axis=-1)]
    return spread(usable, ratios=ratios) if len(usable) else None


def markdown(first: Run, second: Run) -> str:
    """Return the comparison as a Markdown page."""
    runs = (first, second)
    common = [case for case in first.cases if case in second.cases]
    finished = [case for case in common if not (first.failed(case) or second.failed(case))]
    one_ram = len(first.ram_measures | second.ram_measures) <= 1
    ratios, differences, times = [], [], []
    for column, figure in FIGURES.items():
        subsets = {"": common}
        if figure.penalty and len(finished) < len(common):
            subsets[", both finished"] = finished
        for suffix, cases in subsets.items() if one_ram or "RAM" not in column else ():
            if found := compare(cases, runs, Run.measured, column, ratios=True):
                ratios.append(_row(figure.title + suffix, found, ".3f"))
                if column == "Time":
                    times.append(_verdict(found, suffix))
    for key, metric in SCORES.items():
        title = metric.title
        if key.startswith("tumor") and (n := first.with_structure(TUMOR)) is not None:
            title += f" (in {n} of {len(first.in_reference)} references)"
        if found := compare(common, runs, Run.score, key, ratios=False):
            differences.append(_row(title, found, "+.4f"))
    parts = [f"# {cell(first.team)} (A) against {cell(second.team)} (B)"]
    failures = [sum(map(run.failed, common)) for run in runs]
    if times and any(failures):
        counts = "A failed {} and B {}".format(*failures)
        times.insert(0, f"**{counts} of {plural(len(common), 'case')}, which count 3600 s.**")
    parts.append(" ".join(times))
    for kind, mean, rows in (
        ("Ratio A / B", "Geometric mean", ratios),
        ("Difference A − B", "Mean", differences),
    ):
        titles = [kind, "Cases", mean, "95 % interval", "Median", "Least", "Greatest"]
        parts += [table(titles, "lrrrrrr", rows)] if rows else []
    if not ratios and not differences:
        parts.append("No case has the same figure in both runs.")
    parts.append(bullets(map(cell, remarks(runs) + _unlike(first, second))))
    return "\n\n".join(filter(None, parts)) + "\n"


def _row(title: str, found: Spread, form: str) -> list[str]:
    numbers = [format(value, form) for value in (found.mean, *found[3:])]
    ends = " to ".join(format(bound, form) for bound in found.interval or ()) or "–"
    return [title, str(found.cases), numbers[0], ends, *numbers[1:]]


def _verdict(found: Spread, suffix: str) -> str:
    """Return what the times show, with the interval of their ratio."""
    basis = f"geometric mean of {plural(found.cases, 'case')}{suffix}"
    text = f"A takes {found.mean:.2f} times as long as B"
    if found.interval is None:
        return f"**{text}** ({basis}; no interval)."
    low, high = found.interval
    if high < 1:
        text = f"A is {1 / found.mean:.2f} times as fast as B"
    elif low <= 1:
        text = f"no difference in time shown: {text}"
    return f"**{text}** ({basis}; 95 % interval of the ratio of times {low:.2f} to {high:.2f})."


def _unlike(first: Run, second: Run) -> list[str]:
    """Return what only a pair can show: cases without a partner, other machines, few cases."""
    found = []
    for run, other in ((first, second), (second, first)):
        if alone := [case for case in run.cases if case not in other.cases]:
            found.append(f"only in {run.team}: {', '.join(alone)}")
        lacks = [("scores", "accuracy")] * (not run.scores)
        lacks += [("times", "efficiency")] * (not run.results)
        for what, command in lacks:
            made = f"python -m benchmark {command} --report {run.folder} …"
            found.append(f"{run.team} has no {what}, so none are compared: {made} makes them")
    for key in ("gpu", "cpu", "cores"):
        machines = first.environment.get(key), second.environment.get(key)
        if machines[0] != machines[1] and first.environment and second.environment:
            found.append(
                f"**other {key}**: A on {machines[0]}, B on {machines[1]}; "
                "the ratios compare the machines as well"
            )
    common = len(set(first.cases) & set(second.cases))
    if 1 < common < FEW_CASES:
        found.append(
            f"{common} cases are few: the intervals take the cases for a fair sample of all, "
            "which few cannot show"
        )
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m benchmark compare`."""
    text = "report folder: TEAM_Efficiency.csv, accuracy_per_case.csv or both"
    for name in ("A", "B"):
        parser.add_argument(f"run_{name.lower()}", type=Path, metavar=f"RUN_{name}", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison as Markdown; 0 done.

    Raises:
        RunError: a folder is no run, or the runs have no case in common.
    """
    first, second = read_runs([arguments.run_a, arguments.run_b])
    if not set(first.cases) & set(second.cases):
        raise RunError(f"{first.team} and {second.team} have no case in common")
    show(markdown(first, second))
    return 0

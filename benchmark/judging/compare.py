"""Compare two runs, case by case: how many times faster, leaner, better is A than B?

Times, memory and areas are compared as paired ratios A / B (below 1: A needs less), scores as
paired differences A - B (above 0: A is better). The geometric mean of the ratios (mean of the
differences) has a 95 % interval by Student's t over the cases, wide where they are few; an interval
that holds 1 (for scores 0) shows no difference. Failed cases count as in every table, and the cases
that both finished are compared apart. Several runs of a case are its median run. RAM of a container
and of a command are read in two ways, and are not compared with one another.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from benchmark.containers.results import FIGURES, PENALTY_SENTENCE
from benchmark.judging.ranking import SCORES
from benchmark.judging.runs import FEW_CASES, Run, RunError, read_runs
from benchmark.text import bullets, cell, plural, show, table
from inference.labels import TUMOR


@dataclass(frozen=True)
class Spread:
    """A paired comparison over cases.

    Attributes:
        count: pairs.
        mean: of differences; the geometric mean of ratios.
        interval: 95 % interval of the mean by Student's t; None below two pairs.
        median, low, high: middle, least and greatest.
    """

    count: int
    mean: float
    interval: tuple[float, float] | None
    median: float
    low: float
    high: float


def spread(pairs: np.ndarray, *, ratios: bool) -> Spread:
    """Compare pairs.

    Args:
        pairs: (cases, 2), A and B; positive where ratios are asked for.
        ratios: A / B and geometric means, or else A - B and means.
    """
    ours, theirs = pairs.T
    values = np.log(ours / theirs) if ratios else ours - theirs
    back = np.exp if ratios else np.asarray
    interval = None
    if np.ptp(values):
        found = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        interval = tuple(back([found.low, found.high]).tolist())
    elif len(values) > 1:  # no spread: scipy has no interval of it
        interval = tuple(back(values[:2]).tolist())
    middle = [values.mean(), np.median(values), values.min(), values.max()]
    mean, median, low, high = back(middle).tolist()
    return Spread(len(values), mean, interval, median, low, high)


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
        cases: their names.
        runs: A and B.
        value, key: `Run.measured` and a column, or `Run.score` and a metric.
        ratios: as in `spread`; pairs with a value of 0, of which there is no ratio, are left out.
    """
    pairs = [[value(run, case, key) for run in runs] for case in cases]
    usable = [pair for pair in pairs if None not in pair and (min(pair) > 0 or not ratios)]
    return spread(np.array(usable, float), ratios=ratios) if usable else None


def markdown(first: Run, second: Run) -> str:
    """Return the comparison as a Markdown page."""
    runs = (first, second)
    common = [case for case in first.cases if case in second.cases]
    finished = [case for case in common if not (first.failed(case) or second.failed(case))]
    ratios, differences, times = [], [], {}
    for column, figure in FIGURES.items():
        if (
            column.endswith(("RAM", "RAM_Time"))
            and len(first.ram_measures | second.ram_measures) > 1
        ):
            continue
        for cases, apart in ((common, ""), (finished, ", both finished")):
            if apart and (not figure.penalty or len(finished) == len(common)):
                continue
            if found := compare(cases, runs, Run.measured, column, ratios=True):
                ratios.append(_row(figure.title + apart, found, ".3f"))
                if column == "Time":
                    times[apart] = found
    for key, metric in SCORES.items():
        title = metric.title
        if key.startswith("tumor") and (n := first.with_structure(TUMOR)) is not None:
            title += f" (in {n} of {len(first.in_reference)} references)"
        if found := compare(common, runs, Run.score, key, ratios=False):
            differences.append(_row(title, found, "+.4f"))
    parts = [f"# {cell(first.team)} (A) against {cell(second.team)} (B)"]
    if times:
        parts.append(_headline(runs, common, times[""], times.get(", both finished")))
    titles = ["Cases", "Geometric mean", "95 % interval", "Median", "Least", "Greatest"]
    if ratios:
        parts.append(table(["Ratio A / B", *titles], "lrrrrrr", ratios))
    if differences:
        titles[1] = "Mean"
        parts.append(table(["Difference A − B", *titles], "lrrrrrr", differences))
    if not ratios and not differences:
        parts.append("No case has the same figure in both runs.")
    parts.append(bullets(map(cell, remarks(first, second))))
    return "\n\n".join(filter(None, parts)) + "\n"


def _row(title: str, found: Spread, form: str) -> list[str]:
    numbers = [format(value, form) for value in (found.mean, found.median, found.low, found.high)]
    ends = " to ".join(format(bound, form) for bound in found.interval or ()) or "–"
    return [title, str(found.count), numbers[0], ends, *numbers[1:]]


def _headline(
    runs: tuple[Run, Run], common: list[str], times: Spread, finished: Spread | None
) -> str:
    """Return what the times show, failures first."""
    failures = [sum(map(run.failed, common)) for run in runs]
    if not any(failures):
        return f"**{_verdict(times)}** ({_basis(times)})."
    words = [f"{count} of {len(common)} cases" if count else "none" for count in failures]
    text = f"**A failed {words[0]}, B {words[1]}.** With failures at 3600 s: {_verdict(times)} "
    text += f"({_basis(times)})."
    if finished:
        text += f" Of the cases that both finished: {_verdict(finished)} ({_basis(finished)})."
    return text


def _verdict(found: Spread) -> str:
    text = f"A takes {found.mean:.2f} times as long as B"
    if found.interval is None:
        return f"{text} in the one case there is"
    if found.interval[1] < 1:
        return f"A is {1 / found.mean:.2f} times as fast as B"
    return text if found.interval[0] > 1 else f"no difference in time shown: {text}"


def _basis(found: Spread) -> str:
    text = f"geometric mean of {plural(found.count, 'case')}"
    if not found.interval:
        return f"{text}; no interval"
    low, high = found.interval
    if high < 1:
        return f"{text}; 95 % interval {1 / high:.2f} to {1 / low:.2f}"
    text += f"; 95 % interval of the time's ratio {low:.2f} to {high:.2f}"
    return text + (", which holds 1" if low <= 1 else "")


def remarks(first: Run, second: Run) -> list[str]:
    """Return what to know: cases without a pair, failures, unlike measures, few cases."""
    found = []
    runs = ((first, second), (second, first))
    for run, other in runs:
        if alone := [case for case in run.cases if case not in other.cases]:
            found.append(f"only in {run.team}: {', '.join(alone)}")
        if failed := [case for case in run.cases if run.failed(case)]:
            found.append(f"failed in {run.team}: {', '.join(failed)}")
        if run.unmeasured:
            found.append(f"**not measured in {run.team}**: {', '.join(run.unmeasured)}")
    if any(run.failed(case) for run, _ in runs for case in run.cases):
        found.append(PENALTY_SENTENCE)
    for run, _ in runs:
        if not run.scores:
            found.append(
                f"{run.team} has no scores, so none are compared: python -m benchmark accuracy "
                f"--reference LABELS --prediction OUTPUTS --report {run.folder} makes them"
            )
        if not run.results:
            found.append(
                f"{run.team} has no times, so none are compared: python -m benchmark efficiency "
                f"--report {run.folder} … measures them"
            )
    if partial := [run.team for run, _ in runs if run.partial]:
        names = " and ".join(partial)
        found.append(f"scores of {names} are of annotated labels only, not the official rule")
    measures = [" and ".join(sorted(run.ram_measures)) or "unknown" for run, _ in runs]
    if len(first.ram_measures | second.ram_measures) > 1:
        found.append(
            f"**RAM is not compared**: A's is {measures[0]}, B's is {measures[1]}, and these are "
            "not the same measure"
        )
    elif first.results and second.results and "unknown" in measures:
        found.append("how RAM was read is not known of both: its ratios may compare two measures")
    warm = [bool(run.environment.get("warm_up")) for run, _ in runs]
    if warm[0] != warm[1]:
        found.append(
            f"**{'A' if warm[0] else 'B'} was warmed up, {'B' if warm[0] else 'A'} was not**: "
            "the first run of one may have read from the disk what the other found in memory"
        )
    for key in ("gpu", "cpu", "cores"):
        machines = first.environment.get(key), second.environment.get(key)
        if machines[0] != machines[1] and first.environment and second.environment:
            found.append(
                f"**other {key}**: A on {machines[0]}, B on {machines[1]}; "
                "the ratios compare the machines as well"
            )
    common = set(first.cases) & set(second.cases)
    if 1 < len(common) < FEW_CASES:
        found.append(
            f"{len(common)} cases are few: the intervals take the cases for a fair sample of all, "
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

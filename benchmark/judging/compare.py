"""Set two runs side by side, case by case: how many times faster, leaner, better is A than B?

Times, memory and areas are compared as paired ratios A / B (below 1: A needs less), scores as
paired differences A - B (above 0: A is better). The geometric mean of the ratios (mean of the
differences) has a 95 % interval by Student's t over the cases, wide where they are few; an interval
that holds 1 (for scores 0) shows no difference. Failed cases count as in every table, and the cases
that both finished are compared apart. Several runs of a case are its median run. RAM of a container
and of a command are read in two ways, and are not compared with one another.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from benchmark.containers.repeats import PENALTY_SENTENCE
from benchmark.judging.runs import FAILED, FEW_CASES, Run, RunError, read_runs
from benchmark.markdown import cell
from inference.labels import TUMOR

RATIOS = {
    "Time": "time (s)",
    "MaxGPU_Mem": "max GPU memory (MB)",
    "AUC_GPU_Time": "GPU area (MB·s)",
    "MaxCPU_Utilization": "max CPU (%)",
    "AUC_CPU_Time": "CPU area (%·s)",
    "MaxRAM": "max RAM (MB)",
    "AUC_RAM_Time": "RAM area (MB·s)",
}
"""Official efficiency columns compared as ratios."""

DIFFERENCES = {
    "dsc": "organ DSC",
    "nsd": "organ NSD",
    "tumor-dsc": "tumor DSC",
    "tumor-nsd": "tumor NSD",
}
"""Scores compared as differences."""


@dataclass(frozen=True)
class Spread:
    """A paired comparison over cases.

    Attributes:
        count: pairs.
        mean: of differences; the geometric mean of ratios.
        median, low, high: middle, least and greatest.
        interval: 95 % interval of the mean by Student's t; None below two pairs.
    """

    count: int
    mean: float
    median: float
    low: float
    high: float
    interval: tuple[float, float] | None


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
    if len(values) > 1:
        error = values.std(ddof=1) / np.sqrt(len(values))
        half = stats.t.ppf(0.975, len(values) - 1) * error
        interval = tuple(back([values.mean() - half, values.mean() + half]).tolist())
    mean, middle, low, high = back(
        [values.mean(), np.median(values), values.min(), values.max()]
    ).tolist()
    return Spread(len(values), mean, middle, low, high, interval)


def pairs_of(
    cases: list[str],
    first: Run,
    second: Run,
    value: Callable[[Run, str], float | None],
    *,
    positive: bool,
) -> np.ndarray:
    """The cases in which both runs have a value: (cases, 2).

    Args:
        cases: to look at.
        first, second: A and B.
        value: of a run and a case, or None.
        positive: leave out pairs with a value of 0, of which there is no ratio.
    """
    pairs = [(value(first, case), value(second, case)) for case in cases]
    kept = [pair for pair in pairs if None not in pair and (min(pair) > 0 or not positive)]
    return np.array(kept, float).reshape(-1, 2)


def markdown(first: Run, second: Run) -> str:
    """The comparison as a Markdown page."""
    common = [case for case in first.cases if case in second.cases]
    finished = [case for case in common if not (first.failed(case) or second.failed(case))]
    same_ram = len(first.ram_measures | second.ram_measures) <= 1

    def compared(column: str, cases: list[str]) -> Spread | None:
        pairs = pairs_of(
            cases, first, second, lambda run, case: run.measured(case, column), positive=True
        )
        return spread(pairs, ratios=True) if len(pairs) else None

    ratios, differences = [], []
    for column, title in RATIOS.items():
        if column.endswith(("RAM", "RAM_Time")) and not same_ram:
            continue
        if found := compared(column, common):
            ratios.append(_row(title, found, ".3f"))
        apart = column in FAILED and len(finished) < len(common)
        if apart and (found := compared(column, finished)):
            ratios.append(_row(f"{title}, both finished", found, ".3f"))
    for metric, title in DIFFERENCES.items():
        pairs = pairs_of(
            common,
            first,
            second,
            lambda run, case, key=metric: run.score(case, key),
            positive=False,
        )
        if len(pairs):
            if metric.startswith("tumor") and (n := first.with_structure(TUMOR)) is not None:
                title += f" (in {n} of {len(first.in_reference)} references)"
            differences.append(_row(title, spread(pairs, ratios=False), "+.4f"))
    lines = [f"# {cell(first.team)} (A) against {cell(second.team)} (B)", ""]
    if times := compared("Time", common):
        lines += [_headline(first, second, common, times, compared("Time", finished)), ""]
    header = "| {} | Cases | {} | 95 % interval | Median | Least | Greatest |"
    rule = "|---|---:|---:|---:|---:|---:|---:|"
    if ratios:
        lines += [header.format("Ratio A / B", "Geometric mean"), rule, *ratios, ""]
    if differences:
        lines += [header.format("Difference A − B", "Mean"), rule, *differences, ""]
    if not ratios and not differences:
        lines += ["No case has the same figure in both runs.", ""]
    lines += [f"- {cell(remark)}" for remark in remarks(first, second)]
    return "\n".join(lines).rstrip() + "\n"


def remarks(first: Run, second: Run) -> list[str]:
    """What to know: cases without a pair, failures, missing scores, unlike measures, few cases."""
    found = []
    runs = ((first, second), (second, first))
    common = set(first.cases) & set(second.cases)
    for run, other in runs:
        if alone := [case for case in run.cases if case not in other.cases]:
            found.append(f"only in {run.team}: {', '.join(alone)}")
        if failed := [case for case in run.cases if run.failed(case)]:
            found.append(f"failed in {run.team}: {', '.join(failed)}")
    if any(run.failed(case) for run, _ in runs for case in run.cases):
        found.append(PENALTY_SENTENCE)
    for run, _ in runs:
        if not run.accuracy:
            found.append(
                f"{run.team} has no scores, so none are compared: python -m benchmark accuracy "
                f"--reference LABELS --prediction OUTPUTS --report {run.folder} makes them"
            )
        if not run.efficiency:
            found.append(
                f"{run.team} has no times, so none are compared: python -m benchmark efficiency "
                f"--report {run.folder} … measures them"
            )
    if first.partial or second.partial:
        who = [run.team for run, _ in runs if run.partial]
        found.append(
            f"scores of {' and '.join(who)} are of annotated labels only, not the official rule"
        )
    found += _measure_remarks(first, second)
    if 1 < len(common) < FEW_CASES:
        found.append(
            f"{len(common)} cases are few: the intervals take the cases for a fair sample of all, "
            "which few cannot show"
        )
    return found


def _measure_remarks(first: Run, second: Run) -> list[str]:
    """Where the two were not measured alike."""
    found = []
    runs = (first, second)
    if len(first.ram_measures | second.ram_measures) > 1:
        measures = [" and ".join(sorted(run.ram_measures)) or "not told" for run in runs]
        found.append(
            f"**RAM is not compared**: A's is {measures[0]}, B's is {measures[1]}, and these are "
            "not the same measure"
        )
    elif (
        first.efficiency and second.efficiency and not (first.ram_measures and second.ram_measures)
    ):
        found.append("how RAM was read is not told for both: its ratios may compare two measures")
    warm = [bool(run.environment.get("warm_up")) for run in runs]
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
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m benchmark compare`."""
    for name in ("A", "B"):
        parser.add_argument(
            f"run_{name.lower()}",
            type=Path,
            metavar=f"RUN_{name}",
            help="report folder: TEAM_Efficiency.csv, accuracy_per_case.csv or both",
        )


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison as Markdown.

    Returns:
        0 done; 2 a folder is no run, or the runs have no case in common.
    """
    try:
        first, second = read_runs([arguments.run_a, arguments.run_b])
        if not set(first.cases) & set(second.cases):
            raise RunError(f"{first.team} and {second.team} have no case in common")
    except RunError as error:
        print(f"benchmark compare: {error}", file=sys.stderr)
        return 2
    print(markdown(first, second))
    return 0


def _headline(
    first: Run, second: Run, common: list[str], times: Spread, finished: Spread | None
) -> str:
    """What the times show, failures first."""
    failures = [sum(map(run.failed, common)) for run in (first, second)]
    if not any(failures):
        return f"**{_verdict(times)}** ({_basis(times)})."
    words = [f"{count} of {len(common)} cases" if count else "none" for count in failures]
    text = f"**A failed {words[0]}, B {words[1]}.** With failures at 3600 s: {_verdict(times)} "
    text += f"({_basis(times)})."
    if finished:
        text += f" Of the cases that both finished: {_verdict(finished)} ({_basis(finished)})."
    return text


def _verdict(found: Spread) -> str:
    if found.interval and (found.interval[0] > 1 or found.interval[1] < 1):
        return f"A is {1 / found.mean:.2f} times as fast as B"
    if found.interval is None:
        return f"A took {found.mean:.2f} times as long as B in the one case there is"
    return f"no difference in time shown: A took {found.mean:.2f} times as long as B"


def _basis(found: Spread) -> str:
    text = f"geometric mean of {found.count} {'case' if found.count == 1 else 'cases'}"
    if not found.interval:
        return text + "; no interval"
    low, high = found.interval
    if low <= 1 <= high:
        return text + f"; 95 % interval of the time's ratio {low:.2f} to {high:.2f}, which holds 1"
    return text + f"; 95 % interval {1 / high:.2f} to {1 / low:.2f}"


def _row(title: str, found: Spread, form: str) -> str:
    interval = "–"
    if found.interval:
        interval = " to ".join(format(bound, form) for bound in found.interval)
    numbers = (format(value, form) for value in (found.median, found.low, found.high))
    return (
        f"| {title} | {found.count} | {found.mean:{form}} | {interval} | "
        + " | ".join(numbers)
        + " |"
    )

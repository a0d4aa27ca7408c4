"""Set two runs side by side, case by case: how many times faster, leaner, better is A than B?

Times, memory and areas are compared as paired ratios A / B (below 1: A needs less), scores as
paired differences A - B (above 0: A is better). The geometric mean of the ratios has a 95 %
bootstrap interval over the cases; an interval that does not hold 1 (for scores 0) is a difference
that these cases bear out. Several repeats of a case count as their median.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmark.judging.runs import Run, RunError, read_runs
from benchmark.markdown import cell

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

RESAMPLINGS = 10_000


@dataclass(frozen=True)
class Spread:
    """A paired comparison over cases.

    Attributes:
        count: pairs.
        mean: of differences; the geometric mean of ratios.
        median, low, high: middle, least and greatest.
        interval: 95 % bootstrap interval of the mean; None below two pairs.
    """

    count: int
    mean: float
    median: float
    low: float
    high: float
    interval: tuple[float, float] | None


def spread(pairs: np.ndarray, *, ratios: bool, seed: int = 0) -> Spread:
    """Compare pairs.

    Args:
        pairs: (cases, 2), A and B; positive where ratios are asked for.
        ratios: A / B and geometric means, or else A - B and means.
        seed: of the bootstrap.
    """
    ours, theirs = pairs.T
    values = np.log(ours / theirs) if ratios else ours - theirs
    back = np.exp if ratios else np.asarray
    interval = None
    if len(values) > 1:
        chosen = np.random.default_rng(seed).integers(len(values), size=(RESAMPLINGS, len(values)))
        interval = tuple(back(np.percentile(values[chosen].mean(axis=1), [2.5, 97.5])).tolist())
    mean, middle, low, high = back(
        [values.mean(), np.median(values), values.min(), values.max()]
    ).tolist()
    return Spread(len(values), mean, middle, low, high, interval)


def pairs_of(
    first: Run, second: Run, value: Callable[[Run, str], float | None], *, positive: bool
) -> np.ndarray:
    """The cases in which both runs have a value: (cases, 2).

    Args:
        first, second: A and B.
        value: of a run and a case, or None.
        positive: leave out pairs with a value of 0, of which there is no ratio.
    """
    pairs = [
        (value(first, case), value(second, case)) for case in first.cases if case in second.cases
    ]
    kept = [pair for pair in pairs if None not in pair and (min(pair) > 0 or not positive)]
    return np.array(kept, float).reshape(-1, 2)


def markdown(first: Run, second: Run) -> str:
    """The comparison as a Markdown page."""
    lines = [f"# {cell(first.team)} (A) against {cell(second.team)} (B)", ""]
    header = "| {} | Cases | {} | 95 % interval | Median | Least | Greatest |"
    rule = "|---|---:|---:|---:|---:|---:|---:|"
    ratios, differences = [], []
    for column, title in RATIOS.items():
        pairs = pairs_of(
            first, second, lambda run, case, key=column: run.measured(case, key), positive=True
        )
        if len(pairs):
            found = spread(pairs, ratios=True)
            ratios.append(_row(title, found, ".3f"))
            if column == "Time":
                lines += [_sentence(found), ""]
    for metric, title in DIFFERENCES.items():
        pairs = pairs_of(
            first, second, lambda run, case, key=metric: run.score(case, key), positive=False
        )
        if len(pairs):
            differences.append(_row(title, spread(pairs, ratios=False), "+.4f"))
    if ratios:
        lines += [header.format("Ratio A / B", "Geometric mean"), rule, *ratios, ""]
    if differences:
        lines += [header.format("Difference A − B", "Mean"), rule, *differences, ""]
    if not ratios and not differences:
        lines += ["No case has the same figure in both runs.", ""]
    lines += [f"- {cell(remark)}" for remark in remarks(first, second)]
    return "\n".join(lines).rstrip() + "\n"


def remarks(first: Run, second: Run) -> list[str]:
    """Which cases had no pair, which failed, and whether the machines differ."""
    found = []
    for run, other in ((first, second), (second, first)):
        if alone := [case for case in run.cases if case not in other.cases]:
            found.append(f"only in {run.team}: {', '.join(alone)}")
        if failed := [case for case in run.cases if run.failed(case)]:
            found.append(
                f"failed in {run.team}, so without ratios of time and memory: {', '.join(failed)}"
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


def _sentence(found: Spread) -> str:
    text = (
        f"**A is {1 / found.mean:.2f} times as fast as B** "
        f"(geometric mean of {found.count} {'case' if found.count == 1 else 'cases'}"
    )
    if found.interval:
        text += f"; 95 % interval {1 / found.interval[1]:.2f} to {1 / found.interval[0]:.2f}"
    return text + ")."


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

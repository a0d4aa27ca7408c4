"""Teams ranked as the challenge does: metrics, a year's rules, ranks and their confidence."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.stats import permutation_test, rankdata

from benchmark.containers.results import FIGURES, TOLERANCES, Tolerances, flare_area
from benchmark.judging.runs import Run, RunError, remarks
from inference.labels import TUMOR

RESAMPLINGS = 10_000
"""Of the cases for P(first), and at most so many sign flips for the intervals."""

_LEVEL = 0.95  # of the intervals


class Metric(NamedTuple):
    """What teams are ranked by: its title, and its column in TEAM_Efficiency.csv or no column.

    Without one it is a score, of which more is better.
    """

    title: str
    column: str | None = None

    @property
    def failure(self) -> float:
        """The value of a case that the team has no row for (FLARE 2022 rules)."""
        return (FIGURES[self.column].penalty or 0.0) if self.column else 0.0

    def title_with(self, tolerances: Tolerances) -> str:
        """Return the title; of time and GPU memory the part above the tolerance is ranked."""
        if self.column == "Time" and tolerances.seconds:
            return f"time above {tolerances.seconds:g} s (s)"
        if self.column == "AUC_GPU_Time" and tolerances.mb:
            return f"area of GPU memory above {tolerances.mb:g} MB (MB·s)"
        return self.title


SCORES = {
    "dsc": Metric("organ DSC"),
    "nsd": Metric("organ NSD"),
    "tumor-dsc": Metric("tumor DSC"),
    "tumor-nsd": Metric("tumor NSD"),
}

METRICS = SCORES | {
    key: Metric(FIGURES[column].title, column)
    for key, column in (("time", "Time"), ("gpu", "AUC_GPU_Time"), ("cpu", "AUC_CPU_Time"))
}


class Rules(NamedTuple):
    """A year's ranking: metric to weight, where 0 drops it, and what costs nothing."""

    weights: dict[str, float]
    tolerances: Tolerances


RULES = {
    "flare23": Rules({**dict.fromkeys(METRICS, 1.0), "cpu": 0.0}, TOLERANCES["flare23"]),
    "flare22": Rules(
        dict(zip(METRICS, (1.0, 1.0, 0.0, 0.0, 1.0, 0.5, 0.5), strict=True)), TOLERANCES["flare22"]
    ),
}


@dataclass(frozen=True)
class Ranking:
    """The result; all arrays have the teams along their first axis."""

    teams: list[str]
    cases: list[str]
    values: dict[str, np.ndarray]  # metric to (teams, cases), tolerances subtracted; NaN: no team
    ranks: dict[str, np.ndarray]  # metric to (teams, cases), 1 is best
    rules: Rules  # with the weights of these metrics
    scores: np.ndarray  # (teams,) weighted mean of all ranks
    final: np.ndarray  # (teams,) rank of the scores
    interval: np.ndarray  # (teams, 2) the ranks that the cases do not rule out
    first: np.ndarray  # (teams,) share of resamplings in which it is first, alone or shared
    notes: Sequence[str] = ()


def rank_runs(runs: list[Run], rules: Rules) -> Ranking:
    """Rank runs that were read.

    Raises:
        RunError: they cannot be ranked together.
    """
    if without := [run.team for run in runs if run.has_gpu and not run.has_samples]:
        rules = rules._replace(tolerances=rules.tolerances._replace(mb=0.0))
    cases, values, notes = gather(runs, rules)
    if without:
        names = ", ".join(without)
        notes.append(f"Caution: whole GPU areas, without tolerance, as {names} has no samples")
    if {"tumor-dsc", "tumor-nsd"} & values.keys():
        counts = [(run.with_structure(TUMOR), len(run.in_reference)) for run in runs]
        present, total = max((n for n in counts if n[1]), default=(None, 0))
        if present:
            notes.append(f"tumor scores: {present} of {total} references have a tumor")
        elif total:
            notes.append(
                "tumor scores: no reference has a tumor; they are 1 where none was predicted, "
                "else 0, by the challenge's rule (--weight tumor-dsc=0 drops them)"
            )
    notes += remarks(runs)
    return rank_teams([run.team for run in runs], cases, values, rules, notes)


def metric_value(run: Run, metric: str, case: str, tolerances: Tolerances) -> float | None:
    """Return a team's value of a metric, of a container that failed the failure's."""
    column = METRICS[metric].column
    if column is None:
        return run.score(case, metric)
    value = None if metric == "gpu" and not run.has_gpu else run.measured(case, column)
    if value is None or run.failed(case):
        return value
    if metric == "time":
        return max(0.0, value - tolerances.seconds)
    if metric == "gpu" and tolerances.mb:
        shown = run.shown[case]
        return flare_area(shown["samples"]["gpu_used_mb"], tolerances.mb, shown["interval_s"])
    return value


def gather(runs: list[Run], rules: Rules) -> tuple[list[str], dict[str, np.ndarray], list[str]]:
    """Collect the teams' values.

    Returns:
        The cases; metric to (teams, cases), NaN where no team has the case; and what to know: each
        metric that no team has, each case that a team lacks, and each case that is skipped for
        every team because a GPU was not read in it. A team that failed in every case has the
        failure's values throughout.

    Raises:
        RunError: two teams have no case in common, only some teams that did any case have a metric
            at all, or no metric is left.
    """
    notes = []
    unmeasured = {case for run in runs for case in run.unmeasured}
    cases = sorted({case for run in runs for case in run.cases} - unmeasured)
    if unmeasured:
        names = ", ".join(sorted(unmeasured))
        notes.append(f"Caution: skipped for every team, as one's GPU was not read: {names}")
    for one, other in combinations(runs, 2):
        if not set(one.cases) & set(other.cases) - unmeasured:
            raise RunError(f"{one.team} and {other.team} have no case in common")
    values = {}
    for key, metric in METRICS.items():
        if not rules.weights[key]:
            continue
        found = [[metric_value(run, key, case, rules.tolerances) for case in cases] for run in runs]
        table = np.array(found, float)  # None is NaN
        absent = np.isnan(table)
        if absent.all():
            notes.append(f"{metric.title}: no team has it, so it is skipped")
            continue
        each = list(zip(runs, absent, strict=True))
        if without := [run.team for run, row in each if row.all() and not run.failed_everywhere]:
            raise RunError(
                f"{', '.join(without)}: no {metric.title} at all, which others have; "
                f"measure it, or drop it with --weight {key}=0"
            )
        measured = ~absent.all(axis=0)
        if not measured.all():
            notes.append(f"{metric.title}: no team has {(~measured).sum()} of {len(cases)} cases")
        for run, row in each:
            if names := ", ".join(np.array(cases)[row & measured]):
                notes.append(f"{run.team}, {metric.title}: counted as failed in {names}")
        values[key] = np.where(absent & measured, metric.failure, table)
    if not values:
        raise RunError("the runs have no metric of a weight above 0")
    return cases, values, notes


def rank_teams(
    teams: list[str],
    cases: list[str],
    values: dict[str, np.ndarray],
    rules: Rules,
    notes: Sequence[str] = (),
) -> Ranking:
    """Rank per case and metric, then average.

    `values` are of each metric (teams, cases); a case that is NaN for all does not count.
    """
    ranks = {}
    total = np.zeros((len(teams), len(cases)))  # of each case's weighted ranks
    weight = np.zeros(len(cases))
    for key, table in values.items():
        signed = table if METRICS[key].column else -table
        ranks[key] = rankdata(signed, method="min", axis=0, nan_policy="omit")
        total += rules.weights[key] * np.nan_to_num(ranks[key])
        weight += rules.weights[key] * ~np.isnan(table[0])
    random = np.random.default_rng(0)
    chosen = random.integers(len(cases), size=(RESAMPLINGS, len(cases)))
    weights_chosen = weight[chosen].sum(axis=1)
    resampled = np.stack([row[chosen].sum(axis=1) for row in total])
    resampled /= np.where(weights_chosen, weights_chosen, 1)
    scores = total.sum(axis=1) / weight.sum()
    used = rules._replace(weights={key: rules.weights[key] for key in values})
    interval = rank_intervals(total, random)
    first = (_rank_scores(resampled) == 1).mean(axis=1)
    final = _rank_scores(scores)
    return Ranking(teams, cases, values, ranks, used, scores, final, interval, first, notes)


def rank_intervals(totals: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the ranks that a team may truly have, as far as the cases can show.

    Resampling a few cases only ever shows what these cases show: where a team is ahead in all of
    three, it is ahead in every resampling, and yet of two equal teams one is ahead in all of three
    once in four times. So each pair of teams is compared by a sign-flip test over the cases, and a
    team's rank runs from one below all that are surely better to one above all that are surely
    worse. The level of 95 % is divided among a team's comparisons (Bonferroni).

    Args:
        totals: (teams, cases) weighted sum of a team's ranks in each case.
        random: for sign flips, where there are too many to go through.

    Returns:
        (teams, 2) integers, the best and the worst rank.
    """
    teams, cases = totals.shape
    intervals = np.tile([1, teams], (teams, 1))
    pairs = np.array(list(combinations(range(teams), 2)))
    if teams > 1 and cases >= fewest_cases(teams):
        differences = totals[pairs[:, 0]] - totals[pairs[:, 1]]
        how = {"permutation_type": "samples", "vectorized": True, "axis": -1, "batch": 200}
        test = permutation_test((differences,), np.sum, n_resamples=RESAMPLINGS, rng=random, **how)
        sure = test.pvalue <= (1 - _LEVEL) / (teams - 1) + 1e-12
        for pair, sum_ in zip(pairs[sure], test.statistic[sure], strict=True):
            better, worse = pair if sum_ < 0 else pair[::-1]
            intervals[better, 1] -= 1
            intervals[worse, 0] += 1
    return intervals


def fewest_cases(teams: int) -> int:
    """Return below how many cases `rank_intervals` rules nothing out, whatever they show."""
    # Of n cases that all agree p is 2 / 2**n.
    return int(np.ceil(np.log2(2 * max(teams - 1, 1) / (1 - _LEVEL)) - 1e-9))


def _rank_scores(scores: np.ndarray) -> np.ndarray:
    """Return ranks along the first axis; scores that differ by rounding errors only are tied."""
    return rankdata(np.round(scores, 9), method="min", axis=0).astype(int)

"""Teams ranked as the challenge does: metrics, a year's rules, ranks and their confidence."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from benchmark.containers.repeats import PENALTY, median_run
from benchmark.judging.runs import Run, RunError, tolerated_area


@dataclass(frozen=True)
class Metric:
    """Something that teams are ranked by.

    Attributes:
        title: for tables.
        higher_is_better: or else lower is.
        failure: the value of a case that the team has no row for (FLARE 2022 rules).
        column: in TEAM_Efficiency.csv; None for a score of accuracy_per_case.csv.
    """

    title: str
    higher_is_better: bool
    failure: float
    column: str | None = None

    def title_with(self, rules: "Rules") -> str:
        """The title of what is ranked by: of time and GPU memory what lies above the tolerance."""
        if self.column == "Time" and rules.time_tolerance_s:
            return f"time above {rules.time_tolerance_s:g} s (s)"
        if self.column == "AUC_GPU_Time" and rules.memory_tolerance_mb:
            return f"area of GPU memory above {rules.memory_tolerance_mb:g} MB (MB·s)"
        return self.title


_ALL_FLIPS = 12
"""Cases up to which all 2**cases sign flips are gone through."""

METRICS = {
    "dsc": Metric("organ DSC", True, 0.0),
    "nsd": Metric("organ NSD", True, 0.0),
    "tumor-dsc": Metric("tumor DSC", True, 0.0),
    "tumor-nsd": Metric("tumor NSD", True, 0.0),
    "time": Metric("time (s)", False, PENALTY["seconds"], "Time"),
    "gpu": Metric("GPU area (MB·s)", False, PENALTY["auc_gpu_mb_s"], "AUC_GPU_Time"),
    "cpu": Metric("CPU area (%·s)", False, PENALTY["auc_cpu_percent_s"], "AUC_CPU_Time"),
}


@dataclass(frozen=True)
class Rules:
    """A year's ranking.

    Attributes:
        weights: metric to weight; 0 leaves it out.
        time_tolerance_s: subtracted from every time, down to 0.
        memory_tolerance_mb: subtracted from every sample of GPU memory, down to 0.
    """

    weights: dict[str, float]
    time_tolerance_s: float
    memory_tolerance_mb: float


RULES = {
    "flare23": Rules({**dict.fromkeys(METRICS, 1.0), "cpu": 0.0}, 15.0, 4096.0),
    "flare22": Rules(
        {"dsc": 1.0, "nsd": 1.0, "tumor-dsc": 0.0, "tumor-nsd": 0.0}
        | {"time": 1.0, "gpu": 0.5, "cpu": 0.5},
        0.0,
        2048.0,
    ),
}


@dataclass(frozen=True)
class Ranking:
    """The result; all arrays have the teams along their first axis.

    Attributes:
        teams: their names.
        cases: the cases ranked by.
        values: metric to (teams, cases), tolerances subtracted; NaN where no team has the case.
        ranks: metric to (teams, cases), 1 is best.
        weights: metric to weight.
        scores: (teams,) weighted mean of all ranks.
        final: (teams,) rank of the scores.
        interval: (teams, 2) the ranks that the cases do not rule out, by `rank_intervals`.
        first: (teams,) share of resamplings in which the team is first, alone or shared.
    """

    teams: list[str]
    cases: list[str]
    values: dict[str, np.ndarray]
    ranks: dict[str, np.ndarray]
    weights: dict[str, float]
    scores: np.ndarray
    final: np.ndarray
    interval: np.ndarray
    first: np.ndarray


def metric_values(run: Run, metric: str, cases: list[str], rules: Rules) -> np.ndarray:
    """One team's values of a metric over the cases; NaN where it has none.

    A container that failed has the failure's values.

    Raises:
        RunError: a memory tolerance is asked for and the samples are not there.
    """
    column, failure = METRICS[metric].column, METRICS[metric].failure
    if metric == "gpu" and not run.has_gpu:
        return np.full(len(cases), np.nan)
    values = []
    for case in cases:
        if column is None:
            value = run.score(case, metric)
        elif run.failed(case):
            value = failure
        elif metric == "gpu" and rules.memory_tolerance_mb and case in run.efficiency:
            value = _tolerated_area(run, case, rules.memory_tolerance_mb)
        else:
            value = run.measured(case, column)
            if metric == "time" and value is not None:
                value = max(0.0, value - rules.time_tolerance_s)
        values.append(np.nan if value is None else value)
    return np.array(values, float)


def _tolerated_area(run: Run, case: str, tolerance_mb: float) -> float:
    runs = run.measurements.get(case)
    if not runs:
        raise RunError(
            f"{run.team}: a memory tolerance needs the samples of {case} "
            f"(efficiency/{case}.json); rank by whole areas with --memory-tolerance 0"
        )
    return tolerated_area(median_run(runs), tolerance_mb)


def gather(runs: list[Run], rules: Rules) -> tuple[list[str], dict[str, np.ndarray], list[str]]:
    """Set the teams' values side by side.

    Returns:
        The cases; metric to (teams, cases), NaN where no team has the case; and what to know: each
        metric that no team has, and each case that a team lacks. A team that failed in every case
        has the failure's values throughout.

    Raises:
        RunError: only some teams that did any case have a metric at all, or no metric is left.
    """
    cases = sorted({case for run in runs for case in run.cases})
    values, notes = {}, []
    for key, metric in METRICS.items():
        if not rules.weights[key]:
            continue
        table = np.stack([metric_values(run, key, cases, rules) for run in runs])
        absent = np.isnan(table)
        if absent.all():
            notes.append(f"{metric.title}: no team has it, so it is left out")
            continue
        without = [
            run.team
            for run, row in zip(runs, absent, strict=True)
            if row.all() and not run.failed_everywhere
        ]
        if without:
            raise RunError(
                f"{', '.join(without)}: no {metric.title} at all, which others have; "
                f"measure it, or leave it out with --weight {key}=0"
            )
        measured = ~absent.all(axis=0)
        if not measured.all():
            notes.append(f"{metric.title}: no team has {(~measured).sum()} of {len(cases)} cases")
        for run, row in zip(runs, absent & measured, strict=True):
            if row.any():
                names = ", ".join(np.array(cases)[row])
                notes.append(f"{run.team}, {metric.title}: counted as failed in {names}")
        values[key] = np.where(absent & measured, metric.failure, table)
    if not values:
        raise RunError("the runs have nothing that the weights leave to rank by")
    return cases, values, notes


def rank_teams(
    teams: list[str],
    cases: list[str],
    values: dict[str, np.ndarray],
    weights: dict[str, float],
    resamplings: int = 10_000,
    seed: int = 0,
) -> Ranking:
    """Rank per case and metric, then average.

    Args:
        teams: names.
        cases: names.
        values: metric to (teams, cases); a case that is NaN for all is left out of the metric.
        weights: metric to weight.
        resamplings: of the cases, with replacement.
        seed: of the resampling.
    """
    ranks = {}
    total = np.zeros((len(teams), len(cases)))  # of each case's weighted ranks
    weight = np.zeros(len(cases))
    for key, table in values.items():
        signed = -table if METRICS[key].higher_is_better else table
        ranks[key] = rankdata(signed, method="min", axis=0, nan_policy="omit")
        total += weights[key] * np.nan_to_num(ranks[key])
        weight += weights[key] * ~np.isnan(table[0])
    random = np.random.default_rng(seed)
    chosen = random.integers(len(cases), size=(resamplings, len(cases)))
    drawn = weight[chosen].sum(axis=1)
    resampled = np.stack([row[chosen].sum(axis=1) for row in total]) / np.where(drawn, drawn, 1)
    resampled_ranks = _rank_scores(resampled)
    scores = total.sum(axis=1) / weight.sum()
    return Ranking(
        teams=teams,
        cases=cases,
        values=values,
        ranks=ranks,
        weights={key: weights[key] for key in values},
        scores=scores,
        final=_rank_scores(scores),
        interval=rank_intervals(total, resamplings, random),
        first=(resampled_ranks == 1).mean(axis=1),
    )


def rank_intervals(
    totals: np.ndarray, flips: int, random: np.random.Generator, level: float = 0.95
) -> np.ndarray:
    """The ranks that a team may truly have, as far as the cases tell.

    Resampling a few cases only ever shows what these cases say: where a team is ahead in all of
    three, it is ahead in every resampling, and yet of two equal teams one is ahead in all of three
    once in four times. So each pair of teams is compared by a sign-flip test over the cases (all
    flips up to 12 cases, drawn ones beyond), and a team's rank runs from one below all that are
    surely better to one above all that are surely worse. With fewer than six cases nothing is ever
    sure, and the interval holds every rank.

    Args:
        totals: (teams, cases) weighted sum of a team's ranks in each case.
        flips: drawn where there are too many to go through.
        random: draws them.
        level: of the interval; divided among a team's comparisons (Bonferroni).

    Returns:
        (teams, 2) integers, the best and the worst rank.
    """
    teams, cases = totals.shape
    if cases <= _ALL_FLIPS:
        signs = 1 - 2 * ((np.arange(2**cases)[:, None] >> np.arange(cases)) & 1)
        drawn = 0  # all of them: the observed one is among them
    else:
        signs = random.choice([-1, 1], size=(max(flips, 1), cases))
        drawn = 1
    intervals = np.tile([1, teams], (teams, 1))
    for ours in range(teams):
        for theirs in range(teams):
            differences = totals[ours] - totals[theirs]
            if ours == theirs or not differences.any():
                continue
            observed = abs(differences.sum())
            as_far = np.count_nonzero(np.abs(signs @ differences) >= observed - 1e-9)
            p = (as_far + drawn) / (len(signs) + drawn)
            if p <= (1 - level) / (teams - 1):
                intervals[ours] += (1, 0) if differences.sum() > 0 else (0, -1)
    return intervals


def _rank_scores(scores: np.ndarray) -> np.ndarray:
    """Ranks along the first axis; scores that differ by rounding errors only are tied."""
    return rankdata(np.round(scores, 9), method="min", axis=0).astype(int)

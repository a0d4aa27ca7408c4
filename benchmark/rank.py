"""Rank teams as the challenge does, and say how sure each rank is.

Every case and metric ranks the teams; a team's score is the weighted mean of all its ranks
("rank then average"). Ties share the better rank, as in challengeR, the package that the challenge
names. A case without a team's row gets the values of a failed container: DSC and NSD 0, 3600 s,
29,491,200 MB·s and 360,000 %·s.

  flare22  DSC, NSD and time, GPU and CPU area at half weight; GPU memory above 2048 MB counts
           (flare22.grand-challenge.org/Evaluation)
  flare23  DSC and NSD of organs and of tumor, time above 15 s, area of GPU memory above 4096 MB;
           no CPU. The weights are equal here: no other are published that we know of.

The confidence comes from resampling the cases with replacement and ranking anew.
"""

import argparse
import csv
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from scipy.stats import rankdata

from benchmark.efficiency_tables import PENALTY
from benchmark.runs import Run, RunError, read_runs, tolerated_area
from inference.volume import write_atomically


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
        interval: (teams, 2) 95 % interval of the final rank over resampled cases.
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
            value = run.efficiency.get(case, {}).get(column)
            if metric == "time" and value is not None:
                value = max(0.0, value - rules.time_tolerance_s)
        values.append(np.nan if value is None else value)
    return np.array(values, float)


def _tolerated_area(run: Run, case: str, tolerance_mb: float) -> float:
    """Median over the case's repeats."""
    repeats = run.completed(case)
    if not repeats:
        raise RunError(
            f"{run.team}: a memory tolerance needs the samples of {case} "
            f"(efficiency/{case}.json); rank by whole areas with --memory-tolerance 0"
        )
    return median(tolerated_area(repeat, tolerance_mb) for repeat in repeats)


def gather(runs: list[Run], rules: Rules) -> tuple[list[str], dict[str, np.ndarray], list[str]]:
    """Set the teams' values side by side.

    Returns:
        The cases; metric to (teams, cases), NaN where no team has the case; and what to know: each
        metric that no team has, and each case that a team lacks.

    Raises:
        RunError: only some teams have a metric at all, or no metric is left.
    """
    cases = sorted({case for run in runs for case in run.cases})
    values, notes = {}, []
    for key, metric in METRICS.items():
        if not rules.weights[key]:
            continue
        table = np.stack([metric_values(run, key, cases, rules) for run in runs])
        absent = np.isnan(table)
        without = [run.team for run, row in zip(runs, absent, strict=True) if row.all()]
        if len(without) == len(runs):
            notes.append(f"{metric.title}: no team has it, so it is left out")
            continue
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
    chosen = np.random.default_rng(seed).integers(len(cases), size=(resamplings, len(cases)))
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
        interval=np.percentile(
            resampled_ranks, [2.5, 97.5], axis=1, method="inverted_cdf"
        ).T.astype(int),
        first=(resampled_ranks == 1).mean(axis=1),
    )


def _rank_scores(scores: np.ndarray) -> np.ndarray:
    """Ranks along the first axis; scores that differ by rounding errors only are tied."""
    return rankdata(np.round(scores, 9), method="min", axis=0).astype(int)


def summary_rows(ranking: Ranking) -> list[dict[str, object]]:
    """One row for each team, best first: the columns of ranking.csv."""
    rows = []
    for index in np.argsort(ranking.scores, kind="stable"):
        row = {
            "rank": int(ranking.final[index]),
            "team": ranking.teams[index],
            "score": round(float(ranking.scores[index]), 4),
            "rank_low": int(ranking.interval[index, 0]),
            "rank_high": int(ranking.interval[index, 1]),
            "probability_first": round(float(ranking.first[index]), 4),
        }
        for key in ranking.values:
            row[f"{key}_rank"] = round(float(np.nanmean(ranking.ranks[key][index])), 4)
            row[f"{key}_mean"] = round(float(np.nanmean(ranking.values[key][index])), 4)
        rows.append(row)
    return rows


def markdown(ranking: Ranking, notes: list[str], rules: Rules, resamplings: int) -> str:
    """The ranking as a Markdown page."""
    titles = [
        f"{METRICS[key].title} ×{ranking.weights[key]:g}"  # the weight beside the name
        for key in ranking.values
    ]
    lines = [
        "# Ranking",
        "",
        f"{len(ranking.teams)} teams, {len(ranking.cases)} cases. Score: mean of the ranks over "
        f"cases and metrics with the weights shown; ties share the better rank. "
        f"Time above {rules.time_tolerance_s:g} s and GPU memory above "
        f"{rules.memory_tolerance_mb:g} MB count. The interval holds 95 % of the ranks, and "
        f"P(first) the share of first places, over {resamplings} resamplings of the cases. "
        "Metric columns: mean rank (mean value).",
        "",
        "| Rank | Team | Score | 95 % interval | P(first) | " + " | ".join(titles) + " |",
        "|---:|---|---:|---:|---:|" + "---:|" * len(titles),
    ]
    for row in summary_rows(ranking):
        metrics = [
            f"{row[f'{key}_rank']:.2f} ({_short(row[f'{key}_mean'])})" for key in ranking.values
        ]
        team = str(row["team"]).replace("|", "\\|")
        lines.append(
            f"| {row['rank']} | {team} | {row['score']:.3f} | {row['rank_low']}–{row['rank_high']} "
            f"| {row['probability_first']:.3f} | " + " | ".join(metrics) + " |"
        )
    if notes:
        lines += ["", "## Remarks", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def write_ranking(
    folder: Path, ranking: Ranking, notes: list[str], rules: Rules, resamplings: int, seed: int
) -> None:
    """Write ranking.md, ranking.csv and ranking.json (with every case's values and ranks)."""
    rows = summary_rows(ranking)
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    content = {
        "rules": {
            "weights": ranking.weights,
            "time_tolerance_s": rules.time_tolerance_s,
            "memory_tolerance_mb": rules.memory_tolerance_mb,
            "ties": "min",
        },
        "bootstrap": {"resamplings": resamplings, "seed": seed},
        "ranking": rows,
        "remarks": notes,
        "teams": ranking.teams,
        "cases": ranking.cases,
        "values": {key: _lists(table) for key, table in ranking.values.items()},
        "ranks": {key: _lists(table) for key, table in ranking.ranks.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(ranking, notes, rules, resamplings)
    write_atomically(folder / "ranking.md", text.encode())
    write_atomically(folder / "ranking.csv", table.getvalue().encode())
    write_atomically(folder / "ranking.json", json.dumps(content, indent=1).encode())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmark rank`."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="report folder of one team: TEAM_Efficiency.csv, accuracy_per_case.csv or both",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for ranking.md/.csv/.json"
    )
    parser.add_argument(
        "--protocol",
        choices=RULES,
        default="flare23",
        help="the year's weights and tolerances (default: %(default)s)",
    )
    parser.add_argument(
        "--weight",
        type=_weight,
        action="append",
        default=[],
        metavar="METRIC=W",
        help=f"change a weight, 0 leaves the metric out; METRIC: {', '.join(METRICS)}",
    )
    parser.add_argument(
        "--time-tolerance",
        type=float,
        metavar="S",
        help="seconds that are free (default: 15 in flare23, 0 in flare22)",
    )
    parser.add_argument(
        "--memory-tolerance",
        type=float,
        metavar="MB",
        help="GPU memory that is free (default: 4096 in flare23, 2048 in flare22)",
    )
    parser.add_argument(
        "--resamplings",
        type=int,
        default=10_000,
        metavar="N",
        help="of the cases, for the ranks' confidence (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resampling")


def run(arguments: argparse.Namespace) -> int:
    """Rank, write and print.

    Returns:
        0 done; 2 the runs cannot be ranked together.
    """
    preset = RULES[arguments.protocol]
    time_tolerance, memory_tolerance = arguments.time_tolerance, arguments.memory_tolerance
    rules = Rules(
        preset.weights | dict(arguments.weight),
        preset.time_tolerance_s if time_tolerance is None else time_tolerance,
        preset.memory_tolerance_mb if memory_tolerance is None else memory_tolerance,
    )
    try:
        runs = read_runs(arguments.runs)
        cases, values, notes = gather(runs, rules)
    except RunError as error:
        print(f"benchmark rank: {error}", file=sys.stderr)
        return 2
    resamplings, seed = max(1, arguments.resamplings), arguments.seed
    ranking = rank_teams(
        [run.team for run in runs], cases, values, rules.weights, resamplings, seed
    )
    write_ranking(arguments.output, ranking, notes, rules, resamplings, seed)
    print(markdown(ranking, notes, rules, resamplings))
    return 0


def _weight(text: str) -> tuple[str, float]:
    metric, _, weight = text.partition("=")
    if metric not in METRICS:
        raise argparse.ArgumentTypeError(f"{metric!r} is none of {', '.join(METRICS)}")
    try:
        if float(weight) >= 0:
            return metric, float(weight)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"a weight is a number from 0 up, as in {metric}=0.5")


def _short(value: float) -> str:
    return f"{value:.4f}" if value < 10 else f"{value:,.1f}"


def _lists(table: np.ndarray) -> list[list[float | None]]:
    """Rows of plain numbers, None for NaN, which JSON does not know."""
    return [[None if np.isnan(value) else float(value) for value in row] for row in table]

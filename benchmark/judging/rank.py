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
from pathlib import Path

import numpy as np

from benchmark.judging.ranking import METRICS, RULES, Ranking, Rules, gather, rank_teams
from benchmark.judging.runs import RunError, read_runs
from benchmark.markdown import cell
from inference.files import write_atomically


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
        team = cell(row["team"])
        lines.append(
            f"| {row['rank']} | {team} | {row['score']:.3f} | {row['rank_low']}–{row['rank_high']} "
            f"| {row['probability_first']:.3f} | " + " | ".join(metrics) + " |"
        )
    if notes:
        lines += ["", "## Remarks", "", *(f"- {cell(note)}" for note in notes)]
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
        "--report", type=Path, required=True, metavar="DIR", help="folder for ranking.md/.csv/.json"
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
    write_ranking(arguments.report, ranking, notes, rules, resamplings, seed)
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

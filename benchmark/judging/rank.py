"""Rank teams as the challenge does, and say how sure each rank is.

Every case and metric ranks the teams; a team's score is the weighted mean of all its ranks
("rank then average"). Ties share the better rank, as in challengeR, the package that the challenge
names. A case without a team's row gets the values of a failed container: DSC and NSD 0, 3600 s,
29,491,200 MB·s and 360,000 %·s.

  flare22  DSC, NSD and time, GPU and CPU area at half weight; GPU memory above 2048 MB counts
           (flare22.grand-challenge.org/Evaluation)
  flare23  DSC and NSD of organs and of tumor, time above 15 s, area of GPU memory above 4096 MB;
           no CPU. The weights are equal here: no other are published that we know of.

A team that failed in every case is ranked as one that failed in every case. The interval of a rank
holds every rank that sign-flip tests over the cases do not rule out (`ranking.rank_intervals`);
with fewer than six cases that is every rank. P(first) comes from resampling the cases with
replacement and ranking anew, and is left out below 20 cases, where it is a count of these cases.
"""

import argparse
import csv
import io
import json
import sys
from pathlib import Path

import numpy as np

from benchmark.containers.repeats import PENALTY_SENTENCE
from benchmark.judging.ranking import METRICS, RULES, Ranking, Rules, gather, rank_teams
from benchmark.judging.runs import FEW_CASES, Run, RunError, read_runs
from benchmark.markdown import cell
from inference.files import write_atomically
from inference.labels import TUMOR


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
            "probability_first": round(float(ranking.first[index]), 4)
            if can_tell_first(ranking)
            else None,
        }
        for key in ranking.values:
            row[f"{key}_rank"] = round(float(np.nanmean(ranking.ranks[key][index])), 4)
            row[f"{key}_mean"] = round(float(np.nanmean(ranking.values[key][index])), 4)
        rows.append(row)
    return rows


def can_tell_first(ranking: Ranking) -> bool:
    """Whether there are teams and cases enough for a probability of being first."""
    return len(ranking.teams) > 1 and len(ranking.cases) >= FEW_CASES


def cautions(ranking: Ranking) -> list[str]:
    """What the number of teams and cases leaves unsure, a sentence each."""
    found = []
    if len(ranking.teams) == 1:
        found.append("One team: there is nobody to be ranked against, and rank 1 says nothing.")
    if len(ranking.cases) < FEW_CASES:
        found.append(
            f"Caution: {_count(len(ranking.cases), 'case')}. With fewer than {FEW_CASES} the "
            "ranking may well be another with other cases, and no probability of being first is "
            "given." + " Fewer than 6 bear out no order at all." * (len(ranking.cases) < 6)
        )
    return found


def titles_of(ranking: Ranking, rules: Rules) -> dict[str, str]:
    """Each metric's title with its weight."""
    return {
        key: f"{METRICS[key].title_with(rules)} ×{ranking.weights[key]:g}" for key in ranking.values
    }


def markdown(ranking: Ranking, notes: list[str], rules: Rules, resamplings: int) -> str:
    """The ranking as a Markdown page."""
    titles = list(titles_of(ranking, rules).values())
    lines = [
        "# Ranking",
        "",
        *(f"**{caution}**\n" for caution in cautions(ranking)),
        f"{_count(len(ranking.teams), 'team')}, {_count(len(ranking.cases), 'case')}. Score: mean "
        "of the ranks over cases and metrics with the weights shown; ties share the better rank. "
        f"Time above {rules.time_tolerance_s:g} s and GPU memory above "
        f"{rules.memory_tolerance_mb:g} MB count. The interval holds the ranks that sign-flip "
        "tests over the cases do not rule out (95 %); P(first) is the share of first places over "
        f"{resamplings} resamplings of the cases. Metric columns: mean rank (mean value). "
        + PENALTY_SENTENCE,
        "",
        "| Rank | Team | Score | 95 % interval | P(first) | " + " | ".join(titles) + " |",
        "|---:|---|---:|---:|---:|" + "---:|" * len(titles),
    ]
    for row in summary_rows(ranking):
        metrics = [
            f"{row[f'{key}_rank']:.2f} ({_short(row[f'{key}_mean'])})" for key in ranking.values
        ]
        team = cell(row["team"])
        first = row["probability_first"]
        lines.append(
            f"| {row['rank']} | {team} | {row['score']:.3f} | {row['rank_low']}–{row['rank_high']} "
            f"| {'–' if first is None else format(first, '.3f')} | " + " | ".join(metrics) + " |"
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
        "cautions": cautions(ranking),
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
        help="of the cases, for P(first), and sign flips for the intervals (default: %(default)s)",
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
    resamplings, seed = max(1, arguments.resamplings), arguments.seed
    try:
        runs = read_runs(arguments.runs)
        ranking, notes = rank_runs(runs, rules, resamplings, seed)
    except RunError as error:
        print(f"benchmark rank: {error}", file=sys.stderr)
        return 2
    write_ranking(arguments.report, ranking, notes, rules, resamplings, seed)
    print(markdown(ranking, notes, rules, resamplings))
    return 0


def rank_runs(
    runs: list[Run], rules: Rules, resamplings: int, seed: int
) -> tuple[Ranking, list[str]]:
    """Rank runs that were read.

    Returns:
        The ranking and what to know about it.

    Raises:
        RunError: they cannot be ranked together.
    """
    cases, values, notes = gather(runs, rules)
    notes += _unlike(runs, values)
    teams = [run.team for run in runs]
    return rank_teams(teams, cases, values, rules.weights, resamplings, seed), notes


def _unlike(runs: list[Run], values: dict[str, np.ndarray]) -> list[str]:
    """Where the teams were not measured or scored alike, and how many cases have a tumor."""
    notes = []
    measures = {run.team: " and ".join(sorted(run.ram_measures)) for run in runs if run.efficiency}
    if len(set(measures.values()) - {""}) > 1:
        told = "; ".join(f"{team}: {measure or 'not told'}" for team, measure in measures.items())
        notes.append(
            f"**CPU and RAM were not read in the same way** ({told}): do not compare their RAM, "
            "and their times only if a container's start is in all or in none"
        )
    if len({bool(run.environment.get("warm_up")) for run in runs if run.environment}) > 1:
        warm = ", ".join(run.team for run in runs if run.environment.get("warm_up"))
        notes.append(f"**only some teams were warmed up before they were timed** ({warm})")
    if len({run.partial for run in runs if run.accuracy}) > 1:
        names = ", ".join(run.team for run in runs if run.partial)
        notes.append(f"**only some scores are of annotated labels alone** ({names})")
    if "tumor-dsc" in values or "tumor-nsd" in values:
        counts = [(n, len(run.in_reference)) for run in runs if (n := run.with_structure(TUMOR))]
        told = [n for run in runs if (n := run.with_structure(TUMOR)) is not None]
        if counts:
            notes.append("tumor scores: {} of {} references have a tumor".format(*max(counts)))
        elif told:
            notes.append(
                "tumor scores: no reference has a tumor; they are 1 where none was predicted, "
                "else 0, by the challenge's rule (--weight tumor-dsc=0 leaves them out)"
            )
    return notes


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


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

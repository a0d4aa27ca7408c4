"""Rank teams as the challenge does, and report how sure each rank is.

Every case and metric ranks the teams; a team's score is the weighted mean of all its ranks
("rank then average"). Ties share the better rank, as in challengeR, the package that the challenge
names. A case without a team's row gets the values of a failed container: DSC and NSD 0, 3600 s,
29,491,200 MB·s and 360,000 %·s. A case in which a GPU stopped answering is skipped for every team.

  flare22  DSC, NSD and time, GPU and CPU area at half weight; GPU memory above 2048 MB counts
           (flare22.grand-challenge.org/Evaluation)
  flare23  DSC and NSD of organs and of tumor, time above 15 s, area of GPU memory above 4096 MB;
           no CPU. The weights are equal here: no other are published that we know of.

Where the samples of any team are missing, whole GPU areas count, and a caution says so.

A team that failed in every case is ranked, with these values. The interval of a rank has every rank
that sign-flip tests over the cases do not rule out (`ranking.rank_intervals`). P(first) is the part
of resamplings of the cases, with replacement, in which a team is first; it needs 20 cases.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.containers.results import PENALTY_SENTENCE
from benchmark.files import csv_text
from benchmark.judging import ranking as ranks
from benchmark.judging.ranking import METRICS, RULES, Ranking
from benchmark.judging.runs import FEW_CASES, read_runs
from benchmark.options import not_negative
from benchmark.text import bullets, cell, number_or_dash, plural, show, table
from inference.files import write_atomically


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmark rank`."""
    add = parser.add_argument
    text = "report folder of one team: TEAM_Efficiency.csv, accuracy_per_case.csv or both"
    add("runs", nargs="+", type=Path, metavar="RUN", help=text)
    text = "folder for ranking.md/.csv/.json"
    add("--report", type=Path, required=True, metavar="DIR", help=text)
    text = "the year's weights and tolerances (default: %(default)s)"
    add("--protocol", choices=RULES, default="flare23", help=text)
    text = f"change a weight, 0 drops the metric; METRIC: {', '.join(METRICS)}"
    add("--weight", type=_weight, action="append", default=[], metavar="METRIC=W", help=text)


def _weight(text: str) -> tuple[str, float]:
    metric, _, weight = text.partition("=")
    if metric not in METRICS:
        raise argparse.ArgumentTypeError(f"{metric!r} is not one of {', '.join(METRICS)}")
    return metric, not_negative(weight)


def run(arguments: argparse.Namespace) -> int:
    """Rank, write and print; 0 done."""
    rules = RULES[arguments.protocol]
    rules = rules._replace(weights=rules.weights | dict(arguments.weight))
    ranking = ranks.rank_runs(read_runs(arguments.runs), rules)
    write_ranking(arguments.report, ranking)
    show(markdown(ranking))
    return 0


def cautions(ranking: Ranking) -> list[str]:
    """Return what the number of teams and cases leaves unsure, a sentence each."""
    found = []
    teams, cases = len(ranking.teams), len(ranking.cases)
    if teams == 1:
        found.append("One team: there is nobody to be ranked against, and rank 1 means nothing.")
    if cases < FEW_CASES:
        found.append(
            f"Caution: {plural(cases, 'case')}. With fewer than {FEW_CASES} the ranking may well "
            "be another with other cases, and no probability of being first is given."
        )
    if teams > 1 and cases < (least := ranks.fewest_cases(teams)):
        found[-1] += f" Fewer than {least} cannot separate any two of {plural(teams, 'team')}."
    return found


def summary_rows(ranking: Ranking) -> list[dict[str, Any]]:
    """Return one row for each team, best first: the columns of ranking.csv."""
    rows = []
    enough = len(ranking.teams) > 1 and len(ranking.cases) >= FEW_CASES
    for index in np.argsort(ranking.scores, kind="stable"):
        row = {
            "rank": int(ranking.final[index]),
            "team": ranking.teams[index],
            "score": round(float(ranking.scores[index]), 4),
            "rank_low": int(ranking.interval[index, 0]),
            "rank_high": int(ranking.interval[index, 1]),
            "probability_first": round(float(ranking.first[index]), 4) if enough else None,
        }
        for key in ranking.values:
            row[f"{key}_rank"] = round(float(np.nanmean(ranking.ranks[key][index])), 4)
            row[f"{key}_mean"] = round(float(np.nanmean(ranking.values[key][index])), 4)
        rows.append(row)
    return rows


def ranking_table(ranking: Ranking) -> tuple[list[str], list[list[str]]]:
    """Return the titles and rows of the ranking; of each metric the mean rank (mean value)."""
    titles = [
        f"{METRICS[key].title_with(ranking.rules.tolerances)} ×{ranking.rules.weights[key]:g}"
        for key in ranking.values
    ]
    rows = []
    for row in summary_rows(ranking):
        first = number_or_dash(row["probability_first"], ".3f")
        interval = f"{row['rank_low']}–{row['rank_high']}"
        cells = [str(row["rank"]), row["team"], f"{row['score']:.3f}", interval, first]
        for key in ranking.values:
            mean = row[f"{key}_mean"]
            shown = f"{mean:.4f}" if mean < 10 else f"{mean:,.1f}"
            cells.append(f"{row[f'{key}_rank']:.2f} ({shown})")
        rows.append(cells)
    return ["Rank", "Team", "Score", "95 % interval", "P(first)", *titles], rows


def markdown(ranking: Ranking) -> str:
    """Return the ranking as a Markdown page."""
    titles, rows = ranking_table(ranking)
    seconds, mb = ranking.rules.tolerances
    parts = [
        "# Ranking",
        *(f"**{caution}**" for caution in cautions(ranking)),
        f"{plural(len(ranking.teams), 'team')}, {plural(len(ranking.cases), 'case')}. Score: mean "
        "of the ranks over cases and metrics with the weights shown; ties share the better rank. "
        f"Time above {seconds:g} s and GPU memory above {mb:g} MB count. The interval has the "
        "ranks that sign-flip tests over the cases do not rule out (95 %); P(first) is the share "
        f"of first places over {ranks.RESAMPLINGS} resamplings of the cases. Metric columns: mean "
        f"rank (mean value). {PENALTY_SENTENCE}",
        table(titles, "rl" + "r" * (len(titles) - 2), rows),
    ]
    if ranking.notes:
        parts += ["## Remarks", bullets(map(cell, ranking.notes))]
    return "\n\n".join(parts) + "\n"


def write_ranking(folder: Path, ranking: Ranking) -> None:
    """Write ranking.md, ranking.csv and ranking.json (with every case's values and ranks)."""
    rows = summary_rows(ranking)
    weights, (seconds, mb) = ranking.rules
    tolerances = {"time_tolerance_s": seconds, "memory_tolerance_mb": mb}
    content = {
        "rules": {"weights": weights, **tolerances, "ties": "min"},
        "cautions": cautions(ranking),
        "resamplings": ranks.RESAMPLINGS,
        "ranking": rows,
        "remarks": ranking.notes,
        "teams": ranking.teams,
        "cases": ranking.cases,
        "values": {key: _lists(values) for key, values in ranking.values.items()},
        "ranks": {key: _lists(values) for key, values in ranking.ranks.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("ranking.md", markdown(ranking)),
        ("ranking.csv", csv_text(rows[0], (row.values() for row in rows))),
        ("ranking.json", json.dumps(content, indent=1)),
    ):
        write_atomically(folder / name, text)


def _lists(values: np.ndarray) -> list[list[float | None]]:
    """Return rows of plain numbers, None for NaN, which JSON does not know."""
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]

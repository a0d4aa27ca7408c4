"""An organiser's evening: every team's archive loaded, checked, run, scored, and ranked.

Teams are taken one after another, in the order of their archives' names. The image is removed
before the next is loaded, and the disk is looked at before each. A team that breaks costs itself
only: its cases count as failed, and it is ranked. The same command again goes on where it was
stopped; a team whose archive has changed starts anew. The files of the report folder:

    challenge.html     the ranking, what became of each team, and every curve and score
    ranking/           ranking.md, ranking.csv, ranking.json
    teams/TEAM/        the team's run folder, as `efficiency`, `accuracy` and `check` write it
    teams/TEAM/labels/ its label maps
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from benchmark.challenge.team import DONE, FAILED, Evening, Fate, run_team, team_name
from benchmark.containers.cases import Case, list_cases
from benchmark.containers.device import open_gpu
from benchmark.containers.engine import EngineError, docker
from benchmark.containers.repeats import median_run
from benchmark.containers.run_folder import write_json
from benchmark.containers.runner import signals_raise
from benchmark.judging.rank import cautions, rank_runs, summary_rows, titles_of, write_ranking
from benchmark.judging.ranking import RULES, Ranking, Rules
from benchmark.judging.report import render
from benchmark.judging.runs import Run, RunError, read_run
from benchmark.messages import UsageError, say
from benchmark.options import odd_count
from benchmark.scoring.protocol import PROTOCOLS
from inference.files import case_name, find_cases, printable, write_atomically
from inference.signals import Stopped

_RESAMPLINGS = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command line of `python -m benchmark challenge`."""
    parser.epilog = (
        "Exit code 0: every team ran, and every case of it is ok; 1: some did not (the page says "
        "which); 2: wrong usage, or an engine that does not work."
    )
    for name, text in (
        ("archives", "folder of TEAM.tar.gz, the teams' `docker save` files"),
        ("inputs", "folder of NAME_0000.nii.gz"),
        ("reference", "folder of NAME.nii.gz, the label maps to score against"),
        ("report", "where everything goes"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="DIR", help=text)
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="device (default: 0)")
    parser.add_argument(
        "--timeout", default="3600", metavar="S", help="end a case after this time (default: 3600)"
    )
    parser.add_argument(
        "--memory-limit",
        default="28g",
        metavar="SIZE",
        help="RAM and shared memory of a case (default and official: 28g)",
    )
    parser.add_argument(
        "--repeat",
        type=odd_count,
        default=1,
        metavar="K",
        help="run every case K times, an odd number; the run of median time counts (default: 1)",
    )
    parser.add_argument(
        "--warm-up",
        action="store_true",
        help="let every team's image run once before it is timed",
    )
    parser.add_argument(
        "--protocol",
        choices=[name for name in RULES if name in PROTOCOLS],
        default="flare23",
        help="the year's rules for scores and ranking (default: %(default)s)",
    )
    parser.add_argument(
        "--no-check",
        dest="check",
        action="store_false",
        help="leave out `python -m benchmark check`, some ten runs on synthetic CT for each team",
    )


def run(arguments: argparse.Namespace) -> int:
    """Take every team through the evening.

    Returns:
        0 if every team ran and every case is ok, 1 if not, 2 for wrong usage or an engine that does
        not work, 128 + N if signal N ended it.
    """
    try:
        with signals_raise():
            return _run(arguments)
    except (UsageError, EngineError, OSError) as error:
        say(f"benchmark challenge: {printable(error)}")
        return 2
    except Stopped as stopped:
        say(
            f"stopped by {stopped}; nothing is left running or loaded. The same command goes on "
            "from here"
        )
        return 128 + stopped.number


def _run(arguments: argparse.Namespace) -> int:
    archives = _find_archives(arguments.archives)
    cases = list_cases(arguments.inputs)
    _match_references(cases, arguments.reference)
    if docker("version", "--format", "{{.Server.Version}}").returncode != 0:
        raise EngineError("the container engine does not answer")
    gpu, _ = open_gpu(arguments.gpu)
    if gpu:
        gpu.close()
    report = arguments.report
    report.mkdir(parents=True, exist_ok=True)
    _keep_conditions(report, arguments, gpu is not None)
    rules = RULES[arguments.protocol]
    evening = Evening(
        inputs=arguments.inputs,
        reference=arguments.reference,
        report=report,
        cases=cases,
        gpu=gpu is not None,
        efficiency_options=[
            *("--gpu", str(arguments.gpu), "--timeout", arguments.timeout),
            *("--memory-limit", arguments.memory_limit, "--repeat", str(arguments.repeat)),
            *("--time-tolerance", str(rules.time_tolerance_s)),
            *("--memory-tolerance", str(rules.memory_tolerance_mb)),
            *(["--warm-up"] if arguments.warm_up else []),
        ],
        accuracy_options=["--protocol", arguments.protocol],
        check=arguments.check,
    )
    fates: dict[str, Fate] = {}
    well = True
    for number, archive in enumerate(archives, start=1):
        team = team_name(archive)
        size = archive.stat().st_size / 1e6
        say(f"[{number}/{len(archives)}] {team} ({size:,.0f} MB)")
        fates[team] = fate = run_team(archive, report / "teams" / team, evening)
        say(f"  {fate.state}" + (f": {fate.reason}" if fate.reason else ""))
        well &= _write_results(report, fates, rules)
    say(f"{report / 'challenge.html'} and {report / 'ranking' / 'ranking.md'}", sys.stdout)
    return 0 if well else 1


def _find_archives(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UsageError(f"--archives {folder} is not a folder")
    archives = sorted(
        path
        for path in folder.iterdir()
        if path.name.lower().endswith((".tar.gz", ".tgz", ".tar")) and not path.name.startswith(".")
    )
    if not archives:
        raise UsageError(f"--archives {folder} holds no TEAM.tar.gz")
    teams: dict[str, Path] = {}
    for archive in archives:
        other = teams.setdefault(team_name(archive).lower(), archive)
        if other != archive:
            raise UsageError(
                f"{other.name} and {archive.name} are both the image "
                f"{team_name(archive).lower()}:latest: rename or move one"
            )
    return archives


def _match_references(cases: list[Case], folder: Path) -> None:
    """See before the evening, not after it, that every case can be scored."""
    if not folder.is_dir():
        raise UsageError(f"--reference {folder} is not a folder")
    inputs = {case.name for case in cases}
    references = {case_name(path) for path in find_cases(folder)}
    for missing, what in (
        (inputs - references, "no reference for"),
        (references - inputs, "no CT for the references"),
    ):
        if missing:
            names = sorted(missing)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise UsageError(f"{what} {', '.join(names[:5])}{more}")


def _keep_conditions(report: Path, arguments: argparse.Namespace, gpu: bool) -> None:
    """Hold every call for one report to the same conditions, for teams are compared.

    Raises:
        UsageError: an earlier call had others.
    """
    names = ("timeout", "memory_limit", "repeat", "warm_up", "protocol")
    conditions = {name: getattr(arguments, name) for name in names} | {"gpu": gpu}
    path = report / "challenge.json"
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = conditions
    if earlier != conditions:
        others = [name for name in conditions if earlier.get(name) != conditions[name]]
        raise UsageError(
            f"the challenge in {report} has another {', '.join(others)}: name another --report, or "
            "the same conditions"
        )
    write_json(path, conditions)


def _write_results(report: Path, fates: dict[str, Fate], rules: Rules) -> bool:
    """Write the ranking and the page of the teams so far; whether all of them are well."""
    runs: dict[str, Run] = {}
    for team, fate in fates.items():
        if fate.state in (DONE, FAILED):
            runs[team] = read_run(report / "teams" / team)
    done = {team: sum(not run.failed(case) for case in run.cases) for team, run in runs.items()}
    rows = []
    for team, fate in fates.items():
        count = f"{done[team]} of {len(fate.cases)}" if team in runs else "–"
        reason = fate.reason or (_reasons(runs[team]) if team in runs else "")
        rows.append([team, fate.state, count, fate.check or "–", reason])
    titles = ("Team", "State", "Cases done", "Check", "Reason")
    content = {
        "notes": [],
        "ranking": {"columns": ["Rank", "Team"], "rows": []},
        "fates": {"columns": [(title, "") for title in titles], "rows": rows},
    }
    if waiting := [team for team, fate in fates.items() if team not in runs]:
        content["notes"].append(
            f"Caution: {', '.join(waiting)} not run, through no fault of their own, and not "
            "ranked. The same command again tries them."
        )
    if runs:
        try:
            ranking, notes = rank_runs(list(runs.values()), rules, _RESAMPLINGS, seed=0)
        except RunError as error:
            content["notes"].append(f"Caution: no ranking: {error}")
        else:
            write_ranking(report / "ranking", ranking, notes, rules, _RESAMPLINGS, seed=0)
            content["notes"] += [*cautions(ranking), *notes]
            content["ranking"] = _ranking_table(ranking, rules)
        page = render(list(runs.values()), "Challenge", content)
        write_atomically(report / "challenge.html", page.encode())
    ok = all(
        run.measurements.get(case) and median_run(run.measurements[case])["status"] == "ok"
        for run in runs.values()
        for case in run.cases
    )
    return ok and all(fate.state == DONE for fate in fates.values())


def _reasons(run: Run) -> str:
    """Why cases of a team are not ok, the most frequent first."""
    shown = [median_run(runs) for runs in run.measurements.values()]
    reasons = Counter(f"{one['status']}: {one['reason']}" for one in shown if one["status"] != "ok")
    return "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))


def _ranking_table(ranking: Ranking, rules: Rules) -> dict:
    """The ranking as text for the page: rank, team, score, and each metric's mean rank and mean."""
    titles = titles_of(ranking, rules)
    rows = [
        [
            str(row["rank"]),
            str(row["team"]),
            f"{row['score']:.3f}",
            f"{row['rank_low']}–{row['rank_high']}",
            *(f"{row[f'{key}_rank']:.2f} ({row[f'{key}_mean']:,.4g})" for key in titles),
        ]
        for row in summary_rows(ranking)
    ]
    columns = [("Rank", ""), ("Team", ""), ("Score", "mean rank")]
    columns += [("95 % interval", "of the rank")]
    columns += [(title, "mean rank (mean)") for title in titles.values()]
    return {"columns": columns, "rows": rows}

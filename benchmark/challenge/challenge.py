"""Run a whole challenge: every team's archive loaded, checked, run, scored, and ranked.

Teams are run one after another, in the order of their archives' names. The image is removed
before the next is loaded, and the disk is checked before each. A team that breaks costs itself
only: its cases count as failed, and it is ranked. The same command again continues where it was
stopped; a team whose archive has changed is run again. The files of the report folder:

    challenge.html     the ranking, the state of each team, and every curve and score
    ranking/           ranking.md, ranking.csv, ranking.json
    teams/TEAM/        the team's run folder, as `efficiency`, `accuracy` and `check` write it
    teams/TEAM/labels/ its label maps

Exit code 0: every team ran, and every case of it is ok; 1: some did not (the page shows which).
"""

import argparse
from collections import Counter
from pathlib import Path

from benchmark.challenge.team import DONE, FAILED, Challenge, Fate, run_team, team_name
from benchmark.containers.efficiency import add_run_options, conditions
from benchmark.containers.engine import EngineError, engine_version
from benchmark.containers.machine import open_gpu
from benchmark.containers.measurement import list_cases
from benchmark.containers.results import TOLERANCES
from benchmark.files import read_json, write_json
from benchmark.judging.rank import cautions, ranking_table, write_ranking
from benchmark.judging.ranking import RULES, rank_runs
from benchmark.judging.report import render
from benchmark.judging.runs import Run, RunError, read_run
from benchmark.options import HarnessError
from benchmark.scoring.protocol import PROTOCOLS
from benchmark.text import listed, log, show
from inference.files import case_name, find_entries, why_not_a_volume, write_atomically


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command line of `python -m benchmark challenge`."""
    add = parser.add_argument
    for name, text in (
        ("archives", "folder of TEAM.tar.gz, the teams' `docker save` files"),
        ("inputs", "folder of NAME_0000.nii.gz"),
        ("reference", "folder of NAME.nii.gz, the label maps to score against"),
        ("report", "where everything goes"),
    ):
        add(f"--{name}", type=Path, required=True, metavar="DIR", help=text)
    add_run_options(parser)
    text = "the year's rules for scores and ranking (default: %(default)s)"
    add("--protocol", choices=PROTOCOLS, default="flare23", help=text)
    text = "skip `python -m benchmark check`, some ten runs on synthetic CT for each team"
    add("--no-check", dest="check", action="store_false", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Run every team; 0 if every team ran and every case is ok, 1 if not."""
    archives = _find_archives(arguments.archives)
    cases, refused = list_cases(arguments.inputs)
    references = _match_references({case.name for case in cases}, refused, arguments.reference)
    cases = [case for case in cases if case.name in references]
    for name, reason in refused.items():
        log(f"{name}: skipped for every team: {reason}")
    if not engine_version():
        raise EngineError("the container engine does not answer")
    report, protocol = arguments.report, arguments.protocol
    with open_gpu(arguments.gpu) as gpu:
        report.mkdir(parents=True, exist_ok=True)
        same = ("timeout", "memory_limit", "repeat", "warm_up", "protocol")
        wanted = {name: getattr(arguments, name) for name in same}
        _insist_on_conditions(report, wanted | {"gpu": gpu.note is None})
        how = conditions(arguments, gpu, TOLERANCES[protocol])
        label_maps = list(references.values())
        challenge = Challenge(cases, label_maps, protocol, arguments.check, how)
        fates: dict[str, Fate] = {}
        well = not refused
        for number, archive in enumerate(archives, start=1):
            team = team_name(archive)
            log(f"[{number}/{len(archives)}] {team}")
            fates[team] = fate = run_team(archive, report / "teams" / team, challenge)
            log(f"  {fate.state}" + (f": {fate.reason}" if fate.reason else ""))
            well &= _write_results(report, fates, refused, protocol)
    show(f"{report / 'challenge.html'} and {report / 'ranking' / 'ranking.md'}")
    return 0 if well else 1


def _find_archives(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise HarnessError(f"--archives {folder} is not a folder")
    kinds = (".tar.gz", ".tgz", ".tar")
    found = sorted(path for path in folder.iterdir() if path.name.lower().endswith(kinds))
    archives = [path for path in found if not path.name.startswith(".")]
    if not archives:
        raise HarnessError(f"--archives {folder} has no TEAM.tar.gz")
    teams: dict[str, Path] = {}
    for archive in archives:
        image = team_name(archive).lower()
        if (other := teams.setdefault(image, archive)) != archive:
            both = f"{other.name} and {archive.name}"
            raise HarnessError(f"{both} are both the image {image}:latest: rename or move one")
    return archives


def _match_references(names: set[str], refused: dict[str, str], folder: Path) -> dict[str, Path]:
    """Return the reference of each case; those that are no regular file go to `refused`.

    Raises:
        HarnessError: before anything is run, that a case cannot be scored or a CT is missing.
    """

    def any_case(name: str) -> str:
        return case_name(Path(name[:-7] + name[-7:].lower()))

    if not folder.is_dir():
        raise HarnessError(f"--reference {folder} is not a folder")
    references = {}
    for path in find_entries(folder):
        if reason := why_not_a_volume(path):
            refused[path.name] = f"reference: {reason}"
        else:
            references[case_name(path)] = path
    known = set(map(any_case, refused))
    for missing, what in (
        (names - references.keys() - known, "no reference for"),
        (references.keys() - names - known, "no CT for the references"),
    ):
        if missing:
            raise HarnessError(f"{what} {listed(sorted(missing), 5)}")
    return {name: path for name, path in references.items() if name in names}


def _insist_on_conditions(report: Path, conditions: dict) -> None:
    """Hold every call for one report to the same conditions, for teams are compared.

    Raises:
        HarnessError: an earlier call had others.
    """
    earlier = read_json(report / "challenge.json") or conditions
    if others := [name for name in conditions if earlier.get(name) != conditions[name]]:
        raise HarnessError(
            f"the challenge in {report} has another {', '.join(others)}: name another --report, or "
            "the same conditions"
        )
    write_json(report / "challenge.json", conditions)


def _write_results(
    report: Path, fates: dict[str, Fate], refused: dict[str, str], protocol: str
) -> bool:
    """Write the ranking and the page of the teams so far; return whether all of them are well."""
    runs: dict[str, Run] = {}
    rows = []
    for team, fate in fates.items():
        done, reason = "–", fate.reason or ""
        if fate.state in (DONE, FAILED):
            runs[team] = run = read_run(report / "teams" / team)
            done = f"{sum(not run.failed(case) for case in run.cases)} of {len(fate.cases)}"
            reason = reason or _reasons(run)
        rows.append([team, fate.state, done, fate.check or "–", reason])
    titles = ["Team", "State", "Cases done", "Check", "Reason"]
    notes = [f"Caution: {name} skipped: {reason}" for name, reason in refused.items()]
    empty: dict[str, list] = {"columns": ["Rank", "Team"], "rows": []}
    page = {"fates": {"columns": titles, "rows": rows}, "ranking": empty, "notes": notes}
    if waiting := [team for team in fates if team not in runs]:
        notes.append(
            f"Caution: {', '.join(waiting)} not run, through no fault of their own, and not "
            "ranked. The same command again tries them."
        )
    if runs:
        try:
            ranking = rank_runs(list(runs.values()), RULES[protocol])
        except RunError as error:
            notes.append(f"Caution: no ranking: {error}")
        else:
            write_ranking(report / "ranking", ranking)
            notes += [*cautions(ranking), *ranking.notes]
            columns, rows = ranking_table(ranking)
            page["ranking"] = {"columns": columns, "rows": rows}
        text = render(list(runs.values()), "Challenge", page)
        write_atomically(report / "challenge.html", text)
    ok = [
        run.shown.get(case, {}).get("status") == "ok" for run in runs.values() for case in run.cases
    ]
    return all(ok) and all(fate.state == DONE for fate in fates.values())


def _reasons(run: Run) -> str:
    """Return why cases of a team are not ok, the most frequent first."""
    shown = [one for one in run.shown.values() if one["status"] != "ok"]
    reasons = Counter(f"{one['status']}: {one.get('reason')}" for one in shown)
    return "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))

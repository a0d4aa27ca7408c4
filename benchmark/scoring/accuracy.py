"""Score predicted label maps against references: DSC and NSD of 13 organs and tumor.

Every number agrees with the challenge's own script (FLARE23_DSC_NSD_Eval.py, and
FLARE22_DSC_NSD_Eval.py with --protocol flare22) to its 4 decimals. Where that script stops or says
nothing, this one goes on and says so:

  prediction missing, unreadable,  DSC 0 and NSD 0 for every structure; exit code 1
  or of another shape
  affine unlike the reference's    warned; arrays are compared as stored, as the challenge does
  float labels                     taken; fractions are cut off as the challenge does, and warned
  labels outside 0 to 14, NaN      counted as background, and warned
  aorta, inferior vena cava or     scored on that slice, and warned (the challenge's slice range
  esophagus on a single slice      would be empty)

With --cases or --labels only what was annotated is scored, which is not the official rule; the
report says so. Every structure says in how many references it is.
"""

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmark.messages import say
from benchmark.scoring.annotated import Annotated, CasesFileError, parse_labels, read_cases_file
from benchmark.scoring.label_map import LabelMapError
from benchmark.scoring.protocol import PROTOCOLS, Protocol
from benchmark.scoring.scores import CaseScores, failed_case, score_case
from benchmark.scoring.tables import (
    PER_CASE_CSV,
    cases_with,
    official_summary,
    per_case_csv,
    write_report,
)
from benchmark.scoring.workers import WorkerDiedError, in_processes
from inference.files import SUFFIXES, case_name, find_cases, write_atomically
from inference.labels import ORGANS, TUMOR
from inference.memory import cpu_limit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmark accuracy`."""
    parser.add_argument(
        "--reference",
        type=Path,
        required=True,
        metavar="DIR",
        help="reference label maps, NAME.nii.gz or NAME.nii",
    )
    parser.add_argument(
        "--prediction",
        type=Path,
        required=True,
        metavar="DIR",
        help="predicted label maps under the same names",
    )
    parser.add_argument(
        "--report", type=Path, required=True, metavar="DIR", help="folder for tables and plots"
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="flare23",
        help="the year's rules (default: %(default)s; flare22 has no tumor and no NSD floor)",
    )
    parser.add_argument(
        "--nsd-floor",
        type=float,
        metavar="DSC",
        help="NSD is 0 where DSC is below this (default: 0.2 in flare23, 0 in flare22; the results "
        "published in 2023 had 0.1)",
    )
    partly = parser.add_mutually_exclusive_group()
    partly.add_argument(
        "--labels",
        type=parse_labels,
        metavar="1,4",
        help="for partly labelled references: score these labels alone (1 is liver)",
    )
    partly.add_argument(
        "--cases",
        type=Path,
        metavar="cases.json",
        help="the same, the labels of each case as its annotated_labels say",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=cpu_limit(),
        metavar="N",
        help="cases scored at once (default: as many as there are CPUs for it, %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Score a folder and write the report.

    Returns:
        0 all cases scored; 1 some failed, and the rest is written; 2 nothing to do.
    """
    for folder in (arguments.reference, arguments.prediction):
        if not folder.is_dir():
            print(f"benchmark accuracy: there is no folder {folder}", file=sys.stderr)
            return 2
    references = find_cases(arguments.reference)
    if not references:
        print(f"benchmark accuracy: no .nii.gz or .nii in {arguments.reference}", file=sys.stderr)
        return 2
    if arguments.workers < 1:
        print("benchmark accuracy: --workers must be at least 1", file=sys.stderr)
        return 2
    protocol = PROTOCOLS[arguments.protocol]
    if arguments.nsd_floor is not None:
        protocol = replace(protocol, nsd_floor=arguments.nsd_floor)
    try:
        annotated = _annotated(arguments)
    except CasesFileError as error:
        print(f"benchmark accuracy: {error}", file=sys.stderr)
        return 2

    pairs = {path: prediction_of(path, arguments.prediction) for path in references}
    unmatched = [
        path.name for path in find_cases(arguments.prediction) if path not in pairs.values()
    ]
    rules, unscored = _rules(list(pairs), protocol, annotated)
    arguments.report.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:  # so that SIGTERM ends the processes as Ctrl-C does
        cases, unusable = score_cases(pairs, rules, arguments.workers, arguments.report)
    finally:
        signal.signal(signal.SIGTERM, before)
    unscored |= unusable
    if annotated:
        for case in cases:
            if case_name(Path(case.name)) in annotated.stacks:
                case.warnings.append("a stack of slices that do not touch: its NSD means little")
    if not cases:
        print("benchmark accuracy: no reference could be used", file=sys.stderr)
        return 1
    write_report(arguments.report, cases, unscored, unmatched, protocol, annotated)
    for name in unmatched:
        say(f"  warning: {name} has no reference and was left out", sys.stdout)
    summary = official_summary(cases)
    shown = [key for key in summary if key.startswith(("Organ", "Lesion"))]
    tumors = f" (a tumor in {cases_with(cases, TUMOR)} of {len(cases)} references)"
    line = ", ".join(f"{key} {summary[key]:.4f}" for key in shown)
    say(line + tumors * ("Lesion_DSC" in shown), sys.stdout)
    if annotated:
        say(f"not the official rule: {annotated.sentence()}", sys.stdout)
    say(f"report: {arguments.report / 'accuracy.md'}", sys.stdout)
    return int(bool(unscored) or any(case.failure for case in cases))


def _annotated(arguments: argparse.Namespace) -> Annotated | None:
    if arguments.labels:
        return Annotated(arguments.labels, {})
    return read_cases_file(arguments.cases) if arguments.cases else None


def _rules(
    references: list[Path], protocol: Protocol, annotated: Annotated | None
) -> tuple[dict[Path, Protocol], dict[str, str]]:
    """The rules of each reference; and the names of those without any, and why."""
    rules, unscored = {}, {}
    for reference in references:
        try:
            rules[reference] = annotated.rules(reference, protocol) if annotated else protocol
        except CasesFileError as error:
            unscored[reference.name] = str(error)
            say(f"{reference.name}: not scored: {error}", sys.stdout)
    return rules, unscored


def prediction_of(reference: Path, folder: Path) -> Path:
    """Name the prediction's path: the reference's name, `.nii.gz` or `.nii`."""
    stem = reference.name.removesuffix(".gz").removesuffix(".nii")
    names = (reference.name, *(stem + suffix for suffix in SUFFIXES))
    return next(
        (folder / name for name in names if (folder / name).is_file()), folder / reference.name
    )


def score_cases(
    pairs: dict[Path, Path], rules: dict[Path, Protocol], workers: int, report: Path
) -> tuple[list[CaseScores], dict[str, str]]:
    """Score reference and prediction files in parallel, saying how it goes.

    The table of cases is in the report as far as it goes at any time. A case whose scoring fails
    or whose process dies counts as failed.

    Args:
        pairs: reference to prediction.
        rules: of each reference that is to be scored.
        workers: processes.
        report: the folder.

    Returns:
        The scores in the order of `pairs`, and for each reference that could not be used its file
        name and the reason.
    """
    scored, unscored = {}, {}
    jobs = {path: (path, pairs[path], of_case) for path, of_case in rules.items()}
    for done, (reference, result) in enumerate(in_processes(score_case, jobs, workers), 1):
        if isinstance(result, LabelMapError):
            unscored[reference.name] = str(result)
            lines = [f"{reference.name}: not scored, reference: {result}"]
        else:
            if isinstance(result, Exception):
                result = failed_case(reference.name, rules[reference], _why_died(result))
            scored[reference] = result
            lines = _progress(result)
            rows = [scored[path] for path in pairs if path in scored]
            write_atomically(report / PER_CASE_CSV, per_case_csv(rows).encode())
        say(" ".join([f"[{done}/{len(jobs)}]", *lines]), sys.stdout)
    return [scored[path] for path in pairs if path in scored], unscored


def _why_died(error: Exception) -> str:
    if isinstance(error, WorkerDiedError):
        return f"{error}; with little memory, lower --workers"
    return f"{type(error).__name__}: {error}"


def _progress(case: CaseScores) -> list[str]:
    if case.failure:
        return [f"{case.name}: failed, {case.failure}"]
    organs = [label for label in case.dsc if label in ORGANS]
    labels, what = (organs, "organs") if organs else (list(case.dsc), "tumor")
    if organs and len(organs) < len(ORGANS):
        what = f"{len(organs)} annotated {'organ' if len(organs) == 1 else 'organs'}"
    means = (np.mean([scores[label] for label in labels]) for scores in (case.dsc, case.nsd))
    line = "{}: {} DSC {:.4f} NSD {:.4f}, {:.1f} s".format(case.name, what, *means, case.seconds)
    return [line, *(f"\n  warning: {warning}" for warning in case.warnings)]

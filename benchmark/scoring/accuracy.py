"""Score predicted label maps against references: DSC and NSD of 13 organs and tumor.

Every number agrees with the challenge's own script (FLARE23_DSC_NSD_Eval.py, and
FLARE22_DSC_NSD_Eval.py with --protocol flare22) to its 4 decimals. Where that script stops or
prints nothing, this one goes on and warns:

  prediction missing, unreadable,  DSC 0 and NSD 0 for every structure; exit code 1
  or of another shape
  affine unlike the reference's    arrays are compared as stored, as the challenge does
  float labels                     taken; fractions are cut off as the challenge does
  labels outside 0 to 14, NaN      counted as background
  aorta, inferior vena cava or     scored on that slice (the challenge's slice range would be
  esophagus on a single slice      empty)
  what is no regular file          not scored; exit code 1

With --cases or --labels only what was annotated is scored, which is not the official rule; the
report marks it so. Every structure is beside the number of references that have it.
"""

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmark.options import HarnessError, count
from benchmark.processes import WorkerDiedError, in_processes
from benchmark.scoring import protocol as rules
from benchmark.scoring.label_map import LabelMapError
from benchmark.scoring.protocol import PROTOCOLS, Annotated, Protocol
from benchmark.scoring.scores import CaseScores, failed_case, score_case
from benchmark.scoring.tables import PER_CASE_CSV, Scoring, markdown, write_report
from benchmark.text import plural, show
from inference.files import SUFFIXES, case_name, find_entries, why_not_a_volume, write_atomically
from inference.labels import ORGANS
from inference.memory import cpu_limit
from inference.startup import use_for_temporary_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmark accuracy`."""
    add = parser.add_argument
    for name, text in (
        ("--reference", "reference label maps, NAME.nii.gz or NAME.nii"),
        ("--prediction", "predicted label maps under the same names"),
        ("--report", "folder for tables and plots"),
    ):
        add(name, type=Path, required=True, metavar="DIR", help=text)
    text = "the year's rules (default: %(default)s; flare22 has no tumor and no NSD floor)"
    add("--protocol", choices=PROTOCOLS, default="flare23", help=text)
    text = (
        "NSD is 0 where DSC is below this (default: 0.2 in flare23, 0 in flare22; the results "
        "published in 2023 had 0.1)"
    )
    add("--nsd-floor", type=float, metavar="DSC", help=text)
    partly = parser.add_mutually_exclusive_group().add_argument
    text = "for partly labelled references: score these labels alone (1 is liver)"
    partly("--labels", type=rules.parse_labels, metavar="1,4", help=text)
    text = "the same, the labels of each case as its annotated_labels"
    partly("--cases", type=Path, metavar="cases.json", help=text)
    text = "cases scored at once (default: the cores that this process may use, %(default)s)"
    add("--workers", type=count, default=cpu_limit(), metavar="N", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Score a folder and write the report; 0 all scored, 1 some failed and the rest is written."""
    for folder in (arguments.reference, arguments.prediction):
        if not folder.is_dir():
            raise HarnessError(f"there is no folder {folder}")
    protocol = PROTOCOLS[arguments.protocol]
    if arguments.nsd_floor is not None:
        protocol = replace(protocol, nsd_floor=arguments.nsd_floor)
    annotated = Annotated(arguments.labels, {}) if arguments.labels else None
    if arguments.cases:
        annotated = rules.read_cases_file(arguments.cases)
    references = find_entries(arguments.reference)
    if not references:
        raise HarnessError(f"no .nii.gz or .nii in {arguments.reference}")
    where = (arguments.prediction, arguments.report)
    well = score_folder(references, *where, protocol, annotated, arguments.workers)
    return 0 if well else 1


def score_folder(
    references: Sequence[Path],
    prediction: Path,
    report: Path,
    protocol: Protocol,
    annotated: Annotated | None = None,
    workers: int | None = None,
) -> bool:
    """Score the predictions of some references and write the report.

    The table of cases is in the report as far as it goes at any time. A case whose scoring fails
    or whose process dies counts as failed.

    Args:
        references: label maps; what is no regular file is not scored.
        prediction, report: folders, of label maps under the same names and for the report.
        protocol: the rules.
        annotated: which labels count; None is the official rule, all of them.
        workers: processes at once; None is as many as there are cores for this one.

    Returns:
        Whether all of them were scored.
    """
    pairs = {path: prediction_of(path, prediction) for path in references}
    jobs: dict[Path, tuple[Path, Path, Protocol]] = {}
    unscored: dict[str, str] = {}
    for path, predicted in pairs.items():
        reason = why_not_a_volume(path)
        try:
            if not reason:
                scored_by = annotated.rules(path, protocol) if annotated else protocol
                jobs[path] = (path, predicted, scored_by)
        except ValueError as error:
            reason = str(error)
        if reason:
            unscored[path.name] = reason
            show(f"{path.name}: not scored: {reason}")
    report.mkdir(parents=True, exist_ok=True)
    use_for_temporary_files(report)
    scored: dict[Path, CaseScores] = {}
    with closing(in_processes(score_case, jobs, workers or cpu_limit())) as results:
        for done, (path, result) in enumerate(results, start=1):
            if isinstance(result, LabelMapError):
                unscored[path.name] = f"reference: {result}"
                show(f"[{done}/{len(jobs)}] {path.name}: not scored, reference: {result}")
                continue
            if isinstance(result, Exception):
                reason = f"{type(result).__name__}: {result}"
                if isinstance(result, WorkerDiedError):
                    reason = f"{result}; with little memory, lower --workers"
                result = failed_case(path.name, jobs[path][2], reason)
            if annotated and case_name(path) in annotated.stacks:
                result.warnings.append("a stack of slices that do not touch: its NSD means little")
            scored[path] = result
            cases = [scored[path] for path in pairs if path in scored]
            write_atomically(report / PER_CASE_CSV, Scoring(cases, protocol).csv())
            show(f"[{done}/{len(jobs)}] {_progress(result)}")
    if not scored:
        show("no reference could be used")
        return False

    unmatched, irregular = {}, False
    for path in find_entries(prediction):
        reason = why_not_a_volume(path)
        if reason or path not in pairs.values():
            unmatched[path.name] = reason or "a prediction without a reference, not scored"
            show(f"  warning: {path.name}: {unmatched[path.name]}")
            irregular |= bool(reason)
    scoring = Scoring(cases, protocol, annotated, unscored, unmatched)
    write_report(report, scoring)
    show(markdown(scoring))
    return not (irregular or unscored or any(case.failure for case in cases))


def prediction_of(reference: Path, folder: Path) -> Path:
    """Return the prediction's path: the reference's name, `.nii.gz` or `.nii`."""
    stem = reference.name.removesuffix(".gz").removesuffix(".nii")
    names = (reference.name, *(stem + suffix for suffix in SUFFIXES))
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def _progress(case: CaseScores) -> str:
    if case.failure:
        return f"{case.name}: failed, {case.failure}"
    labels = [label for label in case.dsc if label in ORGANS] or list(case.dsc)
    means = (np.mean([scores[label] for label in labels]) for scores in (case.dsc, case.nsd))
    what = f"{case.name}: mean of {plural(len(labels), 'structure')}"
    line = "{}: DSC {:.4f} NSD {:.4f}, {:.1f} s".format(what, *means, case.seconds)
    return "\n".join([line, *(f"  warning: {warning}" for warning in case.warnings)])

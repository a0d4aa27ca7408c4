"""Try a submission as the challenge will, and in every way that can go wrong, before it counts.

Runs the image by the organisers' exact command line, without network, read-only and without
rights, and with 64 MB of shared memory; on phantoms of typical size, thin, anisotropic, turned and
very large, or on CTs of your own; twice on the same, and on a damaged file. Then reports what
passed, what to check (warned) and what failed, with what each would cost in the challenge and what
to do. The files of the report folder:

    check.json         every finding and every run
    check.md           the same, to read; `benchmark report` shows it as well
    check/NN-*.log     what the container printed in each run

Exit code 0: nothing failed, though there may be warnings; 1: something failed.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmark.checking import findings as judge
from benchmark.checking import image as images
from benchmark.checking import trials, volumes
from benchmark.checking.findings import FAILED, FREE, Finding
from benchmark.checking.pages import CHECK_JSON, headline, markdown_page, terminal_list
from benchmark.checking.trials import Trial
from benchmark.checking.volumes import Subject
from benchmark.containers.efficiency import add_container_options
from benchmark.containers.engine import image_id, remove_abandoned, team_of
from benchmark.containers.machine import describe_machine, open_gpu
from benchmark.containers.measurement import Conditions
from benchmark.containers.results import progress_line
from benchmark.containers.runner import Container
from benchmark.files import write_json
from benchmark.options import size_mb, whole
from benchmark.text import log
from inference.files import write_atomically


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command line of `python -m benchmark check`."""
    target = parser.add_mutually_exclusive_group(required=True).add_argument
    text = "a `docker save` file, as it is handed in"
    target("--archive", type=Path, metavar="TEAM.tar.gz", help=text)
    target("--image", metavar="NAME", help="a Docker image that is here")
    add = parser.add_argument
    text = "folder of NAME_0000.nii.gz to try instead of phantoms"
    add("--inputs", type=Path, metavar="DIR", help=text)
    text = "where the findings go (default: check-TEAM)"
    add("--report", type=Path, metavar="DIR", help=text)
    text = (
        "slices of the very large phantom, 512×512 each; 0 skips it (default: %(default)s, more "
        "than 95 %% of the challenge's CTs have; its largest has 2651)"
    )
    add("--large-slices", type=whole, default=volumes.LARGE_SLICES, metavar="N", help=text)
    add_container_options(parser, 600.0)


def run(arguments: argparse.Namespace) -> int:
    """Check a submission and write the report folder; 0 if nothing failed, 1 if something did."""
    if arguments.inputs is not None:
        volumes.own_subjects(arguments.inputs)  # wrong usage is reported before anything is loaded
    remove_abandoned()
    image: str | None
    if arguments.archive:
        log(f"loading {arguments.archive}")
        image, findings = images.load(arguments.archive)
        team = arguments.archive.name.partition(".")[0] or "team"
    else:
        image, findings = images.find(arguments.image)
        team = team_of(image)
    report = arguments.report or Path(f"check-{team}")
    with open_gpu(arguments.gpu) as gpu:
        how = Conditions(gpu, arguments.timeout, memory_limit=arguments.memory_limit)
        sources = (arguments.inputs, arguments.large_slices)
        check = check_image(team, image, findings, report, how, *sources)
    summary = f"{headline(check)}: {report / 'check.md'}"
    log(*terminal_list(check), summary, to=sys.stdout)
    return 1 if any(finding["level"] == FAILED for finding in check["findings"]) else 0


def check_image(
    team: str, image: str | None, findings: list[Finding], report: Path, how: Conditions,
    inputs: Path | None = None, large_slices: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Make every run of a check and write the report folder.

    Args:
        team: its name.
        image: NAME:TAG; None if there is none to run.
        findings: of the archive or the image's name.
        report: the folder.
        how: conditions of the runs.
        inputs: a folder of CTs instead of phantoms.
        large_slices: of the very large phantom; 0 skips it.

    Returns:
        The content of `check.json`.

    Raises:
        HarnessError, OSError: the check cannot go on.
    """
    logs = report / "check"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    runs: list[Trial] = []
    if image is None:
        findings = [*findings, judge.not_run("there is no image to run")]
    else:
        findings = [*findings, *images.judge_image(image)]
        findings += images.judge_weights(image, how.memory_limit, logs / "weights.log")
        how.gpu.read_idle()
        # Not below the system's own folder for such things, which may be of memory, or small.
        with tempfile.TemporaryDirectory(prefix=".work-check-", dir=report.resolve()) as folder:
            work = Path(folder)
            subjects = (
                volumes.own_subjects(inputs)
                if inputs
                else volumes.make_subjects(work, large_slices)
            )
            total = len(subjects) + 5

            def trial(subject: Subject, mode: str = trials.ORGANISERS) -> Trial:
                number = len(runs) + 1
                done = trials.run_trial(subject, image, mode, number, work, logs, how)
                runs.append(done)
                log(f"[{number}/{total}] {progress_line(f'{done.label}, {mode}', done.result)}")
                return done

            findings += _judge(trial, subjects, work, how.memory_limit)
    limits = {"seconds": FREE.seconds, "gpu_mb": FREE.mb, "timeout_s": how.timeout}
    memory = how.memory_limit
    check = {
        "team": team,
        "image": image or "none",
        "image_digest": image_id(image) if image else None,
        "command": Container(image or "none", memory, how.gpu.device).shown_command,
        "environment": describe_machine(how.gpu),
        "limits": limits | {"memory": memory, "memory_mb": float(size_mb(memory))},
        "findings": [finding._asdict() for finding in findings],
        "runs": [run.as_json() for run in runs],
    }
    write_json(report / CHECK_JSON, check)
    write_atomically(report / "check.md", markdown_page(check))
    return check


def _judge(
    trial: Callable[..., Trial], subjects: list[Subject], work: Path, memory: str
) -> Iterator[Finding]:
    """Make every run by `trial(subject, mode)`, and yield the findings in the order of the list."""
    first = trial(subjects[0])
    yield judge.judge_run(judge.START, first)
    if not first.ran:
        yield from judge.judge_outputs([first])
        yield judge.not_run(f"{first.label} gave no label map")
        return
    again = trial(subjects[0])
    modes = [trial(subjects[0], mode) for mode in judge.MODES]
    runs = [first, *(trial(subject) for subject in subjects[1:])]
    damaged = trial(volumes.damaged_subject(work, subjects[0]))
    yield from (judge.judge_mode(mode, first) for mode in modes)
    yield from (judge.judge_run(f"volume: {run.label}", run) for run in runs)
    yield from judge.judge_outputs(runs)
    yield judge.judge_determinism(first, again)
    yield judge.judge_time(runs)
    yield judge.judge_gpu_memory(runs)
    yield judge.judge_memory([*runs, again, *modes], memory)
    yield judge.judge_extra_files([*runs, again, *modes, damaged])
    yield judge.judge_damaged(damaged)

"""Try a submission as the challenge will, and in every way that can go wrong, before it counts.

Runs the image by the organisers' exact command line, without network, read-only and without
rights, and with 64 MB of shared memory; on phantoms of typical size, thin, anisotropic, turned and
very large, or on CTs of your own; twice on the same, and on a damaged file. Then reports what
passed, what to check (warned) and what failed, with what each would cost in the challenge and what
to do. The files of the report folder:

    check.json         every finding and every run
    check.md           the same, to read; `benchmark report` shows it as well
    check/NN-*.log     what the container printed in each run
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from benchmark.checking import findings as judge
from benchmark.checking.findings import FAILED, FREE, Finding
from benchmark.checking.image import find, judge_image, judge_weights, load
from benchmark.checking.pages import CHECK_JSON, headline, markdown_page, terminal_list
from benchmark.checking.trials import (
    HARDENED,
    NO_NETWORK,
    ORGANISERS,
    SMALL_SHARED_MEMORY,
    Bench,
    Trial,
)
from benchmark.checking.volumes import (
    LARGE_SLICES,
    Subject,
    damaged_subject,
    draw_subjects,
    own_subjects,
)
from benchmark.containers.efficiency import gpu_of
from benchmark.containers.engine import image_id, remove_abandoned, team_of
from benchmark.containers.environment import describe_machine
from benchmark.containers.gpu import Gpu, read_idle
from benchmark.containers.results import OFFICIAL_INTERVAL, write_json
from benchmark.containers.runner import Container
from benchmark.options import memory_size, positive, size_mb, whole
from benchmark.text import by, log
from inference.files import write_atomically


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command line of `python -m benchmark check`."""
    parser.epilog = (
        "Exit code 0: nothing failed, though some may be warned of; 1: something failed; 2: wrong "
        "usage, or an engine that does not work."
    )
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
        "slices of the very large phantom, 512×512 each; 0 leaves it out (default: %(default)s, "
        "more than 95 %% of the challenge's CTs have; its largest has 2651)"
    )
    add("--large-slices", type=whole, default=LARGE_SLICES, metavar="N", help=text)
    text = "GPU by NVML's number (default: the first of CUDA_VISIBLE_DEVICES, or else 0)"
    add("--gpu", type=int, metavar="N", help=text)
    text = "end a run after this time (default: 600; the challenge waits for 3600)"
    add("--timeout", type=positive, default=600.0, metavar="S", help=text)
    text = "RAM and shared memory of a run (default and official: 28g)"
    add("--memory-limit", type=memory_size, default="28g", metavar="SIZE", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Check a submission and write the report folder; 0 if nothing failed, 1 if something did."""
    if arguments.inputs is not None:
        own_subjects(arguments.inputs)  # wrong usage is reported before an archive is loaded
    remove_abandoned()
    if arguments.archive:
        log(f"loading {arguments.archive}")
        image, findings = load(arguments.archive)
        team = arguments.archive.name.partition(".")[0] or "team"
    else:
        image, findings = find(arguments.image)
        team = team_of(image)
    report = arguments.report or Path(f"check-{team}")
    with gpu_of(arguments.gpu) as (gpu, gpu_note):
        limits = (arguments.memory_limit, arguments.timeout)
        sources = (arguments.inputs, arguments.large_slices)
        check = check_image(team, image, findings, report, gpu, gpu_note, *limits, *sources)
    summary = f"{headline(check)}: {report / 'check.md'}"
    log(*terminal_list(check), summary, to=sys.stdout)
    return 1 if any(finding["level"] == FAILED for finding in check["findings"]) else 0


def check_image(
    team: str,
    image: str | None,
    findings: list[Finding],
    report: Path,
    gpu: Gpu | None,
    gpu_note: str | None,
    memory_limit: str = "28g",
    timeout: float = 600.0,
    inputs: Path | None = None,
    large_slices: int = 0,
) -> dict:
    """Make every run of a check and write the report folder.

    Args:
        team: its name.
        image: NAME:TAG; None if there is none to run.
        findings: what was found of the archive or the image's name.
        report: the folder.
        gpu, gpu_note: the GPU, and why its memory is not read.
        memory_limit, timeout: of a run, as "28g" and in seconds.
        inputs: a folder of CTs instead of phantoms.
        large_slices: of the very large phantom; 0 leaves it out.

    Returns:
        The content of `check.json`.

    Raises:
        HarnessError, OSError: the check cannot go on.
    """
    logs = report / "check"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    trials: list[Trial] = []
    if image is None:
        findings = [*findings, judge.not_run("there is no image to run")]
    else:
        findings = [*findings, *judge_image(image)]
        findings += judge_weights(image, memory_limit, logs / "weights.log")
        idle = read_idle(gpu, OFFICIAL_INTERVAL)
        # Not below the system's own folder for such things, which may be of memory, or small.
        work = Path(tempfile.mkdtemp(prefix=".work-check-", dir=report.resolve()))
        bench = Bench(image, memory_limit, logs, work, gpu, idle, timeout)
        try:
            subjects = own_subjects(inputs) if inputs else draw_subjects(work, large_slices, log)
            findings += _judge(bench, subjects, trials)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    check = {
        "team": team,
        "image": image or "none",
        "image_digest": image_id(image) if image else None,
        "command": Container(image or "none", memory_limit, gpu and gpu.device).shown_command,
        "environment": describe_machine(gpu, gpu_note),
        "limits": {
            "seconds": FREE.seconds,
            "gpu_mb": FREE.mb,
            "timeout_s": timeout,
            "memory": memory_limit,
            "memory_mb": float(size_mb(memory_limit)),
        },
        "findings": [asdict(finding) for finding in findings],
        "runs": [trial.as_json() for trial in trials],
    }
    write_json(report / CHECK_JSON, check)
    write_atomically(report / "check.md", markdown_page(check).encode())
    return check


def _judge(bench: Bench, subjects: list[Subject], trials: list[Trial]) -> Iterator[Finding]:
    """Make every run, into `trials`, and yield the findings in the order of the list.

    Args:
        bench: where and how.
        subjects: the volumes, one to start with first.
        trials: gets the runs.
    """

    def trial(subject: Subject, mode: str = ORGANISERS) -> Trial:
        done = bench.run(subject, mode, len(trials) + 1)
        trials.append(done)
        log(_progress_line(len(trials), len(subjects) + 5, done))
        return done

    memory = bench.memory_limit
    first = trial(subjects[0])
    yield judge.judge_start(first, memory)
    if not first.ran:
        yield from judge.judge_outputs([first])
        yield judge.not_run(f"{first.label} gave no label map")
        return
    again = trial(subjects[0])
    modes = [trial(subjects[0], mode) for mode in (NO_NETWORK, HARDENED, SMALL_SHARED_MEMORY)]
    volumes = [first, *(trial(subject) for subject in subjects[1:])]
    damaged = trial(damaged_subject(bench.work, subjects[0]))
    yield from (judge.judge_mode(mode, first) for mode in modes)
    yield from map(judge.judge_volume, volumes)
    yield from judge.judge_outputs(volumes)
    yield judge.judge_determinism(first, again)
    yield judge.judge_time(volumes)
    yield judge.judge_gpu_memory(volumes)
    yield judge.judge_memory([*volumes, again, *modes], memory)
    yield from judge.judge_leftovers([*volumes, again, *modes, damaged])
    yield judge.judge_damaged(damaged)


def _progress_line(number: int, count: int, trial: Trial) -> str:
    size, outcome = by(trial.image_size), trial.outcome
    parts = [f"[{number}/{count}] {trial.label} {size}, {trial.mode}: {outcome.seconds:.1f} s"]
    parts.append(f"RAM {trial.max_ram_mb:,.0f} MB")
    if trial.peak_gpu_mb is not None:
        parts.append(f"GPU {trial.peak_gpu_mb:,.0f} MB")
    parts.append(outcome.status + (f" ({outcome.reason})" if outcome.reason else ""))
    if outcome.status == "ok":
        parts.append("; ".join(trial.output.problems) or "label map valid")
    return ", ".join(parts)

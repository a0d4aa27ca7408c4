"""Try a submission as the challenge will, and in every way that can go wrong, before it counts.

Runs the image by the organisers' exact command line, without network, read-only and without
rights, and with 64 MB of shared memory; on phantoms of typical size, thin, anisotropic, turned and
very large, or on CTs of your own; twice on the same, and on a damaged file. Then says what passed,
what to look at (warned) and what failed, with what each would cost in the challenge and what to
do. The files of the report folder:

    check.json         every finding and every run
    check.md           the same, to read; `benchmark report` shows it as well
    check/NN-*.log     what the container printed in each run
"""

import argparse
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from benchmark.checking import findings as judge
from benchmark.checking.findings import FAILED, Finding, Limits
from benchmark.checking.image import find, judge_image, judge_weights, load
from benchmark.checking.pages import CHECK_JSON, headline, markdown_page, terminal_list
from benchmark.checking.trials import (
    HARDENED,
    NO_NETWORK,
    ORGANISERS,
    SMALL_SHARED_MEMORY,
    Bench,
    Trial,
    VariedContainer,
)
from benchmark.checking.volumes import (
    LARGE_SLICES,
    Subject,
    damaged_subject,
    draw_subjects,
    own_subjects,
)
from benchmark.containers.device import open_gpu, read_idle
from benchmark.containers.engine import EngineError, image_id, remove_abandoned
from benchmark.containers.environment import describe_machine
from benchmark.containers.gpu import Gpu
from benchmark.containers.run_folder import write_json
from benchmark.containers.runner import signals_raise
from benchmark.containers.tables import OFFICIAL_INTERVAL, by
from benchmark.containers.targets import Folders, MemoryLimit
from benchmark.messages import UsageError, say
from benchmark.options import positive
from inference.files import printable, write_atomically
from inference.signals import Stopped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command line of `python -m benchmark check`."""
    parser.epilog = (
        "Exit code 0: nothing failed, though some may be warned of; 1: something failed; 2: wrong "
        "usage, or an engine that does not work."
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--archive",
        type=Path,
        metavar="TEAM.tar.gz",
        help="a `docker save` file, as it is handed in",
    )
    target.add_argument("--image", metavar="NAME", help="a Docker image that is here")
    parser.add_argument(
        "--inputs",
        type=Path,
        metavar="DIR",
        help="folder of NAME_0000.nii.gz to try instead of phantoms",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="where the findings go (default: check-TEAM)",
    )
    parser.add_argument(
        "--large-slices",
        type=_slices,
        default=LARGE_SLICES,
        metavar="N",
        help="slices of the very large phantom, 512×512 each; 0 leaves it out (default: "
        f"{LARGE_SLICES}, more than 95 %% of the challenge's CTs have; its largest has 2651)",
    )
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="device (default: 0)")
    parser.add_argument(
        "--timeout",
        type=positive,
        default=600.0,
        metavar="S",
        help="end a run after this time (default: 600; the challenge waits for 3600)",
    )
    parser.add_argument(
        "--memory-limit",
        type=MemoryLimit.parse,
        default="28g",
        metavar="SIZE",
        help="RAM and shared memory of a run (default and official: 28g)",
    )
    parser.add_argument(
        "--time-tolerance",
        type=positive,
        default=15.0,
        metavar="S",
        help="seconds that cost nothing (default: 15, as in 2023)",
    )
    parser.add_argument(
        "--memory-tolerance",
        type=positive,
        default=4096.0,
        metavar="MB",
        help="GPU memory that costs nothing (default: 4096, as in 2023)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check a submission and write the report folder.

    Returns:
        0 if nothing failed, 1 if something did, 2 for wrong usage or an engine that does not work,
        128 + N if signal N ended the check.
    """
    try:
        with signals_raise():
            return _run(arguments)
    except (UsageError, EngineError, OSError) as error:
        say(f"benchmark check: {printable(error)}")
        return 2
    except Stopped as stopped:
        say(f"stopped by {stopped}; nothing is left running")
        return 128 + stopped.number


def _run(arguments: argparse.Namespace) -> int:
    if arguments.inputs is not None:
        own_subjects(arguments.inputs)  # wrong usage is said before an archive is loaded
    remove_abandoned()
    if arguments.archive:
        _say(f"loading {arguments.archive}")
        image, findings = load(arguments.archive)
        team = arguments.archive.name.partition(".")[0] or "team"
    else:
        image, findings = find(arguments.image)
        team = image.rpartition("/")[2].partition(":")[0]
    report = arguments.report or Path(f"check-{team}")
    logs = report / "check"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)

    gpu, gpu_note = open_gpu(arguments.gpu)
    try:
        limit = arguments.memory_limit
        limits = Limits(
            arguments.time_tolerance, arguments.memory_tolerance, str(limit), float(limit.mb)
        )
        trials: list[Trial] = []
        if image is None:
            findings.append(judge.not_run("there is no image to run"))
        else:
            findings += judge_image(image) + judge_weights(image, limit, logs / "weights.log")
            findings += _try(image, arguments, report, gpu, limits, trials)
        check = {
            "team": team,
            "image": image or "none",
            "image_digest": image_id(image) if image else None,
            "command": _command(image, limit, gpu),
            "environment": describe_machine(gpu, gpu_note),
            "limits": {**asdict(limits), "timeout_s": arguments.timeout},
            "findings": [asdict(finding) for finding in findings],
            "runs": [_as_json(trial) for trial in trials],
        }
    finally:
        if gpu:
            gpu.close()
    write_json(report / CHECK_JSON, check)
    write_atomically(report / "check.md", markdown_page(check).encode())
    say(terminal_list(check), sys.stdout)
    say(f"{headline(check)}: {report / 'check.md'}", sys.stdout)
    return 1 if any(finding.level == FAILED for finding in findings) else 0


def _try(
    image: str,
    arguments: argparse.Namespace,
    report: Path,
    gpu: Gpu | None,
    limits: Limits,
    trials: list[Trial],
) -> list[Finding]:
    """Make every run, into `trials`, and judge them."""
    idle = read_idle(gpu, OFFICIAL_INTERVAL)
    # Not below the system's own folder for such things, which may be of memory, or small.
    work = Path(tempfile.mkdtemp(prefix=".work-check-", dir=report.resolve()))
    bench = Bench(report, work, gpu, idle, arguments.timeout, limits.gpu_mb)
    try:
        if arguments.inputs is not None:
            subjects = own_subjects(arguments.inputs)
        else:
            subjects = draw_subjects(work, arguments.large_slices, _say)
        count = len(subjects) + 5
        index = gpu.index if gpu else None

        def trial(subject: Subject, mode: str = ORGANISERS) -> Trial:
            target = VariedContainer(image, arguments.memory_limit, index, phases=False, mode=mode)
            done = bench.run(subject, target, len(trials) + 1)
            trials.append(done)
            _say(_progress_line(len(trials), count, done))
            return done

        return list(_judge(trial, subjects, work, limits))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _judge(
    trial: Callable[..., Trial], subjects: list[Subject], work: Path, limits: Limits
) -> Iterator[Finding]:
    """Every finding about runs, in the order of the list.

    Args:
        trial: makes one run of a subject in a mode.
        subjects: the volumes, one to begin with first.
        work: a folder for the damaged volume.
        limits: to hold the runs against.
    """
    first = trial(subjects[0])
    yield judge.judge_start(first, limits)
    if not first.ran:
        yield from judge.judge_outputs([first])
        yield judge.not_run(f"{first.label} gave no label map")
        return
    again = trial(subjects[0])
    modes = [trial(subjects[0], mode) for mode in (NO_NETWORK, HARDENED, SMALL_SHARED_MEMORY)]
    volumes = [first, *(trial(subject) for subject in subjects[1:])]
    damaged = trial(damaged_subject(work, subjects[0]))

    for mode in modes:
        yield judge.judge_mode(mode, first)
    for volume in volumes:
        yield judge.judge_volume(volume)
    yield from judge.judge_outputs(volumes)
    yield judge.judge_determinism(first, again)
    yield judge.judge_time(volumes, limits)
    yield judge.judge_gpu_memory(volumes, limits)
    yield judge.judge_memory([*volumes, again, *modes], limits)
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


def _as_json(trial: Trial) -> dict:
    return {
        "volume": trial.label,
        "mode": trial.mode,
        "image_size": list(trial.image_size),
        **asdict(trial.outcome),
        "max_ram_mb": trial.max_ram_mb,
        "peak_gpu_mb": trial.peak_gpu_mb,
        "auc_flare_mb_s": trial.auc_flare_mb_s,
        "auc_flare_tolerated_mb_s": trial.auc_tolerated_mb_s,
        "output": asdict(trial.output),
        "sha256": trial.digest,
        "empty": trial.empty,
        "left": trial.left,
        "inputs_touched": trial.inputs_touched,
    }


def _command(image: str | None, limit: MemoryLimit, gpu: Gpu | None) -> str:
    """The organisers' command line, for the page."""
    target = VariedContainer(image or "none", limit, gpu.index if gpu else None, phases=False)
    return shlex.join(target.command_line("NAME", Folders(Path("INPUTS"), Path("OUTPUTS"), Path())))


def _say(line: str) -> None:
    say(printable(line))


def _slices(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"a whole number of 0 or more is needed, not {text}")
    return value

"""Measure a team's container as the organisers do, case by case.

One container start per case, alone in its inputs folder. The files of a run folder:

    TEAM_Efficiency.csv    the official table, one row a case
    efficiency.md          the same in the shape of the paper's Table 4
    environment.json       machine, image, command
    efficiency/CASE.json   every sample and every number of a case (CASE.repeatN.json: repetitions)
    efficiency/CASE.png    GPU memory, RAM and CPU against time
    efficiency/CASE.log    what the container printed
"""

import argparse
import contextlib
import json
import math
import re
import shlex
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError

from benchmark.curves import draw_curves
from benchmark.efficiency_tables import (
    OFFICIAL_INTERVAL,
    PENALTY,
    by,
    csv_table,
    markdown_page,
    markdown_table,
)
from benchmark.environment import describe_machine
from benchmark.output_check import OutputCheck, check_output
from benchmark.runner import (
    PHASE_LOG,
    STOP_SIGNALS,
    Command,
    Container,
    EngineError,
    Folders,
    MemoryLimit,
    docker,
    image_id,
    load_archive,
    run_case,
)
from benchmark.sampler import Gpu, GpuUnavailable, Sampler, Samples, flare_area, true_area
from inference.volume import case_name, find_cases, write_atomically

_IDLE_SAMPLES = 10
_BUSY_MB = 256.0
"""Idle memory, the driver's own part left out, above which the device is taken to be in use."""


class UsageError(ValueError):
    """What was asked cannot be done; the message says what to do, in one line."""


class _Stopped(KeyboardInterrupt):
    """A signal asked the run to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass(frozen=True)
class Case:
    """One input volume.

    Attributes:
        name: of the case, without `_0000`.
        image: the volume's file.
        size: its shape on disk.
    """

    name: str
    image: Path
    size: tuple[int, ...]


@dataclass(frozen=True)
class Idle:
    """The device before the first case.

    Attributes:
        gpu_mb: mean of total − free; None without a device.
        processes: ids of the compute processes already there.
    """

    gpu_mb: float | None
    processes: tuple[int, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command line of `python -m benchmark efficiency`."""
    parser.epilog = (
        "Exit code 0: every case ran and wrote a valid label map; 1: some did not; 2: wrong usage."
    )
    parser.add_argument(
        "--inputs", type=Path, required=True, metavar="DIR", help="folder of NAME_0000.nii.gz"
    )
    parser.add_argument(
        "--outputs", type=Path, required=True, metavar="DIR", help="where NAME.nii.gz go"
    )
    parser.add_argument(
        "--report", type=Path, required=True, metavar="DIR", help="where the measurements go"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--image", metavar="NAME:TAG", help="a Docker image that is here")
    target.add_argument(
        "--archive",
        type=Path,
        metavar="TEAM.tar.gz",
        help="a `docker save` file; the image in it is named as the file, in lower case",
    )
    target.add_argument(
        "--command",
        dest="shell_command",
        metavar="'COMMAND'",
        help="a local command, such as 'sh predict.sh --input {inputs} --output {outputs}'",
    )
    parser.add_argument("--team", help="name in the tables (default: the image's; 'command')")
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="device (default: 0)")
    parser.add_argument(
        "--interval",
        type=_positive,
        default=OFFICIAL_INTERVAL,
        metavar="S",
        help="seconds between samples (default and official: 0.1)",
    )
    parser.add_argument(
        "--timeout",
        type=_positive,
        default=PENALTY["seconds"],
        metavar="S",
        help="end a case after this time (default: 3600)",
    )
    parser.add_argument(
        "--memory-limit",
        type=MemoryLimit.parse,
        default="28g",
        metavar="SIZE",
        help="RAM and shared memory of a case (default and official: 28g)",
    )
    parser.add_argument(
        "--time-tolerance",
        type=_not_negative,
        default=15.0,
        metavar="S",
        help="seconds that cost nothing (default: 15, as in 2023; 2022: 0)",
    )
    parser.add_argument(
        "--memory-tolerance",
        type=_not_negative,
        default=4096.0,
        metavar="MB",
        help="GPU memory that costs nothing (default: 4096, as in 2023; 2022: 2048)",
    )
    parser.add_argument(
        "--repeat",
        type=_count,
        default=1,
        metavar="K",
        help="run every case K times; the tables take the run of median time (default: 1)",
    )
    parser.add_argument(
        "--phases",
        action="store_true",
        help="ask for a phase log through ABDOSEG_PHASE_LOG, which adds one -e to the organisers' "
        "command line",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the cases that REPORT already holds"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure every case and write the run folder.

    Returns:
        0 if every case is ok, 1 if some are not, 2 for wrong usage or an engine that does not
        work, 128 + N if signal N ended the run.
    """
    try:
        with _signals_raise():
            return _run(arguments)
    except (UsageError, EngineError) as error:
        print(f"benchmark efficiency: {error}", file=sys.stderr)
        return 2
    except _Stopped as stopped:
        print(
            f"stopped by {stopped}; nothing is left running. --resume goes on from here",
            file=sys.stderr,
        )
        return 128 + stopped.number


def _run(arguments: argparse.Namespace) -> int:
    cases = _list_cases(arguments.inputs)
    if arguments.outputs.resolve() == arguments.inputs.resolve():
        raise UsageError("--outputs must be another folder than --inputs")
    gpu, gpu_note = _open_gpu(arguments.gpu)
    try:
        target, team, identity = _find_target(arguments, gpu)
        report = arguments.report
        (report / "efficiency").mkdir(parents=True, exist_ok=True)
        arguments.outputs.mkdir(parents=True, exist_ok=True)
        idle = _read_idle(gpu, arguments.interval)
        environment = describe_machine(gpu, gpu_note) | identity
        environment |= {"idle_gpu_mb": idle.gpu_mb, "idle_gpu_processes": list(idle.processes)}
        done = _earlier_results(arguments, cases, environment)
        _write_json(report / "environment.json", environment)

        results: dict[str, list[dict]] = {case.name: [] for case in cases}
        rounds = [(repeat, case) for repeat in range(arguments.repeat) for case in cases]
        for number, (repeat, case) in enumerate(rounds, start=1):
            result = done.get((case.name, repeat))
            kept = result is not None
            if not kept:
                result = _measure(case, repeat, target, team, gpu, idle, arguments)
            result |= _areas(result, arguments)
            stem = report / "efficiency" / _stem(case.name, repeat)
            _write_json(stem.with_name(f"{stem.name}.json"), result)
            if not kept:
                picture = draw_curves(result, gpu_note)
                write_atomically(stem.with_name(f"{stem.name}.png"), picture)
            results[case.name].append(result)
            _write_tables(report, results, environment)
            print(_progress_line(number, len(rounds), result, kept), file=sys.stderr, flush=True)
        print(markdown_table(results))
        return 0 if all(r["status"] == "ok" for runs in results.values() for r in runs) else 1
    finally:
        if gpu:
            gpu.close()


def _list_cases(inputs: Path) -> list[Case]:
    if not inputs.is_dir():
        raise UsageError(f"--inputs {inputs} is not a folder")
    cases: dict[str, Case] = {}
    for image in find_cases(inputs):
        name = case_name(image)
        if name in cases:
            raise UsageError(f"{cases[name].image.name} and {image.name} are both case {name}")
        try:
            cases[name] = Case(name, image, nibabel.load(image).shape)
        except (ImageFileError, OSError, EOFError) as error:
            raise UsageError(f"{image} is not a NIfTI file: {error}") from error
    if not cases:
        raise UsageError(f"--inputs {inputs} holds no .nii.gz file")
    return list(cases.values())


def _open_gpu(index: int) -> tuple[Gpu | None, str | None]:
    try:
        return Gpu(index), None
    except GpuUnavailable as error:
        note = f"{error}; `--gpus` is left out"
        print(f"GPU columns stay empty: {note}", file=sys.stderr)
        return None, note
    except IndexError as error:
        raise UsageError(f"--gpu {index}: {error}") from error


def _find_target(
    arguments: argparse.Namespace, gpu: Gpu | None
) -> tuple[Container | Command, str, dict]:
    """What to run, the team's name, and what makes two runs the same for --resume."""
    index = gpu.index if gpu else None
    limit, phases = arguments.memory_limit, arguments.phases
    if arguments.shell_command:
        missing = [
            name for name in ("{inputs}", "{outputs}") if name not in arguments.shell_command
        ]
        if missing:
            raise UsageError(
                f"--command needs {' and '.join(missing)} where the folder is to stand"
            )
        target = Command(arguments.shell_command, limit, index, phases)
        identity = {"image": None, "image_digest": None, "docker": None}
        identity["command"] = arguments.shell_command
        team = arguments.team or "command"
    else:
        if arguments.archive:
            if not arguments.archive.is_file():
                raise UsageError(f"--archive {arguments.archive} is not a file")
            image = load_archive(arguments.archive)
        else:
            last = arguments.image.rpartition("/")[2]
            image = arguments.image if ":" in last else f"{arguments.image}:latest"
        digest = image_id(image)
        if digest is None:
            raise UsageError(f"there is no image {image} here: `docker pull` it, or use --archive")
        target = Container(image, limit, index, phases)
        placeholder = Folders(Path("INPUTS"), Path("OUTPUTS"), Path())
        identity = {
            "image": image,
            "image_digest": digest,
            "docker": docker("version", "--format", "{{.Server.Version}}").stdout.strip(),
            "command": shlex.join(target.command_line("NAME", placeholder)),
        }
        team = arguments.team or image.rpartition("/")[2].partition(":")[0]
    if re.search(r"[/\0]", team) or team.startswith("."):
        raise UsageError(f"--team {team}: a name that can begin a file's name is needed")
    identity |= {
        "team": team,
        "interval_s": arguments.interval,
        "memory_limit": str(limit),
        "timeout_s": arguments.timeout,
        "phases": phases,
        "repeat": arguments.repeat,
        "tolerances": {"seconds": arguments.time_tolerance, "mb": arguments.memory_tolerance},
    }
    return target, team, identity


def _read_idle(gpu: Gpu | None, interval: float) -> Idle:
    """Sample the device before the first case, and warn where it is in use."""
    if gpu is None:
        return Idle(None, ())
    readings = []
    for _ in range(_IDLE_SAMPLES):
        readings.append(gpu.memory_mb())
        time.sleep(interval)
    idle_mb = statistics.fmean(used for used, _ in readings)
    processes = gpu.processes_mb() or {}
    own_mb = idle_mb - (readings[-1][1] or 0.0)
    if processes or own_mb > _BUSY_MB:
        print(
            f"warning: GPU {gpu.index} is not idle: {idle_mb:,.0f} MB are taken"
            + (f" (processes {', '.join(map(str, processes))})" if processes else "")
            + ", which the official area counts in every sample",
            file=sys.stderr,
        )
    return Idle(idle_mb, tuple(processes))


def _earlier_results(
    arguments: argparse.Namespace, cases: list[Case], environment: dict
) -> dict[tuple[str, int], dict]:
    """What --resume keeps; anything else of an earlier run is removed.

    Raises:
        UsageError: a label map is in the way that no earlier run of this report wrote.
    """
    folder = arguments.report / "efficiency"
    earlier = {path.name: _read_json(path) for path in folder.glob("*.json")}
    differences = _differences(_read_json(arguments.report / "environment.json"), environment)
    kept = {}
    if earlier and not arguments.resume:
        print(f"replacing the earlier run in {arguments.report}", file=sys.stderr)
    elif earlier and differences:
        print(
            f"starting over: the run in {arguments.report} has another {', '.join(differences)}",
            file=sys.stderr,
        )
    elif arguments.resume:
        for case in cases:
            for repeat in range(arguments.repeat):
                result = earlier.get(f"{_stem(case.name, repeat)}.json")
                written = (arguments.outputs / f"{case.name}.nii.gz").is_file()
                scored = result and result["status"] in ("ok", "invalid output") and repeat == 0
                if result and (written or not scored):
                    kept[case.name, repeat] = result
    for case in cases:
        output = arguments.outputs / f"{case.name}.nii.gz"
        if (case.name, 0) not in kept and output.exists():
            if f"{case.name}.json" not in earlier:
                raise UsageError(f"{output} is in the way: name an empty folder for --outputs")
            output.unlink()
    keep = {_stem(*key) for key in kept}
    for path in folder.iterdir():
        if path.suffix in (".json", ".png", ".log") and path.stem not in keep:
            path.unlink()
    return kept


def _differences(earlier: dict | None, environment: dict) -> list[str]:
    names = ("team", "image_digest", "command", "gpu", "interval_s", "memory_limit", "timeout_s")
    earlier = earlier or {}
    return [name for name in names if earlier.get(name) != environment[name]]


def _measure(
    case: Case,
    repeat: int,
    target: Container | Command,
    team: str,
    gpu: Gpu | None,
    idle: Idle,
    arguments: argparse.Namespace,
) -> dict:
    """Run one case in folders of its own, and say everything about it but the areas."""
    work = (arguments.report / f".work-{case.name}").resolve()
    log = arguments.report / "efficiency" / f"{_stem(case.name, repeat)}.log"
    shutil.rmtree(work, ignore_errors=True)
    folders = Folders(work / "inputs", work / "outputs", log)
    try:
        for folder in (folders.inputs, folders.outputs):
            folder.mkdir(parents=True)
            folder.chmod(0o777)  # as the organisers do: a container may run as any user
        shutil.copy(case.image, folders.inputs)
        sampler = Sampler(gpu, arguments.interval, idle.processes)
        outcome, samples, cost = run_case(target, case.name, folders, arguments.timeout, sampler)
        output = check_output(folders.outputs, case.name, case.image)
        if output.found and outcome.status == "ok" and repeat == 0:
            _move(folders.outputs / f"{case.name}.nii.gz", arguments.outputs)
        phases = _read_phases(folders.outputs / PHASE_LOG, sampler.started)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if work.exists():
            print(f"{work} cannot be removed: its files belong to another user", file=sys.stderr)

    status, reason = _judge(outcome.status, outcome.reason, output)
    failed = outcome.status != "ok" or not output.scorable
    return {
        "case": case.name,
        "file": case.image.name,
        "team": team,
        "status": status,
        "reason": reason,
        "penalty": PENALTY if failed else None,
        "exit_code": outcome.exit_code,
        "seconds": round(outcome.seconds, 4),
        "repeat": repeat,
        "image_size": list(case.size),
        "interval_s": arguments.interval,
        "idle_gpu_mb": idle.gpu_mb,
        "sampler": asdict(cost),
        "samples": asdict(samples),
        "phases": phases,
        "output": {"found": output.found, "valid": output.valid, "problems": output.problems},
    }


def _judge(status: str, reason: str | None, output: OutputCheck) -> tuple[str, str | None]:
    problems = "; ".join(output.problems)
    if status != "ok":
        return status, reason + (" (a valid label map was written)" if output.valid else "")
    if not output.found:
        return "no output", problems
    return ("ok", None) if output.valid else ("invalid output", problems)


def _move(file: Path, folder: Path) -> None:
    """Move a file to another folder, where it appears only when it is whole."""
    partial = folder / f".{file.name}.partial"
    shutil.copyfile(file, partial)
    partial.replace(folder / file.name)


def _read_phases(path: Path, started: float) -> list[dict]:
    """The phase log, its times relative to the case's start; lines that are none are left out."""
    phases = []
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                phases.append(
                    {
                        "phase": str(entry["phase"]),
                        "case": entry["case"],
                        "start_s": round(entry["start"] - started, 6),
                        "end_s": round(entry["end"] - started, 6),
                    }
                )
    return phases


def _areas(result: dict, arguments: argparse.Namespace) -> dict:
    """Peaks and areas of a case's samples, with and without the tolerances."""
    samples = Samples(**result["samples"])
    interval, tolerance = result["interval_s"], arguments.memory_tolerance
    times, gpu = samples.time_s, samples.gpu_used_mb
    return {
        "peak_gpu_mb": max(gpu) if gpu else None,
        "auc_flare_mb_s": flare_area(gpu, interval) if gpu else None,
        "auc_true_mb_s": true_area(times, gpu) if gpu else None,
        "auc_flare_tolerated_mb_s": flare_area(gpu, interval, tolerance) if gpu else None,
        "auc_true_tolerated_mb_s": true_area(times, gpu, tolerance) if gpu else None,
        "seconds_tolerated": max(0.0, result["seconds"] - arguments.time_tolerance),
        "tolerances": {"seconds": arguments.time_tolerance, "mb": tolerance},
        "max_cpu_percent": max(samples.cpu_percent),
        "auc_cpu_percent_s": float(np.round(sum(samples.cpu_percent) * interval, 2)),
        "max_ram_mb": max(samples.ram_mb),
        "auc_ram_mb_s": flare_area(samples.ram_mb, interval),
    }


def _write_tables(report: Path, results: dict[str, list[dict]], environment: dict) -> None:
    name = f"{environment['team']}_Efficiency.csv"
    write_atomically(report / name, csv_table(results).encode())
    write_atomically(report / "efficiency.md", markdown_page(results, environment).encode())


def _progress_line(number: int, count: int, run: dict, kept: bool) -> str:
    parts = [f"[{number}/{count}] {run['case']} ({by(run['image_size'])}): {run['seconds']:.2f} s"]
    if run["peak_gpu_mb"] is not None:
        parts.append(f"peak {run['peak_gpu_mb']:,.0f} MB, {run['auc_flare_mb_s']:,.0f} MB·s")
    parts.append(f"RAM {run['max_ram_mb']:,.0f} MB")
    parts.append(run["status"] + (f" ({run['reason']})" if run["reason"] else ""))
    if kept:
        parts.append("from the earlier run")
    return ", ".join(parts)


def _stem(case: str, repeat: int) -> str:
    return f"{case}.repeat{repeat}" if repeat else case


def _write_json(path: Path, content: dict) -> None:
    write_atomically(path, (json.dumps(content) + "\n").encode())


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and a closed terminal into `_Stopped`; what is ignored stays so."""

    def stop(number: int, _frame: object) -> None:
        raise _Stopped(number)

    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _positive(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"a number above 0 is needed, not {text}")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"a number of 0 or more is needed, not {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"a whole number of 1 or more is needed, not {text}")
    return value

"""One case measured: run in folders of its own, its label map checked, its numbers in one place."""

import argparse
import contextlib
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmark.containers.apart import check_output_apart
from benchmark.containers.areas import flare_area, true_area
from benchmark.containers.cases import Case
from benchmark.containers.collecting import RefusedError, collect, open_left_file
from benchmark.containers.device import Idle
from benchmark.containers.gpu import Gpu
from benchmark.containers.output_check import OutputCheck, missing_output
from benchmark.containers.repeats import PENALTY
from benchmark.containers.runner import run_case
from benchmark.containers.sampler import Sampler, Samples
from benchmark.containers.targets import PHASE_LOG, Command, Container, Folders
from benchmark.messages import say
from inference.files import whole_file

_MOST_HEADER_BYTES = 16 << 20
"""Of a label map beside its voxels, and of a phase log."""


def measure_case(
    case: Case,
    repeat: int,
    target: Container | Command,
    team: str,
    gpu: Gpu | None,
    idle: Idle,
    arguments: argparse.Namespace,
    *,
    first: bool,
) -> dict:
    """Run one case in folders of its own, and say everything about it but the areas.

    `first` says that nothing ran before it here, so that it may have started cold.
    """
    work = (arguments.report / f".work-{case.name}").resolve()
    log = arguments.report / "efficiency" / f"{file_stem(case.name, repeat)}.log"
    shutil.rmtree(work, ignore_errors=True)
    folders = Folders(work / "inputs", work / "outputs", log)
    try:
        for folder in (folders.inputs, folders.outputs):
            folder.mkdir(parents=True)
            folder.chmod(0o777)  # as the organisers do: a container may run as any user
        collected = work / "collected"  # which the container does not see
        collected.mkdir()
        shutil.copy(case.image, folders.inputs)
        sampler = Sampler(gpu, arguments.interval, idle.processes)
        outcome, samples, cost = run_case(target, case.name, folders, arguments.timeout, sampler)
        output = take_output(folders.outputs, collected, case)
        if output.found and outcome.status == "ok" and repeat == 0:
            _move(collected / f"{case.name}.nii.gz", arguments.outputs)
        phases = _read_phases(folders.outputs, sampler.started)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if work.exists():
            say(f"{work} cannot be removed: its files belong to another user")

    status, reason = _judge(outcome.status, outcome.reason, output)
    failed = outcome.status != "ok" or not output.scorable
    return {
        "case": case.name,
        "file": case.image.name,
        "team": team,
        "status": status,
        "reason": reason,
        "penalty": _penalty(samples) if failed else None,
        "exit_code": outcome.exit_code,
        "seconds": round(outcome.seconds, 4),
        "repeat": repeat,
        "first": first,
        "image_size": list(case.size),
        "interval_s": arguments.interval,
        "idle_gpu_mb": idle.gpu_mb,
        "sampler": asdict(cost),
        "samples": asdict(samples),
        "phases": phases,
        "output": {"found": output.found, "valid": output.valid, "problems": output.problems},
    }


def _penalty(samples: Samples) -> dict[str, float]:
    """What a failed case counts as; without a device there is no penalty for its memory."""
    return {
        name: value
        for name, value in PENALTY.items()
        if name != "auc_gpu_mb_s" or samples.gpu_used_mb
    }


def take_output(outputs: Path, collected: Path, case: Case) -> OutputCheck:
    """Copy the label map out of the container's reach, and check the copy."""
    name = f"{case.name}.nii.gz"
    # As float64 and hardly compressed it would still be below this.
    most_bytes = 9 * math.prod(max(1, length) for length in case.size) + _MOST_HEADER_BYTES
    try:
        collect(outputs, name, collected / name, most_bytes)
    except FileNotFoundError:
        return missing_output(outputs, name)
    except (RefusedError, OSError) as error:
        return OutputCheck(
            found=False, scorable=False, problems=[f"not taken: {error}"], aspects=["file"]
        )
    return check_output_apart(collected / name, case.image, case.size)


def _judge(status: str, reason: str | None, output: OutputCheck) -> tuple[str, str | None]:
    problems = "; ".join(output.problems)
    if status != "ok":
        return status, reason + (" (a valid label map was written)" if output.valid else "")
    if not output.found:
        return "no output", problems
    return ("ok", None) if output.valid else ("invalid output", problems)


def _move(file: Path, folder: Path) -> None:
    """Move a file to another folder, where it appears only when it is whole."""
    with file.open("rb") as source, whole_file(folder / file.name) as target:
        shutil.copyfileobj(source, target)


def _read_phases(outputs: Path, started: float) -> list[dict]:
    """The phase log, its times relative to the case's start; lines that are none are left out."""
    phases = []
    with (
        contextlib.suppress(OSError, RefusedError),
        open_left_file(outputs, PHASE_LOG, _MOST_HEADER_BYTES) as file,
    ):
        for line in file.read(_MOST_HEADER_BYTES).decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                entry = json.loads(line)
                start, end = (float(entry[name]) - started for name in ("start", "end"))
                if math.isfinite(start) and math.isfinite(end):
                    phases.append(
                        {
                            "phase": str(entry["phase"])[:100],
                            "case": None if entry["case"] is None else str(entry["case"])[:255],
                            "start_s": round(start, 6),
                            "end_s": round(end, 6),
                        }
                    )
    return phases


def peaks_and_areas(result: dict, arguments: argparse.Namespace) -> dict:
    """Peaks and areas of a case's samples, with and without the tolerances; None if not read."""
    samples = Samples(**result["samples"])
    interval, tolerance = result["interval_s"], arguments.memory_tolerance
    times, gpu = samples.time_s, samples.gpu_used_mb
    seen = any(samples.ram_mb)
    return {
        "peak_gpu_mb": max(gpu) if gpu else None,
        "auc_flare_mb_s": flare_area(gpu, interval) if gpu else None,
        "auc_true_mb_s": true_area(times, gpu) if gpu else None,
        "auc_flare_tolerated_mb_s": flare_area(gpu, interval, tolerance) if gpu else None,
        "auc_true_tolerated_mb_s": true_area(times, gpu, tolerance) if gpu else None,
        "seconds_tolerated": max(0.0, result["seconds"] - arguments.time_tolerance),
        "tolerances": {"seconds": arguments.time_tolerance, "mb": tolerance},
        # A run that ended before its first reading has used something, not 0.
        "max_cpu_percent": max(samples.cpu_percent) if seen else None,
        "auc_cpu_percent_s": float(np.round(sum(samples.cpu_percent) * interval, 2))
        if seen
        else None,
        "max_ram_mb": max(samples.ram_mb) if seen else None,
        "auc_ram_mb_s": flare_area(samples.ram_mb, interval) if seen else None,
    }


def file_stem(case: str, repeat: int) -> str:
    """What the names of a case's files begin with, repetitions apart."""
    return f"{case}.repeat{repeat}" if repeat else case

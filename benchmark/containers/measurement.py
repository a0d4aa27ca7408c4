"""One case run in folders of its own, its label map checked, its numbers in one place."""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmark.containers.gpu import Gpu, Idle
from benchmark.containers.outputs import OutputCheck, RefusedError, open_left_file, take_output
from benchmark.containers.results import NOT_MEASURED, PENALTY, Tolerances, peaks_and_areas
from benchmark.containers.runner import PHASE_LOG, Command, Container, Folders, Outcome, run_case
from benchmark.containers.sampler import Sampler, SamplerCost, Samples
from benchmark.options import UsageError
from benchmark.text import log
from inference.files import case_name, find_entries, output_key, why_not_a_volume
from inference.volume import VolumeError, read_header

_MOST_PHASE_BYTES = 16 << 20


@dataclass(frozen=True)
class Case:
    """An input volume: its case's name, without `_0000`, its file and its shape on disk."""

    name: str
    image: Path
    size: tuple[int, ...]


def list_cases(inputs: Path) -> tuple[list[Case], dict[str, str]]:
    """Return the cases of a folder of CTs; and the names of what is no volume there, and why.

    Raises:
        UsageError: it is no folder, or holds no case, or two of one name. Names that some file
            systems do not tell apart are one.
        OSError: it cannot be read.
    """
    if not inputs.is_dir():
        raise UsageError(f"--inputs {inputs} is not a folder")
    cases: dict[str, Case] = {}
    refused: dict[str, str] = {}
    for image in find_entries(inputs):
        reason = why_not_a_volume(image)
        if not reason:
            try:
                case = Case(case_name(image), image, tuple(read_header(image).get_data_shape()))
            except (VolumeError, OSError) as error:
                reason = f"not a NIfTI file: {error}"
        if reason:
            refused[image.name] = reason
            continue
        other = cases.setdefault(output_key(case.name), case)
        if other is not case:
            raise UsageError(f"{other.image.name} and {image.name} are both case {case.name}")
    if not cases:
        seen = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise UsageError(f"--inputs {inputs} holds no volume to read" + (seen and f" ({seen})"))
    return list(cases.values()), refused


@dataclass(frozen=True)
class Run:
    """One run of a case, as it ended; its folders are removed at the end of `run_alone`."""

    folders: Folders
    outcome: Outcome
    samples: Samples
    cost: SamplerCost
    output: OutputCheck
    label_map: Path  # a copy out of the container's reach, if the output was found
    phases: list[dict]  # of the phase log: phase, case, start_s and end_s from the case's start


@contextlib.contextmanager
def run_alone(
    case: Case,
    target: Container | Command,
    work: Path,
    log_path: Path,
    gpu: Gpu | None,
    idle: Idle,
    interval: float,
    timeout: float,
) -> Iterator[Run]:
    """Run a case in folders of its own, below `work`, which is removed at the end of the block.

    Raises:
        EngineError: the engine did not start the container.
        OSError: the folders cannot be made or written.
    """
    work = work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    folders = Folders(work / "inputs", work / "outputs", log_path)
    try:
        for folder in (folders.inputs, folders.outputs):
            folder.mkdir(parents=True)
            folder.chmod(0o777)  # as the organisers do: a container may run as any user
        shutil.copyfile(case.image, folders.inputs / case.image.name)
        (folders.inputs / case.image.name).chmod(0o644)
        sampler = Sampler(gpu, interval, idle.processes)
        outcome, samples, cost = run_case(target, case.name, folders, timeout, sampler)
        (work / "collected").mkdir()  # which the container does not see
        label_map = work / "collected" / f"{case.name}.nii.gz"
        output = take_output(folders.outputs, label_map, case.image, case.size)
        phases = _read_phases(folders.outputs, sampler.started)
        yield Run(folders, outcome, samples, cost, output, label_map, phases)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if work.exists():
            log(f"{work} cannot be removed: its files belong to another user")


def result_of(
    case: Case, run: Run, gpu: Gpu | None, interval: float, tolerances: Tolerances
) -> dict:
    """Return the result of a run: how it ended and every number of it."""
    output, seconds = run.output, round(run.outcome.seconds, 4)
    problems = "; ".join(output.problems)
    status, reason, penalty = run.outcome.status, run.outcome.reason, None
    if run.cost.gpu_error:
        status, reason = NOT_MEASURED, f"GPU {gpu.device} stopped answering ({run.cost.gpu_error})"
    elif status != "ok" or not output.scorable:
        gpu_read = run.samples.gpu_used_mb
        penalty = {key: v for key, v in PENALTY.items() if key != "auc_gpu_mb_s" or gpu_read}
    if status == "ok" and not output.valid:
        status, reason = "invalid output" if output.found else "no output", problems
    elif penalty and output.valid:
        reason += " (a valid label map was written)"
    return {
        "case": case.name,
        "file": case.image.name,
        "status": status,
        "reason": reason,
        "penalty": penalty,
        "exit_code": run.outcome.exit_code,
        "seconds": seconds,
        "image_size": list(case.size),
        "interval_s": interval,
        "sampler": asdict(run.cost),
        "samples": asdict(run.samples),
        "phases": run.phases,
        "output": {"found": output.found, "valid": output.valid, "problems": output.problems},
        **peaks_and_areas(run.samples, seconds, interval, tolerances),
    }


def _read_phases(outputs: Path, started: float) -> list[dict]:
    """Read the phase log, its times from the case's start; lines that are none are skipped."""
    phases = []
    with (
        contextlib.suppress(OSError, RefusedError),
        open_left_file(outputs, PHASE_LOG, _MOST_PHASE_BYTES) as file,
    ):
        for line in file.read(_MOST_PHASE_BYTES).decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                entry = json.loads(line)
                start, end = (float(entry[name]) - started for name in ("start", "end"))
                case = None if entry["case"] is None else str(entry["case"])[:255]
                if math.isfinite(start) and math.isfinite(end):
                    times = {"start_s": round(start, 6), "end_s": round(end, 6)}
                    phases.append({"phase": str(entry["phase"])[:100], "case": case, **times})
    return phases

"""One case run in folders of its own, its label map checked, its numbers in one place."""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmark.containers.machine import NO_GPU, Gpu
from benchmark.containers.outputs import RefusedError, open_left_file, take_output
from benchmark.containers.results import (
    NOT_MEASURED,
    PENALTY,
    TOLERANCES,
    Result,
    Tolerances,
    peaks_and_areas,
)
from benchmark.containers.runner import PHASE_LOG, Command, Container, Folders, run_case
from benchmark.containers.sampler import Sampler
from benchmark.options import HarnessError
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
    """Return the cases of a folder of CTs; and the names of other files there, with the reason.

    Raises:
        HarnessError: it is no folder, or has no case, or two of one name. Names that some file
            systems take for the same are one.
        OSError: it cannot be read.
    """
    if not inputs.is_dir():
        raise HarnessError(f"--inputs {inputs} is not a folder")
    cases: dict[str, Case] = {}
    refused: dict[str, str] = {}
    for image in find_entries(inputs):
        reason = why_not_a_volume(image)
        try:
            if not reason:
                case = Case(case_name(image), image, tuple(read_header(image).get_data_shape()))
        except (VolumeError, OSError) as error:
            reason = f"not a NIfTI file: {error}"
        if reason:
            refused[image.name] = reason
        elif (other := cases.setdefault(output_key(case.name), case)) is not case:
            raise HarnessError(f"{other.image.name} and {image.name} are both case {case.name}")
    if not cases:
        seen = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise HarnessError(f"--inputs {inputs} has no volume to read" + (seen and f" ({seen})"))
    return list(cases.values()), refused


@dataclass(frozen=True)
class Conditions:
    """Conditions of runs and measurements; the defaults are the organisers' of 2023."""

    gpu: Gpu = NO_GPU
    timeout: float = PENALTY["seconds"]  # after which a run is ended
    tolerances: Tolerances = TOLERANCES["flare23"]
    memory_limit: str = "28g"  # of each container
    repeat: int = 1  # runs of each case, an odd number
    warm_up: bool = False  # whether a first run is discarded


@contextlib.contextmanager
def run_alone(
    case: Case, target: Container | Command, work: Path, log_path: Path, how: Conditions
) -> Iterator[tuple[Result, Folders, Path]]:
    """Run a case in folders of its own, below `work`, which is removed at the end of the block.

    Yields:
        Its result, its folders, and where a copy of its label map is, if it wrote one, out of the
        container's reach.

    Raises:
        EngineError: the engine did not start the container.
        OSError: the folders cannot be made or written.
    """
    work = work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    folders = Folders(work / "inputs", work / "outputs", log_path)
    try:
        copy = folders.inputs / case.image.name
        for folder in (folders.inputs, folders.outputs):
            folder.mkdir(parents=True)
        shutil.copyfile(case.image, copy)
        # As the organisers do: a container may run as any user. CIFS and its like have no modes.
        for path, mode in ((folders.inputs, 0o777), (folders.outputs, 0o777), (copy, 0o644)):
            with contextlib.suppress(OSError):
                path.chmod(mode)
        sampler = Sampler(how.gpu)
        outcome, samples, cost = run_case(target, case.name, folders, how.timeout, sampler)
        (work / "collected").mkdir()  # which the container does not see
        label_map = work / "collected" / f"{case.name}.nii.gz"
        output = take_output(folders.outputs, label_map, case.image, case.size)
        result: Result = {
            "case": case.name,
            "file": case.image.name,
            **asdict(outcome),
            "penalty": None,
            "seconds": round(outcome.seconds, 4),
            "image_size": list(case.size),
            "idle_gpu_mb": how.gpu.idle_mb,
            "sampler": asdict(cost),
            "samples": asdict(samples),
            "phases": read_phases(folders.outputs, sampler.started),
            "output": asdict(output),
            **peaks_and_areas(samples, outcome.seconds, how.tolerances),
        }
        if cost.gpu_error:
            reason = f"GPU {how.gpu.device} stopped answering ({cost.gpu_error})"
            result |= {"status": NOT_MEASURED, "reason": reason}
        elif outcome.status != "ok" or not output.scorable:
            read = samples.gpu_used_mb  # without a GPU there is no penalty for its memory
            result["penalty"] = {k: v for k, v in PENALTY.items() if k != "auc_gpu_mb_s" or read}
            result["reason"] = (
                f"{outcome.reason}{' (a valid label map was written)' * output.valid}"
            )
        if outcome.status == "ok" and not output.valid and not cost.gpu_error:
            result["status"] = "invalid output" if output.found else "no output"
            result["reason"] = "; ".join(output.problems)
        yield result, folders, label_map
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if work.exists():
            log(f"{work} cannot be removed: its files belong to another user")


def read_phases(outputs: Path, started: float) -> list[dict]:
    """Read the phase log, with times from the case's start; skip lines of any other form."""
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

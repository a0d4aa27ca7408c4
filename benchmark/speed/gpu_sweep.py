"""Measure whatever only a GPU can show, and end by the clock.

In the order of what they are worth: labels against the CPU's, the network alone, and the choices
of `inference.prediction.Predictor` (`gpu_stages`, one process); cold cases of the service, the
plain pipeline and a peer, a process each; a folder in one process. An error costs its own
measurement, and what the time does not allow is named. This process itself never uses the device.

In the report's folder, written after each stage: gpu-NAME.md, the page; gpu-NAME.json, its figures
and every sample of the cold cases; and as they come gpu_stages.jsonl, what the one process prints.
"""

import argparse
import contextlib
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np

from benchmark.checking.volumes import lengthened
from benchmark.containers.machine import NO_GPU, Gpu, describe_machine, open_gpu
from benchmark.containers.measurement import Case, Conditions, read_phases, run_alone
from benchmark.containers.results import Result
from benchmark.containers.runner import Command, Folders, run_case
from benchmark.containers.sampler import Sampler
from benchmark.options import not_negative
from benchmark.text import bullets, log, show, table
from inference.files import one_line, write_atomically
from inference.network.weights import SLIM, WEIGHTS
from synthetic.phantom import draw_phantom, write_nifti

FULL_SIZE, PAPER_SIZE = "full-size.safetensors", "paper.safetensors"
"""Weights that `gpu_stages` writes: 64 channels at reduction 2, and the paper's own network."""

STAGES = ("rates", "labels", "network", "choices")
"""Of `gpu_stages`, in their order."""

OUT_OF_TIME = "the time was over"

LEAST_DSC = 0.995
"""Of each organ: labels on the device against those of a CPU in fp32."""

SECTIONS = {
    "rates": "Measured, not from a data sheet; of half precision.",
    "labels": f"Against those of a CPU in fp32. An organ's DSC is to be at least {LEAST_DSC}.",
    "network": "Alone, in half precision; the memory is what its allocator has beside weights.",
    "choices": "Whole predictions in one process, in the order A B B A.",
    "cold cases": "A process each. Labels are compared with the first run of the same network.",
    "warm folder": "In one process, from the first label map on.",
    "not measured": "And why.",
}
"""Lists of the result, with a line for each."""

_SPACING = (2.5, 0.78, 0.78)
_VOLUMES = 8  # in the folder that one process segments
_CASE_SECONDS = 75.0  # after which a cold case is ended
_MEMORY = "1000g"  # no limit
_SECONDS_TO_END = 6  # of the time: for ending a process and writing the page


def memory_of(run: Result) -> dict[str, float | None]:
    """Return peak (MB) and both areas (MB·s) of a result of `run_alone`, or None if not read.

    Each as it is, and without what the idle device has in use.
    """
    times, idle = run["samples"]["time_s"], run["idle_gpu_mb"]
    found = {}
    for name, key, idle_seconds in (
        ("peak{} (MB)", "peak_gpu_mb", 1),
        ("official area{} (MB·s)", "auc_flare_mb_s", len(times) * run["interval_s"]),
        ("true area{} (MB·s)", "auc_true_mb_s", times[-1] - times[0]),
    ):
        value = run[key]
        found[name.format("")] = value
        found[name.format(", less idle")] = value and value - idle * idle_seconds
    return found


class ColdCase(NamedTuple):
    """One process on one volume; the label maps of one network and volume are compared."""

    program: str
    network: str
    volume: str  # "short", "middle" or "long"
    command: str  # with {inputs} and {outputs}


class Sweep:
    """The stages, one after another, until the time is over.

    Args:
        gpu: the device; without one the stages run on the CPU, with small volumes.
        folder: for volumes, weights and outputs.
        report: for what `gpu_stages` prints.
        deadline: on `time.monotonic`'s clock.
        peer: command of another predictor, or "".
    """

    def __init__(self, gpu: Gpu, folder: Path, report: Path, deadline: float, peer: str) -> None:
        self.gpu, self.folder, self.deadline, self.peer = gpu, folder, deadline, peer
        self.printed = report / "gpu_stages.jsonl"
        self.device, self.slices, self.size = ("cuda", 200, 512) if gpu.device else ("cpu", 8, 64)
        self.result: dict[str, list[dict[str, Any]]] = {
            name: [] for name in (*SECTIONS, "runs", "seconds")
        }

    def run_command(
        self, command: str, seconds: float, folders: Folders, *, phases: bool = False
    ) -> str:
        """Run a command until it ends, or its time or the sweep's is over; return what failed."""
        seconds = max(1.0, min(seconds, self.deadline - time.monotonic()))
        target = Command(f"exec {sys.executable} -m {command}", _MEMORY, self.gpu.device, phases)
        return run_case(target, "", folders, seconds, Sampler())[0].reason or ""

    def missed(self, what: str, why: str) -> None:
        """Name something that could not be measured."""
        self.result["not measured"].append({"what": what, "why": why})

    def volumes(self) -> None:
        """Write the volumes: an eighth of the slices is generated, the rest repeats them."""
        slices, size = self.slices, self.size
        phantom = draw_phantom((max(2, slices // 8), size, size), _SPACING, seed=0).volume
        for name, length in (("short", slices // 2), ("middle", slices), ("long", slices * 5 // 2)):
            write_nifti(self.folder / f"{name}.nii.gz", lengthened(phantom, length), _SPACING)

    def one_process(self) -> None:
        """Run `gpu_stages`."""
        folders = Folders(self.folder, self.folder, self.printed)
        command = f"benchmark.speed.gpu_stages {self.folder} {self.device}"
        why = self.run_command(command, 80, folders)
        for line in self.printed.read_text(encoding="utf-8").splitlines():
            if line.startswith("{") and line.endswith("}"):  # not a warning, nor the last in part
                found = json.loads(line)
                self.result[found.pop("stage")].append(found)
        ended = {line["what"] for line in self.result["seconds"]}
        for stage in STAGES:
            if why and stage not in ended:
                self.missed(f"{stage}, or part of it", why)

    def cold(self, cases: list[ColdCase], seconds: float) -> None:
        """Measure cold cases as `benchmark efficiency --command` does, for so long at most."""
        end = min(self.deadline, time.monotonic() + seconds)
        first: dict[tuple[str, str], np.ndarray] = {}
        for cold in cases:
            what = f"{cold.program}, {cold.network}"
            timeout = min(_CASE_SECONDS, end - time.monotonic())
            if timeout <= 0:
                self.missed(what, OUT_OF_TIME)
                continue
            image = self.folder / f"{cold.volume}.nii.gz"
            case = Case(cold.volume, image, nibabel.Nifti1Image.from_filename(image).shape)
            target = Command(cold.command, _MEMORY, self.gpu.device)
            places = (self.folder / "case", self.folder / "log")
            with run_alone(case, target, *places, Conditions(self.gpu, timeout)) as (run, _, path):
                self.result["runs"].append({"what": what, **run})
                if run["status"] != "ok":
                    self.missed(what, f"{run['status']}: {run['reason']}")
                    continue
                labels = np.asanyarray(nibabel.Nifti1Image.from_filename(path).dataobj)
            alike = first.setdefault((cold.volume, cold.network), labels)
            line = {"what": what, "slices": labels.shape[2], "time (s)": run["seconds"]}
            line |= memory_of(run) | {"RAM (MB)": run["max_ram_mb"]}
            line["voxels unlike the first"] = int((labels != alike).sum())
            self.result["cold cases"].append(line)

    def warm_folder(self) -> None:
        """Segment a folder of volumes in one process of the service."""
        inputs, outputs = self.folder / "many", self.folder / "many-out"
        inputs.mkdir()
        outputs.mkdir()
        for number in range(_VOLUMES):
            (inputs / f"{number}_0000.nii.gz").hardlink_to(self.folder / "middle.nii.gz")
        command = f"inference --quiet --device {self.device} --weights {self.folder / PAPER_SIZE}"
        command += " --input {inputs} --output {outputs}"
        folders = Folders(inputs, outputs, self.folder / "log")
        if why := self.run_command(command, 40, folders, phases=True):
            self.missed("warm folder", why)
            return
        phases = read_phases(outputs, 0.0)
        written = sorted(phase["end_s"] for phase in phases if phase["phase"] == "write")
        rate = (len(written) - 1) / (written[-1] - written[0])
        self.result["warm folder"].append({"what": "volumes a second", "rate": rate})

    def case(self, program: str, network: Path, volume: str = "middle") -> ColdCase:
        """Return a cold case of the service or the plain pipeline."""
        module = {"service": "inference --quiet", "plain pipeline": "benchmark plain-pipeline"}
        command = f"exec {sys.executable} -m {module[program]}"
        command += f" --device {self.device} --weights '{network}'"
        command += " --input {inputs} --output {outputs}"
        return ColdCase(program, network.stem, volume, command)

    def cold_cases(self) -> None:
        """Measure the cold cases, what is worth most first."""
        paper, full, slim = self.folder / PAPER_SIZE, self.folder / FULL_SIZE, WEIGHTS / SLIM
        cases = [
            self.case("service", paper),
            self.case("plain pipeline", paper),
            *([ColdCase("peer", "its own", "middle", self.peer)] if self.peer else []),
            self.case("service", full),
            self.case("service", slim),
            self.case("service", paper, "short"),
            self.case("service", paper, "long"),
        ]
        self.cold(cases, 170)

    def run(self, stages: Iterable[Callable[[], None]], write: Callable[[], None]) -> None:
        """Run stages as long as there is time; `write` is called after each."""
        for stage in stages:
            name, started = stage.__name__.replace("_", " "), time.monotonic()
            try:
                if started > self.deadline:
                    self.missed(name, OUT_OF_TIME)
                else:
                    stage()
            except Exception as error:  # the stages after it must not suffer
                self.missed(name, one_line(error))
            seconds = time.monotonic() - started
            self.result["seconds"].append({"what": name, "seconds": seconds})
            log(f"{name}: {seconds:.1f} s")
            write()


def _cell(value: object) -> object:
    if isinstance(value, dict):  # DSC by organ
        low = [f"{organ} {dsc:.4f}" for organ, dsc in value.items() if dsc < LEAST_DSC]
        return f"**{', '.join(low)}**" if low else f"{len(value)} organs well"
    if isinstance(value, list):
        return ", ".join(map(str, map(_cell, value)))
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else value


def markdown(machine: dict[str, Any], result: dict[str, list[dict[str, Any]]]) -> str:
    """Return the page of a machine and a `Sweep.result`: of each of its lines a row."""
    seconds = ", ".join(f"{line['what']} {line['seconds']:.0f}" for line in result["seconds"])
    about = [
        f"{machine['gpu']}, {machine['gpu_memory_mb'] or 0:,.0f} MB, driver {machine['driver']}; "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, Python "
        f"{machine['versions']['python']}; {machine['date']}.",
        "Made by `python -m benchmark gpu-sweep`. Volumes are synthetic; longer ones repeat their "
        "first slices back and forth. `paper` is the paper's network (its labels mean little), "
        "`full-size` has 64 channels at reduction 2. The plain pipeline is fp32 as torch computes "
        "it by default, with TF32 where a device has it.",
        f"Seconds: {seconds}.",
    ]
    parts = [f"# {machine['gpu'] or 'No GPU: a rehearsal'}", bullets(about)]
    for name, line in SECTIONS.items():
        if rows := result[name]:
            head = list(dict.fromkeys(key for row in rows for key in row))
            cells = [[_cell(row.get(key)) for key in head] for row in rows]
            parts += [f"## {name.capitalize()}", line]
            parts.append(table(head, "l" + "r" * (len(head) - 1), cells))
    return "\n\n".join(parts) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmark gpu-sweep`."""
    add = parser.add_argument
    add("--report", type=Path, required=True, metavar="DIR", help="where page and figures go")
    text = "at most (default: %(default)s)"
    add("--minutes", type=not_negative, default=4, metavar="M", help=text)
    text = "real CTs NAME_0000.nii.gz to compare labels on"
    add("--cts", type=Path, metavar="DIR", help=text)
    text = (
        "another predictor to measure on one cold case, with {inputs} and {outputs} for the "
        "folders (benchmark/results/peers/peers.md has nnU-Net's)"
    )
    add("--peer", default="", metavar="'COMMAND'", help=text)
    add("--rehearse", action="store_true", help="on the CPU, with volumes of 8 slices of 64x64")


def run(options: argparse.Namespace) -> int:
    """Run it; 0 if everything was measured, 1 if something was not, 2 without a GPU."""
    deadline = time.monotonic() + 60 * options.minutes - _SECONDS_TO_END
    with contextlib.nullcontext(NO_GPU) if options.rehearse else open_gpu(None) as gpu:
        return measure(gpu, options, deadline) if options.rehearse or gpu.device else 2


def measure(gpu: Gpu, options: argparse.Namespace, deadline: float) -> int:
    """Run the stages and write the page; return the exit code."""
    options.report.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(gpu)
    name = re.sub(r"[^a-z0-9]+", "-", (machine["gpu"] or "rehearsal").lower()).strip("-")
    page = options.report / f"gpu-{name}.md"
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(gpu, Path(folder), options.report, deadline, options.peer)

        def write() -> None:
            content = json.dumps({"machine": machine, **sweep.result})
            write_atomically(page.with_suffix(".json"), content)
            write_atomically(page, markdown(machine, sweep.result))

        gpu.read_idle()
        if options.cts:
            shutil.copytree(options.cts, sweep.folder / "cts")
        stages = (sweep.volumes, sweep.one_process, sweep.cold_cases, sweep.warm_folder)
        sweep.run(stages, write)
    show(page.read_text(encoding="utf-8"))
    return 1 if sweep.result["not measured"] else 0

"""Measure whatever only a GPU can tell, and end by the clock.

In the order of what they are worth: labels against the CPU's, the network alone, and the choices
of `inference.prediction.Predictor` (`gpu_stages`, one process); cold cases of the service, the
plain pipeline and a peer (`benchmark efficiency --command`); a folder in one process. An error
costs its own measurement, and what the time does not allow is named. This process itself never uses
the device.

In the report's folder, written after each stage: gpu-CARD.md, the page; gpu-CARD.json, its figures
and every sample of the cold cases; and as they come gpu_stages.jsonl, what the one process prints.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np

from benchmark.containers.environment import describe_machine
from benchmark.containers.gpu import open_gpu
from benchmark.options import not_negative
from benchmark.speed.gpu_page import SECTIONS, markdown
from benchmark.text import log, show
from inference.files import write_atomically
from inference.network.weights import SLIM, WEIGHTS
from inference.phases import LOG_VARIABLE
from synthetic.phantom import draw_phantom, write_nifti

FULL_SIZE, PAPER_SIZE = "full-size.safetensors", "paper.safetensors"
"""Weights that `gpu_stages` writes: 64 channels at reduction 2, and the paper's own network."""

STAGES = ("rates", "labels", "network", "choices")
"""Of `gpu_stages`, in their order."""

_ROOT = Path(__file__).parents[2]

_SPACING = (2.5, 0.78, 0.78)

_VOLUMES = 8  # in the folder that one process segments

_CASE_SECONDS = 75  # after which a cold case is ended

_SECONDS_TO_END = 6  # of the time: for ending a process and writing the page


def tiled(volume: np.ndarray, slices: int) -> np.ndarray:
    """Return a volume of more slices: forward, backward, forward, so that no step shows."""
    pair = np.concatenate([volume, volume[::-1]])
    return np.resize(pair, (slices, *volume.shape[1:]))


def memory_of(run: dict) -> dict[str, float | None]:
    """Return peak (MB) and both areas (MB·s) of a result of `efficiency`, or None if not read.

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


class Sweep:
    """The stages, one after another, until the time is over.

    Args:
        options: of the command line.
        folder: for volumes, weights and outputs.
        deadline: on `time.monotonic`'s clock.
        result: a list for each of `SECTIONS`, and of `runs` and `seconds`.
    """

    def __init__(
        self, options: argparse.Namespace, folder: Path, deadline: float, result: dict
    ) -> None:
        self.options, self.folder, self.deadline, self.result = options, folder, deadline, result
        self.device, self.slices, self.size = ("cuda", 200, 512)
        if options.rehearse:
            self.device, self.slices, self.size = ("cpu", 8, 64)

    def follow(self, *command: object, seconds: float, out: Path | None = None, **more: str) -> str:
        """Run a module of the project until it ends, or its time or the sweep's is over.

        Args:
            command: the module and its options.
            seconds: at most.
            out: file for what it prints.
            more: environment beside this process's own.

        Returns:
            Why it did not end well, or "".
        """
        limit = max(1.0, min(seconds, self.deadline - time.monotonic()))
        # `timeout` sends SIGTERM, at which a module ends what it has started, before SIGKILL.
        words = ["timeout", "-k", _SECONDS_TO_END, limit, sys.executable, "-m", *command]
        with (out or self.folder / "printed").open("wb") as printed:
            streams = {"stdout": printed, "stderr": subprocess.PIPE}
            environment = {**os.environ, **more}
            ended = subprocess.run(
                list(map(str, words)), cwd=_ROOT, env=environment, check=False, **streams
            )
        if ended.returncode in (124, 137):
            return "the time was over"
        last = (ended.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        return f"exit code {ended.returncode}: {last}" if ended.returncode else ""

    def missed(self, what: str, why: str) -> None:
        """Name something that could not be measured."""
        self.result["not measured"].append({"what": what, "why": why or "unknown"})

    def draw(self) -> None:
        """Write the volumes: an eighth of the slices drawn, and tiled."""
        slices, size = self.slices, self.size
        drawn = draw_phantom((max(2, slices // 8), size, size), _SPACING, seed=0).volume
        for name, length in (("short", slices // 2), ("middle", slices), ("long", slices * 5 // 2)):
            write_nifti(self.folder / f"{name}.nii.gz", tiled(drawn, length), _SPACING)

    def one_process(self) -> None:
        """Run `gpu_stages`."""
        out = self.options.report / "gpu_stages.jsonl"
        module = "benchmark.speed.gpu_stages"
        why = self.follow(module, self.folder, self.device, seconds=80, out=out)
        whole = out.read_text(encoding="utf-8").rpartition("\n")[0]
        for line in map(json.loads, whole.splitlines()):
            self.result[line.pop("stage")].append(line)
        ended = {line["what"] for line in self.result["seconds"]}
        for stage in STAGES:
            if why and stage not in ended:
                self.missed(f"{stage}, or part of it", why)

    def cold(self, cases: list[tuple[str, str, str]], seconds: float) -> None:
        """Measure cold cases by one `benchmark efficiency`, where each has a command of its own.

        Args:
            cases: (name, volume, command), the command with {inputs} and {outputs}.
            seconds: at most, for all of them.
        """
        work = Path(tempfile.mkdtemp(dir=self.folder))
        (work / "inputs").mkdir()
        for number, (_, volume, command) in enumerate(cases, 10):
            (work / f"inputs/{number}_0000.nii.gz").hardlink_to(self.folder / f"{volume}.nii.gz")
            script = command.replace("{inputs}", '"$1"').replace("{outputs}", '"$2"')
            (work / f"{number}.sh").write_text(f"exec {script}\n", encoding="utf-8")
        case = "$(basename {inputs}/*_0000.nii.gz _0000.nii.gz)"
        options = {
            "--inputs": work / "inputs",
            "--outputs": work / "outputs",
            "--report": work / "report",
            "--command": f"sh {work}/{case}.sh {{inputs}} {{outputs}}",
            "--timeout": _CASE_SECONDS,
        }
        words = itertools.chain.from_iterable(options.items())
        why = self.follow("benchmark", "efficiency", *words, seconds=seconds)
        first: dict[tuple, np.ndarray] = {}
        for number, (name, volume, _) in enumerate(cases, 10):
            file = work / f"report/efficiency/{number}.json"
            if not file.is_file():
                self.missed(name, why)
                continue
            run = json.loads(file.read_text(encoding="utf-8"))
            self.result["runs"].append({"what": name, **run})
            if run["status"] != "ok":
                self.missed(name, f"{run['status']}: {run['reason']}")
                continue
            labels = np.asanyarray(nibabel.load(work / f"outputs/{number}.nii.gz").dataobj)
            alike = first.setdefault((volume, name.split(", ")[1]), labels)
            line = {"what": name, "slices": run["image_size"][2], "time (s)": run["seconds"]}
            line |= memory_of(run) | {"RAM (MB)": run["max_ram_mb"]}
            line["voxels unlike the first"] = int((labels != alike).sum())
            self.result["cold cases"].append(line)

    def warm_folder(self) -> None:
        """Segment a folder of volumes in one process of the service."""
        inputs, log = self.folder / "many", self.folder / "phases.jsonl"
        inputs.mkdir()
        for number in range(_VOLUMES):
            (inputs / f"{number}_0000.nii.gz").hardlink_to(self.folder / "middle.nii.gz")
        words = ["--quiet", "--device", self.device, "--input", inputs]
        words += ["--output", self.folder / "many-out", "--weights", self.folder / PAPER_SIZE]
        if why := self.follow("inference", *words, seconds=40, **{LOG_VARIABLE: str(log)}):
            self.missed("warm folder", why)
            return
        phases = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        written = sorted(phase["end"] for phase in phases if phase["phase"] == "write")
        rate = (len(written) - 1) / (written[-1] - written[0])
        self.result["warm folder"].append({"what": "volumes a second", "rate": rate})

    def case(self, program: str, network: Path, volume: str = "middle") -> tuple[str, str, str]:
        """Return a cold case of the service or the plain pipeline, for `cold`."""
        module = {"service": "inference --quiet", "plain pipeline": "benchmark plain-pipeline"}
        command = f"{sys.executable} -m {module[program]} --device {self.device}"
        command += f" --weights '{network}' --input {{inputs}} --output {{outputs}}"
        return f"{program}, {network.stem}", volume, command

    def stages(self) -> dict[str, Callable[[], None]]:
        """Return the stages by name, what is worth most first."""
        paper, full, slim = self.folder / PAPER_SIZE, self.folder / FULL_SIZE, WEIGHTS / SLIM
        cases = [
            self.case("service", paper),
            self.case("plain pipeline", paper),
            *([("peer, its own", "middle", self.options.peer)] if self.options.peer else []),
            self.case("service", full),
            self.case("service", slim),
            self.case("service", paper, "short"),
            self.case("service", paper, "long"),
        ]
        return {
            "volumes": self.draw,
            "one process": self.one_process,
            "cold cases": lambda: self.cold(cases, 170),
            "warm folder": self.warm_folder,
        }

    def run(self, stages: dict[str, Callable[[], None]], write: Callable[[], None]) -> None:
        """Run stages as long as there is time; `write` is called after each."""
        for name, stage in stages.items():
            started = time.monotonic()
            try:
                if started > self.deadline:
                    self.missed(name, "the time was over")
                else:
                    stage()
            except Exception as error:  # the stages after it must not suffer
                self.missed(name, f"{type(error).__name__}: {' '.join(str(error).split())}")
            seconds = time.monotonic() - started
            self.result["seconds"].append({"what": name, "seconds": seconds})
            log(f"{name}: {seconds:.1f} s")
            write()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmark gpu-sweep`."""
    add = parser.add_argument
    add("--report", type=Path, required=True, metavar="DIR")
    text = "at most (default: %(default)s)"
    add("--minutes", type=not_negative, default=4, metavar="M", help=text)
    text = "real CTs NAME_0000.nii.gz to compare labels on"
    add("--cts", type=Path, metavar="DIR", help=text)
    text = (
        "another predictor to measure on one cold case, with {inputs} and {outputs} for the "
        "folders (benchmark/results/peers/peers.md has nnU-Net's)"
    )
    add("--peer", metavar="'COMMAND'", help=text)
    add("--rehearse", action="store_true", help="on the CPU, with volumes of 8 slices of 64x64")


def run(options: argparse.Namespace) -> int:
    """Run it.

    Returns:
        0 if everything was measured, 1 if something was not, 2 without a GPU.
    """
    deadline = time.monotonic() + 60 * options.minutes - _SECONDS_TO_END
    gpu, note = (None, "rehearsal") if options.rehearse else open_gpu(None)
    if gpu is None and not options.rehearse:
        return 2
    machine = describe_machine(gpu, note)
    if gpu:
        gpu.close()
    options.report.mkdir(parents=True, exist_ok=True)
    card = re.sub(r"[^a-z0-9]+", "-", (machine["gpu"] or note).lower()).strip("-")
    page = options.report / f"gpu-{card}.md"
    result = {"machine": machine, **{name: [] for name in (*SECTIONS, "runs", "seconds")}}

    def write() -> None:
        write_atomically(page.with_suffix(".json"), json.dumps(result).encode())
        write_atomically(page, markdown(result).encode())

    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(options, Path(folder), deadline, result)
        if options.cts:
            shutil.copytree(options.cts, sweep.folder / "cts")
        sweep.run(sweep.stages(), write)
    show(markdown(result))
    return 1 if result["not measured"] else 0

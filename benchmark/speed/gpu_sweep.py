"""Every figure that needs a GPU, in one call of under 8 minutes, as one Markdown page.

NOT YET RUN ON A GPU: written on a machine without one. Its tables and arithmetic are tested on
known numbers and its parts were run on a CPU; the first run on a card may need repair.

The full-size network (seeded random weights unless a file is given) segments synthetic volumes of
512x512x100, 200 and 500. Cold cases of the service and of the plain pipeline are measured by
`python -m benchmark efficiency --command`, one process a case; the network alone by
`python -m benchmark network-speed --sweep`; a warm folder by the service's own phase log. This
process itself never touches the device. Every stage stands on its own: whatever goes wrong costs
that stage, and the page and the raw results beside it are written after each. What the time no
longer allows is left out, and the page says so. It is long because the stages share one clock, one
folder of volumes and one result.
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmark.containers.environment import describe_machine
from benchmark.containers.gpu import Gpu, GpuUnavailable
from benchmark.options import odd_count
from benchmark.speed.gpu_page import BATCH_SIZES, LONG, MIDDLE, SHORT, SIZE, markdown, warm_rate
from inference.choices import CHOICES_VARIABLE, CudaChoices
from inference.files import write_atomically
from inference.phases import LOG_VARIABLE
from synthetic.phantom import draw_phantom, write_nifti

_ROOT = Path(__file__).parents[2]

_DEVICE = "cuda"

_SPACING = (2.5, 0.78, 0.78)

_FOLDER = 8  # volumes of 200 slices in the warm folder

_SWEEP_MEMORY_MB = 16000  # so that no batch of BATCH_SIZES is halved


class StageError(RuntimeError):
    """A stage could not be measured; the message says why, in one line."""


def tiled(volume: np.ndarray, slices: int) -> np.ndarray:
    """A volume of more slices: forward, backward, forward and so on, so that no step shows."""
    pair = np.concatenate([volume, volume[::-1]])
    return np.resize(pair, (slices, *volume.shape[1:]))


class _Sweep:
    """The measurements, one after another, as long as there is time.

    Args:
        gpu: NVML's number of the device.
        folder: for volumes, weights and outputs.
        weights: safetensors file.
        deadline: on `time.monotonic`'s clock.
    """

    def __init__(self, gpu: int, folder: Path, weights: Path, deadline: float) -> None:
        self.gpu, self.folder, self.weights, self.deadline = gpu, folder, weights, deadline
        self.environment = {
            **os.environ,
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": str(gpu),
        }

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def volume(self, slices: int) -> Path:
        return self.folder / f"inputs{slices}" / f"slices{slices}_0000.nii.gz"

    def draw(self) -> None:
        """Write the volumes."""
        first = draw_phantom((SHORT, SIZE, SIZE), _SPACING, seed=0).volume
        for slices in (SHORT, MIDDLE, LONG):
            self.volume(slices).parent.mkdir()
            write_nifti(self.volume(slices), tiled(first, slices), _SPACING)

    def service_command(self, *options: str, choices: str = "") -> str:
        command = (sys.executable, "-m", "inference", "--quiet", "--device", _DEVICE)
        changed = ("env", f"{CHOICES_VARIABLE}={choices}") if choices else ()
        return shlex.join([*changed, *command, "--weights", str(self.weights), *options])

    def plain_command(self) -> str:
        command = (sys.executable, "-m", "benchmark", "plain-pipeline", "--device", _DEVICE)
        return shlex.join([*command, "--weights", str(self.weights)])

    def run(self, *command: str, printed: Path | None = None, **environment: str) -> str:
        """Run a module of the project to its end and hand back what it prints.

        Args:
            command: the module and its options.
            printed: a file that takes what it prints as it comes, which is handed back then too.
            environment: beside this process's own.
        """
        printed = printed or self.folder / "printed"
        try:
            with printed.open("w", encoding="utf-8") as output:
                ended = subprocess.run(
                    [sys.executable, "-m", *command],
                    cwd=_ROOT,
                    env={**self.environment, **environment},
                    stdout=output,
                    stderr=subprocess.PIPE,
                    encoding="utf-8",
                    errors="replace",
                    timeout=max(1.0, self.left()),
                    check=False,
                )
        except subprocess.TimeoutExpired as error:
            raise StageError(f"{' '.join(command[:2])} did not end in time") from error
        if ended.returncode:
            lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
            raise StageError(f"{' '.join(command[:2])}: {lines[-1]}")
        return printed.read_text(encoding="utf-8")

    def cold(self, command: str, slices: int, repeat: int) -> list[dict]:
        """Cold cases through `benchmark efficiency`: a result for each repetition.

        A command that does not name the folders takes them as the service does.
        """
        if "{inputs}" not in command:
            command += " --input {inputs} --output {outputs}"
        with tempfile.TemporaryDirectory(dir=self.folder) as work:
            report = Path(work) / "report"
            options = {
                "--inputs": self.volume(slices).parent,
                "--outputs": Path(work) / "outputs",
                "--report": report,
                "--command": command,
                "--gpu": self.gpu,
                "--repeat": repeat,
                # It ends its cases itself, so that none outlives it.
                "--timeout": max(1.0, self.left() / repeat),
            }
            words = [str(word) for option in options.items() for word in option]
            ended = subprocess.run(
                [sys.executable, "-m", "benchmark", "efficiency", "--phases", *words],
                cwd=_ROOT,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                check=False,
            )
            results = [
                json.loads(path.read_text(encoding="utf-8"))
                for path in (report / "efficiency").glob("*.json")
            ]
            if not results:
                lines = ended.stderr.strip().splitlines()
                raise StageError(lines[-1] if lines else f"exit code {ended.returncode}")
            for result in results:
                if result["status"] != "ok":
                    raise StageError(f"{result['status']}: {result['reason']}")
            return results

    def warm(self) -> dict:
        """A folder of volumes through one process of the service."""
        inputs, log = self.folder / "many", self.folder / "phases.jsonl"
        inputs.mkdir()
        for number in range(_FOLDER):
            (inputs / f"volume{number}_0000.nii.gz").hardlink_to(self.volume(MIDDLE))
        options = ("--input", str(inputs), "--output", str(self.folder / "many-out"))
        command = shlex.split(self.service_command(*options))[2:]
        self.run(*command, **{LOG_VARIABLE: str(log)})
        phases = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        return {"volumes": _FOLDER, **warm_rate(phases)}

    def network(self, result: dict) -> None:
        """The network alone; what it had measured before it failed counts."""
        command = ("benchmark", "network-speed", "--sweep", "--device", _DEVICE)
        printed = self.folder / "network.jsonl"
        try:
            self.run(*command, "--weights", str(self.weights), printed=printed)
        finally:
            # A line that was being printed when it was ended has no end.
            lines = [
                line
                for line in printed.read_text(encoding="utf-8").splitlines(True)
                if line.endswith("\n")
            ]
            if lines:
                result["network"] = json.loads(lines[-1])

    def speed(self) -> str:
        """`benchmark speed`, once."""
        command = ("benchmark", "speed", "--device", _DEVICE, "--repeat", "1")
        options = ("--input", str(self.volume(SHORT)), "--weights", str(self.weights))
        return self.run(*command, *options)


def save_random_weights(path: Path, base_channels: int = 64) -> None:
    """Write seeded random weights of the network; nothing is computed on a device."""
    import torch

    from inference.model import AttentionUNet
    from inference.weights import WeightsMetadata, save_weights

    torch.manual_seed(0)
    network = AttentionUNet(base_channels=base_channels)
    metadata = WeightsMetadata(
        base_channels=base_channels,
        num_classes=15,
        intensity_mean=70.0,
        intensity_std=141.0,
        trained_on="nothing: seeded random weights, to measure speed",
        licence="MIT",
        date="2026-01-01",
        revision="random",
    )
    save_weights(path, network.state_dict(), metadata)


def _measure(
    sweep: _Sweep,
    result: dict,
    repeat: int,
    write: Callable[[dict], None],
    peers: dict[str, str] | None = None,
) -> None:
    """Run every stage, what matters most first; `write` is called after each."""

    def cold(name: str, key: str, command: str, slices: int, runs: int) -> Callable[[], None]:
        def stage() -> None:
            result[name][key] = sweep.cold(command, slices, runs)

        return stage

    def single(name: str, measure: Callable[[], object]) -> Callable[[], None]:
        def stage() -> None:
            result[name] = measure()

        return stage

    service, plain = sweep.service_command(), sweep.plain_command()
    # Name, the seconds that must be left to begin it, what to do.
    version = ("benchmark", "network-speed", "--version")
    stages = [
        ("torch", 10, single("torch", lambda: sweep.run(*version).strip())),
        ("volumes", 30, sweep.draw),
    ]
    for slices in (MIDDLE, SHORT, LONG):
        stage = cold("service", str(slices), service, slices, repeat)
        stages.append((f"service, {slices} slices", 30, stage))
    stages.append((f"plain, {MIDDLE} slices", 60, cold("plain", str(MIDDLE), plain, MIDDLE, 1)))
    for name, command in (peers or {}).items():
        stages.append((f"peer {name}", 60, cold("peers", name, command, MIDDLE, 1)))
    stages.append(("network alone", 30, lambda: sweep.network(result)))
    stages.append(("warm folder", 30, single("folder", sweep.warm)))
    for batch in BATCH_SIZES:
        options = ("--batch-size", str(batch), "--gpu-memory", str(_SWEEP_MEMORY_MB))
        stage = cold("batches", str(batch), sweep.service_command(*options), MIDDLE, 1)
        stages.append((f"batch size {batch}", 10, stage))
    for name, chosen in dataclasses.asdict(CudaChoices()).items():
        command = sweep.service_command(choices=f"{name}={int(not chosen)}")
        stage = cold("choices", name, command, MIDDLE, repeat)
        stages.append((f"{name} {'off' if chosen else 'on'}", 20, stage))
    for slices, seconds in ((SHORT, 30), (LONG, 120)):
        stage = cold("plain", str(slices), plain, slices, 1)
        stages.append((f"plain, {slices} slices", seconds, stage))
    stages.append(("speed", 60, single("speed", sweep.speed)))

    for name, seconds, stage in stages:
        if sweep.left() < seconds:
            result["left_out"][name] = f"{max(0.0, sweep.left()):.0f} s were left"
            write(result)
            continue
        started = time.monotonic()
        try:
            stage()
        except Exception as error:  # the stages after it must not suffer
            what = "" if isinstance(error, StageError) else f"{type(error).__name__}: "
            result["left_out"][name] = what + " ".join(str(error).split())
        print(f"{name}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
        write(result)


def _named_command(text: str) -> tuple[str, str]:
    name, _, command = text.partition("=")
    if not name or "{inputs}" not in command or "{outputs}" not in command:
        raise argparse.ArgumentTypeError(
            f"not NAME=COMMAND with {{inputs}} and {{outputs}} in the command: {text}"
        )
    return name, command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmark gpu-sweep`."""
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE.safetensors",
        help="(default: seeded random weights of the full size)",
    )
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="device (default: 0)")
    parser.add_argument(
        "--minutes", type=float, default=7.5, metavar="M", help="at most (default: %(default)s)"
    )
    parser.add_argument(
        "--repeat", type=odd_count, default=3, metavar="K", help="of the service's cold cases"
    )
    parser.add_argument(
        "--peer",
        type=_named_command,
        action="append",
        default=[],
        metavar="NAME='COMMAND'",
        help="another predictor, measured on one cold case of 200 slices; {inputs} and {outputs} "
        "stand for the folders (benchmark/results/peers/peers.md has nnU-Net's; may be repeated)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        default=_ROOT / "benchmark" / "results",
        metavar="DIR",
        help="where gpu-CARD.md and gpu-CARD.json go (default: benchmark/results)",
    )


def run(options: argparse.Namespace) -> int:
    """Run it.

    Returns:
        0 if everything was measured, 1 if something had to be left out, 2 without a GPU.
    """
    started = time.monotonic()
    try:
        gpu = Gpu(options.gpu)
    except (GpuUnavailable, IndexError) as error:
        print(f"benchmark gpu-sweep: it needs a GPU: {error}", file=sys.stderr)
        return 2
    machine = describe_machine(gpu, None)
    gpu.close()
    if options.weights and not options.weights.is_file():
        print(f"benchmark gpu-sweep: --weights {options.weights}: no such file", file=sys.stderr)
        return 2
    options.report.mkdir(parents=True, exist_ok=True)
    card = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    page = options.report / f"gpu-{card}.md"

    with tempfile.TemporaryDirectory() as folder:
        weights = options.weights
        if weights is None:
            weights = Path(folder) / "random.safetensors"
            save_random_weights(weights)
        result = {
            "machine": machine,
            "weights": options.weights.name if options.weights else "seeded random, full size",
            **dict.fromkeys(("torch", "speed"), ""),
            **{name: {} for name in ("service", "plain", "peers", "batches", "choices")},
            **{name: {} for name in ("folder", "network")},
            "left_out": {},
        }
        deadline = started + 60 * options.minutes
        sweep = _Sweep(options.gpu, Path(folder), weights.resolve(), deadline)

        def write(result: dict) -> None:
            write_atomically(page.with_suffix(".json"), json.dumps(result).encode())
            write_atomically(page, markdown(result).encode())

        _measure(sweep, result, options.repeat, write, dict(options.peer))
    print(page.read_text(encoding="utf-8"))
    return 1 if result["left_out"] else 0

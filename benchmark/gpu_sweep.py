"""Every figure that needs a GPU, in one call of under 8 minutes, as one Markdown page.

NOT YET RUN ON A GPU: written on a machine without one. Its tables and arithmetic are tested on
known numbers and its parts were run on a CPU; the first run on a card may need repair.

The full-size network (seeded random weights unless a file is given) segments synthetic volumes of
512x512x100, 200 and 500. Cold cases of the service and of the plain pipeline are measured by
`python -m benchmark efficiency --command`, one process a case; the network alone by
`benchmark.network_speed --sweep`; a warm folder by the service's own phase log. This process
itself never touches the device. What the time no longer allows is left out, and the page says so.
"""

import argparse
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

from benchmark.environment import describe_machine
from benchmark.phantom import draw_phantom, write_nifti
from benchmark.sampler import Gpu, GpuUnavailable, true_area
from inference.phases import LOG_VARIABLE
from inference.volume import write_atomically

SHORT, MIDDLE, LONG = 100, 200, 500
"""Slices of the volumes, 512x512 each."""

BATCH_SIZES = (1, 2, 4, 8, 16)
"""Tried in whole cold cases."""

_ROOT = Path(__file__).parents[1]
_DEVICE = "cuda"
_SPACING = (2.5, 0.78, 0.78)
_SIZE = 512
_FOLDER = 8  # volumes of 200 slices in the warm folder
_SWEEP_MEMORY_MB = 16000  # so that no batch of BATCH_SIZES is halved


class StageError(RuntimeError):
    """A stage could not be measured; the message says why, in one line."""


def tiled(volume: np.ndarray, slices: int) -> np.ndarray:
    """A volume of more slices: forward, backward, forward and so on, so that no step shows."""
    pair = np.concatenate([volume, volume[::-1]])
    return np.resize(pair, (slices, *volume.shape[1:]))


def held_after_network(run: dict) -> float:
    """Area under the device memory that a process holds when its network has ended, MB·s.

    What a short-lived GPU process could save at most. The idle device's own memory is taken away.

    Args:
        run: one result of `benchmark.efficiency`, with phases.
    """
    end = max(phase["end_s"] for phase in run["phases"] if phase["phase"] == "predict")
    samples = run["samples"]
    later = [
        (second, used - run["idle_gpu_mb"])
        for second, used in zip(samples["time_s"], samples["gpu_used_mb"], strict=True)
        if second >= end
    ]
    return true_area(*map(list, zip(*later, strict=True))) if len(later) > 1 else 0.0


def warm_rate(phases: list[dict]) -> dict[str, float]:
    """Throughput of a folder from its first label map on.

    Args:
        phases: of the service's phase log, of two cases or more.

    Returns:
        `volumes_per_s`, and `network_share`: of that time, how much the network ran.
    """
    written = sorted(phase["end"] for phase in phases if phase["phase"] == "write")
    first, last = written[0], written[-1]
    network = sum(
        max(0.0, min(phase["end"], last) - max(phase["start"], first))
        for phase in phases
        if phase["phase"] == "predict"
    )
    return {
        "volumes_per_s": (len(written) - 1) / (last - first),
        "network_share": network / (last - first),
    }


def _median(runs: list[dict]) -> dict:
    return sorted(runs, key=lambda run: run["seconds"])[(len(runs) - 1) // 2]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|" + "---|" + "---:|" * (len(head) - 1),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def _aims(result: dict) -> list[tuple[str, str, str, str]]:
    """Rows (figure, aim, reached, met or not) for what has been measured."""
    rows = []

    def add(figure: str, aim: str, value: float, form: str, met: bool) -> None:
        rows.append((figure, aim, form.format(value), "yes" if met else "**no**"))

    service, plain = (
        result[name].get(str(MIDDLE)) and _median(result[name][str(MIDDLE)])
        for name in ("service", "plain")
    )
    if service and plain:
        ratio = plain["seconds"] / service["seconds"]
        add("cold, 200 slices: time, plain / service", "≥ 10", ratio, "{:.1f}", ratio >= 10)
        ratio = plain["auc_flare_mb_s"] / service["auc_flare_mb_s"]
        add("the same, GPU area", "≥ 20", ratio, "{:.1f}", ratio >= 20)
    if service:
        area, peak = service["auc_flare_mb_s"], service["peak_gpu_mb"]
        add("GPU area of the service (MB·s)", "< 3,000 on an H100", area, "{:,.0f}", area < 3000)
        add("peak GPU memory of the service (MB)", "< 2,048", peak, "{:,.0f}", peak < 2048)
    if result["folder"]:
        rate = result["folder"]["volumes_per_s"]
        add("warm folder, volumes of 200 slices a second", "≥ 1", rate, "{:.2f}", rate >= 1)
    if result["network"]:
        share = 100 * max(_shares(result["network"])["float16"])
        aim = "≥ 50 %"
        add("network, best share of the fp16 matrix rate", aim, share, "{:.0f} %", share >= 50)
    return rows


def _shares(network: dict) -> dict[str, list[float]]:
    """By type, each form's and batch size's share of the type's matrix rate."""
    shares = {}
    for run in network["runs"]:
        share = run["tflops"] / network["matrix_tflops"][run["dtype"]]
        shares.setdefault(run["dtype"], []).append(share)
    return shares


def _cold_row(name: str, slices: str, run: dict) -> tuple[str, ...]:
    return (
        f"{name}, {slices} slices",
        f"{run['seconds']:.2f}",
        f"{run['peak_gpu_mb']:,.0f}",
        f"{run['auc_flare_mb_s']:,.0f}",
        f"{run['auc_true_mb_s']:,.0f}",
        f"{held_after_network(run):,.0f}",
        f"{run['max_ram_mb']:,.0f}",
    )


def markdown(result: dict) -> str:
    """The page.

    Args:
        result: `machine` (of `describe_machine`), `torch`, `weights`, `service` and `plain` (slices
            as text: results of `benchmark.efficiency`), `batches` (batch size as text: the same),
            `folder` (of `warm_rate`, and `volumes`), `network` (of `network_speed --sweep`),
            `speed` (Markdown), `left_out` (stage: why). Empty where not measured.
    """
    machine = result["machine"]
    lines = [
        f"# {machine['gpu']}",
        "",
        f"- {machine['gpu']}, {machine['gpu_memory_mb']:,.0f} MB, driver {machine['driver']}; "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; {machine['date']}",
        f"- Python {machine['versions']['python']}, {result['torch']}; weights: "
        f"{result['weights']}",
        "- Made by `python -m benchmark.gpu_sweep`. Volumes are synthetic, 512×512; longer ones "
        "repeat the first 100 slices back and forth. Every run is a process of its own.",
        "- Random weights give every voxel nearly the same label: components and writing then cost "
        "both pipelines less than with trained ones.",
        *(f"- **Left out**: {stage}: {why}" for stage, why in result["left_out"].items()),
        "",
    ]
    aims = _aims(result)
    if aims:
        lines += ["## Aims", "", *_table(("figure", "aim", "reached", "met"), aims)]

    cold = [
        _cold_row(name, slices, _median(runs))
        for name in ("service", "plain")
        for slices, runs in result[name].items()
    ]
    if cold:
        head = (
            "one cold case", "time (s)", "peak GPU (MB)", "GPU area, official (MB·s)",
            "true area (MB·s)", "of it held after the network (MB·s)", "RAM (MB)",
        )  # fmt: skip
        lines += ["## Cold cases", "", *_table(head, cold)]
    if result["batches"]:
        rows = [
            (batch, f"{run['seconds']:.2f}", f"{run['peak_gpu_mb']:,.0f}",
             f"{run['auc_flare_mb_s']:,.0f}")
            for batch, (run, *_) in result["batches"].items()
        ]  # fmt: skip
        head = ("batch size", "time (s)", "peak GPU (MB)", "GPU area, official (MB·s)")
        lines += ["## Batch size, one cold case of 200 slices", "", *_table(head, rows)]
    if result["folder"]:
        folder = result["folder"]
        lines += [
            "## Warm folder",
            "",
            f"{folder['volumes']} volumes of 200 slices in one process: "
            f"{folder['volumes_per_s']:.2f} volumes a second once the first is written; the "
            f"network runs {100 * folder['network_share']:.0f} % of that time.",
            "",
        ]
    if result["network"]:
        lines += _network_lines(result["network"])
    if result["speed"]:
        lines += ["## Service against plain pipeline by stage", "", result["speed"]]
    return "\n".join(lines).rstrip() + "\n"


def _network_lines(network: dict) -> list[str]:
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in network["matrix_tflops"].items())
    rows = [
        (
            f"{run['dtype']}, upsampling {'merged' if run['merges_upsampling'] else 'apart'}, "
            f"batch of {run['batch_size']}{', cuDNN search' if run['searches'] else ''}",
            f"{run['ms']:.2f}",
            f"{run['tflops']:.0f}",
            f"{100 * run['tflops'] / network['matrix_tflops'][run['dtype']]:.0f} %",
            f"{run['peak_mb']:,.0f}" if run["peak_mb"] is not None else "",
            f"{run['widths']:.1f}" if run["widths"] is not None else "",
        )
        for run in network["runs"]
    ]
    context = network["context_mb"]
    return [
        "## The network alone",
        "",
        f"- Matrix products of 8192×8192, TFLOP/s: {rates}.",
        f"- The CUDA context with its first kernel takes {context or 0:,.0f} MB; a batch for "
        f"2,000 MB is {network['default_batch_size']} slices.",
        f"- GFLOP a slice: {network['gflop']['plain']:.1f} plain, "
        f"{network['gflop']['apart']:.1f} folded, {network['gflop']['merged']:.1f} with merged "
        "upsampling. TFLOP/s count what a form itself does.",
        "",
        *_table(
            ("form", "ms a slice", "TFLOP/s", "of the matrix rate", "peak (MB)", "widths a pixel"),
            rows,
        ),
    ]


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
        first = draw_phantom((SHORT, _SIZE, _SIZE), _SPACING, seed=0).volume
        for slices in (SHORT, MIDDLE, LONG):
            self.volume(slices).parent.mkdir()
            write_nifti(self.volume(slices), tiled(first, slices), _SPACING)

    def service_command(self, *options: str) -> str:
        command = (sys.executable, "-m", "inference", "--quiet", "--device", _DEVICE)
        return shlex.join([*command, "--weights", str(self.weights), *options])

    def plain_command(self) -> str:
        command = (sys.executable, "-m", "benchmark.plain_pipeline", "--device", _DEVICE)
        return shlex.join([*command, "--weights", str(self.weights)])

    def run(self, *command: str, **environment: str) -> str:
        """Run a module of the project to its end and hand back what it prints."""
        try:
            ended = subprocess.run(
                [sys.executable, "-m", *command],
                cwd=_ROOT,
                env={**self.environment, **environment},
                capture_output=True,
                text=True,
                timeout=max(1.0, self.left()),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise StageError(f"{command[0]} did not end in time") from error
        if ended.returncode:
            lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
            raise StageError(f"{command[0]}: {lines[-1]}")
        return ended.stdout

    def cold(self, command: str, slices: int, repeat: int) -> list[dict]:
        """Cold cases through `benchmark.efficiency`: a result for each repetition."""
        with tempfile.TemporaryDirectory(dir=self.folder) as work:
            report = Path(work) / "report"
            options = {
                "--inputs": self.volume(slices).parent,
                "--outputs": Path(work) / "outputs",
                "--report": report,
                "--command": f"{command} --input {{inputs}} --output {{outputs}}",
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
                text=True,
                check=False,
            )
            results = [
                json.loads(path.read_text()) for path in (report / "efficiency").glob("*.json")
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
        phases = [json.loads(line) for line in log.read_text().splitlines()]
        return {"volumes": _FOLDER, **warm_rate(phases)}

    def network(self) -> dict:
        """The network alone."""
        command = ("benchmark.network_speed", "--sweep", "--device", _DEVICE)
        return json.loads(self.run(*command, "--weights", str(self.weights)))

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


def _measure(sweep: _Sweep, result: dict, repeat: int, write: Callable[[dict], None]) -> None:
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
    stages = [("volumes", 30, sweep.draw)]
    for slices in (MIDDLE, SHORT, LONG):
        stage = cold("service", str(slices), service, slices, repeat)
        stages.append((f"service, {slices} slices", 30, stage))
    stages.append((f"plain, {MIDDLE} slices", 60, cold("plain", str(MIDDLE), plain, MIDDLE, 1)))
    stages.append(("network alone", 30, single("network", sweep.network)))
    stages.append(("warm folder", 30, single("folder", sweep.warm)))
    for batch in BATCH_SIZES:
        options = ("--batch-size", str(batch), "--gpu-memory", str(_SWEEP_MEMORY_MB))
        stage = cold("batches", str(batch), sweep.service_command(*options), MIDDLE, 1)
        stages.append((f"batch size {batch}", 10, stage))
    for slices, seconds in ((SHORT, 30), (LONG, 120)):
        stage = cold("plain", str(slices), plain, slices, 1)
        stages.append((f"plain, {slices} slices", seconds, stage))
    stages.append(("speed", 60, single("speed", sweep.speed)))

    for name, seconds, stage in stages:
        if sweep.left() < seconds:
            result["left_out"][name] = f"{max(0.0, sweep.left()):.0f} s were left"
            continue
        started = time.monotonic()
        try:
            stage()
        except StageError as error:
            result["left_out"][name] = str(error)
        print(f"{name}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
        write(result)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 if everything was measured, 1 if something had to be left out, 2 without a GPU.
    """
    started = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.gpu_sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
        "--repeat", type=int, default=3, metavar="K", help="of the service's cold cases"
    )
    parser.add_argument(
        "--report",
        type=Path,
        default=_ROOT / "benchmark" / "results",
        metavar="DIR",
        help="where gpu-CARD.md goes (default: benchmark/results)",
    )
    options = parser.parse_args(arguments)
    try:
        gpu = Gpu(options.gpu)
    except (GpuUnavailable, IndexError) as error:
        print(f"benchmark gpu_sweep: it needs a GPU: {error}", file=sys.stderr)
        return 2
    machine = describe_machine(gpu, None)
    gpu.close()
    if options.weights and not options.weights.is_file():
        print(f"benchmark gpu_sweep: --weights {options.weights}: no such file", file=sys.stderr)
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
            **{name: {} for name in ("service", "plain", "batches", "folder", "network")},
            "speed": "",
            "left_out": {},
        }
        deadline = started + 60 * options.minutes
        sweep = _Sweep(options.gpu, Path(folder), weights.resolve(), deadline)
        try:
            result["torch"] = sweep.run("benchmark.network_speed", "--version").strip()
            _measure(
                sweep,
                result,
                options.repeat,
                lambda result: write_atomically(page, markdown(result).encode()),
            )
        except StageError as error:
            print(f"benchmark gpu_sweep: {error}", file=sys.stderr)
            return 2
    print(page.read_text())
    return 1 if result["left_out"] else 0


if __name__ == "__main__":
    sys.exit(main())

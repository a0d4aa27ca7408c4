"""Compare the service's time with the plain pipeline's, stage by stage, on one volume.

Both run as whole processes, in turn, with the same weights on the same device; each logs its
phases. A second table adds the steps from the plain network to the service's one by one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import nibabel
import numpy as np

from benchmark.containers.environment import describe_machine
from inference.files import case_name, write_atomically
from inference.network.weights import DEMONSTRATION_WEIGHTS
from inference.phases import LOG_VARIABLE
from synthetic.phantom import draw_phantom, write_nifti

STAGES = {
    "read": "reading",
    "percentiles": "normalising",
    "predict": "network",
    "components": "components",
    "write": "writing",
}
"""Phase in the log: what the table calls it. The service normalises on the device, within
`predict`; its `percentiles` are what is left of normalising on the host."""

_ROOT = Path(__file__).parents[2]


class SpeedError(RuntimeError):
    """One of the two pipelines failed; the message is its last line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command line of `python -m benchmark speed`."""
    parser.add_argument(
        "--input", type=Path, metavar="FILE", help="a CT volume (default: a synthetic one)"
    )
    parser.add_argument(
        "--slices", type=int, default=50, metavar="N", help="of the synthetic one (default: 50)"
    )
    parser.add_argument(
        "--size", type=int, default=512, metavar="N", help="its rows and columns (default: 512)"
    )
    parser.add_argument("--weights", type=Path, default=DEMONSTRATION_WEIGHTS, metavar="FILE")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--repeat", type=int, default=3, metavar="K", help="runs of each, in turn (default: 3)"
    )
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="write speed.md and speed.json there"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure both pipelines and print the tables.

    Returns:
        0, 1 if one of them failed, 2 for wrong usage.
    """
    if arguments.input and not arguments.input.is_file():
        print(f"benchmark speed: --input {arguments.input}: no such file", file=sys.stderr)
        return 2
    if not arguments.weights.is_file():
        print(f"benchmark speed: --weights {arguments.weights}: no such file", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = _measure(arguments, Path(folder))
    except SpeedError as error:
        print(f"benchmark speed: {error}", file=sys.stderr)
        return 1
    page = markdown(result)
    print(page)
    if arguments.report:
        arguments.report.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.report / "speed.md", page.encode())
        write_atomically(arguments.report / "speed.json", json.dumps(result, indent=1).encode())
    return 0


def _measure(arguments: argparse.Namespace, folder: Path) -> dict:
    source = arguments.input
    if source is None:
        spacing = (2.5, 400 / arguments.size, 400 / arguments.size)
        shape = (arguments.slices, arguments.size, arguments.size)
        source = folder / "phantom_0000.nii.gz"
        write_nifti(source, draw_phantom(shape, spacing, seed=0).volume, spacing)
    common = ["--input", str(source), "--weights", str(arguments.weights)]
    common += [] if arguments.device == "auto" else ["--device", arguments.device]
    commands = {
        "plain": ["benchmark", "plain-pipeline", *common, "--output", str(folder / "plain")],
        "service": ["inference", "--quiet", *common, "--output", str(folder / "service")],
    }
    runs = {name: [] for name in commands}
    for number in range(arguments.repeat):
        for name, command in commands.items():
            runs[name].append(_timed(command, folder / f"{name}.{number}.jsonl"))
            print(
                f"[{number + 1}/{arguments.repeat}] {name}: {runs[name][-1]['wall']:.2f} s",
                file=sys.stderr,
            )
    label_maps = [
        np.asanyarray(nibabel.load(folder / name / f"{case_name(source)}.nii.gz").dataobj)
        for name in commands
    ]
    shape = nibabel.load(source).shape
    # Last, for it uses the device from this process.
    from benchmark.speed.network_speed import measure_network

    return {
        "volume": list(shape),
        "weights": arguments.weights.name,
        "repeat": arguments.repeat,
        "seconds": {
            name: {
                phase: statistics.median(run[phase] for run in measured)
                for phase in ("wall", "start", *STAGES)
            }
            for name, measured in runs.items()
        },
        "label_agreement": float((label_maps[0] == label_maps[1]).mean()),
        "network": measure_network(arguments.weights, arguments.device, shape[1::-1]),
        "machine": describe_machine(None, None),
    }


def _timed(command: list[str], log: Path) -> dict[str, float]:
    """Return the seconds of a pipeline's process, before its first stage, and by phase."""
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=_ROOT,
        env={**os.environ, LOG_VARIABLE: str(log)},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    seconds = defaultdict(float, wall=time.monotonic() - started)
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
        raise SpeedError(f"{command[0]}: {lines[-1]}")
    phases = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    for phase in phases:
        seconds[phase["phase"]] += phase["end"] - phase["start"]
    ready = max(phase["end"] for phase in phases if phase["phase"] == "context")
    seconds["start"] = ready - started
    return seconds


def markdown(result: dict) -> str:
    """The two tables of a measurement, with what must be known to read them."""
    plain, service = result["seconds"]["plain"], result["seconds"]["service"]
    outside = [phase for phase in STAGES if phase != "predict"]
    rows = [("start: interpreter, imports, weights on the device", "start")]
    rows += [(name, phase) for phase, name in STAGES.items()]
    lines = [
        "| step | plain (s) | service (s) | ratio |",
        "|---|---:|---:|---:|",
        *(_row(name, plain[phase], service[phase]) for name, phase in rows),
        _row(
            "all but start and network",
            sum(plain[phase] for phase in outside),
            sum(service[phase] for phase in outside),
        ),
        _row("**whole process**", plain["wall"], service["wall"]),
        "",
        "| network, each step added to those before | ms a slice | ratio to plain |",
        "|---|---:|---:|",
    ]
    steps = result["network"]["steps"]
    lines += [f"| {name} | {ms:.1f} | {steps[0][1] / ms:.2f} |" for name, ms in steps]
    machine = result["machine"]
    matrix = "×".join(map(str, result["network"]["matrix"]))
    size = "×".join(map(str, result["volume"]))
    lines += [
        "",
        f"- {size} voxels, {result['weights']}, medians of {result['repeat']} runs in turn.",
        f"- The network's own matrix is {matrix}.",
        f"- {result['network']['device']}; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gb']} GB; {machine['date']}.",
        "- The service reads while torch is being imported, so its steps overlap and add up to "
        "more than the whole process.",
        f"- The label maps agree in {100 * result['label_agreement']:.4f} % of the voxels "
        "(fp32 against the service's precision).",
    ]
    if result["network"]["device"] != "CPU":
        lines.append("- The plain pipeline is fp32 as torch computes it: with TF32 where it can.")
    return "\n".join(lines) + "\n"


def _row(name: str, plain: float, service: float) -> str:
    return f"| {name} | {plain:.2f} | {service:.2f} | {plain / max(service, 1e-9):.1f} |"

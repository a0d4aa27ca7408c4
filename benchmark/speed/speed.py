"""Compare the service's time with the plain pipeline's, stage by stage, on one volume.

Both run as whole processes, in turn, with the same weights on the same device; each logs its
phases. A second table adds the steps from the plain network to the service's one by one.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from benchmark.containers.machine import describe_machine
from benchmark.containers.measurement import Case, Conditions, run_alone
from benchmark.containers.results import Result
from benchmark.containers.runner import Command
from benchmark.options import HarnessError, count
from benchmark.text import bullets, by, log, show, table
from inference.files import case_name, write_atomically
from inference.network.weights import DEMONSTRATION_WEIGHTS
from synthetic.phantom import draw_phantom, write_nifti

STAGES = {
    "read": "reading",
    "percentiles": "normalising",
    "predict": "network",
    "components": "components",
    "write": "writing",
}
"""Names in the table of the phases in the log. The service normalises on the device, within
`predict`; its `percentiles` are the part of it on the host."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command line of `python -m benchmark speed`."""
    add = parser.add_argument
    add("--input", type=Path, metavar="FILE", help="a CT volume (default: a synthetic one)")
    add("--slices", type=count, default=50, metavar="N", help="of the synthetic one (default: 50)")
    text = "its rows and columns (default: 512)"
    add("--size", type=count, default=512, metavar="N", help=text)
    text = "of both (default: the demonstration's)"
    add("--weights", type=Path, default=DEMONSTRATION_WEIGHTS, metavar="FILE", help=text)
    text = "of both (default: cuda where there is one)"
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help=text)
    add("--repeat", type=count, default=3, metavar="K", help="runs of each, in turn (default: 3)")
    add("--report", type=Path, metavar="DIR", help="write speed.md and speed.json there")


def run(arguments: argparse.Namespace) -> int:
    """Measure both pipelines and print the tables; HarnessError if one fails."""
    for option in ("input", "weights"):
        path = getattr(arguments, option)
        if path and not path.is_file():
            raise HarnessError(f"--{option} {path}: no such file")
    with tempfile.TemporaryDirectory() as folder:
        result = _measure(arguments, Path(folder))
    page = markdown(result)
    show(page)
    if arguments.report:
        arguments.report.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.report / "speed.md", page)
        write_atomically(arguments.report / "speed.json", json.dumps(result, indent=1))
    return 0


def _measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source = arguments.input
    if source is None:
        spacing = (2.5, 400 / arguments.size, 400 / arguments.size)
        shape = (arguments.slices, arguments.size, arguments.size)
        source = folder / "phantom_0000.nii.gz"
        write_nifti(source, draw_phantom(shape, spacing, seed=0).volume, spacing)
    size = nibabel.Nifti1Image.from_filename(source).shape
    case = Case(case_name(source), source, size)
    options = f" --input {{inputs}} --output {{outputs}} --weights '{arguments.weights.resolve()}'"
    options += "" if arguments.device == "auto" else f" --device {arguments.device}"
    modules = {"plain": "benchmark plain-pipeline", "service": "inference --quiet"}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in modules}
    labels: dict[str, np.ndarray] = {}
    for number in range(arguments.repeat):
        for name, module in modules.items():
            command = Command(f"exec {sys.executable} -m {module}{options}", "1000g", phases=True)
            places = (folder / "work", folder / "log")
            with run_alone(case, command, *places, Conditions()) as (result, _, label_map):
                if result["status"] != "ok":
                    raise HarnessError(f"{name}: {result['reason']}")
                image = nibabel.Nifti1Image.from_filename(label_map)
                labels[name] = np.asanyarray(image.dataobj)
            seconds[name].append(_by_phase(result))
            log(f"[{number + 1}/{arguments.repeat}] {name}: {result['seconds']:.2f} s")

    from benchmark.speed.network_speed import measure_network  # torch, for nothing before

    return {
        "volume": list(size),
        "weights": arguments.weights.name,
        "repeat": arguments.repeat,
        "seconds": {
            name: {
                phase: statistics.median(run[phase] for run in runs)
                for phase in ("wall", "start", *STAGES)
            }
            for name, runs in seconds.items()
        },
        "label_agreement": float((labels["plain"] == labels["service"]).mean()),
        "network": measure_network(arguments.weights, arguments.device, (size[1], size[0])),
        "machine": describe_machine(),
    }


def _by_phase(result: Result) -> dict[str, float]:
    """Return the seconds of a whole process, before its first stage, and by phase."""
    seconds = defaultdict(float, wall=result["seconds"])
    for phase in result["phases"]:
        seconds[phase["phase"]] += phase["end_s"] - phase["start_s"]
        if phase["phase"] == "context":
            seconds["start"] = phase["end_s"]
    return seconds


def markdown(result: dict[str, Any]) -> str:
    """Return the two tables of a measurement and what is needed to read them."""
    plain, service = result["seconds"]["plain"], result["seconds"]["service"]
    outside = [phase for phase in STAGES if phase != "predict"]
    names = {"start": "start: interpreter, imports, weights on the device", **STAGES}
    times = [(name, plain[phase], service[phase]) for phase, name in names.items()]
    ours, theirs = (sum(seconds[phase] for phase in outside) for seconds in (plain, service))
    times.append(("all but start and network", ours, theirs))
    times.append(("**whole process**", plain["wall"], service["wall"]))
    rows = [(name, f"{a:.2f}", f"{b:.2f}", f"{a / max(b, 1e-9):.1f}") for name, a, b in times]
    network, machine = result["network"], result["machine"]
    first = network["steps"][0][1]
    steps = [(name, f"{ms:.1f}", f"{first / ms:.2f}") for name, ms in network["steps"]]
    about = [
        f"{by(result['volume'])} voxels, {result['weights']}, medians of {result['repeat']} runs "
        "in turn.",
        f"The network's own matrix is {by(network['matrix'])}.",
        f"{network['device']}; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gb']} GB; {machine['date']}.",
        "The service reads while torch is being imported, so its steps overlap and add up to more "
        "than the whole process.",
        f"The label maps agree in {100 * result['label_agreement']:.4f} % of the voxels (fp32 "
        "against the service's precision).",
    ]
    if network["device"] != "CPU":
        about.append("The plain pipeline is fp32 as torch computes it: with TF32 where it can.")
    head = ("network, each step added to those before", "ms a slice", "ratio to plain")
    pipelines = table(("step", "plain (s)", "service (s)", "ratio"), "lrrr", rows)
    return "\n\n".join([pipelines, table(head, "lrr", steps), bullets(about)]) + "\n"

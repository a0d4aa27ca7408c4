"""The harness from its command line in a test: inputs, results, a stand-in for Docker."""

import contextlib
import csv
import json
import os
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import nibabel
import numpy as np
import psutil

from benchmark.__main__ import main
from benchmark.scoring.protocol import COLUMNS

ROOT = Path(__file__).parents[2]

AFFINE = np.diag([-0.8, -1.1, 2.5, 1.0])

COPY = 'cp {inputs}/* {outputs}/"$(basename {inputs}/* _0000.nii.gz)".nii.gz'
"""A command that writes a valid label map of its input."""


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def make_inputs(folder: Path, *names: str) -> Path:
    for name in names:
        save(folder / f"{name}_0000.nii.gz", np.zeros((6, 5, 4), np.int16))
    return folder


def blobs(seed: int, noise: float = 0.0) -> np.ndarray:
    """A label map of 14 overlapping boxes, some at the array's borders, and stray voxels."""
    shape, rng = (40, 36, 24), np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    for label in rng.permutation(np.arange(1, 15)):
        start = [rng.integers(-3, size - 3) for size in shape]
        stop = [first + rng.integers(4, 15) for first in start]
        labels[tuple(slice(max(a, 0), b) for a, b in zip(start, stop, strict=True))] = label
    stray = rng.random(shape) < noise
    labels[stray] = rng.integers(0, 15, stray.sum())
    return labels


class Done(NamedTuple):
    """What a run of the command line left behind."""

    code: int
    out: str
    err: str


def run_benchmark(*arguments: object, plots: bool = False, **environment: str) -> Done:
    """`python -m benchmark` in this process; unless asked for, plots take no time and are empty."""
    output, errors = StringIO(), StringIO()
    with (
        contextlib.nullcontext() if plots else mock.patch("matplotlib.figure.Figure.savefig"),
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            code = main([*map(str, arguments)])
        except SystemExit as usage:
            code = usage.code
    return Done(code, output.getvalue(), errors.getvalue())


def places(folder: Path, *names: str) -> list[object]:
    """Words of `efficiency` for cases in folder/in, label maps to folder/out, folder/run."""
    inputs = make_inputs(folder / "in", *names)
    return ["--inputs", inputs, "--outputs", folder / "out", "--report", folder / "run"]


def measure(folder: Path, names: str, *options: object, command: str | None = COPY, **env) -> Done:
    """`python -m benchmark efficiency` over cases, by default of a local command."""
    what = () if command is None else ("--command", command)
    return run_benchmark("efficiency", *places(folder, *names.split()), *what, *options, **env)


def start(*arguments: object, **environment: str) -> subprocess.Popen:
    """`python -m benchmark` in a process of its own, to be interrupted."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmark", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def read_case(folder: Path, name: str) -> dict:
    return read(folder / f"run/efficiency/{name}.json")


def read_table(folder: Path, team: str = "command") -> dict[str, dict[str, str]]:
    with (folder / f"run/{team}_Efficiency.csv").open() as file:
        return {row["Name"].removesuffix("_0000.nii.gz"): row for row in csv.DictReader(file)}


def page_data(page: Path) -> dict:
    """The data of a report page."""
    return json.loads(page.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])


def tables_of(page: str) -> list[list[str]]:
    """The rows of a Markdown page's tables."""
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines]


def running(marker: str) -> list[psutil.Process]:
    """Processes with a word of this test on their command line, but not the measuring one."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if marker in words and "benchmark" not in words:
            found.append(process)
    return found


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class StandInEngine:
    """`docker_stub.py` as the `docker` command."""

    def __init__(self, folder: Path):
        self.folder = folder
        binaries = folder / "bin"
        binaries.mkdir(parents=True)
        self.script = binaries / "docker"
        stub = Path(__file__).with_name("docker_stub.py")
        # Without site-packages, which take most of an interpreter's start.
        self.script.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {stub} "$@"\n')
        self.script.chmod(0o755)
        path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
        self.environment = {"PATH": path, "DOCKER_STUB": str(folder)}

    def make_image(self, name: str, predict: str) -> None:
        (self.folder / "images" / name).mkdir(parents=True)
        (self.folder / "images" / name / "predict.sh").write_text(predict)

    def containers(self, name: str) -> list[str]:
        return [path.stem for path in self.folder.glob(f"{name}-*.pid")]

    def orders(self, *start: str) -> list[list[str]]:
        """Everything that was asked of it, or what starts with some words."""
        lines = (self.folder / "orders").read_text().splitlines()
        return [order for line in lines if (order := json.loads(line))[: len(start)] == [*start]]


# Run folders of made-up measurements and scores, as `efficiency` and `accuracy` write them.

HEADER = "Name,Time,MaxGPU_Mem,AUC_GPU_Time,MaxCPU_Utilization,AUC_CPU_Time,MaxRAM,AUC_RAM_Time"


def result_of(case, seconds, used=None, number=0, **changes):
    """A result with a GPU sample every 0.1 s."""
    count = len(used or range(5))
    samples = {"time_s": [0.1 * n for n in range(count)], "gpu_used_mb": used}
    samples |= {"ram_mb": [200.0 * n for n in range(count)], "cpu_percent": [50.0] * count}
    result = {"case": case, "status": "ok", "reason": None, "penalty": None, "repeat": number}
    result |= {"seconds": seconds, "interval_s": 0.1, "image_size": [512, 512, 10 * count]}
    result |= {"tolerances": {"seconds": 15.0, "mb": 2048.0}, "samples": samples, "phases": []}
    result |= {"sampler": {"source": None, "gpu_error": None}, "peak_gpu_mb": used and max(used)}
    result |= {"auc_flare_mb_s": used and round(sum(used) * 0.1), "max_cpu_percent": 50.0}
    result |= {"auc_cpu_percent_s": 10.0, "max_ram_mb": 1000.0, "auc_ram_mb_s": 100 * seconds}
    return result | changes


def write_run(folder, team=None, efficiency=None, scores=None, samples=None, environment=None):
    """A run's folder.

    efficiency: case to (time, max GPU, GPU area, CPU area), None is an empty cell.
    scores: case to (organ DSC, organ NSD, tumor DSC, tumor NSD), the organs all alike.
    samples: case to a list of repeats, each (seconds, GPU samples) and changes of the result.
    """
    (folder / "efficiency").mkdir(parents=True)
    if efficiency is not None:
        with (folder / f"{team}_Efficiency.csv").open("w", newline="") as file:
            file.write(HEADER + "\n")
            for case, (seconds, peak, area, cpu) in efficiency.items():
                cells = (f"{case}_0000.nii.gz", seconds, peak, area, 50, cpu, 1000, 100 * seconds)
                csv.writer(file).writerow(cells)
    if scores is not None:
        with (folder / "accuracy_per_case.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["Name", *(f"{c}_{m}" for m in ("DSC", "NSD") for c in COLUMNS)])
            for case, (dsc, nsd, tumor_dsc, tumor_nsd) in scores.items():
                table.writerow([f"{case}.nii.gz", *[dsc] * 13, tumor_dsc, *[nsd] * 13, tumor_nsd])
    for case, repeats in (samples or {}).items():
        for number, (seconds, used, *changes) in enumerate(repeats):
            content = result_of(case, seconds, used, number, **(changes[0] if changes else {}))
            name = "".join(c if c.isalnum() else "_" for c in f"{case}.repeat{number}")
            (folder / "efficiency" / f"{name}.json").write_text(json.dumps(content))
    if environment:
        (folder / "environment.json").write_text(json.dumps(environment))
    return folder

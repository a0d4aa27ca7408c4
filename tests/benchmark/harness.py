"""The harness from its command line in a test: inputs, results, a stand-in for Docker."""

import contextlib
import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from unittest import mock

import nibabel
import numpy as np
import psutil

from benchmark.__main__ import main

ROOT = Path(__file__).parents[2]

AFFINE = np.diag([-0.8, -0.8, 2.5, 1.0])


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def make_inputs(folder: Path, *names: str) -> Path:
    for name in names:
        save(folder / f"{name}_0000.nii.gz", np.zeros((6, 5, 4), np.int16))
    return folder


@dataclass(frozen=True)
class Done:
    """What a run of the command line left behind."""

    returncode: int
    stdout: str
    stderr: str


def run_benchmark(*arguments: object, **environment: str) -> Done:
    """`python -m benchmark` in this process."""
    output, errors = StringIO(), StringIO()
    with (
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            code = main([*map(str, arguments)])
        except SystemExit as usage:
            code = usage.code
    return Done(code, output.getvalue(), errors.getvalue())


def run_efficiency(*arguments: object, **environment: str) -> Done:
    """`python -m benchmark efficiency` in this process."""
    return run_benchmark("efficiency", *arguments, **environment)


def start_efficiency(*arguments: object, **environment: str) -> subprocess.Popen:
    """The same in a process of its own, to be interrupted."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmark", "efficiency", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def read_case(report: Path, name: str) -> dict:
    return json.loads((report / f"efficiency/{name}.json").read_text())


def read_table(report: Path, team: str = "command") -> dict[str, dict[str, str]]:
    with (report / f"{team}_Efficiency.csv").open() as file:
        return {row["Name"]: row for row in csv.DictReader(file)}


def running(marker: str) -> list[psutil.Process]:
    """Processes with a word of this test on their command line, the measuring one left out."""
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
        script = binaries / "docker"
        stub = Path(__file__).with_name("docker_stub.py")
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {stub} "$@"\n')
        script.chmod(0o755)
        path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
        self.environment = {"PATH": path, "DOCKER_STUB": str(folder)}

    def make_image(self, name: str, predict: str) -> None:
        (self.folder / "images" / name).mkdir(parents=True)
        (self.folder / "images" / name / "predict.sh").write_text(predict)

    def containers(self, name: str) -> list[str]:
        return [path.stem for path in self.folder.glob(f"{name}-*.pid")]

    def close(self) -> None:
        pass

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

ROOT = Path(__file__).parents[2]

AFFINE = np.diag([-0.8, -0.8, 2.5, 1.0])

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


class Done(NamedTuple):
    """What a run of the command line left behind."""

    code: int
    out: str
    err: str


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


def read_case(folder: Path, name: str) -> dict:
    return json.loads((folder / f"run/efficiency/{name}.json").read_text())


def read_table(folder: Path, team: str = "command") -> dict[str, dict[str, str]]:
    with (folder / f"run/{team}_Efficiency.csv").open() as file:
        return {row["Name"].removesuffix("_0000.nii.gz"): row for row in csv.DictReader(file)}


def page_data(page: Path) -> dict:
    """The data of a report page."""
    return json.loads(page.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])


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

    def close(self) -> None:
        pass

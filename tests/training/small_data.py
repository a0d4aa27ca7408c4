"""Small data sets for the tests of training, in the layout of images/ and labels/."""

import json
from pathlib import Path

import numpy as np
from conftest import save_nifti

from synthetic.phantom import draw_phantom, write_nifti
from training import fit as fit_module
from training.__main__ import main
from training.cases import Case, find_training_cases
from training.data_set import DataSet
from training.label_mapping import CHALLENGE

fit_module._STATISTICS_BATCHES = 1  # 512 slices at the end of a run take long


def labelled(value=1, shape=(12, 10, 6)) -> np.ndarray:
    """A label map of a block in slices 1 to 3, along the third axis."""
    labels = np.zeros(shape, np.uint8)
    labels[3:9, 2:8, 1:4] = value
    return labels


def write_case(folder: Path, name: str, labels=None, hu=None, seed=0, affine=None, kinds=None):
    """Write a case in RAS, its labels `labelled()` by default; returns HU and labels."""
    labels = labelled() if labels is None else labels
    if hu is None:
        hu = np.random.default_rng(seed).normal(-200, 300, labels.shape).astype(np.int16)
    images, label_maps = kinds or ("images", "labels")
    for kind, suffix, array in ((images, "_0000", hu), (label_maps, "", labels)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        place = () if affine is None or kind == images else (affine,)
        save_nifti(folder / kind / f"{name}{suffix}.nii.gz", array, *place)
    return hu, labels


def describe(folder: Path, **about: dict) -> Path:
    """Write `cases.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(about))
    return folder


def read(folder: Path, cache: Path | None = None, mapping=CHALLENGE, left_out=False) -> DataSet:
    """Read a data set as fit does."""
    files, unused = find_training_cases(folder, mapping)
    files = [case for case in files if case.left_out == left_out]
    return DataSet(folder, files, unused).read(cache)


def cached(folder: Path, cache: Path) -> list[Case]:
    return read(folder, cache).cases


def write_phantoms(folder: Path, count: int, slices=16) -> Path:
    """Draw synthetic patients of 64x64 pixels of 7 mm, all labels in them."""
    for seed in range(count):
        phantom = draw_phantom((slices, 64, 64), (14.0, 7.0, 7.0), seed)
        for kind, suffix, array in (
            ("images", "_0000", phantom.volume),
            ("labels", "", phantom.label_map),
        ):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            write_nifti(folder / kind / f"p{seed}{suffix}.nii.gz", array, phantom.spacing)
    return folder


def settings(**numbers) -> list[str]:
    """Options that replace a recipe's numbers."""
    return [option for name, value in numbers.items() for option in ("--set", f"{name}={value}")]


def fit(data: Path, run: Path, *more, **numbers) -> int:
    """Train a tiny network on a CPU; returns the exit code."""
    tiny = {"base_channels": 4, "log_interval": 1, "precision": "fp32", **numbers}
    options = ["--data", data, "--output", run, "--device", "cpu", *more, *settings(**tiny)]
    return main(["fit", *map(str, options)])


def export(run: Path, output: Path, *more) -> int:
    """Export a run's last checkpoint; returns the exit code."""
    options = [run, "--output", output, "--checkpoint", "last", "--trained-on", "tests"]
    return main(["export", *map(str, options), "--licence", "MIT", *map(str, more)])

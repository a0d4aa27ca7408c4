"""Segment a synthetic CT with known truth, and write pictures: what `make demo` runs."""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmark.scoring.scores import score_case
from benchmark.text import by
from inference.labels import LABEL_NAMES, ORGANS
from synthetic.phantom import draw_phantom, write_nifti

_ROOT = Path(__file__).parents[1]
# Not among the seeds that the demonstration weights were trained on, and chosen for its tumor of
# 43 mL, that a reader sees one found. Of the 24 seeds from 2023 on the weights find 14 patients'
# tumors with a DSC over 0.5, mean 0.60; they miss six altogether, four of them below 3 mL.
_SEED = 2027
_SHAPE = (100, 512, 512)
_SPACING = (2.5, 0.8, 0.8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmark demo`."""
    text = "folder, which is replaced (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR", help=text)


def run(options: argparse.Namespace) -> int:
    """Generate a CT, run `predict.sh` on it, score the label map; return the exit code of that."""
    folder = options.output.resolve()
    images, labels, predictions = (folder / n for n in ("images", "labels", "predictions"))
    shutil.rmtree(folder, ignore_errors=True)
    for made in (images, labels, predictions):
        made.mkdir(parents=True)
    name = f"phantom_{_SEED}"
    print(f"Generating a synthetic abdominal CT, {by(_SHAPE)} voxels", flush=True)
    phantom = draw_phantom(_SHAPE, _SPACING, _SEED)
    write_nifti(images / f"{name}_0000.nii.gz", phantom.volume, _SPACING)
    write_nifti(labels / f"{name}.nii.gz", phantom.label_map, _SPACING)

    start = time.monotonic()
    weights = ["--weights", str(_ROOT / "weights" / "phantom-slim.safetensors")]
    places = ["--input", str(images), "--output", str(predictions)]
    command = ["sh", str(_ROOT / "predict.sh"), "--preview", *weights, *places]
    ended = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, check=False)
    if ended.returncode:
        return ended.returncode
    seconds = time.monotonic() - start
    scores = score_case(labels / f"{name}.nii.gz", predictions / f"{name}.nii.gz")
    print(f"\n{name}, {_SHAPE[0]} slices: {seconds:.1f} s from cold")
    print("\nDSC against the known truth (weights trained on synthetic CT, for demonstration)")
    for label, organ in enumerate(LABEL_NAMES[1:], start=1):
        print(f"  {organ:<20}{scores.dsc[label]:.3f}")
    mean = sum(scores.dsc[organ] for organ in ORGANS) / len(ORGANS)
    print(f"  {'mean of the organs':<20}{mean:.3f}")
    print(
        "The tumor is a large one (43 mL), chosen to be seen: over 24 such patients these weights "
        "reach a mean tumor DSC of 0.60 and miss four of the five below 3 mL."
    )
    print(f"\nThe labels on the CT: {predictions / f'{name}.png'}")
    return 0

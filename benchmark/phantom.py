"""Generate synthetic abdominal CT with exact label maps, as a data set.

DIR/images/NAME_0000.nii.gz and DIR/labels/NAME.nii.gz, for training and for measurements.
"""

import argparse
import time
from pathlib import Path

from benchmark.options import count, number, whole
from benchmark.text import by, log, show
from synthetic.phantom import draw_phantom, write_nifti
from synthetic.structures import PHASES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmark phantom`."""
    length = number("a length in mm", lambda value: value >= 1e-3)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    add("--cases", type=count, default=4, metavar="N", help="how many (default: 4)")
    add("--seed", type=whole, default=0, metavar="N", help="seed of the first (default: 0)")
    add("--slices", type=count, default=100, metavar="N", help="slices of each (default: 100)")
    add("--size", type=count, default=512, metavar="N", help="rows and columns (default: 512)")
    text, axes = "spacing in mm, as a NIfTI header has it", ("COLUMN", "ROW", "SLICE")
    usual = [0.8, 0.8, 2.5]
    add("--spacing", type=length, nargs=3, default=usual, metavar=axes, help=text)
    add("--phase", choices=PHASES, help="contrast phase (default: random, by each seed)")


def run(options: argparse.Namespace) -> int:
    """Write phantoms as a data set; 0 all written, 1 some could not be, 2 wrong usage."""
    images, labels = options.output / "images", options.output / "labels"
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    shape = (options.slices, options.size, options.size)
    column, row, thickness = options.spacing
    spacing = (thickness, row, column)
    failed = 0
    for index in range(options.cases):
        start = time.monotonic()
        seed = options.seed + index
        name = f"phantom_{seed:04d}"
        phantom = draw_phantom(shape, spacing, seed, options.phase)
        try:
            write_nifti(images / f"{name}_0000.nii.gz", phantom.volume, spacing)
            write_nifti(labels / f"{name}.nii.gz", phantom.label_map, spacing)
        except OSError as error:
            failed += 1
            log(f"{name}: cannot write {error.filename}: {error.strerror}")
            continue
        seconds = time.monotonic() - start
        done = f"[{index + 1}/{options.cases}] {name}"
        show(f"{done}  {by(shape)}  {phantom.phase}  {seconds:.1f} s")
    return 1 if failed else 0

"""`python -m tests.hostile`: the campaign at any length."""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

from tests.hostile.campaign import OK, REFUSED, campaign


def main() -> int:
    """Print the classes of outcomes; 0 if there are none but the good ones, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.hostile",
        description="Read and write mutated NIfTI files, or read damaged DICOM series, and count "
        "the outcomes.",
        epilog="example: python -m tests.hostile --count 10000 --seed 1; "
        "of DICOM: python -m tests.hostile --dicom --count 2000",
    )
    parser.add_argument("--count", type=int, default=10_000, metavar="N", help="of files")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the generator")
    parser.add_argument("--dicom", action="store_true", help="DICOM series, not NIfTI files")
    options = parser.parse_args()
    if options.dicom:
        from tests.hostile.series import outcome
    else:
        from tests.hostile.campaign import outcome
    for library in ("nibabel", "pydicom", "highdicom"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    start = time.monotonic()

    def report(done: int) -> None:
        if done % 1000 == 0:
            print(f"{done} files, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        classes = campaign(options.seed, options.count, Path(folder), report, outcome)
    for name, outcomes in sorted(classes.items(), key=lambda entry: -len(entry[1])):
        print(f"{len(outcomes):>7}  {name}")
        if name not in (OK, REFUSED):
            for number, line in outcomes[:5]:
                print(f"         file {number} of seed {options.seed}: {line}")
    return 1 if set(classes) - {OK, REFUSED} else 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.hostile.many_cases`: a thousand small cases in one call, a fault in every 20th.

Prints memory and open files as the run goes on; a leak shows as a slope.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import psutil

from inference import command
from inference.case import Case
from inference.network.weights import DEMONSTRATION_WEIGHTS
from inference.progress import Progress


def main() -> int:
    """Run the cases; 0 if every good one is right and no bad one is there."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.hostile.many_cases",
        description=__doc__,
        epilog="example: python -m tests.hostile.many_cases --count 1000",
    )
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="of cases")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as name:
        inputs, outputs = Path(name) / "inputs", Path(name) / "outputs"
        inputs.mkdir()
        for number in range(options.count):
            path = inputs / f"c{number:05}_0000.nii.gz"
            shape = (32 + number % 3, 32, 4 + number % 5)
            voxels = rng.integers(-1000, 1000, shape, np.int16)
            nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-1.0, -1.0, 2.0, 1.0])), path)
            if number % 20 == 19:
                path.write_bytes(path.read_bytes()[: 50 + number])

        ended = 0

        def on_case(self: Progress, case: Case) -> None:
            nonlocal ended
            ended += 1
            if ended % (options.count // 10) == 0:
                memory = process.memory_info().rss / 2**20
                print(f"{ended} cases: {memory:.0f} MB, {process.num_fds()} open files", flush=True)

        Progress.on_case = on_case
        weights = ["--weights", str(DEMONSTRATION_WEIGHTS), "--device", "cpu", "--quiet"]
        manifest = Path(name) / "manifest.jsonl"
        records = ["--manifest", str(manifest), "--statistics", str(Path(name) / "table.csv")]
        places = ["--input", str(inputs), "--output", str(outputs)]
        code = command.main([*places, *weights, *records])
        wrong = abs(len(manifest.read_text().splitlines()) - options.count)
        for number in range(options.count):
            output = outputs / f"c{number:05}.nii.gz"
            if number % 20 == 19:
                wrong += output.exists()
                continue
            shape = nibabel.load(inputs / f"c{number:05}_0000.nii.gz").shape
            label_map = nibabel.load(output)
            wrong += label_map.shape != shape or np.asanyarray(label_map.dataobj).max() > 14
        print(f"exit code {code}, {wrong} of {options.count} wrong")
    return 1 if wrong or code != 1 else 0


if __name__ == "__main__":
    sys.exit(main())

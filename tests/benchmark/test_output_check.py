"""What a container wrote, held against its input."""

import numpy as np
import pytest
from harness import AFFINE, save

from benchmark.containers.outputs import check_output


@pytest.mark.parametrize(
    ("array", "affine", "scorable", "problem"),
    [
        (np.zeros((6, 5, 4), np.uint8), AFFINE, True, None),
        (np.full((6, 5, 4), 14, np.int16), AFFINE + 1e-5, True, None),
        (np.zeros((5, 6, 4), np.uint8), AFFINE, False, "shape 5×6×4"),
        (np.zeros((6, 5, 4), np.uint8), np.diag([0.8, -0.8, 2.5, 1]), True, "affine"),
        (np.zeros((6, 5, 4), np.float32), AFFINE, True, "stored as float32"),
        (np.full((6, 5, 4), 15, np.uint8), AFFINE, True, "no label: 15"),
        (np.full((6, 5, 4), -1, np.int16), AFFINE, True, "no label: -1"),
    ],
)
def test_output_is_held_against_its_input(tmp_path, array, affine, scorable, problem):
    image = save(tmp_path / "in/x_0000.nii.gz", np.zeros((6, 5, 4), np.int16))
    check = check_output(save(tmp_path / "out/x.nii.gz", array, affine), image)
    assert check.found
    assert check.scorable == scorable
    assert check.valid == (problem is None)
    assert problem is None or problem in "; ".join(check.problems)


def test_a_damaged_output_is_no_score(tmp_path):
    image = save(tmp_path / "in/x_0000.nii.gz", np.zeros((6, 5, 4), np.int16))
    output = save(tmp_path / "out/x.nii.gz", np.zeros((60, 50, 40), np.uint8))
    output.write_bytes(output.read_bytes()[:-20])
    check = check_output(output, image)
    assert check.found
    assert not check.scorable
    assert not check.valid

"""Which weights run where none are named, on which device, and that a user is told."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_nifti

from inference.command import main
from inference.labels import LABEL_NAMES
from inference.network.weights import (
    DEMONSTRATION,
    DEMONSTRATION_WEIGHTS,
    FULL,
    SLIM,
    SUBMISSION,
    WEIGHTS,
    WeightsError,
    default_weights,
    read_metadata,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("present", "on_cuda", "chosen", "why"),
    [
        ((FULL, SLIM, DEMONSTRATION), True, FULL, "full network"),
        ((FULL, SLIM, DEMONSTRATION), False, SLIM, "for CPUs"),
        ((SLIM, DEMONSTRATION), True, SLIM, "no full one"),
        ((FULL, DEMONSTRATION), False, FULL, "no slim one"),
        ((DEMONSTRATION,), True, DEMONSTRATION, "not for patients"),
        ((DEMONSTRATION,), False, DEMONSTRATION, "not for patients"),
    ],
)
def test_the_best_weights_for_the_device(tmp_path, present, on_cuda, chosen, why):
    for name in present:
        (tmp_path / name).touch()
    path, reason = default_weights(on_cuda=on_cuda, folder=tmp_path)
    assert path == tmp_path / chosen
    assert why in reason


def test_no_weights_at_all(tmp_path):
    with pytest.raises(WeightsError, match="phantom-slim"):
        default_weights(on_cuda=False, folder=tmp_path)


def test_the_demonstration_is_small_and_says_what_it_is():
    metadata = read_metadata(DEMONSTRATION_WEIGHTS)
    assert metadata.label_names == LABEL_NAMES
    assert "synthetic" in metadata.trained_on
    assert DEMONSTRATION_WEIGHTS.stat().st_size <= 2_000_000


@pytest.mark.slow
def test_one_line_says_which_weights_and_why(ct, tmp_path, capsys):
    path = save_nifti(tmp_path / "a_0000.nii.gz", ct)
    places = ["--input", str(path), "--output", str(tmp_path / "outputs"), "--device", "cpu"]
    assert main(places) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "CPU" in line]
    assert line.endswith(f"{SLIM} (the slim network, for CPUs)")
    assert (WEIGHTS / SLIM).is_file()

    assert main([*places, "--weights", str(DEMONSTRATION_WEIGHTS)]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "CPU" in line]
    assert line.endswith(DEMONSTRATION)


@pytest.mark.slow
def test_wrong_usage_is_told_without_torch(tmp_path):
    """Also with the default weights, which are not opened before the device is known."""
    program = (
        "import sys; from inference.command import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    for arguments in (["--input", str(tmp_path)], ["--weights", str(tmp_path)]):
        ended = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert ended.stdout.split() == ["2", "False"]


def test_a_submission_wins_on_every_device(tmp_path):
    for name in (SUBMISSION, FULL, SLIM, DEMONSTRATION):
        (tmp_path / name).touch()
    for on_cuda in (True, False):
        path, reason = default_weights(on_cuda=on_cuda, folder=tmp_path)
        assert path == tmp_path / SUBMISSION
        assert reason == "the submission"

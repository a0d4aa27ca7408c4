"""Which weights run where none are named, on which device, and that a user is told."""

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
    WeightsError,
    default_weights,
    read_metadata,
)


@pytest.mark.parametrize(
    ("present", "on_cuda", "on_cpu"),
    [
        ((FULL, SLIM, DEMONSTRATION), FULL, SLIM),
        ((SLIM, DEMONSTRATION), SLIM, SLIM),
        ((FULL, DEMONSTRATION), FULL, FULL),
        ((DEMONSTRATION,), DEMONSTRATION, DEMONSTRATION),
        ((SUBMISSION, FULL, SLIM, DEMONSTRATION), SUBMISSION, SUBMISSION),
    ],
)
def test_the_best_weights_for_the_device(tmp_path, present, on_cuda, on_cpu):
    for name in present:
        (tmp_path / name).touch()
    for cuda, chosen in ((True, on_cuda), (False, on_cpu)):
        path, reason = default_weights(on_cuda=cuda, folder=tmp_path)
        assert path == tmp_path / chosen
        assert ("not for patients" in reason) == (chosen == DEMONSTRATION)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(WeightsError, match="phantom-slim"):
        default_weights(on_cuda=False, folder=tmp_path)


def test_the_demonstration_is_small_and_says_what_it_is():
    metadata = read_metadata(DEMONSTRATION_WEIGHTS)
    assert metadata.label_names == LABEL_NAMES
    assert "synthetic" in metadata.trained_on
    assert DEMONSTRATION_WEIGHTS.stat().st_size <= 2_000_000


@pytest.mark.slow
def test_one_line_says_which_weights_run(ct, tmp_path, capsys):
    path = save_nifti(tmp_path / "a_0000.nii.gz", ct)
    places = ["--input", str(path), "--output", str(tmp_path / "outputs"), "--device", "cpu"]
    for arguments, name in (([], SLIM), (["--weights", str(DEMONSTRATION_WEIGHTS)], DEMONSTRATION)):
        assert main([*places, *arguments]) == 0
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "CPU" in line]
        assert name in line

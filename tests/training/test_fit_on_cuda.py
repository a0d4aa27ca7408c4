"""Training's steps, their loss and the scoring on a CUDA device that is not there."""

import csv

import pytest
import torch
from fake_cuda import aten

from synthetic.phantom import draw_phantom, write_nifti
from training.__main__ import main


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for seed in range(2):
        spacing = (14.0, 7.0, 7.0)
        phantom = draw_phantom((8, 64, 64), spacing, seed)
        write_nifti(folder / "images" / f"p{seed}_0000.nii.gz", phantom.volume, spacing)
        write_nifti(folder / "labels" / f"p{seed}.nii.gz", phantom.label_map, spacing)
    return folder


def fit(phantoms, run, *more):
    numbers = ("--recipe", "best", "--schedule", "constant", "--slice-size", "64", "--workers", "0")
    sizes = ("--pixel-mm", "6", "8", "--batch-size", "2", "--warmup-steps", "1", "--steps", "2")
    model = ("--base-channels", "8", "--log-interval", "1", "--matrix-reduction", "2")
    options = [*numbers, *sizes, *model, *map(str, more)]
    return main(["--data", f"{phantoms}=complete", "--output", str(run), *options])


def losses(run):
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def expected_losses(phantoms, tmp_path_factory):
    """Of the CPU, in fp32."""
    run = tmp_path_factory.mktemp("cpu")
    assert fit(phantoms, run, "--device", "cpu", "--precision", "fp32") == 0
    return losses(run)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steps_and_scoring_on_cuda(phantoms, expected_losses, tmp_path, cuda_device, precision):
    """The loss of the CPU's first steps, but for the precision."""
    device = cuda_device()
    run = tmp_path / "cuda"
    assert fit(phantoms, run, "--device", "cuda", "--precision", precision) == 0
    assert losses(run) == pytest.approx(expected_losses, rel=0.01)
    assert (run / "held_out.csv").is_file()
    state = torch.load(run / "last.pt", weights_only=True)
    assert state["step"] == 2
    assert aten._fused_adamw_ in device.operators
    assert all(index == 0 for _, index in device.traffic.fractions)
    # It goes on from what it saved.
    assert fit(phantoms, run, "--device", "cuda", "--precision", precision) == 0

"""`python -m benchmark check` in a real engine: our image passes, images broken on purpose fail."""

import json
import os
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pytest

from benchmark.__main__ import main

IMAGE = os.environ.get("IMAGE", "abdoseg:latest")
BROKEN = Path(__file__).with_name("broken")


def check(report, image, *options):
    """The exit code, and every finding by its level and check."""
    code = main(["check", "--image", image, "--report", str(report), *map(str, options)])
    findings = json.loads((report / "check.json").read_text())["findings"]
    return code, {(finding["level"], finding["check"]): finding for finding in findings}


def names(findings, level):
    return {name for found, name in findings if found == level}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A CT small enough to be tried many times, and no two of whose axes are alike."""
    folder = tmp_path_factory.mktemp("inputs")
    volume = np.random.default_rng(5).integers(-1000, 1000, (60, 50, 40), np.int16)
    image = nibabel.Nifti1Image(volume, np.diag([-0.8, -0.9, 2.5, 1]))
    nibabel.save(image, folder / "FLARE23Ts_0001_0000.nii.gz")
    return folder


@pytest.fixture
def broken_image(request):
    image = f"abdoseg-broken-{request.param}-{os.getpid()}:latest"
    build = ["docker", "build", "-q", "--build-arg", f"DEFECT={request.param}", "-t", image, BROKEN]
    subprocess.run(build, check=True, capture_output=True)
    yield image
    subprocess.run(["docker", "rmi", "-f", image], check=True, capture_output=True)


def test_our_image_passes(tmp_path):
    code, findings = check(tmp_path, IMAGE)
    assert code == 0, names(findings, "failed")
    assert names(findings, "failed") == set()
    # What this machine has too little of to measure, or takes too long for, is no defect.
    assert {name.split(",")[0] for name in names(findings, "warned")} <= {"GPU memory", "time"}
    assert ("passed", "weights") in findings
    for volume in ("typical", "thin", "anisotropic", "turned", "very large"):
        assert ("passed", f"volume: {volume}") in findings


@pytest.mark.parametrize(
    ("broken_image", "failing", "words"),
    [
        ("misnamed", "output names", "found FLARE23Ts_0001_0000.nii.gz instead"),
        ("misshapen", "output shapes", "60×50×39, the input has 60×50×40"),
        ("unplaced", "output affines", "affine differs"),
        ("fractions", "output types", "stored as float32"),
        ("foreign", "output labels", "no label: 15"),
        ("random", "twice the same", "labelled voxels differ"),
        ("litters", "files left behind", "FLARE23Ts_0001_probabilities.nii.gz"),
        ("crashes", "starts with the organisers' command", "exit code 3"),
        ("downloads", "starts with the organisers' command", "urlopen error"),
        ("hangs", "starts with the organisers' command", "timeout: ended after 20 s"),
        ("greedy", "starts with the organisers' command", "out of memory: over the limit of 512m"),
    ],
    indirect=["broken_image"],
)
def test_an_image_broken_on_purpose_fails_for_its_reason(
    broken_image, failing, words, inputs, tmp_path
):
    options = ("--inputs", inputs, "--timeout", 20, "--memory-limit", "512m")
    code, findings = check(tmp_path, broken_image, *options)
    assert code == 1
    expected = {failing, "output labels"} if "fractions" in broken_image else {failing}
    assert names(findings, "failed") == expected
    assert words in findings["failed", failing]["found"]
    if "downloads" in broken_image:
        assert "network" in findings["failed", failing]["advice"]


@pytest.mark.parametrize(
    ("broken_image", "warning"),
    [
        ("writes", "read-only and hardened"),
        ("shares", "64 MB of shared memory"),
        ("careless", "a damaged input"),
    ],
    indirect=["broken_image"],
)
def test_what_costs_nothing_in_the_challenge_is_warned_of(broken_image, warning, inputs, tmp_path):
    code, findings = check(tmp_path, broken_image, "--inputs", inputs, "--memory-limit", "512m")
    assert code == 0
    assert warning in names(findings, "warned")

"""`python -m benchmark check` in a real engine: our image passes, images broken on purpose fail."""

import json
import os
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pytest

from benchmark.__main__ import main
from benchmark.checking.findings import START

IMAGE = os.environ.get("IMAGE", "abdoseg:latest")
BROKEN = Path(__file__).with_name("broken")


def check(report, image, *options):
    """The exit code, and the names of the findings by level."""
    code = main(["check", "--image", image, "--report", str(report), *map(str, options)])
    findings = json.loads((report / "check.json").read_text())["findings"]
    levels = {level: set() for level in ("passed", "warned", "failed")}
    for finding in findings:
        levels[finding["level"]].add(finding["check"])
    return code, levels


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
    code, levels = check(tmp_path, IMAGE)
    assert (code, levels["failed"]) == (0, set())
    # What this machine has too little of to measure, or takes too long for, is no defect.
    assert {name.split(",")[0] for name in levels["warned"]} <= {"GPU memory", "time"}
    volumes = ("typical", "thin", "anisotropic", "turned", "very large")
    assert {"weights", *(f"volume: {volume}" for volume in volumes)} <= levels["passed"]


@pytest.mark.parametrize(
    ("broken_image", "level", "findings"),
    [
        ("misnamed", "failed", {"output names"}),
        ("misshapen", "failed", {"output shapes"}),
        ("unplaced", "failed", {"output affines"}),
        ("fractions", "failed", {"output types", "output labels"}),
        ("foreign", "failed", {"output labels"}),
        ("random", "failed", {"twice the same"}),
        ("litters", "failed", {"extra files"}),
        ("crashes", "failed", {START}),
        ("downloads", "failed", {START}),
        ("hangs", "failed", {START}),
        ("greedy", "failed", {START}),
        # What costs nothing in the challenge.
        ("writes", "warned", {"read-only and hardened"}),
        ("shares", "warned", {"64 MB of shared memory"}),
        ("careless", "warned", {"a damaged input"}),
    ],
    indirect=["broken_image"],
)
def test_an_image_broken_on_purpose_is_found(broken_image, level, findings, inputs, tmp_path):
    options = ("--inputs", inputs, "--timeout", 20, "--memory-limit", "512m")
    code, levels = check(tmp_path, broken_image, *options)
    if level == "failed":
        assert (code, levels["failed"]) == (1, findings)
    else:
        assert (code, levels["failed"]) == (0, set())
        assert findings <= levels["warned"]

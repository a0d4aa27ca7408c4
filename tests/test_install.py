"""The package that `pip install .` gives, used as a stranger would."""

import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import save_nifti

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_an_installed_package_segments_in_four_lines_and_by_its_command(tmp_path, ct):
    site = tmp_path / "site"
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "inference", "weights"):
        (source / name).symlink_to(ROOT / name)
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", site, source], check=True, cwd=tmp_path)

    path = save_nifti(tmp_path / "a_0000.nii.gz", ct)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    lines = """
import sys
from abdoseg import Segmenter
segmenter = Segmenter()
labels = segmenter(sys.argv[1])
labels.to_filename(sys.argv[2])
"""
    api = [sys.executable, "-c", lines, path, tmp_path / "api.nii.gz"]
    command = [sys.executable, "-m", "abdoseg", "--input", path, "--output", tmp_path / "out"]
    for one in (api, [site / "bin" / "abdoseg", "--version"], command):
        subprocess.run(one, check=True, cwd=tmp_path, env=environment)
    found, written = (nibabel.load(tmp_path / name) for name in ("api.nii.gz", "out/a.nii.gz"))
    assert np.array_equal(found.dataobj, written.dataobj)
    assert np.array_equal(found.affine, written.affine)

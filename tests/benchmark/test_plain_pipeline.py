"""The plain baseline and the service write the same label maps in fp32."""

from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from conftest import ORIENTATIONS, RAS_AFFINE, reoriented, save_nifti

from benchmark.__main__ import main
from inference import prediction
from inference.command import main as run_service
from inference.network.weights import DEMONSTRATION_WEIGHTS, load_weights, save_weights
from synthetic.phantom import draw_phantom


@pytest.mark.slow
@pytest.mark.parametrize(
    ("orientation", "clip_hu"), [(0, None), (21, None), (46, None), (0, (-160, 240))]
)
def test_label_maps_are_equal_voxel_for_voxel(tmp_path, monkeypatch, orientation, clip_hu):
    phantom = draw_phantom((12, 250, 310), (16.0, 1.4, 1.3), seed=11)
    patient = np.ascontiguousarray(phantom.volume[:, ::-1, ::-1].transpose(2, 1, 0))  # RAS
    volume, affine = reoriented(patient, RAS_AFFINE, ORIENTATIONS[orientation])
    save_nifti(tmp_path / "a_0000.nii.gz", volume, affine)
    monkeypatch.setattr(prediction, "choose_dtype", lambda device: torch.float32)

    weights = tmp_path / "weights.safetensors"
    state_dict, metadata = load_weights(DEMONSTRATION_WEIGHTS)
    save_weights(weights, state_dict, replace(metadata, clip_hu=clip_hu))
    common = ["--input", str(tmp_path / "a_0000.nii.gz"), "--weights", str(weights)]
    common += ["--device", "cpu", "--output"]
    assert main(["plain-pipeline", *common, str(tmp_path / "plain")]) == 0
    assert run_service([*common, str(tmp_path / "service"), "--quiet"]) == 0
    plain, service = (nibabel.load(tmp_path / name / "a.nii.gz") for name in ("plain", "service"))
    np.testing.assert_array_equal(plain.affine, service.affine)
    labels = np.asanyarray(service.dataobj)
    np.testing.assert_array_equal(np.asanyarray(plain.dataobj), labels)
    assert len(np.unique(labels)) > 8


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    inputs, weights = tmp_path / "inputs", tmp_path / "w.safetensors"
    inputs.mkdir()
    (inputs / "a.nii.gz").write_bytes(b"no gzip data")
    weights.write_bytes(b"no weights")
    for path, code in ((weights, 2), (DEMONSTRATION_WEIGHTS, 1)):
        places = ["--input", inputs, "--output", tmp_path / "out", "--weights", path]
        assert main(["plain-pipeline", *map(str, places), "--device", "cpu"]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert str(weights if code == 2 else inputs / "a.nii.gz") in line
    assert not list((tmp_path / "out").iterdir())

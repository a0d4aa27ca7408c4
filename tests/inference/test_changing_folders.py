"""A folder that changes while it is worked on: every case ends as what its file was when read."""

import nibabel
import numpy as np
import pytest
from conftest import save_nifti

from inference.service import Service


@pytest.fixture
def at_first_case(monkeypatch):
    """Sets what happens to the folder while the first case is being predicted."""
    predict = Service._predict

    def install(change):
        def predict_and_change(self, read, predictor):
            if read.case.name == "a":
                change()
            return predict(self, read, predictor)

        monkeypatch.setattr(Service, "_predict", predict_and_change)

    return install


@pytest.mark.slow
def test_a_file_that_is_replaced_while_it_is_predicted(folders, run, ct, at_first_case, predicted):
    """The label map would be newer than its input, and be taken for the new one's."""
    inputs, outputs = folders
    for name in "ab":
        save_nifti(inputs / f"{name}_0000.nii.gz", ct)
    at_first_case(lambda: save_nifti(inputs / "a_0000.nii.gz", ct // 2))
    assert run("--quiet") == 1
    assert [path.name for path in outputs.iterdir()] == ["b.nii.gz"]
    at_first_case(lambda: (inputs / "a_0000.nii.gz").unlink())  # when it has been read
    assert run("--quiet", "--keep-existing") == 0
    assert sorted(path.name for path in outputs.iterdir()) == ["a.nii.gz", "b.nii.gz"]


@pytest.mark.slow
def test_files_that_vanish_grow_and_arrive(folders, run, ct, at_first_case, capsys):
    inputs, outputs = folders
    # The next case is read ahead while the first is predicted, so what changes is behind it.
    for name in ("a", "b", "c_vanishes", "e_good"):
        save_nifti(inputs / f"{name}_0000.nii.gz", ct)
    whole = (inputs / "e_good_0000.nii.gz").read_bytes()
    growing = inputs / "d_grows_0000.nii.gz"
    growing.write_bytes(whole[: len(whole) // 2])

    def change():
        (inputs / "c_vanishes_0000.nii.gz").unlink()
        with growing.open("ab") as file:
            file.write(whole[len(whole) // 2 : -100])
        save_nifti(inputs / "f_arrives_0000.nii.gz", ct)

    at_first_case(change)
    assert run("--quiet") == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 2
    assert any("c_vanishes" in line and "No such file" in line for line in errors)
    assert any("d_grows" in line for line in errors)
    assert sorted(path.name for path in outputs.iterdir()) == [
        "a.nii.gz", "b.nii.gz", "e_good.nii.gz"
    ]  # fmt: skip

    # What has become whole or was not there yet is made by the next run, and nothing else.
    made = {path: path.stat().st_mtime_ns for path in outputs.iterdir()}
    growing.write_bytes(whole)
    assert run("--quiet", "--keep-existing") == 0
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    for name in ("d_grows", "f_arrives"):
        label_map = nibabel.load(outputs / f"{name}.nii.gz")
        assert np.array_equal(
            np.asanyarray(label_map.dataobj),
            np.asanyarray(nibabel.load(outputs / "e_good.nii.gz").dataobj),
        )

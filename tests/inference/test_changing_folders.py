"""A folder that changes while it is worked on: every case ends as what its file was when read."""

import numpy as np
import pytest
from conftest import errors_of, names_in, save_nifti, stored

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
def test_a_file_that_is_replaced_while_it_is_predicted(folders, run, cts, ct, at_first_case):
    """The label map would be newer than its input, and be taken for the new one's."""
    (path, _) = cts("a", "b")
    at_first_case(lambda: save_nifti(path, ct // 2))
    assert run("--quiet") == 1
    assert names_in(folders[1]) == ["b.nii.gz"]
    at_first_case(path.unlink)  # when it has been read
    assert run("--quiet", "--keep-existing") == 0
    assert names_in(folders[1]) == ["a.nii.gz", "b.nii.gz"]


@pytest.mark.slow
def test_files_that_vanish_grow_and_arrive(folders, run, cts, at_first_case, capsys):
    # The next case is read ahead while the first is predicted, so what changes is behind it.
    _, _, vanishing, growing, good = cts("a", "b", "c", "d", "e")
    whole = good.read_bytes()
    growing.write_bytes(whole[:900])

    def change():
        vanishing.unlink()
        with growing.open("ab") as file:
            file.write(whole[900:-100])
        cts("f")

    at_first_case(change)
    assert run("--quiet") == 1
    errors = errors_of(capsys)
    assert len(errors) == 2 and str(vanishing) in errors[0] and str(growing) in errors[1]
    assert names_in(folders[1]) == ["a.nii.gz", "b.nii.gz", "e.nii.gz"]

    # What has become whole or was not there yet is made by the next run, and nothing else.
    made = {path: path.stat().st_mtime_ns for path in folders[1].iterdir()}
    growing.write_bytes(whole)
    assert run("--quiet", "--keep-existing") == 0
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    maps = [stored(folders[1] / f"{name}.nii.gz") for name in "def"]
    assert np.array_equal(maps[0], maps[1]) and np.array_equal(maps[2], maps[1])

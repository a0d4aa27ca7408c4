"""Places that fold names, refuse fsync or rename, or are shared by several runs."""

import errno
import os
import re
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import errors_of, names_in, save_nifti

from inference import files
from inference.files import locked, whole_file, write_atomically
from inference.labels import LABEL_NAMES
from inference.records.statistics import StatisticsTable
from inference.shards import shard_of
from inference.sources import NiftiFile
from inference.startup import use_for_temporary_files
from training.cache import save_array

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "names",
    [
        ("Case", "case"),
        ("STRASSE", "straße"),
        *[(unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)) for name in
          ("Müller", "が", "ǰ")],
        (unicodedata.normalize("NFC", "ÉA"), unicodedata.normalize("NFD", "éa")),
    ],
)  # fmt: skip
def test_names_that_a_file_system_folds_are_one(folders, run, ct, names, capsys):
    inputs, outputs = folders
    paths = [save_nifti(inputs / f"{name}_0000.nii.gz", ct[:, :, :3]) for name in names]
    assert run("--quiet", "--per-organ", "--preview") == 1
    (line,) = errors_of(capsys)
    second, first = sorted(paths)[::-1]
    assert str(second) in line and first.name in line
    name = first.name.removesuffix("_0000.nii.gz")
    assert {path.name for path in outputs.iterdir()} == {name, f"{name}.nii.gz", f"{name}.png"}
    shards = [len(shard_of([*map(NiftiFile, paths)], index, 2)) for index in range(2)]
    assert sorted(shards) == [0, 2]


def refuses(number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_fsync_is_written_to(folders, run, ct, tmp_path, monkeypatch, number):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    monkeypatch.setattr(files.os, "fsync", refuses(number))
    records = ("--manifest", str(tmp_path / "m.jsonl"), "--statistics", str(tmp_path / "t.csv"))
    assert run("--quiet", *records) == 0
    assert names_in(folders[1]) == ["a.nii.gz"]


@pytest.mark.parametrize(
    ("function", "number"),
    [("rename", errno.ENOSYS), ("fsync", errno.EIO), ("open", errno.EROFS)],
)
def test_a_folder_that_cannot_be_written_is_refused_before_the_first_case(
    folders, run, ct, monkeypatch, function, number
):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    if function == "rename":
        monkeypatch.setattr(Path, "replace", refuses(number))
    else:
        monkeypatch.setattr(files.os, function, refuses(number))
    monkeypatch.setattr("inference.service.Service.run", lambda *_: pytest.fail("cases were begun"))
    assert run("--quiet") == 2
    assert not list(folders[1].iterdir())


def test_a_name_that_the_file_system_refuses_fails_before_it_is_predicted(
    folders, run, ct, monkeypatch, predicted
):
    for name in ("a:b", "c"):
        save_nifti(folders[0] / f"{name}_0000.nii.gz", ct)
    assert run("--quiet") == 0
    replace = Path.replace

    def replace_without_colon(self, target):
        return refuses(errno.EINVAL)() if ":" in target.name else replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_without_colon)
    assert run("--quiet") == 1
    assert predicted == ["a:b", "c", "c"]
    assert names_in(folders[1]) == ["a:b.nii.gz", "c.nii.gz"]


def test_access_is_not_asked_where_writing_works(run, cts, monkeypatch):
    cts("a")
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert run("--quiet") == 0


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EACCES, errno.EBUSY])
def test_a_file_system_that_renames_over_nothing(tmp_path, monkeypatch, number):
    replace, path = Path.replace, tmp_path / "a.nii.gz"

    def replace_nothing(self, target):
        return refuses(number)() if target.exists() else replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_nothing)
    for content in (b"one", b"two"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        write_atomically(tmp_path / "folder", b"three")
    assert names_in(tmp_path) == ["a.nii.gz", "folder"]


def test_the_file_that_is_there_stays_where_its_successor_cannot_be_renamed(tmp_path, monkeypatch):
    replace, path = Path.replace, tmp_path / "a.nii.gz"
    path.write_bytes(b"one")
    tries = []

    def replace_nothing(self, target):
        tries.append(target)
        if target.exists() or len(tries) == 3:  # over a file, and then the disk is gone
            refuses(errno.EBUSY)()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_nothing)
    with pytest.raises(OSError, match="busy"):
        write_atomically(path, b"two")
    assert path.read_bytes() == b"one" and [*tmp_path.iterdir()] == [path]


def test_text_is_utf_8_and_an_error_of_writing_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    write_atomically(path, "M\udcfcller,Müller\n")
    assert path.read_bytes() == "M\\udcfcller,Müller\n".encode()
    monkeypatch.setattr(files.os, "fsync", refuses(errno.ENOSPC))
    with pytest.raises(OSError, match=r"t\.csv") as raised:
        write_atomically(path, b"content")
    assert raised.value.filename == str(path)


def test_two_containers_write_one_cache_file(tmp_path):
    """Both are process 1: what one is writing is not the other's."""
    path, array = tmp_path / "a.npy", np.arange(5)
    (tmp_path / f".a.npy.{os.getpid()}.partial").mkdir()
    with whole_file(path) as file:
        save_array(path, array)
        file.write(b"another")
        assert np.array_equal(np.load(path), array)
    assert path.read_bytes() == b"another"
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"another"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_lock_is_held_by_one_and_given_back(tmp_path, monkeypatch):
    path = tmp_path / "run"
    for _ in range(2):
        with locked(path), pytest.raises(BlockingIOError), locked(path, wait=False):
            pass
    monkeypatch.setattr(files.fcntl, "flock", refuses(errno.ENOLCK))
    with locked(path, wait=False):  # a file system without locks
        pass


def test_temporary_files_lie_in_the_report_where_no_usual_folder_can_be_written(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", None)
    use_for_temporary_files(tmp_path)
    assert tempfile.gettempdir() != str(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    use_for_temporary_files(tmp_path)
    assert Path(tempfile.mkdtemp()).parent == tmp_path


def record_of(case):
    values = dict.fromkeys(LABEL_NAMES[1:], 1)
    return {"case": case, "flags": [], "voxels": values, "volumes_ml": values, "mean_hu": values}


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_two_runs_share_a_table(tmp_path, ending):
    path = tmp_path / f"t.{ending}"
    one, other = StatisticsTable(path), StatisticsTable(path)
    for table, cases in ((one, "ace"), (other, "bdf")):
        for case in cases:
            table.add(record_of(case))
    one.write()
    other.write()
    one.write()
    both = StatisticsTable(path, keep=True)
    assert all(case in both for case in "abcdef")
    assert path.read_text().count("liver") == 6
    assert "a" not in StatisticsTable(path)  # a later run that keeps nothing


def test_a_name_is_the_same_in_every_locale():
    shows = (
        "from inference.startup import use_utf8; use_utf8(); import sys; print(ascii(sys.argv[1:]))"
    )
    command = [sys.executable, "-E", "-c", shows, "Müller", "-x"]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    for utf8 in ("0", "1"):
        done = subprocess.run(
            [command[0], "-X", f"utf8={utf8}", *command[1:]],
            cwd=ROOT, env=environment, capture_output=True, check=True,
        )  # fmt: skip
        assert done.stdout.decode() == ascii(["Müller", "-x"]) + "\n"

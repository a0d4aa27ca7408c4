"""Inputs, outputs and surroundings that would do harm: nothing is lost, every fault is one line."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import errors_of, metadata_of, save_nifti, trained_looking_network, with_header
from safetensors import safe_open
from safetensors.numpy import save_file

from inference import files
from inference.files import find_cases, write_atomically
from inference.labels import LABEL_NAMES
from inference.network.weights import WeightsError, load_weights, read_metadata, save_weights
from inference.service import Service
from inference.volume import VolumeError, read_volume

# inputs


@pytest.mark.parametrize(
    "how",
    ["same folder", "linked folder", "hard link", "symbolic link", "second run", "table"],
)
def test_an_input_is_never_written_over(folders, run, ct, how, tmp_path):
    inputs, outputs = folders
    ct_file, arguments = save_nifti(inputs / "x.nii.gz", ct), ()
    if how == "second run":
        ct_file = ct_file.rename(inputs / "x_0000.nii.gz")
        assert run("--output", inputs, "--quiet") == 0
        ct_file = inputs / "x.nii.gz"  # the first run's label map
    elif how == "table":
        os.link(ct_file, arguments_file := tmp_path / "table.csv")
        arguments = ("--statistics", arguments_file)
    elif how == "linked folder":
        outputs.symlink_to(inputs)
    elif how != "same folder":
        outputs.mkdir()
        link = os.link if how == "hard link" else os.symlink
        link(ct_file, outputs / "x.nii.gz")
    if how in ("same folder", "second run"):
        arguments = ("--output", inputs)
    before = ct_file.read_bytes()
    assert run(*arguments) == 2
    assert ct_file.read_bytes() == before


# temporary files


def test_a_link_planted_under_the_temporary_name_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "known")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".known.partial").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "a.nii.gz", b"label map")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "a.nii.gz").exists()


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    monkeypatch.setattr(
        Path, "replace", lambda self, target: (order.append("rename"), replace(self, target))
    )
    write_atomically(tmp_path / "a", b"x")
    assert order == ["fsync", "rename"]


# headers


@pytest.mark.parametrize(
    "fields",
    [
        {"dim": [3, -40, 33, 21, 1, 1, 1, 1]},
        {"dim": [3, -40, -33, 21, 1, 1, 1, 1]},
        {"dim": [0, 40, 33, 21, 1, 1, 1, 1]},
        {"dim": [4, 40, 33, 21, 2, 1, 1, 1]},
        {"sform_code": 1, "srow_x": [3e38, 3e38, 3e38, 0]},
        {"datatype": 1234},
        {"vox_offset": 12},
        {"vox_offset": np.inf},
    ],
)
def test_a_damaged_header_is_one_line_in_words(tmp_path, ct, fields):
    path = with_header(tmp_path / "a.nii", ct, **fields)
    with pytest.raises(VolumeError) as refused:
        read_volume(path)
    assert "\n" not in str(refused.value)
    assert not any(word in str(refused.value) for word in ("KeyError", "IndexError", "np."))


def test_library_warnings_stay_out_of_the_lines(folders, run, ct, capfd):
    with_header(folders[0] / "a_0000.nii", ct, sizeof_hdr=17)
    save_nifti(folders[0] / "b_0000.nii", ct)
    assert run() == 1
    lines = capfd.readouterr().err.splitlines()
    assert all(
        line.startswith(("error: ", "[", "the CPU", "warning: ", "check ")) for line in lines
    ), lines


def test_a_name_that_is_too_long_fails_before_predicting(folders, run, ct, monkeypatch, capsys):
    name = "n" * 250 + ".nii"  # with .gz it has 257 bytes
    save_nifti(folders[0] / name, ct)
    monkeypatch.setattr(Service, "_predict", lambda *_: pytest.fail("predicted"))
    assert run("--quiet") == 1
    assert "255" in errors_of(capsys)[0]


# what is called like a volume and is none


def test_nothing_called_like_a_volume_is_passed_over(folders, run, ct, capsys):
    inputs, outputs = folders
    save_nifti(inputs / "good_0000.nii.gz", ct)
    (inputs / "dangling_0000.nii.gz").symlink_to("nowhere")
    (inputs / "loop_0000.nii.gz").symlink_to("loop_0000.nii.gz")
    save_nifti(inputs / "upper_0000.nii.gz", ct).rename(inputs / "upper_0000.NII.GZ")
    (inputs / "folder_0000.nii.gz").mkdir()
    (inputs / "good.nii").mkdir()  # neither takes the good file's name
    (inputs / "good.nii.gz").symlink_to("nowhere")
    save_nifti(inputs / "_0000.nii.gz", ct)  # its label map would be a hidden file
    os.mkfifo(inputs / "pipe_0000.nii.gz")
    assert run("--quiet") == 1
    lines = errors_of(capsys)
    bad = ["dangling_0000", "loop", "upper", "folder_0000", "pipe"]
    bad += ["good.nii:", "good.nii.gz", "/_0000"]
    assert [sum(name in line for line in lines) for name in bad] == [1] * len(lines) == [1] * 8
    assert [path.name for path in outputs.iterdir()] == ["good.nii.gz"]
    assert [path.name for path in find_cases(inputs)] == ["good_0000.nii.gz"]


def test_what_is_no_volume_beside_volumes_is_one_line(folders, run, cts, capsys):
    cts("a")
    for count, name in enumerate(("pair.hdr", "pair.img", "c.nii.zst", "b.mha", ".hidden")):
        assert run() == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
        assert len(lines) == min(count, 1) and all(f" {count} entr" in line for line in lines)
        (folders[0] / name).touch()


def weights_with(path, stored=None, **fields):
    network = trained_looking_network()
    save_weights(path, network.state_dict(), metadata_of(network))
    with safe_open(path, framework="numpy") as file:
        metadata = json.loads(file.metadata()["abdoseg"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = json.dumps(metadata | fields) if stored is None else stored
    save_file(tensors, path, {"abdoseg": text})
    return path


@pytest.mark.parametrize(
    "damage",
    [
        {"stored": "{not json"},
        {"stored": "[1, 2]"},
        {"stored": "[" * 100_000},
        {"base_channels": 12.0},
        {"base_channels": "8"},
        {"base_channels": -8},
        {"base_channels": 1 << 40},
        {"num_classes": 2},
        {"intensity_mean": float("nan")},
        {"intensity_std": float("inf")},
        {"intensity_std": 0},
        {"intensity_std": "150"},
        {"matrix_reduction": 3},
        {"matrix_reduction": True},
        {"attention": ["none"]},
        {"supervised_channels": -1},
        {"clip_hu": [240, -160]},
        {"clip_hu": [0]},
        {"clip_hu": ["0", "1"]},
        {"clip_hu": [0, float("inf")]},
        {"clip_hu": 5},
        {"supervised_channels": 4.0},
        {"label_names": 5},
        {"label_names": ["background", "spleen", *LABEL_NAMES[2:]]},
        {"percentiles": [0.5, 99.5]},
        {"orientation": "RAS"},
    ],
)
def test_weights_with_damaged_metadata_are_refused(tmp_path, damage):
    path = weights_with(tmp_path / "w.safetensors", **damage)
    with pytest.raises(WeightsError) as refused:
        read_metadata(path)
    assert "\n" not in str(refused.value)


def test_weights_that_are_not_numbers_or_of_another_width_are_refused(
    folders, run, ct, tmp_path, capsys
):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    network = trained_looking_network()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state["head.bias"][0] = torch.nan
    save_weights(tmp_path / "nan.safetensors", state, metadata_of(network))
    with pytest.raises(WeightsError, match="not numbers"):
        load_weights(tmp_path / "nan.safetensors")
    assert run("--weights", str(tmp_path / "nan.safetensors")) == 2
    wide = weights_with(tmp_path / "wide.safetensors", base_channels=12)
    assert run("--weights", str(wide)) == 2
    assert len(errors_of(capsys)) == 2

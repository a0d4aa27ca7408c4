"""Inputs, outputs and surroundings that would do harm: nothing is lost, every fault is one line."""

import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import (
    RAS_AFFINE,
    errors_of,
    metadata_of,
    save_nifti,
    trained_looking_network,
    with_header,
)

from inference import files
from inference.files import find_cases, write_atomically
from inference.label_map import why_not_label_map_of, write_label_map
from inference.labels import LABEL_NAMES
from inference.network.weights import WeightsError, load_weights, read_metadata, save_weights
from inference.service import Service
from inference.volume import VolumeError, read_header, read_volume


def wrong_usage(run, *arguments):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    return stopped.value.code == 2


# inputs


@pytest.mark.parametrize("how", ["same folder", "linked folder", "hard link", "symbolic link"])
def test_an_input_is_never_written_over(folders, run, ct, how, capsys):
    inputs, outputs = folders
    ct_file = save_nifti(inputs / "x.nii.gz", ct)
    before = ct_file.read_bytes()
    if how == "same folder":
        target = inputs
    elif how == "linked folder":
        outputs.symlink_to(inputs)
        target = outputs
    else:
        outputs.mkdir()
        target = outputs
        link = os.link if how == "hard link" else os.symlink
        link(ct_file, outputs / "x.nii.gz")
    assert wrong_usage(run, "--output", str(target))
    assert "is an input" in capsys.readouterr().err
    assert ct_file.read_bytes() == before


def test_a_second_run_into_the_inputs_folder_is_refused(folders, run, ct):
    inputs, _ = folders
    save_nifti(inputs / "x_0000.nii.gz", ct)
    assert run("--output", str(inputs), "--quiet") == 0
    label_map = (inputs / "x.nii.gz").read_bytes()
    assert wrong_usage(run, "--output", str(inputs))
    assert (inputs / "x.nii.gz").read_bytes() == label_map


def test_statistics_do_not_replace_an_input(folders, run, ct, tmp_path):
    source = save_nifti(folders[0] / "x_0000.nii.gz", ct)
    os.link(source, tmp_path / "table.csv")
    assert wrong_usage(run, "--statistics", str(tmp_path / "table.csv"))


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
    ("fields", "words"),
    [
        ({"dim": [3, -40, 33, 21, 1, 1, 1, 1]}, "no voxels"),
        ({"dim": [3, -40, -33, 21, 1, 1, 1, 1]}, "no voxels"),
        ({"dim": [0, 40, 33, 21, 1, 1, 1, 1]}, "no voxels|not a NIfTI|3D"),
        ({"dim": [4, 40, 33, 21, 2, 1, 1, 1]}, "3D"),
        ({"sform_code": 1, "srow_x": [3e38, 3e38, 3e38, 0]}, "affine"),
        ({"datatype": 1234}, "not a NIfTI file"),
        ({"vox_offset": 12}, "not a NIfTI file"),
        ({"vox_offset": np.inf}, "header|cut short"),
    ],
)
def test_a_damaged_header_is_one_line_in_words(tmp_path, ct, fields, words):
    path = with_header(tmp_path / "a.nii", ct, **fields)
    with pytest.raises(VolumeError, match=words) as refused:
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
    assert "more than 255 bytes" in errors_of(capsys)[0]


# previews and statistics


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "pixdim"), [((3, 3000, 2), 1.0), ((3000, 3, 2), 1.0), ((20, 20, 3), 1e30)]
)
def test_a_preview_has_a_size_that_is_bounded(folders, run, shape, pixdim):
    from PIL import Image

    affine = np.diag([-1.0, -pixdim, 2.0, 1.0])
    save_nifti(folders[0] / "a_0000.nii", np.zeros(shape, np.int16), affine)
    assert run("--preview", "--quiet") == 0
    with Image.open(folders[1] / "a.png") as picture:
        assert picture.width == 1280
        assert picture.height < 2100


@pytest.mark.slow
def test_a_preview_that_fails_costs_no_case(folders, run, ct, capsys):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    (folders[1] / "a.png").mkdir(parents=True)
    assert run("--preview") == 0
    captured = capsys.readouterr()
    assert "warning: " in captured.err and "no preview: Is a directory" in captured.err
    assert nibabel.load(folders[1] / "a.nii.gz").shape == ct.shape


# what counts as done


def damaged_label_maps(good, other):
    whole = good.read_bytes()
    yield "empty", b""
    yield "cut", whole[:-20]
    yield "check sum", whole[:-6] + bytes([whole[-6] ^ 255]) + whole[-5:]
    yield "foreign", other.read_bytes()
    yield "text", b"mine"


@pytest.mark.slow
def test_only_whole_label_maps_of_the_volume_count_as_done(folders, run, ct, tmp_path):
    inputs, outputs = folders
    source = save_nifti(inputs / "a_0000.nii.gz", ct)
    assert run("--quiet") == 0
    good = (outputs / "a.nii.gz").read_bytes()
    other = tmp_path / "other.nii.gz"
    volume = read_volume(save_nifti(tmp_path / "b.nii.gz", ct[:, :, :5]))
    write_label_map(other, np.zeros(volume.voxels.shape, np.uint8), volume)
    for what, content in damaged_label_maps(outputs / "a.nii.gz", other):
        (outputs / "a.nii.gz").write_bytes(content)
        assert run("--keep-existing", "--quiet") == 0, what
        assert (outputs / "a.nii.gz").read_bytes() == good, what
    assert why_not_label_map_of(outputs / "a.nii.gz", read_header(source)) == ""
    moved = np.array(RAS_AFFINE)
    moved[0, 3] += 5
    save_nifti(source, ct, moved)
    assert "affine" in why_not_label_map_of(outputs / "a.nii.gz", read_header(source))


def test_a_folder_in_the_place_of_a_label_map_is_not_done(folders, run, ct, capsys):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    (folders[1] / "a.nii.gz").mkdir(parents=True)
    assert run("--keep-existing", "--quiet") == 1
    assert "Is a directory" in errors_of(capsys)[0]


# the phase log


def test_a_phase_log_that_cannot_be_written_is_a_warning(folders, run, ct, monkeypatch, capsys):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    monkeypatch.setenv("ABDOSEG_PHASE_LOG", "/dev/full")
    assert run() == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "no phases" in line]
    assert len(warnings) == 1


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
    for name, reason in {
        "dangling": "leads nowhere", "loop": "leads nowhere", "upper": "lower case",
        "folder_0000": "a folder", "pipe": "not a regular file", "good.nii:": "a folder",
        "good.nii.gz": "leads nowhere", "/_0000": "before _0000",
    }.items():  # fmt: skip
        assert sum(name in line and reason in line for line in lines) == 1, name
    assert len(lines) == 8
    assert [path.name for path in outputs.iterdir()] == ["good.nii.gz"]
    assert [path.name for path in find_cases(inputs)] == ["good_0000.nii.gz"]


# wrong usage without a traceback


def test_what_is_no_volume_beside_volumes_is_one_line(folders, run, ct, capsys):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    for count, name in enumerate(("pair.hdr", "pair.img", "c.nii.zst", "b.mha", ".hidden")):
        assert run() == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
        assert len(lines) == min(count, 1) and all(f" {count} entr" in line for line in lines)
        (folders[0] / name).touch()


def test_inputs_that_are_no_files(tmp_path, run, capsys):
    os.mkfifo(tmp_path / "pipe.nii.gz")
    for source, words in (
        (tmp_path / "pipe.nii.gz", "not a regular file"),
        ("/dev/null", "not a .nii.gz"),
        ("/" + "n" * 300 + ".nii.gz", "File name too long"),
        ("/" + "n/" * 4000, "File name too long"),
    ):
        assert wrong_usage(run, "--input", str(source))
        assert words in capsys.readouterr().err.splitlines()[-1]


def weights_with(path, stored=None, **fields):
    network = trained_looking_network()
    save_weights(path, network.state_dict(), metadata_of(network))
    from safetensors import safe_open
    from safetensors.numpy import save_file

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

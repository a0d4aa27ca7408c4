"""What is found in a folder, what is skipped, and how series are named."""

import os
import re
import zipfile

import numpy as np
import pydicom
import pytest
from conftest import SHARED
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import (
    ComprehensiveSRStorage,
    MRImageStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from inference.dicom.discovery import find_series
from inference.volume import VolumeError
from tests.inference.dicom.writing import (
    HU,
    IDENTITY,
    Grid,
    enhanced,
    found_in,
    header,
    single_slices,
    to_bytes,
    write,
)

WORDS = {word.lower() for value in IDENTITY.values() for word in re.findall(r"\w+", value)}


def mixture(folder):
    """Two series of CT in one tree, and all that comes beside them."""
    write(folder / "DOE^JANE" / "a", single_slices(HU))
    (folder / "DOE^JANE" / "b").mkdir()
    for index, dataset in enumerate(single_slices(HU, seed=1)):
        name = f"DOE_JANE.CT.{index}.IMA" if index % 2 else f"{index}"
        (folder / "DOE^JANE" / "b" / name).write_bytes(to_bytes(dataset))
    scout = single_slices(HU[:1], seed=2, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    (dose,) = single_slices(HU[:1], seed=5, ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"])
    del dose.ImagePositionPatient
    others = [
        header(seed, SOPClassUID=kind, SOPInstanceUID=generate_uid(), Modality=modality)
        for seed, kind, modality in (
            (3, SecondaryCaptureImageStorage, "OT"),
            (4, ComprehensiveSRStorage, "SR"),
            (6, MRImageStorage, "MR"),
        )
    ]
    write(folder / "DOE^JANE" / "others", [*scout, dose, *others])
    (folder / "readme.txt").write_text("Jane Doe", encoding="utf-8")
    (folder / "empty").touch()
    (folder / ".hidden").write_bytes(b"x" * 200)
    return folder


@pytest.mark.parametrize(
    ("names", "pattern"), [("number", r"3_Abdomen_5_0_[0-9a-f]{8}"), ("uid", r"ct_[0-9a-f]{16}")]
)
def test_names_and_lines_do_not_identify_the_patient(tmp_path, names, pattern):
    series, skipped = find_series(mixture(tmp_path), names)
    assert [len(one.slices) for one in series] == [6, 6]
    assert all(re.fullmatch(pattern, one.name) for one in series)
    assert len({one.name for one in series}) == 2
    lines = "\n".join([*skipped, *map(str, series)]).lower()
    kinds = (SecondaryCaptureImageStorage, ComprehensiveSRStorage, MRImageStorage)
    assert all(kind.name.lower() in lines for kind in kinds) and len(skipped) == 6
    assert not [word for word in WORDS if word in lines]


@pytest.mark.parametrize(
    "description", ["Abdomen 5.0äDoe", "xDOEx Abdomen 5.0", "JaneDoe_Abdomen_5"]
)
def test_a_name_within_a_word_is_found(tmp_path, description):
    write(tmp_path, single_slices(HU, PatientName="Doe^Jane", SeriesDescription=description))
    (series,) = found_in(tmp_path)
    assert "Abdomen" in series.name
    assert not re.search("doe|jane", series.name.lower())


def test_a_series_has_the_same_name_whatever_lies_beside_it(tmp_path):
    paths = write(tmp_path / "x" / "one", single_slices(HU))
    (alone,) = found_in(tmp_path / "x")
    found_in(tmp_path / "x" / "two", single_slices(HU, seed=1))
    assert alone.name in {one.name for one in found_in(tmp_path / "x")}
    assert [one.name for one in find_series(paths[0])[0]] == [alone.name]


def test_folders_name_series_if_asked_to(tmp_path):
    write(tmp_path / "p1" / "ct", single_slices(HU))
    write(tmp_path / "p2", single_slices(HU, seed=1) + single_slices(HU, seed=2))
    names = [one.name for one in find_series(tmp_path, "folder")[0]]
    assert names[0] == "p1_ct"
    assert all(re.fullmatch(r"p2_[0-9a-f]{8}", name) for name in names[1:]) and len(set(names)) == 3


def test_a_zip_is_a_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for index, dataset in enumerate(single_slices(HU)):
            archive.writestr(f"study/{index}", to_bytes(dataset))
        archive.writestr("__MACOSX/._0", b"x")
        archive.writestr("note.txt", b"x")
    (plain,) = found_in(tmp_path / "plain", single_slices(HU))
    ((packed,), _) = find_series(tmp_path / "s.zip")
    assert packed.name == plain.name
    np.testing.assert_array_equal(packed.read().voxels, plain.read().voxels)
    (tmp_path / "bad.zip").write_bytes(b"PK\3\4 nothing")
    series, skipped = find_series(tmp_path)
    assert len(series) == len(skipped) == 1
    with pytest.raises(ValueError, match="zip"):
        find_series(tmp_path / "bad.zip")


def test_links_are_followed_once_and_what_is_no_file_fails(tmp_path):
    root, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    write(root / "one", single_slices(HU))
    write(elsewhere, single_slices(HU, seed=1))
    (root / "linked").symlink_to(elsewhere)
    (root / "one" / "parent").symlink_to(root)
    (elsewhere / "again").symlink_to(elsewhere)
    assert [(len(one.slices), one.notes) for one in found_in(root)] == [(6, []), (6, [])]
    (root / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(root / "pipe")
    (root / "damaged").write_bytes(bytes(128) + b"DICM" + bytes(range(200)))
    *series, bad = found_in(root)
    assert [len(one.read().voxels) for one in series] == [6, 6]
    with pytest.raises(VolumeError, match="3"):
        bad.read()


@pytest.mark.parametrize("syntax", ["implicit", "explicit", "big-endian"])
@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        (None, None),
        ("SpecificCharacterSet", "ISO_IR 100"),
        ("ImageType", ["ORIGINAL", "PRIMARY", "AXIAL"]),
        ("InstanceCreationDate", "20200101"),
        (0x00080000, 300),
        (0x00080001, 4000),
        (0x00080006, []),
    ],
)
def test_files_without_preamble_may_begin_with_any_element_of_group_8(
    tmp_path, syntax, keyword, value
):
    for number, dataset in enumerate(single_slices(HU, ImageType=None)):
        del dataset.file_meta
        if isinstance(keyword, int):
            dataset.add_new(keyword, "SQ" if value == [] else "UL", value)
        elif keyword:
            setattr(dataset, keyword, value)
        content = DicomBytesIO()
        content.is_implicit_VR = syntax == "implicit"
        content.is_little_endian = syntax != "big-endian"
        order = "<" if content.is_little_endian else ">"
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(f"{order}i2").tobytes()
        write_dataset(content, dataset)
        (tmp_path / f"{number}.ima").write_bytes(content.getvalue())
    ((series,), skipped) = find_series(tmp_path)
    np.testing.assert_array_equal(series.read().voxels - 1024, HU)
    assert skipped == []


def test_copies_count_once(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, single_slices(HU))
    (series,) = found_in(tmp_path)
    assert len(series.slices) == 6 and re.findall(r"\d+", *series.notes) == ["6"]
    changed = single_slices(HU)
    changed[1].ImagePositionPatient = [0, 0, 7]
    write(tmp_path / "c", changed)
    with pytest.raises(VolumeError, match="SOPInstanceUID"):
        found_in(tmp_path)[0].read()


def two_acquisitions(step):
    grid = Grid(position=np.array([-30, -40, 100 + step]))
    second = single_slices(HU + 1, grid, AcquisitionNumber=2)
    for dataset in second:
        dataset.SOPInstanceUID = generate_uid()
    return single_slices(HU) + second


def test_acquisitions_at_one_place_are_two_cases(tmp_path):
    series = found_in(tmp_path, two_acquisitions(0))
    assert [one.name[-3:] for one in series] == ["_a1", "_a2"]
    for one, wanted in zip(series, (HU, HU + 1), strict=True):
        np.testing.assert_array_equal(one.read().voxels - 1024, wanted)
    (tmp_path / "IM0002").unlink()
    (series,) = found_in(tmp_path)
    with pytest.raises(VolumeError, match="acquisitions: 2"):
        series.read()


@pytest.mark.parametrize(("step", "numbers"), [(24, []), (2, ["1", "6", "2", "6"])])
def test_interleaved_acquisitions_are_noted(tmp_path, step, numbers):
    (series,) = found_in(tmp_path, two_acquisitions(step))
    wanted = np.concatenate([HU, HU + 1])
    if numbers:
        wanted[::2], wanted[1::2] = HU, HU + 1
    np.testing.assert_array_equal(series.read().voxels - 1024, wanted)
    assert re.findall(r"\d+", " ".join(series.notes)) == numbers


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "FrameOfReferenceUID", "PatientID"])
def test_two_patients_under_one_series_uid_are_refused(tmp_path, keyword):
    datasets = single_slices(HU)
    for dataset in datasets[4:]:
        setattr(dataset, keyword, "1.2.3")
    (series,) = found_in(tmp_path, datasets)
    with pytest.raises(VolumeError, match=r"2\D+4\D+2\D"):
        series.read()
    for index, dataset in enumerate(datasets):
        setattr(dataset, keyword, f"1.2.{index}")
    (series,) = found_in(tmp_path, datasets)
    assert len(series.read().voxels) == 6 and len(series.notes) == 1


def test_a_series_uid_of_each_slice_is_noted_once(tmp_path):
    datasets = single_slices(HU)
    for index, dataset in enumerate(datasets):
        dataset.SeriesInstanceUID += f".{index}"
    series = found_in(tmp_path, datasets)
    (note,) = (note for one in series for note in one.notes)
    assert len(series) == 6 and "6" in note


@pytest.mark.parametrize(("count", "named"), [(3_000_000_000, "NumberOfFrames"), (7, "6.*7")])
def test_frames_and_functional_groups_must_agree(tmp_path, count, named):
    dataset = enhanced(HU)
    dataset.NumberOfFrames = count
    with pytest.raises(VolumeError, match=named):
        found_in(tmp_path, [dataset])[0].read()


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "dicom").is_dir(), reason="real DICOM beside the project")
def test_real_series_lie_where_their_files_say():
    """Against positions and values that pydicom reads of each file alone."""
    series, _ = find_series(SHARED / "dicom" / "hcc_006")
    assert len(series) == 2
    for one in series:
        volume = one.read()
        for place, found in enumerate(one.stack.slices):
            dataset = pydicom.dcmread(found.file.path)
            np.testing.assert_array_equal(volume.voxels[place], dataset.pixel_array)
            left, posterior, superior = dataset.ImagePositionPatient
            corner = volume.affine @ (0, 0, place, 1)
            np.testing.assert_allclose(corner[:3], (-left, -posterior, superior), atol=1e-3)

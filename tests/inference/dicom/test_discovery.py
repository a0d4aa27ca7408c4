"""What is found in a folder, what is left out, and what it is called."""

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
    CTImageStorage,
    MRImageStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from inference.dicom.discovery import find_series
from inference.volume import VolumeError
from tests.inference.dicom.writing import Grid, enhanced, header, single_slices, to_bytes, write

HU = np.random.default_rng(6).integers(-1000, 1500, (4, 6, 5), np.int16)
IDENTITY = ("doe", "jane", "mrn4711", "4711", "19700101", "acc0815", "roe", "richard")


def instance(sop_class, **attributes):
    dataset = header(**attributes)
    dataset.SOPClassUID = sop_class
    dataset.SOPInstanceUID = generate_uid()
    return dataset


def mixture(folder):
    """Two series of CT in one tree, and all that comes beside them."""
    write(folder / "DOE^JANE" / "a", single_slices(HU))
    (folder / "DOE^JANE" / "b").mkdir()
    for index, dataset in enumerate(single_slices(HU, seed=1)):
        name = f"DOE_JANE.CT.{index}.IMA" if index % 2 else f"{index}"
        (folder / "DOE^JANE" / "b" / name).write_bytes(to_bytes(dataset))
    scout = single_slices(HU[:1], seed=2, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    capture = instance(SecondaryCaptureImageStorage, seed=3, Modality="OT")
    dose = single_slices(HU[:1], seed=5, ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"])
    del dose[0].ImagePositionPatient
    report = instance(ComprehensiveSRStorage, seed=4, Modality="SR", SeriesDescription="Doe J")
    magnetic = instance(MRImageStorage, seed=6, Modality="MR")
    write(folder / "DOE^JANE" / "others", [*scout, capture, *dose, report, magnetic])
    (folder / "readme.txt").write_text("Jane Doe")
    (folder / "empty").touch()
    (folder / ".hidden").write_bytes(b"x" * 200)
    return folder


@pytest.mark.parametrize("names", ["number", "uid"])
def test_series_are_told_apart_and_tell_nothing_of_the_patient(tmp_path, names):
    found = find_series(mixture(tmp_path), names)
    assert [len(one.slices) for one in found.series] == [4, 4]
    assert len({one.name for one in found.series}) == 2
    pattern = r"3_Abdomen_5_0_[0-9a-f]{8}" if names == "number" else r"ct_[0-9a-f]{16}"
    for one in found.series:
        assert re.fullmatch(pattern, one.name)
    assert len(found.left_out) == 6
    lines = "\n".join([*found.left_out, *map(str, found.series)]).lower()
    for word in ("scout", "secondary capture", "no place in the patient", "comprehensive sr"):
        assert word in lines
    assert "mr image storage, not ct" in lines and "2 files, not dicom" in lines
    for word in IDENTITY:
        assert word not in lines


def test_a_series_keeps_its_name_whatever_lies_beside_it(tmp_path):
    paths = write(tmp_path / "x" / "one", single_slices(HU))
    alone = [one.name for one in find_series(tmp_path / "x").series]
    write(tmp_path / "x" / "two", single_slices(HU, seed=1))
    assert set(alone) < {one.name for one in find_series(tmp_path / "x").series}
    assert [one.name for one in find_series(paths[0]).series] == alone


def test_folders_name_series_when_asked_to(tmp_path):
    write(tmp_path / "p1" / "ct", single_slices(HU))
    write(tmp_path / "p2", single_slices(HU, seed=1) + single_slices(HU, seed=2))
    names = [one.name for one in find_series(tmp_path, "folder").series]
    assert names[0] == "p1_ct"
    assert all(re.fullmatch(r"p2_[0-9a-f]{8}", name) for name in names[1:]) and len(set(names)) == 3


def test_a_zip_is_a_folder(tmp_path):
    datasets = single_slices(HU)
    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for index, dataset in enumerate(datasets):
            archive.writestr(f"study/{index}", to_bytes(dataset))
        archive.writestr("__MACOSX/._0", b"x")
        archive.writestr("note.txt", b"x")
    write(tmp_path / "plain", datasets)
    (plain,), (packed,) = (find_series(tmp_path / name).series for name in ("plain", "s.zip"))
    assert packed.name == plain.name
    np.testing.assert_array_equal(packed.read().voxels, plain.read().voxels)
    (tmp_path / "bad.zip").write_bytes(b"PK\3\4 nothing")
    found = find_series(tmp_path)
    assert len(found.series) == 1 and "2 files, not DICOM" in found.left_out
    with pytest.raises(ValueError, match="zip that cannot be opened"):
        find_series(tmp_path / "bad.zip")


def test_copies_count_once(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, single_slices(HU))
    (series,) = find_series(tmp_path).series
    assert len(series.slices) == 4 and "4 files were there twice" in series.notes[0]
    changed = single_slices(HU)
    changed[1].ImagePositionPatient = [0, 0, 7]
    write(tmp_path / "c", changed)
    (series,) = find_series(tmp_path).series
    with pytest.raises(VolumeError, match="two slices that differ have the same UID"):
        series.read()


def two_acquisitions(step):
    first = single_slices(HU, AcquisitionNumber=1)
    grid = Grid(position=np.array([-30, -40, 100 + step]))
    second = single_slices(HU + 1, grid, AcquisitionNumber=2)
    for dataset in second:
        dataset.SOPInstanceUID = generate_uid()
    return first + second


def test_acquisitions_at_one_place_are_two_cases(tmp_path):
    write(tmp_path / "s", two_acquisitions(0))
    series = find_series(tmp_path).series
    assert [one.name[-3:] for one in series] == ["_a1", "_a2"]
    for one, wanted in zip(series, (HU, HU + 1), strict=True):
        volume = one.read()
        np.testing.assert_array_equal(volume.slope * volume.voxels + volume.intercept, wanted)


def test_acquisitions_that_go_on_are_one_volume(tmp_path):
    write(tmp_path / "s", two_acquisitions(16))
    (series,) = find_series(tmp_path).series
    np.testing.assert_array_equal(series.read().voxels - 1024, np.concatenate([HU, HU + 1]))


def test_acquisitions_that_make_no_volumes_are_refused(tmp_path):
    datasets = two_acquisitions(0)
    del datasets[2]
    write(tmp_path / "s", datasets)
    (series,) = find_series(tmp_path).series
    with pytest.raises(VolumeError, match="it holds 2 acquisitions"):
        series.read()


def test_headers_that_cannot_be_read_are_a_case_that_fails(tmp_path):
    write(tmp_path / "s", single_slices(HU))
    (tmp_path / "damaged").write_bytes(bytes(128) + b"DICM" + bytes(range(200)))
    good, bad = find_series(tmp_path).series
    assert "1 file" in bad.refusal
    good.read()


def test_links_are_followed_once_and_what_is_no_file_fails(tmp_path):
    root, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    write(root / "one", single_slices(HU))
    write(elsewhere, single_slices(HU, seed=1))
    (root / "linked").symlink_to(elsewhere)
    (root / "one" / "parent").symlink_to(root)
    (elsewhere / "again").symlink_to(elsewhere)
    series = find_series(root).series
    assert [(len(one.slices), one.notes) for one in series] == [(4, []), (4, [])]
    (root / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(root / "pipe")
    *series, bad = find_series(root).series
    assert len(series) == 2 and "2 files" in bad.refusal
    with pytest.raises(VolumeError):
        bad.read()


@pytest.mark.parametrize("syntax", ["implicit", "explicit", "big-endian"])
@pytest.mark.parametrize(
    "first",
    [
        *({"SpecificCharacterSet": "ISO_IR 100"}, {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}),
        *({"InstanceCreationDate": "20200101"}, {"SOPClassUID": CTImageStorage}, {0x00080000: 300}),
        *({0x00080001: 4000}, {0x00080006: []}),
    ],
    ids=str,
)  # fmt: skip
def test_files_without_preamble_may_begin_with_any_element_of_group_8(tmp_path, syntax, first):
    for number, dataset in enumerate(single_slices(HU)):
        del dataset.file_meta, dataset.ImageType
        for tag, value in first.items():
            if isinstance(tag, int):
                dataset.add_new(tag, "SQ" if value == [] else "UL", value)
            else:
                setattr(dataset, tag, value)
        content = DicomBytesIO()
        content.is_implicit_VR = syntax == "implicit"
        content.is_little_endian = syntax != "big-endian"
        if not content.is_little_endian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()
        write_dataset(content, dataset)
        (tmp_path / f"{number}.ima").write_bytes(content.getvalue())
    found = find_series(tmp_path)
    (series,) = found.series
    np.testing.assert_array_equal(series.read().voxels - 1024, HU)
    assert found.left_out == []


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "FrameOfReferenceUID", "PatientID"])
def test_two_patients_under_one_series_uid_are_refused(tmp_path, keyword):
    first = single_slices(HU)
    second = single_slices(HU[:3], Grid(position=np.array([-30, -40, 116])), seed=1)
    for dataset in second:
        for name in ("SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"):
            setattr(dataset, name, getattr(first[0], name))
        setattr(dataset, keyword, "1.2.3")
    write(tmp_path / "s", first + second)
    (series,) = find_series(tmp_path).series
    with pytest.raises(VolumeError, match=r"2\D+4\D+3\D"):
        series.read()
    for index, dataset in enumerate(first + second):
        setattr(dataset, keyword, f"1.2.{index}")
    write(tmp_path / "s", first + second)
    (series,) = find_series(tmp_path).series
    assert len(series.read().voxels) == 7 and len(series.notes) == 1


@pytest.mark.parametrize("step", [2, 16])
def test_interleaved_acquisitions_are_noted(tmp_path, step):
    write(tmp_path / "s", two_acquisitions(step))
    (series,) = find_series(tmp_path).series
    assert len(series.read().voxels) == 8
    assert len(series.notes) == (step == 2)
    if step == 2:
        assert re.findall(r"\d+", series.notes[0]) == ["1", "4", "2", "4"]


def test_a_series_uid_of_each_slice_is_noted_once(tmp_path):
    datasets = single_slices(HU)
    for index, dataset in enumerate(datasets):
        dataset.SeriesInstanceUID += f".{index}"
    write(tmp_path / "s", datasets)
    series = find_series(tmp_path).series
    (note,) = (note for one in series for note in one.notes)
    assert len(series) == 4 and "4" in note


def test_frames_and_functional_groups_must_agree(tmp_path):
    dataset = enhanced(HU)
    dataset.NumberOfFrames = 3_000_000_000
    write(tmp_path / "s", [dataset])
    (series,) = find_series(tmp_path).series
    assert "number of frames missing or wrong" in series.refusal
    dataset.NumberOfFrames = 5
    write(tmp_path / "s", [dataset])
    (series,) = find_series(tmp_path).series
    assert "4 functional groups for 5 frames" in series.refusal


@pytest.mark.slow
def test_real_series_lie_where_their_files_say():
    """Against positions and values that pydicom tells of each file alone."""
    folder = SHARED / "dicom" / "hcc_006"
    if not folder.is_dir():
        return
    series = find_series(folder).series
    assert len(series) == 2
    for one in series:
        volume = one.read()
        for place, found in enumerate(one.stack.slices):
            dataset = pydicom.dcmread(found.file.path)
            np.testing.assert_array_equal(volume.voxels[place], dataset.pixel_array)
            left, posterior, superior = dataset.ImagePositionPatient
            corner = volume.affine @ (0, 0, place, 1)
            np.testing.assert_allclose(corner[:3], (-left, -posterior, superior), atol=1e-3)

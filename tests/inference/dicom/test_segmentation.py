"""DICOM SEG against readers of its own kind: dciodvfy, highdicom and dcmqi (DCMTK)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from conftest import metadata_of, trained_looking_network
from pydicom.datadict import dictionary_VR
from pydicom.sr._concepts_dict import concepts

from inference import __version__
from inference.dicom.codes import label_code
from inference.dicom.discovery import find_series
from inference.dicom.segmentation import SegmentationWriter
from inference.labels import LABEL_NAMES
from inference.provenance import Provenance
from inference.weights import save_weights
from tests.inference.dicom.writing import Grid, enhanced, single_slices, write

KINDS = ("binary", "deflated", "labelmap")
HU = np.zeros((6, 12, 10), np.int16)
LABELS = np.zeros(HU.shape, np.uint8)  # SPL
LABELS[1:4, 2:6, 1:5] = 1
LABELS[3:5, 7:9, 2:7] = 13
LABELS[5, 10, 9] = 14
LABELS[0, 0, 0] = 8


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "of-a-test.safetensors"
    network = trained_looking_network()
    save_weights(path, network.state_dict(), metadata_of(network))
    return path


def made(folder, weights, kind="binary", labels=LABELS, datasets=None, change=bytes):
    """A SEG of a series written for it: its path and the series."""
    for path in write(folder / "series", datasets or single_slices(HU)):
        path.write_bytes(change(path.read_bytes()))
    (series,) = find_series(folder / "series").series
    path = folder / f"{kind}.seg.dcm"
    series.seg_notes = SegmentationWriter(kind, Provenance(lambda: [weights])).write(
        path, labels, series.read(), series
    )
    return path, series


@pytest.fixture(scope="module", params=KINDS)
def seg(request, weights, tmp_path_factory):
    return made(tmp_path_factory.mktemp(request.param), weights, request.param)


def test_highdicom_reads_the_same_labels_at_the_same_places(seg):
    path, series = seg
    found = highdicom.seg.segread(path)
    volume = found.get_volume(
        combine_segments=True, relabel=False, allow_missing_positions=True, rescale_fractional=False
    )
    names = {0: "background"} | {
        number: found.get_segment_description(number).segment_label
        for number in found.segment_numbers
    }
    wanted = np.array(LABEL_NAMES)[LABELS]
    # Planes that are empty at the ends are no part of a SEG: find each by where it lies.
    read = np.vectorize(names.get)(volume.array)
    for plane in range(len(read)):
        corner = volume.affine @ (plane, 0, 0, 1)
        place = [np.allclose(corner[:3], one.position, atol=1e-4) for one in series.stack.slices]
        np.testing.assert_array_equal(read[plane], wanted[place.index(True)])
    assert (wanted[: len(read)] != "background").any(axis=(1, 2)).all()
    np.testing.assert_allclose(volume.spacing, (4, 1.25, 1.5), rtol=1e-6)


def dcmqi(path, folder):
    tool = Path(sys.executable).with_name("segimage2itkimage")
    command = [tool, "--inputDICOM", path, "--outputDirectory", folder, "--outputType", "nii"]
    done = subprocess.run([*command, "--mergeSegments"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (segments,) = json.loads((folder / "meta.json").read_text())["segmentAttributes"]
    return nibabel.load(folder / "1.nii.gz"), segments


def test_dcmqi_reads_the_same_labels_at_the_same_places(seg, tmp_path):
    path, series = seg
    image, segments = dcmqi(path, tmp_path)
    numbers = {one["labelID"]: one for one in segments}
    assert {one["SegmentLabel"] for one in segments} == {
        "liver", "left kidney", "tumor", "left adrenal gland"
    }  # fmt: skip
    np.testing.assert_allclose(image.affine, series.stack.affine, atol=1e-4)
    stored = np.asanyarray(image.dataobj).astype(int).transpose(2, 1, 0)
    names = np.full(max(numbers) + 1, "background", object)
    for number, one in numbers.items():
        names[number] = one["SegmentLabel"]
    np.testing.assert_array_equal(names[stored], np.array(LABEL_NAMES)[LABELS])
    kidney = next(one for one in segments if one["SegmentLabel"] == "left kidney")
    assert kidney["SegmentedPropertyTypeCodeSequence"]["CodeValue"] == "64033007"
    side = kidney["SegmentedPropertyTypeModifierCodeSequence"]
    assert (side[0] if isinstance(side, list) else side)["CodeMeaning"] == "Left"


def dciodvfy_errors(path):
    done = subprocess.run(["dciodvfy", path], capture_output=True, text=True)
    assert "Segmentation" in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if "Error" in line]


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="make test installs dicom3tools")
@pytest.mark.parametrize("source", ["slices", "enhanced", "nothing labelled"])
def test_dciodvfy_finds_no_error(weights, tmp_path, source):
    """It knows neither deflated data sets nor the label map form, which is younger than it is."""
    labels = LABELS * (source != "nothing labelled")
    datasets = [enhanced(HU, order=[3, 0, 5, 1, 4, 2])] if source == "enhanced" else None
    path, _ = made(tmp_path, weights, labels=labels, datasets=datasets)
    assert dciodvfy_errors(path) == []


def test_it_says_what_it_is_of_and_what_made_it(seg, weights):
    path, series = seg
    found, source = pydicom.dcmread(path), single_slices(HU)[0]
    for keyword in (
        *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID"),
        *("StudyDate", "AccessionNumber", "FrameOfReferenceUID", "ReferringPhysicianName"),
    ):
        assert found[keyword].value == source[keyword].value
    assert found.SeriesInstanceUID != source.SeriesInstanceUID
    (refers,) = found.ReferencedSeriesSequence
    assert refers.SeriesInstanceUID == series.uid
    instances = {one.ReferencedSOPInstanceUID for one in refers.ReferencedInstanceSequence}
    assert instances == {one.uid for one in series.slices}
    segment = next(one for one in found.SegmentSequence if one.SegmentLabel == "tumor")
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("abdoseg", __version__)
    assert "of-a-test.safetensors" in str(algorithm.AlgorithmParameters)


@pytest.mark.parametrize("tilted", [False, True])
def test_frames_lie_where_their_slices_do(weights, tmp_path, tilted):
    grid = Grid(orientation=(1, 0, 0, 0, 0.96, -0.28)) if tilted else Grid()
    path, series = made(tmp_path, weights, datasets=single_slices(HU, grid))
    found = pydicom.dcmread(path)
    pixels = found.pixel_array
    labels = [one.SegmentLabel for one in found.SegmentSequence]
    seen = 0
    for frame, group in enumerate(found.PerFrameFunctionalGroupsSequence):
        position = group.PlanePositionSequence[0].ImagePositionPatient
        place = next(
            index
            for index, one in enumerate(series.stack.slices)
            if np.allclose(one.position, np.array(position, float), atol=1e-5)
        )
        label = labels[group.SegmentIdentificationSequence[0].ReferencedSegmentNumber - 1]
        wanted = LABELS[place] == LABEL_NAMES.index(label)
        np.testing.assert_array_equal(pixels[frame], wanted)
        seen += int(wanted.sum())
    assert seen == (LABELS > 0).sum()


def test_frames_of_an_enhanced_series_lie_where_its_frames_do(weights, tmp_path):
    path, series = made(tmp_path, weights, datasets=[enhanced(HU, order=[3, 0, 5, 1, 4, 2])])
    image, segments = dcmqi(path, tmp_path)
    np.testing.assert_allclose(image.affine, series.stack.affine, atol=1e-4)
    stored = np.asanyarray(image.dataobj).transpose(2, 1, 0)
    liver = next(one["labelID"] for one in segments if one["SegmentLabel"] == "liver")
    np.testing.assert_array_equal(stored == liver, LABELS == 1)


def test_codes_are_those_of_the_standards_tables():
    known = {
        (value, meaning.lower())
        for entry in concepts["SCT"].values()
        for value, (meaning, _) in entry.items()
    }
    for label in range(1, 15):
        code = label_code(label)
        assert (code.kind.value, code.kind.meaning.lower()) in known
        assert code.category.value in ("91723000", "49755003")  # CID 7150
        organ = LABEL_NAMES[label].removeprefix("right ").removeprefix("left ")
        wanted = "neoplasm" if organ == "tumor" else organ
        assert code.kind.meaning.lower() == wanted
        side = LABEL_NAMES[label].split()[0]
        assert (code.side.meaning.lower() if code.side else "") == (
            side if side in ("right", "left") else ""
        )


def test_colours_come_back_as_those_of_the_contact_sheets():
    from skimage.color import lab2rgb

    from inference.colours import LABEL_COLOURS

    for label in range(1, 15):
        low, a, b = label_code(label).colour.value
        lab = np.array([low / 65535 * 100, a / 65535 * 255 - 128, b / 65535 * 255 - 128])
        np.testing.assert_allclose(lab2rgb(lab) * 255, LABEL_COLOURS[label], atol=2.5)


def test_a_damaged_seg_is_known(seg, tmp_path, weights):
    path, series = seg
    writer = SegmentationWriter(path.name.split(".")[0], Provenance(lambda: [weights]))
    assert writer.damage(path, series) == ""
    other = "labelmap" if path.name != "labelmap.seg.dcm" else "binary"
    assert SegmentationWriter(other, Provenance(lambda: [weights])).damage(path, series)
    content, broken = path.read_bytes(), tmp_path / "b.seg.dcm"
    for part in (content[: len(content) // 2], content[:-9], b"", b"nothing"):
        broken.write_bytes(part)
        assert writer.damage(broken, series)
    write(tmp_path / "other", single_slices(HU, seed=9))
    (stranger,) = find_series(tmp_path / "other").series
    assert writer.damage(path, stranger) == "it is of another series"
    assert writer.damage(tmp_path, series) == "it is no file"


NAMES = {
    "Japanese": (["", "ISO 2022 IR 87"], "", "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    "Korean": (["", "ISO 2022 IR 149"], "", "Hong^Gildong=洪^吉洞=홍^길동"),
    "Korean, one value": (["", "ISO 2022 IR 149"], "ISO_IR 149", "Hong^Gildong=洪^吉洞=홍^길동"),
    "single ISO 2022": ("ISO 2022 IR 100", "", "Müßter^Zoë"),
    "misspelt": ("ISO_IR 144", "ISO_IR144", "Люкceмбypг"),
    "empty": ("ISO_IR 100", "", "Müßter^Zoë"),
    "Chinese": ("GB18030", "", "Wang^XiaoDong=王^小东"),
    "UTF-8": ("ISO_IR 192", "UTF-8", "王^小東=王^小東"),
}  # fmt: skip


@pytest.mark.parametrize(("charset", "instead", "name"), NAMES.values(), ids=NAMES)
def test_a_name_survives_in_every_character_set(weights, tmp_path, charset, instead, name):
    """Also where the source names its character set in another way, or not at all."""
    datasets = single_slices(HU, SpecificCharacterSet=charset, PatientName=name)
    item = pydicom.Dataset()
    item.PatientID, item.TypeOfPatientID, item.IssuerOfPatientID = "1", "TEXT", name.split("^")[0]
    for dataset in datasets:
        dataset.OtherPatientIDsSequence = [item]
    said = "\\".join([charset] if isinstance(charset, str) else charset).encode()
    path, _ = made(tmp_path, weights, datasets=datasets, change=lambda content: content.replace(
        said + b" " * (len(said) % 2), instead.encode().ljust(len(said) + len(said) % 2), 1
    ) if instead else content)  # fmt: skip
    found = pydicom.dcmread(path)
    assert str(found.PatientName) == name
    (other,) = found.OtherPatientIDsSequence
    assert other.IssuerOfPatientID == name.split("^")[0]
    dcmqi(path, tmp_path)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        *(("PatientBirthDate", value) for value in ("00000000", "1980", "ANON", "20230231")),
        *(("PatientSex", value) for value in ("female", "X", "1")),
        *(("StudyDate", value) for value in ("2024-01-02", "20240102101112")),
        *(("StudyTime", value) for value in ("10:11:12", "noon")),
        *(("PatientAge", "57"), ("PatientWeight", "heavy"), ("PatientIdentityRemoved", "Yes")),
    ],
)
def test_what_cannot_be_parsed_is_empty_and_named(weights, tmp_path, keyword, value):
    datasets = single_slices(HU)
    for dataset in datasets:
        dataset.add(pydicom.DataElement(keyword, "LO", value))
        dataset[keyword].VR = dictionary_VR(keyword)
    path, series = made(tmp_path, weights, datasets=datasets)
    found = pydicom.dcmread(path)
    assert not found.get(keyword)
    assert found.PatientName == datasets[0].PatientName
    (note,) = series.seg_notes
    assert keyword in note and value not in note
    assert not shutil.which("dciodvfy") or dciodvfy_errors(path) == []


def test_slices_of_many_frames_of_reference_get_one(weights, tmp_path):
    datasets = single_slices(HU)
    for index, dataset in enumerate(datasets):
        dataset.FrameOfReferenceUID += f".{index}"
    path, series = made(tmp_path, weights, datasets=datasets)
    assert len(series.notes) == 1
    first = series.stack.slices[0].frame_of_reference
    assert pydicom.dcmread(path).FrameOfReferenceUID == first

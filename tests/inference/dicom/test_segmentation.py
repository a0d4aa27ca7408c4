"""DICOM SEG against other readers: dciodvfy, highdicom and dcmqi (DCMTK)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from conftest import metadata_of, trained_looking_network
from pydicom.datadict import dictionary_VR
from pydicom.sr._concepts_dict import concepts
from pydicom.valuerep import PersonName
from skimage.color import lab2rgb

from inference import __version__
from inference.dicom.segmentation import SegmentationWriter
from inference.labels import LABEL_NAMES, TUMOR
from inference.network.weights import save_weights
from inference.records.colours import LABEL_COLOURS
from inference.records.provenance import Provenance
from tests.inference.dicom.writing import Grid, enhanced, found_in, item_of, single_slices, write

KINDS = ("binary", "deflated", "labelmap")
HU = np.zeros((6, 12, 10), np.int16)
LABELS = np.zeros(HU.shape, np.uint8)  # SPL
LABELS[1:4, 2:6, 1:5] = 1
LABELS[3:5, 7:9, 2:7] = 13
LABELS[5, 10, 9] = 14
LABELS[0, 0, 0] = 8
NAMES = np.array(LABEL_NAMES)
SHUFFLED = [3, 0, 5, 1, 4, 2]


@pytest.fixture(scope="module")
def provenance(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "of-a-test.safetensors"
    network = trained_looking_network()
    save_weights(path, network.state_dict(), metadata_of(network))
    return Provenance(lambda: [path])


def made(folder, provenance, datasets=None, kind="binary", labels=LABELS):
    """A SEG of a series that is written for it: its path, the series and the writer's notes."""
    (series,) = found_in(folder / "series", datasets or single_slices(HU))
    path = folder / f"{kind}.seg.dcm"
    notes = SegmentationWriter(kind, provenance).write(path, labels, series.read(), series)
    return path, series, notes


@pytest.fixture(scope="module", params=KINDS)
def seg(request, provenance, tmp_path_factory):
    return made(tmp_path_factory.mktemp(request.param), provenance, kind=request.param)[:2]


def places(series, positions):
    """Indices of slices by their positions, LPS."""
    known = np.array([one.position for one in series.stack.slices])
    off = np.abs(known - np.array(positions, float)[:, None]).max(axis=2)
    assert off.min(axis=1).max() < 1e-4
    return off.argmin(axis=1)


def assert_dcmqi_reads(path, series, folder):
    """Check labels and places as dcmqi reads them; return its segments."""
    tool = Path(sys.executable).with_name("segimage2itkimage")
    command = [tool, "--inputDICOM", path, "--outputDirectory", folder, "--outputType", "nii"]
    done = subprocess.run([*command, "--mergeSegments"], capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (segments,) = json.loads((folder / "meta.json").read_bytes())["segmentAttributes"]
    image = nibabel.load(folder / "1.nii.gz")
    np.testing.assert_allclose(image.affine, series.stack.affine, atol=1e-4)
    names = np.full(256, "background", object)
    for one in segments:
        names[one["labelID"]] = one["SegmentLabel"]
    stored = np.asanyarray(image.dataobj).astype(int).transpose(2, 1, 0)
    np.testing.assert_array_equal(names[stored], NAMES[LABELS])
    return segments


def test_dcmqi_reads_the_same_labels_at_the_same_places(seg, tmp_path):
    segments = assert_dcmqi_reads(*seg, tmp_path)
    kidney = next(one for one in segments if one["SegmentLabel"] == "left kidney")
    assert kidney["SegmentedPropertyTypeCodeSequence"]["CodeValue"] == "64033007"
    side = kidney["SegmentedPropertyTypeModifierCodeSequence"]
    assert (side[0] if isinstance(side, list) else side)["CodeMeaning"] == "Left"


def test_frames_of_an_enhanced_series_lie_where_its_frames_do(provenance, tmp_path):
    path, series, _ = made(tmp_path, provenance, [enhanced(HU, order=SHUFFLED)])
    assert_dcmqi_reads(path, series, tmp_path)


def dciodvfy_errors(path):
    done = subprocess.run(["dciodvfy", path], capture_output=True, text=True)
    assert "Segmentation" in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if "Error" in line]


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="make test installs dicom3tools")
@pytest.mark.parametrize("source", ["slices", "enhanced", "nothing labelled"])
def test_dciodvfy_finds_no_error(provenance, tmp_path, source):
    """It knows neither deflated data sets nor the label map form, which is younger than it is."""
    labels = LABELS * (source != "nothing labelled")
    datasets = [enhanced(HU, order=SHUFFLED)] if source == "enhanced" else None
    assert dciodvfy_errors(made(tmp_path, provenance, datasets, labels=labels)[0]) == []


def test_it_names_its_source_and_what_made_it(seg):
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
    segment = found.SegmentSequence[-1]
    assert segment.SegmentLabel == "tumor" and segment.SegmentAlgorithmType == "AUTOMATIC"
    algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("abdoseg", __version__)
    assert "of-a-test.safetensors" in str(algorithm.AlgorithmParameters)


def test_frames_of_a_tilted_gantry_lie_where_its_slices_do(provenance, tmp_path):
    """Also where every slice has a frame of reference of its own: the SEG has the first."""
    datasets = single_slices(HU, Grid(orientation=(1, 0, 0, 0, 0.96, -0.28)))
    for index, dataset in enumerate(datasets):
        dataset.FrameOfReferenceUID += f".{index}"
    path, series, _ = made(tmp_path, provenance, datasets)
    found = pydicom.dcmread(path)
    assert found.FrameOfReferenceUID == series.stack.slices[0].frame_of_reference
    groups = found.PerFrameFunctionalGroupsSequence
    order = places(series, [one.PlanePositionSequence[0].ImagePositionPatient for one in groups])
    read = np.zeros(LABELS.shape, "U32")
    for place, group, pixels in zip(order, groups, found.pixel_array, strict=True):
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        read[place][pixels > 0] = found.SegmentSequence[number - 1].SegmentLabel
    np.testing.assert_array_equal(read, np.where(LABELS, NAMES[LABELS], ""))


def test_codes_are_of_the_standards_tables_and_colours_of_the_contact_sheets(provenance, tmp_path):
    known = {
        (value, meaning.lower())
        for entry in concepts["SCT"].values()
        for value, (meaning, _) in entry.items()
    }
    every_label = (np.arange(HU.size) % 15).reshape(HU.shape).astype(np.uint8)
    segments = pydicom.dcmread(made(tmp_path, provenance, labels=every_label)[0]).SegmentSequence
    for label, (name, segment) in enumerate(zip(LABEL_NAMES[1:], segments, strict=True), start=1):
        assert segment.SegmentLabel == name
        (kind,) = segment.SegmentedPropertyTypeCodeSequence
        side = name.split()[0] if name.startswith(("right ", "left ")) else ""
        sides = kind.get("SegmentedPropertyTypeModifierCodeSequence", ())
        assert "".join(one.CodeMeaning.lower() for one in sides) == side
        wanted = "neoplasm" if label == TUMOR else name.removeprefix(side).strip()
        assert kind.CodeMeaning.lower() == wanted and (kind.CodeValue, wanted) in known
        (category,) = segment.SegmentedPropertyCategoryCodeSequence
        assert category.CodeValue in ("91723000", "49755003")  # CID 7150
        low, a, b = segment.RecommendedDisplayCIELabValue
        lab = np.array([low / 65535 * 100, a / 65535 * 255 - 128, b / 65535 * 255 - 128])
        np.testing.assert_allclose(lab2rgb(lab) * 255, LABEL_COLOURS[label], atol=2.5)


def test_a_damaged_or_other_seg_is_stale(seg, tmp_path, provenance):
    path, series = seg
    kind = path.name.split(".")[0]
    writer = SegmentationWriter(kind, provenance)
    assert writer.why_stale(path, series) == ""
    other = "binary" if kind == "labelmap" else "labelmap"
    assert SegmentationWriter(other, provenance).why_stale(path, series)
    content, broken = path.read_bytes(), tmp_path / "b.seg.dcm"
    for part in (content[: len(content) // 2], content[:-9], b"", b"nothing"):
        broken.write_bytes(part)
        assert writer.why_stale(broken, series)
    (stranger,) = found_in(tmp_path / "other", single_slices(HU, seed=9))
    assert writer.why_stale(path, stranger) and writer.why_stale(tmp_path, series)


LATIN, JAPANESE, KOREAN = ["iso8859"], ["iso8859", "iso2022_jp"], ["iso8859", "euc_kr"]
CHARACTER_SETS = [
    (["", "ISO 2022 IR 87"], JAPANESE, "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    (["", "ISO 2022 IR 149"], KOREAN, "Hong^Gildong=洪^吉洞=홍^길동"),
    *(
        (charset, KOREAN, "Hong^Gildong=洪^吉洞=홍^길동")
        for charset in ("ISO_IR 149", "ISO 2022 IR 149")
    ),
    *((charset, LATIN, "Müßter^Zoë") for charset in ("ISO 2022 IR 100", "ISO_IR100", "", None)),
    ("ISO IR 144", ["iso8859_5"], "Люкceмбypг"),
    ("GB18030", ["GB18030"], "Wang^XiaoDong=王^小东"),
    *((charset, ["UTF8"], "王^小東=王^小東") for charset in ("ISO_IR 192", "UTF-8")),
    ("ISO_IR 100", LATIN, "Müßter^Zoë\\Muster^Mia"),
    ("ISO_IR 192", LATIN, "Müßter^Zoë"),  # wrong
]


@pytest.mark.parametrize(("charset", "codecs", "name"), CHARACTER_SETS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom, which writes the files
def test_a_name_survives_in_every_character_set(provenance, tmp_path, charset, codecs, name):
    """Also where the source misspells its character set, or does not name it."""
    content = b"\\".join(PersonName(one).encode(codecs) for one in name.split("\\"))
    placeholder = "Q" * (len(content) + len(content) % 2)
    sequence = item_of(PatientID="1", TypeOfPatientID="TEXT", IssuerOfPatientID=placeholder)
    attributes = {"SpecificCharacterSet": charset, "PatientName": placeholder}
    datasets = single_slices(HU, OtherPatientIDsSequence=sequence, **attributes)
    for path in write(tmp_path / "s", datasets):
        new = content.ljust(len(placeholder))
        path.write_bytes(path.read_bytes().replace(placeholder.encode(), new))
    (series,) = found_in(tmp_path / "s")
    seg = tmp_path / "a.seg.dcm"
    notes = SegmentationWriter("binary", provenance).write(seg, LABELS, series.read(), series)
    if wrong := charset == "ISO_IR 192" and codecs == LATIN:
        name = "M\ufffd\ufffdter^Zo\ufffd"
    assert ["PatientName" in note for note in notes] == [True] * wrong
    found = pydicom.dcmread(seg)
    for element in (found["PatientName"], found.OtherPatientIDsSequence[0]["IssuerOfPatientID"]):
        values = element.value if element.VM > 1 else [element.value]
        assert "\\".join(map(str, values)) == name
    assert_dcmqi_reads(seg, series, tmp_path)


@pytest.mark.parametrize(
    ("keyword", "value", "legal"),
    [
        *(("PatientBirthDate", value, None) for value in ("00000000", "1980", "ANON", "20230231")),
        *(("PatientSex", value, None) for value in ("female", "X", "1")),
        *(("StudyDate", value, None) for value in ("2024-01-02", "20240102101112")),
        *(("StudyTime", value, None) for value in ("10:11:12", "noon")),
        ("PatientAge", "57", None),
        ("PatientWeight", "heavy", None),
        ("PatientIdentityRemoved", "Yes", None),
        ("PatientName", "M" * 90 + "^Mia", "M" * 64),
        ("PatientName", "A^B^C^D^E^F=1=2=3", "A^B^C^D^E F=1=2"),
        ("PatientID", "X" * 80, "X" * 64),
        ("AccessionNumber", "one\ttwo", "one two"),
        ("StudyID", "LONGER-THAN-SIXTEEN", "LONGER-THAN-SIXT"),
        ("PatientComments", "c" * 11000, "c" * 10240),
        ("PatientWeight", "70.000000000000001776", "70.0"),
    ],
)
def test_what_is_not_legal_is_empty_or_cut_and_named(provenance, tmp_path, keyword, value, legal):
    datasets = single_slices(HU)
    for dataset in datasets:
        is_name = keyword == "PatientName"  # else as text: pydicom would check it
        dataset.add_new(keyword, "PN" if is_name else "LT", value)
        dataset[keyword].VR = dictionary_VR(keyword)
    path, _, (note,) = made(tmp_path, provenance, datasets)
    found = str(pydicom.dcmread(path).get(keyword) or "")
    assert found == (legal or "")
    assert keyword in note and value not in note
    assert not shutil.which("dciodvfy") or dciodvfy_errors(path) == []


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "FrameOfReferenceUID"])
def test_a_uid_that_is_not_legal_still_refers_to_the_source_and_is_named(
    provenance, tmp_path, keyword
):
    path, _, (note,) = made(tmp_path, provenance, single_slices(HU, **{keyword: "1.2.anon.03"}))
    assert pydicom.dcmread(path)[keyword].value == "1.2.anon.03" and keyword in note

"""Label maps as DICOM SEG, by highdicom: one segment for each label that is there.

A binary SEG is a bit a voxel for each segment, frames that show nothing left out, and is not
compressed: so every viewer and checker reads it. The standard has no picture codec for single bits
that viewers know, but a whole data set may be deflated, which packs it to a hundredth; a label map
SEG always is. Where nothing is labelled there is one segment, of the liver and empty, for a SEG
must have one.
"""

import re
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
from highdicom import AlgorithmIdentificationSequence, PlanePositionSequence
from highdicom.enum import PatientSexValues
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentDescription
from highdicom.sr import CodedConcept
from pydicom import Dataset, config
from pydicom.charset import convert_encodings, python_encoding
from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.multival import MultiValue
from pydicom.sr.codedict import codes
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import DA, DT, TM, validate_value

from inference import __version__
from inference.dicom.codes import label_code
from inference.dicom.series import Series, slices_of_label_map
from inference.dicom.slices import integer
from inference.files import write_atomically
from inference.labels import LABEL_NAMES
from inference.provenance import Provenance
from inference.volume import Volume, VolumeError
from inference.weights import read_metadata

_SEG_CLASSES = {
    "binary": "1.2.840.10008.5.1.4.1.1.66.4",
    "deflated": "1.2.840.10008.5.1.4.1.1.66.4",
    "labelmap": "1.2.840.10008.5.1.4.1.1.66.7",
}
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime"),
)
"""Attributes that every file must have, if empty; not every file does."""
_PARSERS = {"DA": DA, "TM": TM, "DT": DT, "DS": float, "IS": int}


class SegmentationWriter:
    """Writes label maps as DICOM SEG, and knows them again.

    Args:
        kind: "binary", a bit for each segment; "deflated", the same compressed; or "labelmap", a
            byte for all segments, compressed.
        provenance: what makes the label maps.
    """

    def __init__(self, kind: str, provenance: Provenance) -> None:
        self._kind = kind
        self._provenance = provenance

    def write(self, path: Path, label_map: np.ndarray, volume: Volume, series: Series) -> list[str]:
        """Write a label map; the file appears under its name only when it is whole.

        Args:
            path: of the SEG.
            label_map: (slices, rows, columns), SPL, uint8.
            volume: where the label map belongs.
            series: that the volume was read from; its headers are read anew.

        Returns:
            What was wrong with the patient's and study's attributes and is empty in the SEG.

        Raises:
            VolumeError: an attribute that a SEG needs is missing.
            OSError: the file cannot be written, or the series no longer be read.
        """
        labels = slices_of_label_map(label_map, volume)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                segmentation, notes = _segmentation(labels, series, self._kind, self._provenance)
                content = BytesIO()
                if self._kind != "binary":
                    segmentation.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
                pydicom.dcmwrite(content, segmentation, enforce_file_format=True)
            except (VolumeError, OSError, MemoryError):
                raise
            except Exception as error:  # its words may be the patient's
                words = re.findall(r"[A-Z]\w+", str(error))
                named = [type(error).__name__, *filter(tag_for_keyword, words)]
                raise VolumeError(
                    f"no DICOM SEG can be made of its headers ({', '.join(named)})"
                ) from None
        write_atomically(path, content.getvalue())
        return notes

    def damage(self, path: Path, series: Series) -> str:
        """Why a file is no whole SEG of a series, or "" if it is; not what its pixels say."""
        try:
            if not path.is_file():
                return "it is no file"
            found = pydicom.dcmread(path)
            frames, rows, columns = (
                int(found[name].value) for name in ("NumberOfFrames", "Rows", "Columns")
            )
            refers = found.ReferencedSeriesSequence[0]
            instances = {
                item.ReferencedSOPInstanceUID for item in refers.ReferencedInstanceSequence
            }
            if found.SOPClassUID != _SEG_CLASSES[self._kind]:
                return "it is no DICOM SEG of that type"
            segment = found.SegmentSequence[-1]  # a label map's first is the background
            algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
            made_by = f"made by={self._provenance.made_by},weights="
            if made_by not in str(algorithm.AlgorithmParameters):
                return f"it was not made by {self._provenance.made_by}"
            if refers.SeriesInstanceUID != series.uid:
                return "it is of another series"
            if instances != {one.uid for one in series.stack.slices}:
                return "it is of other slices"
            first = series.stack.slices[0]
            bits = frames * rows * columns * int(found.BitsAllocated)
            whole = (
                (rows, columns) == (first.rows, first.columns)
                and frames == len(found.PerFrameFunctionalGroupsSequence)
                and len(found.PixelData) >= -(-bits // 8)
            )
        except Exception as error:
            return f"it cannot be read as DICOM SEG ({type(error).__name__})"
        return "" if whole else "it is not whole"


def _algorithm(provenance: Provenance) -> AlgorithmIdentificationSequence:
    """What made the label map."""
    each = [read_metadata(path) for path in provenance.weights]
    return AlgorithmIdentificationSequence(
        name="abdoseg",
        family=codes.cid7162.ArtificialIntelligence,
        version=__version__,
        source="abdoseg",
        parameters={
            "made by": provenance.made_by,
            "weights": provenance.weights_names.encode("ascii", "replace").decode(),
            "weights SHA-256": provenance.digests,
            "weights exported": "+".join(metadata.date for metadata in each),
            "trained by revision": "+".join(metadata.revision for metadata in each),
        },
    )


def _describe(number: int, label: int, algorithm: AlgorithmIdentificationSequence) -> Dataset:
    """A segment's description."""
    code = label_code(label)
    described = SegmentDescription(
        segment_number=number,
        segment_label=LABEL_NAMES[label],
        segmented_property_category=code.category,
        segmented_property_type=code.kind,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        display_color=code.colour,
    )
    if code.side is not None:
        kind = described.SegmentedPropertyTypeCodeSequence[0]
        side = CodedConcept.from_code(code.side)
        kind.SegmentedPropertyTypeModifierCodeSequence = [side]
    return described


def _encodings(dataset: Dataset) -> list[str]:
    """Return Python's names of a header's character sets, misspelt ones corrected."""
    terms = dataset.get("SpecificCharacterSet") or ""
    corrected = []
    for term in [terms] if isinstance(terms, str) else terms:
        number = "".join(re.findall(r"IR\D*(\d+)\W*$", term, re.IGNORECASE))
        legal = "ISO_IR 192" if number == "192" else f"ISO 2022 IR {number}"
        corrected.append(legal if legal in python_encoding else term)
    return convert_encodings(corrected)


def _check_value(keyword: str, value: object) -> None:
    """Raise ValueError for a value that is not what its attribute's type says, text aside."""
    vr = dictionary_VR(keyword) if keyword else ""
    if keyword == "PatientSex":
        PatientSexValues(value)
    elif vr in _PARSERS:
        _PARSERS[vr](value)
    elif vr in ("AS", "CS"):
        validate_value(vr, value, config.RAISE)


def _make_legal(dataset: Dataset, encodings: list[str]) -> list[str]:
    """Decode a header's text and remove what cannot be parsed.

    Returns:
        Keywords of attributes that were removed, or decoded in part.
    """
    dataset.set_original_encoding(*dataset.original_encoding, encodings)
    wrong = []
    for tag in sorted(dataset.keys()):
        if tag.group >= 0x5200:  # functional groups, which are long and name nobody
            break
        keyword = keyword_for_tag(tag)
        try:
            element = dataset[tag]
            if element.VR == "SQ":
                for item in element.value:
                    own = "SpecificCharacterSet" in item
                    wrong += _make_legal(item, _encodings(item) if own else encodings)
            elif not element.is_empty:
                many = isinstance(element.value, MultiValue)
                for value in element.value if many else [element.value]:
                    _check_value(keyword, value)
                if "\ufffd" in str(element.value):
                    wrong.append(keyword)
        except Exception:
            del dataset[tag]
            wrong.append(keyword)
    if "SpecificCharacterSet" in dataset:
        del dataset.SpecificCharacterSet
    return wrong


def _sources(series: Series) -> tuple[list[Dataset], list[int], list | None]:
    """The headers that the SEG refers to.

    Returns:
        The headers; for each plane of the SEG the slice that it is; and the planes' positions,
        where the headers do not say them in that order.

    Raises:
        VolumeError: highdicom cannot refer to such files.
    """
    slices = series.stack.slices
    files = list(dict.fromkeys(one.file for one in slices))
    headers = []
    for file in files:
        with file.open() as stream:
            header = pydicom.dcmread(stream, stop_before_pixels=True, force=True)
        headers.append(header)
    for keyword in ("FrameOfReferenceUID", "StudyInstanceUID"):
        found = next(filter(None, (header.get(keyword) for header in headers)), None)
        if not found:
            raise VolumeError(f"no DICOM SEG can be made: its files have no {keyword}")
        for header in headers:  # an anonymiser may have given each its own
            setattr(header, keyword, found)
    if len(files) == len(slices):
        return headers, list(range(len(slices))), None
    if len(files) > 1:
        raise VolumeError("no DICOM SEG can be made of a series of several multi-frame files")
    order = sorted(range(len(slices)), key=lambda place: slices[place].frame)
    positions = [
        PlanePositionSequence("PATIENT", image_position=slices[place].position) for place in order
    ]
    return headers, order, positions


def _segmentation(
    labels: np.ndarray, series: Series, kind: str, provenance: Provenance
) -> tuple[Segmentation, list[str]]:
    """The SEG of (slices, rows, columns), in the series' order, and notes."""
    headers, order, positions = _sources(series)
    wrong = _make_legal(headers[0], _encodings(headers[0]))
    headers[0].SpecificCharacterSet = "ISO_IR 192"
    for keyword in _MAY_BE_EMPTY:
        if keyword not in headers[0]:
            setattr(headers[0], keyword, "")
    wrong = [word for word in wrong if word in _MAY_BE_EMPTY or word.startswith("Patient")]
    algorithm = _algorithm(provenance)
    counts = np.bincount(labels.ravel(), minlength=len(LABEL_NAMES))
    present = [label for label in range(1, len(LABEL_NAMES)) if counts[label]] or [1]
    if kind != "labelmap":  # segments must count from 1 without a gap
        numbers = np.zeros(len(LABEL_NAMES), np.uint8)
        numbers[present] = np.arange(1, len(present) + 1)
    else:
        numbers = np.arange(len(LABEL_NAMES), dtype=np.uint8)
    number = integer(headers[0], "SeriesNumber") or 0
    segmentation = Segmentation(
        source_images=headers,
        pixel_array=numbers[labels[order]],
        segmentation_type="LABELMAP" if kind == "labelmap" else "BINARY",
        segment_descriptions=[_describe(int(numbers[one]), one, algorithm) for one in present],
        series_instance_uid=generate_uid(prefix=None),
        series_number=100 * number + 1 if 0 <= number < 10**6 else 9001,
        sop_instance_uid=generate_uid(prefix=None),
        instance_number=1,
        manufacturer="abdoseg",
        manufacturer_model_name="abdoseg",
        software_versions=__version__,
        device_serial_number=provenance.digest[:16],
        content_label="ABDOSEG",
        content_description="Abdominal organs and tumors, by a network; not for diagnosis",
        series_description="abdoseg: organs and tumors",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        plane_positions=positions,
    )
    segmentation.ContentCreatorName = ""  # type 2: nobody, but said
    notes = [f"in the SEG {', '.join(wrong)} is empty or cut: it cannot be parsed"] if wrong else []
    return segmentation, notes

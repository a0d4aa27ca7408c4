"""Write label maps as DICOM SEG, by highdicom: one segment for each label that is there.

A binary SEG has a bit a voxel for each segment, without empty frames, and is not compressed: every
viewer and checker reads it. No image codec for single bits is widely known, but a whole data set
may be deflated, to a hundredth; a label map SEG always is. A SEG must have a segment: of an empty
label map it is the liver, empty.
"""

import math
import re
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
from highdicom import AlgorithmIdentificationSequence, PlanePositionSequence
from highdicom.color import CIELabColor
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentDescription
from highdicom.sr import CodedConcept
from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from pydicom.sr.codedict import codes
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, generate_uid

from .. import __version__
from ..files import write_atomically
from ..labels import LABEL_NAMES, TUMOR
from ..network.weights import read_metadata
from ..records.colours import LABEL_COLOURS
from ..records.provenance import Provenance, same_signature
from ..sources import Source
from ..volume import Volume, VolumeError
from .headers import REFERENCES, correct
from .series import Series
from .slices import integer

_SEG_CLASSES = {
    "binary": "1.2.840.10008.5.1.4.1.1.66.4",
    "deflated": "1.2.840.10008.5.1.4.1.1.66.4",
    "labelmap": "1.2.840.10008.5.1.4.1.1.66.7",
}
_SIDES = {"right": codes.SCT.Right, "left": codes.SCT.Left}


class SegmentationWriter:
    """Writes label maps as DICOM SEG, and checks those that are there.

    Args:
        kind: "binary", a bit for each segment; "deflated", the same compressed; or "labelmap", a
            byte for all segments, compressed.
        provenance: what makes the label maps.
    """

    def __init__(self, kind: str, provenance: Provenance) -> None:
        self._kind = kind
        self._provenance = provenance

    def write(self, path: Path, label_map: np.ndarray, volume: Volume, source: Source) -> list[str]:
        """Write a label map; the file appears under its name only when it is whole.

        Args:
            path: of the SEG.
            label_map: (slices, rows, columns), SPL, uint8.
            volume: that it labels.
            source: the series that it was read from; its headers are read again.

        Returns:
            Notes: which attributes of the patient and the study differ from the series', or are
            not legal.

        Raises:
            VolumeError: an attribute that a SEG needs is missing; the message names it.
            OSError: the file cannot be written, or the series no longer be read.
        """
        series = _series(source)
        labels = volume.as_stored(label_map).transpose(2, 1, 0)  # (slices, rows, columns)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                headers = _headers(series)
                lost = correct(headers[0])
                segmentation = _segmentation(labels, series, headers, self._kind, self._provenance)
                content = BytesIO()
                if self._kind != "binary":
                    segmentation.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
                pydicom.dcmwrite(content, segmentation, enforce_file_format=True)
            except (VolumeError, OSError, MemoryError):
                raise
            except Exception as error:  # its message may quote the patient's attributes
                keywords = filter(tag_for_keyword, re.findall(r"[A-Z]\w+", str(error)))
                named = ", ".join([type(error).__name__, *keywords])
                raise VolumeError(f"no DICOM SEG can be made of its headers ({named})") from None
        write_atomically(path, content.getvalue())
        notes = [f"in the SEG, wrong values are emptied or cut: {', '.join(lost)}"] if lost else []
        if odd := [uid for uid in REFERENCES if not UID(headers[0][uid].value).is_valid]:
            notes.append(f"in the SEG as in the series, no legal UID: {', '.join(odd)}")
        return notes

    def why_stale(self, path: Path, source: Source) -> str:
        """Return why a file is no whole SEG of a series, or ""; its pixels are not checked."""
        try:
            series = _series(source)
            if not path.is_file():
                return "it is no file"
            found, slices = pydicom.dcmread(path), series.stack.slices
            (refers,) = found.ReferencedSeriesSequence
            instances = {one.ReferencedSOPInstanceUID for one in refers.ReferencedInstanceSequence}
            segment = found.SegmentSequence[-1]  # a label map's first is the background
            algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
            found_by = re.findall("made by=(.*?),weights=", algorithm.AlgorithmParameters)
            shape = int(found.NumberOfFrames), int(found.Rows), int(found.Columns)
            bits = math.prod(shape) * int(found.BitsAllocated)
            is_right = {
                "no DICOM SEG of that type": found.SOPClassUID == _SEG_CLASSES[self._kind],
                f"not made by {self._provenance.signature}": any(
                    same_signature(one, self._provenance.signature) for one in found_by
                ),
                "of other slices": refers.SeriesInstanceUID == series.uid
                and instances == {one.uid for one in slices},
                "not whole": shape[1:] == (slices[0].rows, slices[0].columns)
                and shape[0] == len(found.PerFrameFunctionalGroupsSequence)
                and len(found.PixelData) >= -(-bits // 8),
            }
        except Exception as error:
            return f"it cannot be read as DICOM SEG ({type(error).__name__})"
        return next((f"it is {what}" for what, right in is_right.items() if not right), "")


def _series(source: Source) -> Series:
    assert isinstance(source, Series)  # the options refuse a SEG of anything else
    return source


def _algorithm(provenance: Provenance) -> AlgorithmIdentificationSequence:
    """Return what made the label map."""
    each = [read_metadata(path) for path in provenance.weights]
    return AlgorithmIdentificationSequence(
        name="abdoseg",
        family=codes.cid7162.ArtificialIntelligence,
        version=__version__,
        source="abdoseg",
        parameters={
            "made by": provenance.signature,
            "weights": provenance.weights_names.encode("ascii", "replace").decode(),
            "weights SHA-256": provenance.digests,
            "weights exported": "+".join(metadata.date for metadata in each),
            "trained by revision": "+".join(metadata.revision for metadata in each),
        },
    )


def _describe(
    number: int, label: int, algorithm: AlgorithmIdentificationSequence
) -> SegmentDescription:
    """Return a label's description, with SNOMED CT codes of the standard's own tables (PS3.16)."""
    name = LABEL_NAMES[label]
    side, _, organ = name.partition(" ")
    kind = "neoplasm" if label == TUMOR else organ if side in _SIDES else name
    category = "MorphologicallyAbnormalStructure" if label == TUMOR else "AnatomicalStructure"
    described = SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=getattr(codes.SCT, category),
        segmented_property_type=getattr(codes.SCT, kind.title().replace(" ", "")),
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        display_color=CIELabColor.from_rgb(*LABEL_COLOURS[label].tolist()),
    )
    if side in _SIDES:
        (kind_code,) = described.SegmentedPropertyTypeCodeSequence
        code = CodedConcept.from_code(_SIDES[side])
        kind_code.SegmentedPropertyTypeModifierCodeSequence = [code]
    return described


def _headers(series: Series) -> list[Dataset]:
    """Return the headers of a series' files, with the UIDs that they must share.

    Raises:
        VolumeError: highdicom cannot refer to such files.
    """
    headers: list[Dataset] = []
    for file in dict.fromkeys(one.file for one in series.stack.slices):
        with file.open() as stream:
            headers.append(pydicom.dcmread(stream, stop_before_pixels=True, force=True))
    if 1 < len(headers) < len(series.stack.slices):
        raise VolumeError("no DICOM SEG can be made of several files with NumberOfFrames")
    for keyword in REFERENCES:
        uids = [header.get(keyword) for header in headers]
        found = next((uid for uid in uids if uid and isinstance(uid, str)), None)
        if found is None:
            raise VolumeError(f"no DICOM SEG can be made without {keyword}")
        for header in headers:  # an anonymiser may have given each its own
            setattr(header, keyword, found)
    return headers


def _segmentation(
    labels: np.ndarray, series: Series, headers: list[Dataset], kind: str, provenance: Provenance
) -> Segmentation:
    """Return the SEG of labels: (slices, rows, columns), in the series' order."""
    slices = series.stack.slices
    order, positions = list(range(len(slices))), None
    if len(headers) < len(slices):  # frames of one file: in its order
        order = sorted(order, key=lambda place: slices[place].frame)
        positions = [
            PlanePositionSequence("PATIENT", image_position=slices[place].position)
            for place in order
        ]
    algorithm = _algorithm(provenance)
    present = (np.flatnonzero(np.bincount(labels.ravel())[1:]) + 1).tolist() or [1]
    numbers = np.arange(len(LABEL_NAMES), dtype=np.uint8)
    if kind != "labelmap":  # segments must count from 1 without a gap
        numbers[present] = np.arange(1, len(present) + 1)
    number = integer(headers[0], "SeriesNumber") or 0
    name = headers[0].PatientName
    headers[0].PatientName = ""  # highdicom refuses several
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
    segmentation.PatientName = name
    segmentation.ContentCreatorName = ""  # type 2: nobody
    return segmentation

"""Finds the CT series in a folder tree or zip."""

import logging
import os
import re
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pydicom
from pydicom import Dataset
from pydicom.uid import UID

from inference.dicom.naming import IDENTITY, Title, digest, name_cases, secret_words
from inference.dicom.series import Series
from inference.dicom.slices import (
    CT_CLASSES,
    ENHANCED,
    DicomFile,
    Slice,
    SliceError,
    image_types,
    integer,
    slices_of,
    text,
)
from inference.files import file_identity
from inference.volume import VolumeError

_DIRECTORY = "1.2.840.10008.1.3.10"  # an index of a disk
_WANTED = [
    *IDENTITY,
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "Modality"),
    *("FrameOfReferenceUID", "HighBit"),
    *("SeriesNumber", "SeriesDescription", "ImageType", "InstanceNumber", "AcquisitionNumber"),
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated"),
    *("BitsStored", "PixelRepresentation", "NumberOfFrames", "ImagePositionPatient"),
    *("ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]
_PREAMBLE = 132  # bytes, the last four of them "DICM"


@dataclass
class Findings:
    """What was found.

    Attributes:
        series: CT series, sorted by name; those that cannot be read with the reason why.
        left_out: a line for what is no CT series.
    """

    series: list[Series] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass
class _Group:
    """The files of one series."""

    uid: str
    title: Title
    slices: list[Slice] = field(default_factory=list)
    files: int = 0
    refusal: str = ""


def find_series(source: Path, names: str = "number") -> Findings:
    """Find the CT series among the files of a folder and those below it, of a zip, or one file.

    Links to folders are followed, each folder once. Scouts, screen captures and what is no CT are
    left out.

    Args:
        source: folder or file.
        names: "number", "uid" or "folder", as `--names` has them. By "folder", names and lines
            tell of the patient what the folders' names do; otherwise they tell nothing.

    Raises:
        OSError: the folder or zip cannot be read.
        ValueError: it is a zip that cannot be opened.
    """
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # it quotes what it does not like
    warnings.filterwarnings("ignore", module="pydicom")
    found = Findings()
    groups: dict[str, _Group] = {}
    others: dict[tuple[str, str], _Group] = {}
    secret: dict[str, set[str]] = {}  # of every series, whatever is left out of it
    count = Counter()
    for file in _files(source):
        try:
            header = _header(file)
        except Exception:
            count["unreadable"] += 1
            continue
        if header is None:
            count["no DICOM"] += 1
            continue
        uid, kind = text(header, "SeriesInstanceUID"), text(header, "SOPClassUID")
        if kind == _DIRECTORY:
            continue
        if not uid or not kind:
            count["unreadable"] += 1
            continue
        if why := _why_not_ct(header, kind):
            group = others.setdefault((uid, why), _Group(uid, Title(header, file, source)))
        else:
            group = groups.setdefault(uid, _Group(uid, Title(header, file, source)))
            _take(group, file, header)
        group.files += 1
        group.title.secret = secret.setdefault(uid, set())
        group.title.secret |= secret_words(header)
    everybody = set().union(*secret.values())  # lines need not stay the same, as names must
    for (uid, why), group in others.items():
        group.title.secret = everybody
        title = f"{group.title.of(names)}_{digest(uid, names)}"
        found.left_out.append(f"series {title} ({_files_of(group.files)}): {why}")
    if count["no DICOM"]:
        found.left_out.append(f"{_files_of(count['no DICOM'])}, not DICOM")
    for group in groups.values():
        found.series += _cases(group, group.title.of(names))
    name_cases(found.series, names)
    if count["unreadable"]:
        reason = f"{_files_of(count['unreadable'])} cannot be read as DICOM"
        found.series.append(Series("unreadable", "", refusal=reason))
    found.series.sort(key=lambda one: one.name)
    _note_single_slices(found.series)
    return found


def _files_of(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _files(source: Path) -> Iterator[DicomFile]:
    """The files of a folder tree, of zips in it, or one file; in order.

    Raises:
        OSError: the folder cannot be read.
        ValueError: the zip that was named cannot.
    """
    if not source.is_dir():
        yield from _opened(source)
        return

    failed: list[OSError] = []
    seen = {file_identity(source)}
    for folder, folders, names in os.walk(source, onerror=failed.append, followlinks=True):
        for name in sorted(folders):
            identity = file_identity(Path(folder, name))
            if name.startswith((".", "__MACOSX")) or identity in seen:
                folders.remove(name)
            seen.add(identity)
        folders.sort()
        for name in sorted(names):
            if name.startswith("."):
                continue
            try:
                yield from _opened(Path(folder, name))
            except ValueError:
                yield DicomFile(Path(folder, name))  # one file more that is not DICOM
    for error in failed:
        yield DicomFile(Path(error.filename))  # a folder: cannot be read as a file either


def _opened(path: Path) -> Iterator[DicomFile]:
    """A file, or the files in it if it is a zip."""
    if path.suffix.lower() != ".zip" or not path.is_file():
        yield DicomFile(path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.filename)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"a zip that cannot be opened ({type(error).__name__})") from None
    for member in members:
        parts = member.filename.split("/")
        if not member.is_dir() and not any(part.startswith((".", "__MACOSX")) for part in parts):
            yield DicomFile(path, member.filename)


def _header(file: DicomFile) -> Dataset | None:
    """What is needed of a file's header; None if the file is no DICOM.

    Raises:
        Exception: whatever pydicom raises at a damaged header.
    """
    with file.open() as stream:
        start = stream.read(_PREAMBLE)
        if start[128:] != b"DICM" and not _is_element_of_group_2_or_8(start[:8]):
            return None
        stream.seek(0)
        return pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=_WANTED, force=True)


def _is_element_of_group_2_or_8(start: bytes) -> bool:
    """Check for an element's tag, and its VR or length, with which files without preamble begin."""
    if len(start) < 8 or start[:2] not in (b"\2\0", b"\x08\0", b"\0\2", b"\0\x08"):
        return False
    little = start[1] == 0
    length = struct.unpack("<I" if little else ">I", start[4:])[0]
    return length < 1 << 16 or (start[4:6].isalpha() and start[4:6].isupper())


def _why_not_ct(header: Dataset, kind: str) -> str:
    """Why a file is no slice of a CT series, or ""."""
    if kind not in CT_CLASSES:
        name = UID(kind).name
        return "of an unknown kind, not CT" if name == kind else f"{name}, not CT"
    if text(header, "Modality") not in ("CT", ""):
        return "not of modality CT"
    types = image_types(header)
    if "LOCALIZER" in types:
        return "a scout (localizer)"
    if kind not in ENHANCED and "ImagePositionPatient" not in header:
        return "a picture that has no place in the patient, such as a screen capture"
    return ""


def _take(group: _Group, file: DicomFile, header: Dataset) -> None:
    """Put a file's slices into its series."""
    try:
        group.slices += slices_of(file, header)
    except SliceError as error:
        number = integer(header, "InstanceNumber")
        reason = str(error)
        if secret_words(header) & set(re.split(r"\W+", reason.lower())):
            reason = "an attribute has a wrong value"
        group.refusal = group.refusal or f"instance {number}: {reason}"


def _without_copies(slices: list[Slice]) -> tuple[list[Slice], int]:
    """Each slice once, and the number of copies: the same instance in two places.

    Raises:
        VolumeError: two slices that differ have one UID.
    """
    kept: dict[tuple[str, int], Slice] = {}
    for one in slices:
        first = kept.setdefault((one.uid, one.frame), one)
        if first != one:
            raise VolumeError(f"two slices that differ have the same UID, {one.label} is one")
    return list(kept.values()), len(slices) - len(kept)


def _cases(group: _Group, title: str) -> list[Series]:
    """A series as one case, or as several where its acquisitions are volumes each by itself."""
    whole = Series(title, group.uid, group.slices, group.refusal)
    try:
        whole.slices, copies = _without_copies(group.slices)
    except VolumeError as error:
        whole.refusal = whole.refusal or str(error)
        return [whole]
    if copies:
        whole.notes.append(f"{_files_of(copies)} were there twice and are used once")
    if not whole.slices and not whole.refusal:
        whole.refusal = "it has no slices"
    _check_one_patient(whole)
    by_acquisition: dict[int | None, list[Slice]] = {}
    for one in sorted(whole.slices, key=lambda one: one.acquisition or 0):
        by_acquisition.setdefault(one.acquisition, []).append(one)
    if whole.refusal or len(by_acquisition) < 2 or len(whole.slices) < 3 * len(by_acquisition):
        return [whole]
    try:
        _note_interleaved(whole, by_acquisition)
    except VolumeError:
        parts = [
            Series(title, group.uid, slices, notes=list(whole.notes), part=str(abs(number or 0)))
            for number, slices in by_acquisition.items()
        ]
        try:
            for part in parts:
                _ = part.stack
        except VolumeError:
            return [whole]
        return parts
    return [whole]


def _check_one_patient(series: Series) -> None:
    """Refuse slices of several patients, studies or frames of reference under one series UID.

    Where every slice has a value of its own an anonymiser made it: that is noted.
    """
    for what in ("study", "frame_of_reference", "patient"):
        counts = Counter(filter(None, (getattr(one, what) for one in series.slices)))
        name = what.replace("_", " ")
        if len(counts) == len(series.slices) > 2:
            series.notes.append(f"every slice has a {name} of its own: an anonymiser's work?")
        elif len(counts) > 1 and not series.refusal:
            shown = " and ".join(str(count) for _, count in counts.most_common())
            series.refusal = f"its slices differ in {name}: {len(counts)}, of {shown} slices"


def _note_interleaved(series: Series, by_acquisition: dict[int | None, list[Slice]]) -> None:
    """Note acquisitions whose slices lie between each other's and make one grid.

    Raises:
        VolumeError: the slices make no grid.
    """
    numbers = [one.acquisition for one in series.stack.slices if one.acquisition is not None]
    if sum(one != other for one, other in pairwise(numbers)) >= len(set(numbers)):
        shown = " and ".join(
            f"{number} ({len(slices)} slices)" for number, slices in by_acquisition.items()
        )
        series.notes.append(f"acquisitions {shown} are interleaved in one volume")


def _note_single_slices(series: list[Series]) -> None:
    """Note that an anonymiser may have given every slice a series UID of its own."""
    alike: dict[object, list[Series]] = {}
    for one in series:
        if len(one.slices) == 1:
            first = one.slices[0]
            key = first.patient, first.rows, first.columns, first.orientation, first.pixel_mm
            alike.setdefault(key, []).append(one)
    for found in alike.values():
        if len(found) > 2:
            found[0].notes.append(
                f"{len(found)} series of one patient have one slice each: has an anonymiser given "
                "every slice a series UID of its own?"
            )

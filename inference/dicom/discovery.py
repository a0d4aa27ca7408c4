"""Finds the CT series in a folder tree or zip."""

import logging
import os
import re
import stat
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from inference.volume import VolumeError

_DIRECTORY = "1.2.840.10008.1.3.10"  # an index of a disk
_WANTED = [
    *IDENTITY,
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "Modality"),
    *("SeriesNumber", "SeriesDescription", "ImageType", "InstanceNumber", "AcquisitionNumber"),
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated"),
    *("BitsStored", "PixelRepresentation", "NumberOfFrames", "ImagePositionPatient"),
    *("ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]
_PREAMBLE = 132  # bytes, the last four of them "DICM"
_LARGEST_MEMBER = 4 << 30  # of a zip


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

    Links to folders are not followed. Scouts, screen captures and what is no CT are left out.

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
    for file, size in _files(source):
        try:
            header = _header(file, size)
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
        reason = f"{_files_of(count['unreadable'])} of DICOM whose header cannot be read"
        found.series.append(Series("unreadable", "", refusal=reason))
    found.series.sort(key=lambda one: one.name)
    return found


def _files_of(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _files(source: Path) -> Iterator[tuple[DicomFile, int]]:
    """The files of a folder tree, of zips in it, or one file; in order, with their sizes.

    Raises:
        OSError: the folder cannot be read.
        ValueError: the zip that was named cannot.
    """
    if not source.is_dir():
        yield from _opened(source)
        return

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(source, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            if name.startswith("."):
                continue
            try:
                yield from _opened(Path(folder, name))
            except ValueError:
                yield DicomFile(Path(folder, name)), 0  # one file more that is not DICOM


def _opened(path: Path) -> Iterator[tuple[DicomFile, int]]:
    """A file, or the files in it if it is a zip; nothing for what is no regular file."""
    try:
        found = path.stat()
    except OSError:
        return
    if not stat.S_ISREG(found.st_mode):
        return
    if path.suffix.lower() != ".zip":
        yield DicomFile(path), found.st_size
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.filename)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"a zip that cannot be opened ({type(error).__name__})") from None
    for member in members:
        parts = member.filename.split("/")
        if not member.is_dir() and not any(part.startswith((".", "__MACOSX")) for part in parts):
            yield DicomFile(path, member.filename), member.file_size


def _header(file: DicomFile, size: int) -> Dataset | None:
    """What is needed of a file's header; None if the file is no DICOM.

    Raises:
        Exception: whatever pydicom raises at a damaged header.
    """
    if size > _LARGEST_MEMBER and file.member:
        raise SliceError("more than a file of a zip may hold")
    with file.open() as stream:
        start = stream.read(_PREAMBLE)
        # Without a preamble, as older devices write them: a first element of group 2 or 8.
        if start[128:] != b"DICM" and start[:4] not in (
            b"\2\0\0\0",
            b"\x08\0\5\0",
            b"\x08\0\x08\0",
        ):
            return None
        stream.seek(0)
        return pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=_WANTED, force=True)


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
        group.refusal = group.refusal or f"instance {number}: {error}"


def _without_copies(slices: list[Slice]) -> tuple[list[Slice], int]:
    """Each slice once, and the number of copies: the same instance in two places.

    Raises:
        VolumeError: two slices that differ have one UID.
    """
    kept: dict[tuple[str, int], Slice] = {}
    for one in slices:
        first = kept.setdefault((one.uid, one.frame), one)
        if vars(first) | {"file": None} != vars(one) | {"file": None}:
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
    by_acquisition: dict[str, list[Slice]] = {}
    for one in whole.slices:
        by_acquisition.setdefault(one.acquisition, []).append(one)
    if whole.refusal or len(by_acquisition) < 2 or len(whole.slices) < 3 * len(by_acquisition):
        return [whole]
    try:
        _ = whole.stack
    except VolumeError:
        parts = [
            Series(title, group.uid, slices, part=re.sub(r"[^0-9]", "", number) or "0")
            for number, slices in sorted(by_acquisition.items())
        ]
        try:
            for part in parts:
                _ = part.stack
        except VolumeError:
            return [whole]
        return parts
    return [whole]

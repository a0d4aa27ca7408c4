"""Damaged DICOM series through finding and reading, each outcome put into a class."""

import shutil
import warnings
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from inference.dicom.discovery import find_series
from inference.dicom.series import Series
from inference.files import one_line
from tests.hostile.campaign import OK, REFUSED
from tests.inference.dicom.writing import enhanced, recoded, single_slices, to_bytes

_SYNTAXES = (ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless)
_SYNTAXES += (JPEGLSLossless, JPEGLosslessSV1, JPEG2000Lossless)
_WILD = ("", "0", "-1", "1e30", "nan", "inf", "-5", "7\\8", "Doe^Jane", "9" * 16, "1\n2", "\\\\")
_IDENTITY = ("doe", "jane", "mrn4711", "acc0815", "roe", "richard")


def whole_series(rng: np.random.Generator, folder: Path) -> tuple[list[Dataset], np.ndarray]:
    """Return a good series in any form, and its HU: (slices, rows, columns)."""
    hu = rng.integers(-1000, 1500, (5, 12, 10), np.int16)
    if rng.random() < 0.15:
        return [enhanced(hu)], hu
    datasets = single_slices(hu)
    if rng.random() < 0.6:
        syntax = _SYNTAXES[rng.integers(len(_SYNTAXES))]
        datasets = [recoded(one, syntax, folder) for one in datasets]
    return datasets, hu


def _set_wild_value(dataset: Dataset, rng: np.random.Generator) -> None:
    """Replace an attribute's value by a wild one, or remove the attribute."""
    elements = [one for one in dataset if one.tag.group != 0x7FE0]
    element = elements[rng.integers(len(elements))]
    if rng.random() < 0.3:
        del dataset[element.tag]
    elif element.VR == "US":
        element.value = int(rng.choice([0, 1, 2, 3, 7, 11, 65535]))
    elif element.VR != "SQ":
        element.VR, element._value = "UN", _WILD[rng.integers(len(_WILD))].encode()


def damaged(content: bytes, dataset: Dataset, rng: np.random.Generator) -> bytes:
    """Return one file's content, damaged in one or two ways."""
    for _ in range(int(rng.integers(1, 3))):
        kind = rng.integers(7)
        if kind == 0 and content:
            content = content[: int(rng.integers(len(content)))]
        elif kind == 1:
            content += bytes(rng.integers(0, 256, int(rng.integers(1, 2000)), np.uint8))
        elif kind in (2, 3):
            try:
                _set_wild_value(dataset, rng)
                content = to_bytes(dataset)
            except Exception:  # pydicom does not write everything
                continue
        elif content:
            changed = bytearray(content)
            ends = {4: (0, 400), 5: (0, len(content)), 6: (len(content) - 200, len(content))}[kind]
            for place in rng.integers(max(0, ends[0]), min(ends[1], len(content)), 6):
                changed[place] = int(rng.integers(256))
            content = bytes(changed)
    return content


def outcome(seed: int, number: int, folder: Path) -> tuple[str, str]:
    """Return a class, `OK` and `REFUSED` being the good ones, of a damaged series, and its lines.

    A good series lies beside it, and must be read.
    """
    rng = np.random.default_rng((seed, number))
    good_hu = rng.integers(-1000, 1500, (3, 6, 5), np.int16)
    good = single_slices(good_hu, seed=1)
    root = folder / "tree"
    root.mkdir()
    try:
        datasets, hu = whole_series(rng, folder)
        hit = int(rng.integers(len(datasets)))
        intact = {  # HU and position by UID
            one.SOPInstanceUID: (hu[place], list(map(float, one.ImagePositionPatient)))
            for place, one in enumerate(datasets)
            if place != hit
        }
        for place, dataset in enumerate([*datasets, *good]):
            content = to_bytes(dataset)
            if place == hit:
                content = damaged(content, dataset, rng)
            (root / f"{place}").write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _judge(root, good[0].SeriesInstanceUID, good_hu, intact)
    finally:
        shutil.rmtree(root)


def _judge(root: Path, good: str, good_hu: np.ndarray, intact: dict) -> tuple[str, str]:
    try:
        found, lines = find_series(root)
    except Exception as error:
        return f"finding escaped: {type(error).__name__}", str(error)
    verdict, seen = REFUSED, False
    for series in found:
        if series.uid == good or {one.uid for one in series.slices} & set(intact):
            lines.append(str(series))  # whose other files name the patient as well
        try:
            volume = series.read()
        except (ValueError, OSError) as error:
            if series.uid == good:
                return "the good series was refused", one_line(error)
            lines.append(one_line(error))
            continue
        except Exception as error:
            return f"reading escaped: {type(error).__name__}", str(error)
        lines += series.notes
        hu = volume.slope * volume.voxels.astype(float) + volume.intercept
        if series.uid == good:
            seen = np.array_equal(hu, good_hu)
            continue
        verdict = OK
        if wrong := _why_wrong(series, volume.affine, hu, intact):
            return "read wrong", wrong
    if not seen:
        return "the good series was read wrong", ""
    # Of a series in one file, nothing but that file holds the patient's name.
    identity = _IDENTITY if intact else _IDENTITY[2:]
    for line in lines:
        if "\n" in line or not line.isprintable() or len(line) > 300:
            return "more than a line", line
        if any(word in line.lower() for word in identity):
            return "the patient is named", line
    return verdict, "; ".join(lines)


def _why_wrong(series: Series, affine: np.ndarray, hu: np.ndarray, intact: dict) -> str:
    """Return what is wrong with the slices of files that were not damaged, or ""."""
    for place, one in enumerate(series.stack.slices):
        if one.uid not in intact or hu.shape[1:] != (12, 10):
            continue
        wanted, position = intact[one.uid]
        if not np.array_equal(hu[place], wanted):
            return f"other values in {one.label}"
        corner = affine @ (0, 0, place, 1)
        if np.abs(corner[:3] * (-1, -1, 1) - position).max() > 0.2:
            return f"{one.label} lies elsewhere"
    return ""

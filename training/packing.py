"""Packed data sets: 8-bit PNG files that need no header library, small enough to be carried.

    PACKED/part-1/cases.json        as of any data set, and under "packed" the rest
    PACKED/part-1/NAME-1.png        HU: slices one below the other, each pixel an index of `levels`
    PACKED/part-1/NAME-labels-1.png labels in our numbers

Volumes are clipped to the recipe's `clip_hu` and cropped to the body in plane. A volume of at most
256 different HU is stored exactly, another in 256 even levels (2.5 HU apart from -400 to 240).
"""

import json
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from inference.files import write_atomically
from inference.volume import VolumeError
from training import TrainingError
from training.cases import CachedVolume, CaseFiles

LARGEST_FILE, LARGEST_PART = 15_000_000, 45 * 2**20
_LARGEST_IMAGE = 1 << 26  # pixels; above some 90 million Pillow suspects an attack
_AIR_BELOW_HU, _MARGIN = -300, 4


def body_box(hu: np.ndarray, labels: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and columns that show tissue or labels, and some air, which edges repeat."""
    shown = np.any((hu > _AIR_BELOW_HU) | (labels > 0), axis=0)
    found = ndimage.find_objects(shown.astype(np.uint8))
    rows, columns = found[0] if found else (slice(0, size) for size in shown.shape)
    rows, columns = (
        slice(max(part.start - _MARGIN, 0), part.stop + _MARGIN) for part in (rows, columns)
    )
    return rows, columns


def _encoded(array: np.ndarray) -> list[bytes]:
    """Return an array (slices, rows, columns), uint8, as PNG files of whole slices."""
    content = BytesIO()
    if array.size <= _LARGEST_IMAGE or len(array) == 1:
        image = Image.fromarray(array.reshape(-1, array.shape[2]))
        image.save(content, "PNG", compress_level=9)
        if content.tell() <= LARGEST_FILE or len(array) == 1:
            return [content.getvalue()]
    half = len(array) // 2
    return _encoded(array[:half]) + _encoded(array[half:])


def read_packed(packed: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Read a packed case by what `cases.json` has of it; returns what `read_case` does.

    Raises:
        VolumeError: a file is missing or damaged.
    """
    about = {**packed}
    folder, levels, _ = (about.pop(name) for name in ("folder", "levels", "clip_hu"))
    arrays = []
    for kind in ("images", "labels"):
        array, start = np.empty(about["shape"], np.uint8), 0
        for name in about.pop(kind):
            try:
                with Image.open(folder / name) as image:
                    part = np.asarray(image).reshape(-1, *array.shape[1:])
                array[start : start + len(part)] = part
            except (OSError, ValueError, SyntaxError) as error:
                raise VolumeError(f"{name}: missing or damaged ({error})") from error
            start += len(part)
        arrays.append(array)
    codes, labels = arrays
    return np.array(levels, np.int16)[codes], labels, about


def check_clip(cases: list[CaseFiles], clip_hu: tuple[float, float] | None) -> None:
    """Raise TrainingError where HU that a recipe or weights would see were lost in packing."""
    low, high = clip_hu or (-np.inf, np.inf)
    for case in cases:
        least, most = case.packed["clip_hu"] if case.packed else (-np.inf, np.inf)
        if low < least or high > most:
            raise TrainingError(
                f"{case.name} is packed within {least:g} to {most:g} HU, and clip_hu is "
                f"{clip_hu or 'none'}: pack it again"
            )


@dataclass
class Packer:
    """Writes packed cases into parts of `LARGEST_PART`; a larger case has a part of its own."""

    output: Path
    clip_hu: tuple[float, float]
    step: float = 0.0  # least distance of two levels, HU; 0 takes all that 8 bits hold
    # Of each part its bytes and its `cases.json`.
    parts: list[tuple[int, dict[str, dict[str, Any]]]] = field(default_factory=list)

    def _pack(
        self, hu: np.ndarray, labels: np.ndarray
    ) -> tuple[list[bytes], list[bytes], dict[str, Any]]:
        """Return PNG files of the HU and of the labels, and what `read_packed` needs besides."""
        rows, columns = body_box(hu, labels)
        low, high = self.clip_hu
        hu = np.clip(hu[:, rows, columns], low, high)
        levels = np.unique(hu)
        if self.step or len(levels) > 256:
            step = max(self.step, (high - low) / 255)
            hu = np.rint(np.rint((hu - low) / step) * step + low).clip(low, high)
            levels = np.unique(hu)
        codes = np.searchsorted(levels, hu).astype(np.uint8)
        labels = np.ascontiguousarray(labels[:, rows, columns])
        about = {"shape": hu.shape, "levels": levels.astype(int).tolist(), "clip_hu": self.clip_hu}
        return _encoded(codes), _encoded(labels), about

    def add(self, case: CaseFiles) -> None:
        """Pack a case into the first part that has space for it.

        Raises:
            VolumeError: it cannot be read, or nothing in it is labelled.
            OSError: a file cannot be written.
        """
        from training.cache import read_case  # which reads packed cases by this module

        hu, labels, known = read_case(case)
        annotated = case.annotated or CachedVolume.of(hu, labels, known).present
        if not annotated:
            raise VolumeError("nothing is labelled")
        *files, more = self._pack(hu, labels)
        names = [
            [f"{case.name}{suffix}-{index}.png" for index, _ in enumerate(kind, 1)]
            for suffix, kind in zip(("", "-labels"), files, strict=True)
        ]
        about = {
            "annotated_labels": annotated,
            "patient": case.patient,
            "split": "left_out" if case.left_out else "train",
            "slices": "stack" if case.stack else "volume",
            "window_hu": case.window_hu,
            "label_quality": "expert" if case.expert else "model",
            "packed": {**known, **more, "images": names[0], "labels": names[1]},
        }
        size = sum(map(len, files[0] + files[1])) + len(json.dumps({case.name: about})) + 2
        numbers = (n for n, (used, _) in enumerate(self.parts) if used + size <= LARGEST_PART)
        number = next(numbers, len(self.parts))
        if number == len(self.parts):
            self.parts.append((0, {}))
        used, described = self.parts[number]
        part = self.output / f"part-{number + 1}"
        part.mkdir(parents=True, exist_ok=True)
        for file, content in zip(names[0] + names[1], files[0] + files[1], strict=True):
            write_atomically(part / file, content)
        described[case.name] = about
        write_atomically(part / "cases.json", json.dumps(described))
        self.parts[number] = used + size, described

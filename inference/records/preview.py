"""A contact sheet: slices of a volume with its label map over them."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..files import printable, write_atomically
from ..labels import LABEL_NAMES
from ..volume import Volume
from .colours import LEGEND_COLOURS, overlay

_TILE_COLUMNS = 320
_TILES = (3, 4)  # rows, columns of the sheet
_TITLE_HEIGHT, _LEGEND_HEIGHT = 26, 52
_TEXT_PIXELS = 14
_BODY_HU = -300.0  # above lung and air
_TABLE_SHARE = 0.02  # of a row's pixels that may be tissue between body and table
_MARGIN = 0.03  # around the body, as a part of it
_BODY_PIXELS = 512  # rows and columns at most in which the body is searched


def _shown_slices(label_map: np.ndarray, count: int) -> np.ndarray:
    """Return indices of `count` slices, highest first, spread over what is labelled, or all."""
    labelled = np.flatnonzero(label_map.any(axis=(1, 2)))
    first, last = (labelled[0], labelled[-1]) if labelled.size else (0, len(label_map) - 1)
    return np.unique(np.linspace(first, last, count).round().astype(int))[::-1]


def _tile_size(height_mm: float, width_mm: float) -> tuple[int, int]:
    """Return columns and rows of a tile: true proportions, at most twice as high as wide."""
    return _TILE_COLUMNS, round(_TILE_COLUMNS * min(max(height_mm / width_mm, 1 / 16), 2.0))


def _longest_run(inside: np.ndarray) -> slice:
    """Return the longest run of True, with a margin; everything where there is none."""
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    if not edges.size:
        return slice(0, len(inside))
    starts, stops = edges[::2], edges[1::2]
    longest = np.argmax(stops - starts)
    margin = 1 + round(_MARGIN * (stops[longest] - starts[longest]))
    return slice(max(0, starts[longest] - margin), min(len(inside), stops[longest] + margin))


def _body(volume: Volume, shown: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and columns of the patient in the slices shown, without table and air."""
    size = volume.voxels.shape[1:]
    row_step, column_step = (-(-length // _BODY_PIXELS) for length in size)
    voxels = volume.voxels[:, ::row_step, ::column_step]
    tissue = np.zeros(voxels.shape[1:], bool)
    for index in shown:
        tissue |= volume.slope * voxels[index] + volume.intercept > _BODY_HU
    # Between body and table there are rows of air, or of no more than the table's padding.
    rows = _longest_run(tissue.mean(axis=1) > _TABLE_SHARE)
    columns = _longest_run(tissue[rows].mean(axis=0) > _TABLE_SHARE)
    return (
        slice(rows.start * row_step, min(rows.stop * row_step, size[0])),
        slice(columns.start * column_step, min(columns.stop * column_step, size[1])),
    )


def write_preview(path: Path, label_map: np.ndarray, volume: Volume, title: str) -> None:
    """Write a PNG of up to twelve slices, from the head's end down, in their true proportions.

    The slices are cropped to the body. As in every axial picture the patient's right is on the
    left, marked by R and L. The label map is (slices, rows, columns), SPL, uint8.

    Raises:
        OSError: the file cannot be written.
    """
    shown = _shown_slices(label_map, _TILES[0] * _TILES[1])
    body = _body(volume, shown)
    rows, columns = (part.stop - part.start for part in body)
    _, row_mm, column_mm = volume.spacing
    size = _tile_size(rows * row_mm, columns * column_mm)
    # Coarser voxels suffice for a tile: a slice of any size takes little memory.
    steps = (max(1, rows // (2 * size[1])), max(1, columns // (2 * size[0])))
    seen = tuple(slice(part.start, part.stop, step) for part, step in zip(body, steps, strict=True))
    lines = -(-len(shown) // _TILES[1])
    height = _TITLE_HEIGHT + lines * size[1] + _LEGEND_HEIGHT
    sheet = Image.new("RGB", (_TILES[1] * size[0], height))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_TEXT_PIXELS)

    def write(place: tuple[int, int], text: str, anchor: str = "la") -> None:
        draw.text(place, text, fill="white", font=font, anchor=anchor, stroke_width=1,
                  stroke_fill="black")  # fmt: skip

    write((8, 6), printable(title))
    for tile, index in enumerate(shown):
        left, top = tile % _TILES[1] * size[0], _TITLE_HEIGHT + tile // _TILES[1] * size[1]
        hu = volume.slope * volume.voxels[(index, *seen)].astype(np.float32) + volume.intercept
        picture = Image.fromarray(overlay(hu, label_map[(index, *seen)]))
        sheet.paste(picture.resize(size, Image.Resampling.BILINEAR), (left, top))
        write((left + 6, top + 5), f"slice {index + 1}")
        write((left + 6, top + size[1] // 2), "R", "lm")
        write((left + size[0] - 6, top + size[1] // 2), "L", "rm")
    per_line = len(LABEL_NAMES) // 2
    for label in range(1, len(LABEL_NAMES)):
        left = (label - 1) % per_line * (sheet.width // per_line) + 8
        top = sheet.height - _LEGEND_HEIGHT + 8 + 22 * ((label - 1) // per_line)
        colour = tuple(LEGEND_COLOURS[label].tolist())
        draw.rectangle((left, top, left + 13, top + 13), fill=colour, outline="grey")
        write((left + 19, top), LABEL_NAMES[label])
    content = BytesIO()
    sheet.save(content, "PNG")
    write_atomically(path, content.getvalue())

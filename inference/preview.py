"""A contact sheet: slices of a volume with its label map over them."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from inference.files import write_atomically
from inference.labels import LABEL_NAMES
from inference.volume import Volume

# Soft tissue as radiologists look at it: a window of 400 HU around 40 HU.
_LOWEST_HU, _HIGHEST_HU = -160.0, 240.0
_TILE_COLUMNS = 320
_TILES = (3, 4)  # rows, columns of the sheet
_OPACITY = 0.45
_LEGEND_HEIGHT = 44

LABEL_COLOURS = np.array(
    [
        (0, 0, 0),
        (178, 34, 34),
        (255, 165, 0),
        (106, 90, 205),
        (255, 225, 25),
        (255, 0, 60),
        (30, 100, 255),
        (0, 250, 154),
        (0, 160, 100),
        (60, 220, 60),
        (210, 180, 140),
        (255, 130, 190),
        (0, 206, 209),
        (210, 105, 30),
        (255, 255, 255),
    ],
    np.uint8,
)
"""RGB of each label."""


def _shown_slices(label_map: np.ndarray, count: int) -> np.ndarray:
    """Indices of `count` slices, highest first, spread over what is labelled (or over all)."""
    labelled = np.flatnonzero(label_map.any(axis=(1, 2)))
    first, last = (labelled[0], labelled[-1]) if labelled.size else (0, len(label_map) - 1)
    return np.unique(np.linspace(first, last, count).round().astype(int))[::-1]


def _tile(hu: np.ndarray, labels: np.ndarray, size: tuple[int, int]) -> Image.Image:
    grey = (hu - _LOWEST_HU) / (_HIGHEST_HU - _LOWEST_HU) * 255
    rgb = np.repeat(np.clip(np.nan_to_num(grey), 0, 255)[..., None], 3, axis=2)
    over = labels != 0
    rgb[over] = (1 - _OPACITY) * rgb[over] + _OPACITY * LABEL_COLOURS[labels[over]]
    return Image.fromarray(rgb.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)


def _tile_size(height_mm: float, width_mm: float) -> tuple[int, int]:
    """Columns and rows of a tile: true proportions, but never more than twice as high as wide.

    Where the header's spacing is none, or the slice is a needle, the tile is as large as it may be.
    """
    ratio = height_mm / width_mm if width_mm > 0 else np.nan
    ratio = ratio if np.isfinite(ratio) and ratio > 0 else 1.0
    return _TILE_COLUMNS, round(_TILE_COLUMNS * min(max(ratio, 1 / 16), 2.0))


def write_preview(path: Path, label_map: np.ndarray, volume: Volume) -> None:
    """Write a PNG of up to twelve slices, from the head's end down, in their true proportions.

    Args:
        path: of the PNG.
        label_map: (slices, rows, columns), SPL, uint8.
        volume: the CT volume it labels.

    Raises:
        OSError: the file cannot be written.
    """
    _, rows, columns = label_map.shape
    _, row_mm, column_mm = volume.spacing
    size = _tile_size(rows * row_mm, columns * column_mm)
    # Coarser voxels suffice for a tile: a slice of any size takes little memory.
    steps = (max(1, rows // (2 * size[1])), max(1, columns // (2 * size[0])))
    sheet = Image.new("RGB", (_TILES[1] * size[0], _TILES[0] * size[1] + _LEGEND_HEIGHT))
    draw = ImageDraw.Draw(sheet)
    for tile, index in enumerate(_shown_slices(label_map, _TILES[0] * _TILES[1])):
        corner = (tile % _TILES[1] * size[0], tile // _TILES[1] * size[1])
        seen = (index, slice(None, None, steps[0]), slice(None, None, steps[1]))
        hu = volume.slope * volume.voxels[seen].astype(np.float32) + volume.intercept
        sheet.paste(_tile(hu, label_map[seen], size), corner)
        draw.text((corner[0] + 6, corner[1] + 4), f"slice {index + 1}", fill="white")
    per_line = (len(LABEL_NAMES) - 1 + 1) // 2
    for label in range(1, len(LABEL_NAMES)):
        left = (label - 1) % per_line * (sheet.width // per_line) + 6
        top = sheet.height - _LEGEND_HEIGHT + 6 + 20 * ((label - 1) // per_line)
        draw.rectangle((left, top, left + 11, top + 11), fill=tuple(LABEL_COLOURS[label].tolist()))
        draw.text((left + 17, top), LABEL_NAMES[label], fill="white")
    content = BytesIO()
    sheet.save(content, "PNG")
    write_atomically(path, content.getvalue())

"""A map of structures as CT: HU, texture, partial volume and noise."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from inference.labels import TUMOR
from synthetic.grid import bspline_field, bspline_weights, slabs, voxel_positions
from synthetic.structures import ALIKE, CORES, GAS, NUMBERS, PHASES, STRUCTURES


def core(
    mask: np.ndarray, depth: float, spacing: Sequence[float], mode: str = "reflect"
) -> np.ndarray:
    """Return where a mask is farther than about `depth` mm from its surface.

    At its array's border it continues (mode "reflect") or ends ("constant").
    """
    smooth = mask.astype(np.float32)
    # Across a flat surface a step blurred with this sigma reaches 0.84 one sigma inside.
    ndimage.gaussian_filter(
        smooth, [depth / d for d in spacing], output=smooth, truncate=2, mode=mode
    )
    return mask & (smooth > 0.84)


def render(
    anatomy: np.ndarray, spacing: Sequence[float], rng: np.random.Generator, phase: str
) -> np.ndarray:
    """Render a map of structures as CT: HU per structure, texture, partial volume and noise.

    Args:
        anatomy: uint8 (slices, rows, columns) as `draw_anatomy` returns it.
        spacing: of slices, rows and columns, mm.
        rng: source of everything random.
        phase: one of `PHASES`.

    Returns:
        int16 (slices, rows, columns) in HU, within −1024 to 3071.
    """
    column = PHASES.index(phase)
    levels = np.zeros(256, np.float32)
    textures = np.zeros(256, np.float32)
    for number, structure in enumerate(STRUCTURES):
        levels[number] = rng.uniform(*structure.hu[column])
        textures[number] = structure.texture
    for one, other in ALIKE:
        levels[NUMBERS[other]] = levels[NUMBERS[one]]
    inner = {name: rng.uniform(*ranges[column]) for name, (_, ranges) in CORES.items()}
    inner["left kidney"] = inner["right kidney"]
    gas_share = max(0.0, rng.uniform(-0.2, 0.5))
    lesion_levels = rng.uniform(*STRUCTURES[TUMOR].hu[column], 64)
    sigma = rng.uniform(0.5, 0.8)  # mm: of the reconstruction kernel in the slice
    noise_level = rng.uniform(6, 16)  # HU
    control = rng.standard_normal((40, 40, 40), dtype=np.float32) / 0.33
    step = 12.0  # mm between the texture's control points, which repeat every 40

    hu = levels[anatomy]
    boxes = ndimage.find_objects(anatomy, max_label=TUMOR)
    for name, (depth, _) in CORES.items():
        box = boxes[NUMBERS[name] - 1]
        if box is None:
            continue
        inside = core(anatomy[box] == NUMBERS[name], depth, spacing)
        hu[box][inside] = inner[name]
        if name == "stomach" and inside.any():
            rows = np.arange(inside.shape[1])[None, :, None]
            gas = rows < gas_share * inside.shape[1]
            hu[box][inside & gas] = GAS
    if boxes[TUMOR - 1] is not None:
        box = boxes[TUMOR - 1]
        lesions, _ = ndimage.label(anatomy[box] == TUMOR)
        hu[box][lesions > 0] = lesion_levels[lesions[lesions > 0] % len(lesion_levels)]

    weights = []
    for points, count in zip(voxel_positions(anatomy.shape, spacing), control.shape, strict=True):
        cells = int(np.ceil(np.ptp(points) / step)) + 4
        weight = bspline_weights(points, cells, step)
        folded = np.zeros((len(points), count), np.float32)
        for cell in range(cells):
            folded[:, cell % count] += weight[:, cell]
        weights.append(folded)
    for slab in slabs(anatomy.shape):
        texture = bspline_field(control, (weights[0][slab], weights[1], weights[2]))
        texture *= textures[anatomy[slab]]
        hu[slab] += texture

    blur = (0.35, sigma / spacing[1], sigma / spacing[2])  # a slice's profile spans its spacing
    ndimage.gaussian_filter(hu, blur, output=hu, truncate=3)
    grain = (0.0, 0.6 / spacing[1], 0.6 / spacing[2])
    impulse = np.zeros((1, 41, 41), np.float32)
    impulse[0, 20, 20] = 1
    gain = np.sqrt(np.square(ndimage.gaussian_filter(impulse, grain, truncate=3)).sum())
    volume = np.empty(anatomy.shape, np.int16)
    for slab in slabs(anatomy.shape):
        noise = rng.standard_normal(hu[slab].shape, dtype=np.float32)
        ndimage.gaussian_filter(noise, grain, output=noise, truncate=3, mode="wrap")
        noise *= noise_level / gain
        noise += hu[slab]
        volume[slab] = np.clip(np.rint(noise, out=noise), -1024, 3071, out=noise)
    return volume

"""Doubts about a label map that a person should check: flags, not verdicts.

They come from numbers that the pipeline has anyway (percentiles, sizes of components), from the
volume's six faces and from the centres of three organs: a few thousandths of a case's time.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..components import ComponentSizes
from ..labels import LABEL_NAMES, ORGANS
from ..volume import Volume

_LIVER, _RIGHT_KIDNEY, _LEFT_KIDNEY, _SPLEEN = (
    LABEL_NAMES.index(name) for name in ("liver", "right kidney", "left kidney", "spleen")
)

# They end outside any scan of the abdomen: of these only the sides of the volume are checked.
_THROUGH = [
    LABEL_NAMES.index(name) for name in ("aorta", "inferior vena cava", "esophagus", "tumor")
]

_MEANS_ML = {
    "liver": (1411.0, 1710.0),
    "right kidney": (156.5, 193.1),
    "left kidney": (156.5, 193.1),
    "spleen": (179.8, 238.4),
    "pancreas": (64.4, 87.4),
    "right adrenal gland": (4.26, 4.26),
    "left adrenal gland": (4.23, 4.23),
}
# Mean volumes of women and men, mL, measured on CT: Geraghty et al., "Normal organ volume
# assessment from abdominal CT", Abdominal Imaging 29 (2004) 482-490 (711 organs of 149 adults);
# adrenal glands, both sexes: Wang et al., Chinese Medical Sciences Journal 27 (2012) 220-224 (81
# adults). Other labels have no such figure: how full they are, or how far the scan goes, decides.

_FACTOR = 3.0  # below a third of women's mean or above three times men's a volume is flagged

PLAUSIBLE_ML = {
    LABEL_NAMES.index(name): (women / _FACTOR, men * _FACTOR)
    for name, (women, men) in _MEANS_ML.items()
}
"""Least and most plausible volume (mL) of the labels for which there are published means."""

FRAGMENT_ML = 0.5
"""An organ of less is a fragment, wherever it is; the smallest, an adrenal gland, has 4 mL."""

_LARGE_PIECE = 0.1  # of the largest component: so large a second one is no speck

# Of a CT in HU at least 1 % is air, lung or fat, and 1 % is soft tissue or denser. Stored as HU +
# 1024 its 1st percentile is about 0, as is that of a picture or of z-scores.
_HIGHEST_LOW_HU, _LOWEST_HIGH_HU = -50.0, 0.0
_HIGHEST_HIGH_HU = 3071.0  # where the scale of 12 bits ends; metal never fills 1 %
_LOWEST_LOW_HU = -2100.0  # below the usual -2000 and -2048; at -3024 and less labels change

# Voxels; of larger volumes every 4th along each axis gives the centres of organs.
_SAMPLED_ABOVE = 1 << 22


@dataclass(frozen=True)
class Flag:
    """One doubt."""

    name: str  # its kind, one of `KINDS`
    label: int = 0  # the number of its label, or 0 if it is about the whole case
    detail: str = ""  # numbers, for a reader


KINDS = {
    "not HU": "intensities do not look like HU",
    "padding": "padding lowers the 1st percentile",
    "empty": "nothing found",
    "no liver": "no liver found",
    "orientation": "organs as if the header turned or mirrored the volume",
    "sides": "right and left kidney on the wrong sides of each other",
    "border": "touches the scan border",
    "pieces": "several large pieces, all but the largest removed",
    "fragment": f"less than {FRAGMENT_ML} mL",
    "small": "implausibly small",
    "large": "implausibly large",
}
"""What each name means, in the order in which they are printed."""


def find_flags(
    label_map: np.ndarray,
    sizes: ComponentSizes,
    volume: Volume,
    window: tuple[float, ...],
    clip_hu: tuple[float, float] | None = None,
) -> list[Flag]:
    """Return the doubts about a label map.

    Args:
        label_map: (slices, rows, columns), SPL, uint8, its largest components kept.
        sizes: of `keep_largest_components`.
        volume: that it labels.
        window: the volume's 1st and 99th percentile, in the units of its voxels.
        clip_hu: to which the weights clip as well, HU, if they do: padding then changes nothing.
    """
    flags = []
    low, high = sorted(volume.slope * value + volume.intercept for value in window)
    if low > _HIGHEST_LOW_HU or not _LOWEST_HIGH_HU <= high <= _HIGHEST_HIGH_HU:
        flags.append(Flag("not HU", 0, f"1st and 99th percentile {low:.0f} and {high:.0f}"))
    if low < _LOWEST_LOW_HU and clip_hu is None:
        flags.append(Flag("padding", 0, f"{low:.0f} HU"))
    if not sizes.kept.any():
        return [*flags, Flag("empty")]
    if not sizes.kept[_LIVER]:
        flags.append(Flag("no liver", _LIVER))
    centres, at_border = _centres(label_map), _labels_at_border(label_map)
    if doubts := _orientation_doubts(sizes.kept * volume.voxel_ml, centres, at_border):
        flags.append(Flag("orientation", 0, ", ".join(doubts)))
    if centres[_RIGHT_KIDNEY][2] >= centres[_LEFT_KIDNEY][2]:
        flags += [Flag("sides", _RIGHT_KIDNEY), Flag("sides", _LEFT_KIDNEY)]
    flags += [Flag("border", label) for label in sorted(at_border)]
    for label in ORGANS:
        if not sizes.kept[label]:
            continue
        ml, second = (float(n[label]) * volume.voxel_ml for n in (sizes.kept, sizes.next_largest))
        if second > max(FRAGMENT_ML, _LARGE_PIECE * ml):
            flags.append(Flag("pieces", label, f"{ml:.0f} and {second:.0f} mL"))
        least, most = PLAUSIBLE_ML.get(label, (0.0, np.inf))
        if ml < FRAGMENT_ML:
            flags.append(Flag("fragment", label, f"{ml:.2f} mL"))
        elif ml > most:
            flags.append(Flag("large", label, f"{ml:.0f} mL"))
        elif ml < least and label not in at_border:  # what the border cuts is small
            flags.append(Flag("small", label, f"{ml:.1f} mL"))
    return flags


def _labels_at_border(label_map: np.ndarray) -> set[int]:
    """Return the labels in the first or last slice, row or column; in slices without `_THROUGH`."""
    found: set[int] = set()
    for axis in range(3):
        for end in (0, -1):
            face = np.take(label_map, end, axis)
            labels = set(np.flatnonzero(np.bincount(face.ravel())).tolist())
            found |= labels - set(_THROUGH) if axis == 0 else labels
    return found & set(range(1, len(LABEL_NAMES)))


def _centres(label_map: np.ndarray) -> dict[int, np.ndarray]:
    """Return mean slice, row and column of liver and kidneys; NaN where there is none."""
    step = 4 if label_map.size > _SAMPLED_ABOVE else 1
    sample = label_map[::step, ::step, ::step]
    places = {one: np.argwhere(sample == one) for one in (_LIVER, _RIGHT_KIDNEY, _LEFT_KIDNEY)}
    return {
        label: found.mean(axis=0) if found.size else np.full(3, np.nan)
        for label, found in places.items()
    }


def _orientation_doubts(
    ml: np.ndarray, centres: dict[int, np.ndarray], at_border: set[int]
) -> list[str]:
    """Return what suggests that the header turns or mirrors the volume.

    A network that learned no flips labels by place: what is on the image's left becomes liver. So
    labels lie where they should, but in a mirrored volume the true liver is labelled spleen, and
    upside down kidneys and spleen are hardly found. `ml` is the volume of each label.
    """

    def plausible(*labels: int) -> bool:
        return all(ml[label] >= PLAUSIBLE_ML[label][0] for label in labels)

    doubts = []
    right, left = centres[_RIGHT_KIDNEY][0], centres[_LEFT_KIDNEY][0]
    if plausible(_LIVER, _RIGHT_KIDNEY, _LEFT_KIDNEY) and centres[_LIVER][0] < min(right, left):
        doubts.append("the liver is below the kidneys")
    if plausible(_SPLEEN) and ml[_SPLEEN] > ml[_LIVER] and not plausible(_LIVER):
        doubts.append("a small liver and a larger spleen")
    others = (_RIGHT_KIDNEY, _SPLEEN)
    missing = not any(plausible(one) or one in at_border for one in others)
    if missing and plausible(_LIVER) and _LIVER not in at_border:
        doubts.append("a whole liver, but neither right kidney nor spleen")
    return doubts


def in_words(flags: Iterable[Flag]) -> str:
    """Return the flags of a case in one line; "" if there are none."""
    flags = list(flags)
    parts = []
    for kind, words in KINDS.items():
        those = [flag for flag in flags if flag.name == kind]
        if not those:
            continue
        named = [
            LABEL_NAMES[flag.label] + (f" ({flag.detail})" if flag.detail else "")
            for flag in those
            if flag.label and kind not in ("no liver", "sides")
        ]
        detail = those[0].detail if not those[0].label else ""
        parts.append(
            words + (f": {', '.join(named)}" if named else "") + (detail and f" ({detail})")
        )
    return "; ".join(parts)


def count_in_words(cases: Iterable[Iterable[Flag]]) -> str:
    """Return how many cases have a flag, and how many have each, in one line; "" for none."""
    kinds = [{flag.name for flag in flags} for flags in cases]
    flagged = sum(bool(names) for names in kinds)
    if not flagged:
        return ""
    counts = Counter(name for names in kinds for name in names)
    each = ", ".join(f"{kind} {counts[kind]}" for kind in KINDS if counts[kind])
    return f"{flagged} of {len(kinds)} label maps have flags to check: {each}"

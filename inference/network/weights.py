"""Trained weights in safetensors files: tensors, and in the header all that running needs."""

import dataclasses
import json
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ..files import write_atomically
from ..labels import LABEL_NAMES
from ..volume import ORIENTATION

if TYPE_CHECKING:
    from torch import Tensor

_PACKAGE = Path(__file__).parents[1]
_INSTALLED = _PACKAGE / "weights"
WEIGHTS = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "weights"
"""Where the weights that ship lie: in the package where it is installed, else beside it."""

SUBMISSION, FULL, SLIM, DEMONSTRATION = (
    f"{name}.safetensors" for name in ("submission", "abdomen", "abdomen-slim", "phantom-slim")
)
"""A team's own, full-size and slim network for real CT, and the slim one for synthetic CT alone."""

DEMONSTRATION_WEIGHTS = WEIGHTS / DEMONSTRATION

COARSEST_PIXEL_MM = 2.0
"""Slices are not reduced to pixels larger than this; small organs would be lost."""

_METADATA_KEY = "abdoseg"
_STATISTICS = ("running_mean", "running_var")
_WIDEST = 512  # base_channels; the paper's network has 64
_FIXED = {  # what this program does, whatever the weights
    "num_classes": len(LABEL_NAMES),
    "label_names": LABEL_NAMES,
    "percentiles": (1.0, 99.0),
    "orientation": ORIENTATION,
}


class WeightsError(ValueError):
    """A file that cannot be used as weights; the message is the reason, in one line."""


@dataclass(frozen=True)
class WeightsMetadata:
    """What running a network needs besides its weights."""

    base_channels: int  # an argument of `AttentionUNet`, as are all of `network`
    num_classes: int
    intensity_mean: float  # of the training set's clipped voxels, HU
    intensity_std: float
    trained_on: str  # data sets, and anything a user must know before trusting the result
    licence: str  # under which the weights may be used
    date: str  # when they were exported, YYYY-MM-DD
    revision: str  # of the code that trained them
    label_names: tuple[str, ...] = LABEL_NAMES
    percentiles: tuple[float, float] = (1.0, 99.0)  # to which a volume's intensities are clipped
    orientation: str = ORIENTATION  # of the slices that the network was trained on
    matrix_reduction: int = 1  # by which slices are area-averaged before the network sees them
    attention: str = "relu-sigmoid"
    supervised_channels: int = 0
    clip_hu: tuple[float, float] | None = None  # to which intensities are clipped besides, HU
    warning: str = ""  # why these weights should not be used at all

    @property
    def network(self) -> dict[str, Any]:
        """The arguments of `AttentionUNet`."""
        names = ("num_classes", "base_channels", "attention", "supervised_channels")
        return {name: getattr(self, name) for name in names}

    @property
    def live_values(self) -> int:
        """Values that are in memory at once for a pixel of the network's matrix.

        Torch holds up to 3.9 times `base_channels`, and 1.6 times the channels of supervised maps
        that are far wider (test_folding.py counts both); the rest is for what libraries add.
        """
        return max(5 * self.base_channels, 3 * self.supervised_channels)

    def slice_bytes(self, pixels: int, reduction: int, value_bytes: int) -> int:
        """Return the bytes that the network takes for one slice, normalised copies included."""
        return int(pixels * (16 + value_bytes * self.live_values / reduction**2))

    def reduction_at(self, spacing: tuple[float, float, float]) -> int:
        """Return the matrix reduction for a spacing (slice, row, column), mm.

        It is halved until a reduced pixel is no coarser than `COARSEST_PIXEL_MM`.
        """
        reduction = self.matrix_reduction
        while reduction > 1 and reduction * max(spacing[1:]) > COARSEST_PIXEL_MM:
            reduction //= 2
        return reduction


def default_weights(*, on_cuda: bool, folder: Path = WEIGHTS) -> tuple[Path, str]:
    """Return the weights that run by default, and the reason in a few words.

    They are submission.safetensors, else the device's best: on CUDA the full size costs little.

    Raises:
        WeightsError: there are none.
    """
    reasons = {
        SUBMISSION: "the submission",
        FULL: "the full network" if on_cuda else "the full network: no slim one is there",
        SLIM: "the slim network: no full one is there" if on_cuda else "the slim network, for CPUs",
        DEMONSTRATION: "a demonstration on synthetic CT, not for patients",
    }
    trained = (FULL, SLIM) if on_cuda else (SLIM, FULL)
    for name in (SUBMISSION, *trained, DEMONSTRATION):
        if (folder / name).is_file():
            return folder / name, reasons[name]
    raise WeightsError(f"none of {', '.join(reasons)} is in {folder}: name a file")


def read_metadata(path: Path) -> WeightsMetadata:
    """Read a weights file's metadata; torch is not imported and no tensor is read.

    Raises:
        WeightsError: not a safetensors file, not made by `save_weights`, or for another network;
            the message starts with the path.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            stored = (file.metadata() or {}).get(_METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a safetensors file ({error})") from error
    if stored is None:
        raise WeightsError(
            f"{path}: it has no abdoseg metadata: make it with `python -m training export`"
        )
    try:
        fields = json.loads(stored)
        metadata = WeightsMetadata(
            **{
                **fields,
                "label_names": tuple(fields["label_names"]),
                "percentiles": tuple(fields["percentiles"]),
                "clip_hu": fields.get("clip_hu") and tuple(fields["clip_hu"]),
            }
        )
        _check(metadata)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: its metadata cannot be used ({error})") from error
    return metadata


def _check(metadata: WeightsMetadata) -> None:
    """Raise a ValueError unless metadata can be computed with and are of this program."""

    def is_one_of(value: object, numbers: Container[int]) -> bool:
        return type(value) is int and value in numbers

    def is_finite(*values: float) -> bool:
        return all(type(value) in (int, float) and math.isfinite(value) for value in values)

    deviation, clip = metadata.intensity_std, metadata.clip_hu
    widths, supervised = range(4, _WIDEST + 1, 4), range(_WIDEST + 1)
    wanted = {
        "base_channels": (is_one_of(metadata.base_channels, widths), f"in {widths}"),
        "supervised_channels": (
            is_one_of(metadata.supervised_channels, supervised), f"in {supervised}"
        ),
        "matrix_reduction": (is_one_of(metadata.matrix_reduction, (1, 2, 4)), "1, 2 or 4"),
        "warning": (type(metadata.warning) is str, "a text"),
        "attention": (metadata.attention in ("relu-sigmoid", "none"), "relu-sigmoid or none"),
        "intensity_mean": (is_finite(metadata.intensity_mean), "a finite number"),
        "intensity_std": (is_finite(deviation) and deviation > 0, "a finite number above 0"),
        "clip_hu": (
            clip is None or (len(clip) == 2 and is_finite(*clip) and clip[0] < clip[1]),
            "two rising numbers",
        ),
    }  # fmt: skip
    found = dataclasses.asdict(metadata)
    for name, only in _FIXED.items():
        wanted[name] = (found[name] == only and type(found[name]) is type(only), repr(only))
    for name, (is_right, text) in wanted.items():
        if not is_right:
            raise ValueError(f"{name} is {found[name]!r}, not {text}")


def common_metadata(several: Sequence[WeightsMetadata]) -> WeightsMetadata:
    """Return the metadata of one or more networks whose probabilities are averaged.

    They are the first one's, with the width of the widest and the warnings of all.

    Raises:
        WeightsError: they do not see the same slices.
    """
    first = several[0]
    for other in several[1:]:
        for name in ("matrix_reduction", "clip_hu"):
            ours, theirs = getattr(first, name), getattr(other, name)
            if ours != theirs:
                words = name.replace("_", " ")
                raise WeightsError(
                    f"networks of {words} {ours} and {theirs} cannot be averaged: they do not see "
                    "the same slices"
                )
    return dataclasses.replace(
        first,
        base_channels=max(one.base_channels for one in several),
        supervised_channels=max(one.supervised_channels for one in several),
        warning="; ".join(dict.fromkeys(one.warning for one in several if one.warning)),
    )


def load_weights(path: Path) -> tuple[dict[str, "Tensor"], WeightsMetadata]:
    """Load a state dict of `AttentionUNet`, `as_stored`, mapped from the file, and its metadata.

    Raises:
        WeightsError: as `read_metadata`, or a tensor is not finite or contradicts the metadata.
    """
    metadata = read_metadata(path)
    try:
        with safe_open(path, framework="pt") as file:
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a safetensors file ({error})") from error
    for name, tensor in state_dict.items():
        if not tensor.isfinite().all():
            raise WeightsError(f"{path}: its {name} holds values that are not numbers")
    if contradicted := _contradicted_attention(state_dict, metadata):
        raise WeightsError(f"{path}: {contradicted}")
    return state_dict, metadata


def _contradicted_attention(state_dict: dict[str, "Tensor"], metadata: WeightsMetadata) -> str:
    """Return how weights contradict the metadata's `attention`, by what follows it, or "".

    Attention's output is in [0.5, 1). So its convolution's variance is at most the square of half
    the sum of its absolute weights; and its mean, less the bias, is about the sum of its weights
    times the mean output. The least-squares factor is 0.35 to 0.76 in all decoders of 25 networks
    with attention, of 1 to 6000 steps, and in no network without it in more than one.
    """
    excess, factors, fits = [], [], []
    for name, weight in state_dict.items():
        layer = name.removesuffix(".refine.0.weight") + ".refine"
        if name != f"{layer}.0.weight" or f"{layer}.1.running_var" not in state_dict:
            continue
        each = weight.float().flatten(1)
        most = each.abs().sum(1).div(2).square()
        excess.append(float((state_dict[f"{layer}.1.running_var"] / most).median()))
        sums = each.sum(1)
        means = state_dict[f"{layer}.1.running_mean"] - state_dict[f"{layer}.0.bias"].float()
        factors.append(float((sums * means).sum() / sums.square().sum()))
        fits.append(1 - float((means - factors[-1] * sums).square().sum() / means.square().sum()))
    attends = metadata.attention != "none"
    follows = all(0.25 < factor < 1 for factor in factors) and all(fit > 0.1 for fit in fits)
    if not excess or not (min(excess) > 1 if attends else follows):
        return ""
    trained = f"trained {'without' if attends else 'with'} it"
    return f"its metadata's attention is {metadata.attention!r}, and its weights were {trained}"


def as_stored(name: str, tensor: "Tensor") -> "Tensor":
    """Return a tensor as stored: fp16, statistics fp32 (a variance may be more than fp16 holds)."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.float() if name.endswith(_STATISTICS) else tensor.half()


def save_weights(path: Path, state_dict: dict[str, "Tensor"], metadata: WeightsMetadata) -> None:
    """Save the state dict of an `AttentionUNet`, each tensor `as_stored`, with its metadata."""
    from safetensors.numpy import save  # only training saves

    tensors = {
        name: as_stored(name, tensor).cpu().contiguous().numpy()
        for name, tensor in state_dict.items()
    }
    fields = dataclasses.asdict(metadata)
    for name in ("warning", "supervised_channels", "clip_hu"):
        if not fields[name]:  # versions that did not know of it read the file as well
            del fields[name]
    header = {_METADATA_KEY: json.dumps(fields)}
    write_atomically(path, save(tensors, header))

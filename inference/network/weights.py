"""Trained weights in safetensors files: tensors, and in the header all that running needs."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from ..files import write_atomically
from ..labels import LABEL_NAMES
from ..memory import live_values
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


class WeightsError(ValueError):
    """A file that cannot be used as weights; the message is the reason, in one line."""


@dataclass(frozen=True)
class WeightsMetadata:
    """What must be known of a network besides its weights.

    Attributes:
        base_channels, num_classes: arguments of `AttentionUNet`.
        intensity_mean, intensity_std: of the training set's clipped voxels, HU.
        trained_on: data sets, and anything a user must know before trusting the result.
        licence: under which the weights may be used.
        date: when they were exported, YYYY-MM-DD.
        revision: of the code that trained them.
        label_names: by label number.
        percentiles: to which a volume's intensities are clipped.
        clip_hu: to which they are clipped besides, HU, or None.
        orientation: of the slices that the network was trained on.
        matrix_reduction: factor by which slices are area-averaged before the network sees them.
        attention, supervised_channels: arguments of `AttentionUNet`.
        warning: what speaks against using these weights at all, or "".
    """

    base_channels: int
    num_classes: int
    intensity_mean: float
    intensity_std: float
    trained_on: str
    licence: str
    date: str
    revision: str
    label_names: tuple[str, ...] = LABEL_NAMES
    percentiles: tuple[float, float] = (1.0, 99.0)
    orientation: str = ORIENTATION
    matrix_reduction: int = 1
    attention: str = "relu-sigmoid"
    supervised_channels: int = 0
    clip_hu: tuple[float, float] | None = None
    warning: str = ""

    @property
    def network(self) -> dict[str, int | str]:
        """The arguments of `AttentionUNet`."""
        return {
            "num_classes": self.num_classes,
            "base_channels": self.base_channels,
            "attention": self.attention,
            "supervised_channels": self.supervised_channels,
        }

    @property
    def live_values(self) -> int:
        """Values a pixel that the network holds at once (`inference/memory.py`)."""
        return live_values(self.base_channels, self.supervised_channels)

    def reduction_at(self, spacing: tuple[float, float, float]) -> int:
        """The matrix reduction for a volume: less than trained with where its pixels are coarse.

        Args:
            spacing: (slice, row, column), mm.

        Returns:
            `matrix_reduction`, halved until a reduced pixel is no coarser than `COARSEST_PIXEL_MM`.
        """
        reduction = self.matrix_reduction
        while reduction > 1 and reduction * max(spacing[1:]) > COARSEST_PIXEL_MM:
            reduction //= 2
        return reduction


def default_weights(*, on_cuda: bool, folder: Path = WEIGHTS) -> tuple[Path, str]:
    """What `predict.sh` runs unless told otherwise.

    A file called submission.safetensors wins on every device: whoever puts it there means it. Else
    it is the best of the weights present for the device.

    Args:
        on_cuda: whether the network runs on a CUDA device, where the full size costs little.
        folder: of the weights.

    Returns:
        Path, and in a few words why it is the one.

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
        WeightsError: not a safetensors file, not made by `save_weights`, or for another network.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        raise WeightsError("no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            stored = (file.metadata() or {}).get(_METADATA_KEY)
    except SafetensorError as error:
        raise WeightsError(f"not a safetensors file ({error})") from error
    if stored is None:
        raise WeightsError("it has no abdoseg metadata: make it with `python -m training export`")
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
    except WeightsError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"its metadata does not fit this version ({error})") from error
    if metadata.orientation != ORIENTATION:
        raise WeightsError(f"its network wants {metadata.orientation} slices, not {ORIENTATION}")
    return metadata


def _check(metadata: WeightsMetadata) -> None:
    """See that the numbers of a file's metadata can be computed with.

    Raises:
        WeightsError: one cannot.
    """

    def wrong(name: str, wanted: str) -> WeightsError:
        return WeightsError(f"its metadata's {name} is {getattr(metadata, name)!r}, not {wanted}")

    widths = metadata.base_channels
    if type(widths) is not int or widths < 4 or widths % 4 or widths > _WIDEST:
        raise wrong("base_channels", f"a multiple of 4 up to {_WIDEST}")
    supervised = metadata.supervised_channels
    if type(supervised) is not int or not 0 <= supervised <= _WIDEST:
        raise wrong("supervised_channels", f"a whole number up to {_WIDEST}")
    if type(metadata.num_classes) is not int or metadata.num_classes != len(LABEL_NAMES):
        raise wrong("num_classes", str(len(LABEL_NAMES)))
    if type(metadata.matrix_reduction) is not int or metadata.matrix_reduction not in (1, 2, 4):
        raise wrong("matrix_reduction", "1, 2 or 4")
    if type(metadata.warning) is not str:
        raise wrong("warning", "a text")
    for name, only in (("label_names", LABEL_NAMES), ("percentiles", (1.0, 99.0))):
        if getattr(metadata, name) != only:
            raise wrong(name, f"{only}, which is what this program does")
    if metadata.attention not in ("relu-sigmoid", "none"):
        raise wrong("attention", "relu-sigmoid or none")
    for name in ("intensity_mean", "intensity_std"):
        value = getattr(metadata, name)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise wrong(name, "a finite number")
    if metadata.clip_hu is not None:
        numbers = all(type(value) in (int, float) for value in metadata.clip_hu)
        if (
            not numbers
            or len(metadata.clip_hu) != 2
            or not -math.inf < metadata.clip_hu[0] < (metadata.clip_hu[1]) < math.inf
        ):
            raise wrong("clip_hu", "two rising numbers")
    if metadata.intensity_std <= 0:
        raise wrong("intensity_std", "more than 0")


def common_metadata(several: Sequence[WeightsMetadata]) -> WeightsMetadata:
    """What holds of several networks whose probabilities are to be averaged.

    Args:
        several: at least one; of one it is its own.

    Returns:
        The first's, with the width of the widest and the warnings of all.

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
        WeightsError: as `read_metadata`, or a tensor holds what is no number.
        OSError: the file cannot be read.
    """
    metadata = read_metadata(path)
    try:
        with safe_open(path, framework="pt") as file:
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(f"not a safetensors file ({error})") from error
    for name, tensor in state_dict.items():
        if not tensor.isfinite().all():
            raise WeightsError(f"its {name} holds values that are not numbers")
    _check_attention(state_dict, metadata)
    return state_dict, metadata


def _check_attention(state_dict: dict[str, "Tensor"], metadata: WeightsMetadata) -> None:
    """Hold the metadata's `attention`, which has no weights, against the statistics behind it.

    What attention hands on is in [0.5, 1): the variance of its convolution is at most the square of
    half the sum of its absolute weights, and by far smaller in trained networks (at the median
    0.0025 to 0.005 of that in weights/phantom-slim.safetensors, 13 to 26 without attention in
    weights/abdomen-slim.safetensors).

    Raises:
        WeightsError: they contradict each other.
    """
    parts = []
    for name, weight in state_dict.items():
        variance = state_dict.get(name.replace(".0.weight", ".1.running_var"))
        if name.endswith(".refine.0.weight") and variance is not None:
            most = weight.float().abs().flatten(1).sum(1).div(2).square()
            parts.append(float((variance / most).median()))
    attends = metadata.attention != "none"
    if parts and (min(parts) > 1 if attends else max(parts) < 0.01):
        raise WeightsError(
            f"its metadata's attention is {metadata.attention!r}, and its weights were trained "
            f"{'without' if attends else 'with'} it"
        )


def as_stored(name: str, tensor: "Tensor") -> "Tensor":
    """A tensor of a state dict as a weights' file holds it.

    Returns:
        fp16; batch normalisation's statistics fp32, for a variance may be more than fp16 holds.
    """
    if not tensor.is_floating_point():
        return tensor
    return tensor.float() if name.endswith(_STATISTICS) else tensor.half()


def save_weights(path: Path, state_dict: dict[str, "Tensor"], metadata: WeightsMetadata) -> None:
    """Save the state dict of an `AttentionUNet` as `as_stored` says, with its metadata.

    Raises:
        OSError: the file cannot be written.
    """
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

"""Recipes: every number of a training run, in one readable TOML file, each a flag as well."""

import argparse
import dataclasses
import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

FOLDER = Path(__file__).parent / "recipes"
"""Where the shipped recipes lie."""


class RecipeError(ValueError):
    """A recipe that cannot be used; the message is the reason, in one line."""


def _number(default: Any, text: str, **more: Any) -> Any:  # noqa: ANN401
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run; the defaults are the paper's, or switch off what it does not have."""

    # network
    base_channels: int = _number(64, "width of the network's first stage; 16 is the slim network")
    attention: str = _number(
        "relu-sigmoid", "of the decoders and the fusion", choices=("relu-sigmoid", "none")
    )
    supervised_channels: int = _number(
        0, "of each supervised map; 0 is a quarter of base_channels, as in the paper"
    )
    matrix_reduction: int = _number(
        1, "slices are area-averaged by this before the network", choices=(1, 2, 4)
    )
    clip_hu: tuple[float, float] = _number(
        (0.0, 0.0), "range to which HU are clipped beside the volume's percentiles; 0 0 has none"
    )
    # data
    held_out_fraction: float = _number(
        0.1, "patients kept out of training, at least one unless this is 0"
    )
    folds: int = _number(
        0, "parts of the patients, by the seed; one of them is held out instead of a fraction"
    )
    fold: int = _number(0, "which of them, from 0")
    label_balanced_fraction: float = _number(
        0.0,
        "slices sampled by label (a label uniformly, then a patient that shows it, then a slice), "
        "not uniformly",
    )
    synthetic_fraction: float = _number(
        0.0, "slices that are drawn from anatomies (training/synthesis.py), not read"
    )
    synthetic_phantoms: int = _number(
        0, "synthetic patients among those anatomies, beside the files of --anatomy"
    )
    slice_size: int = _number(
        0, "rows and columns that slices are cropped or padded to; 0 keeps their own"
    )
    # optimisation
    steps: int = _number(100_000, "optimisation steps")
    batch_size: int = _number(2, "slices a step, over all processes")
    learning_rate: float = _number(1e-5, "of Adam")
    weight_decay: float = _number(
        0.0, "of convolutions' weights, decoupled, as in AdamW; with 0 this is Adam"
    )
    warmup_steps: int = _number(0, "steps in which the learning rate rises linearly from 0")
    schedule: str = _number(
        "constant", "of the learning rate after that", choices=("constant", "cosine")
    )
    gradient_clip: float = _number(0.0, "largest norm of the gradient; 0 does not clip")
    ema_decay: float = _number(
        0.0, "of the exponential moving average that is scored and exported; 0 has none"
    )
    precision: str = _number(
        "auto",
        "of convolutions; auto is bf16 where the device is fast at it, fp16 on older CUDA devices, "
        "else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    seed: int = _number(0, "of weights, held-out patients, slices and augmentation")
    # loss
    cross_entropy: str = _number(
        "marginal",
        "marginal: a voxel marked 0 is background or any label its annotator did not look for; "
        "plain: it is background",
        choices=("marginal", "plain"),
    )
    dice_weight: float = _number(0.0, "of the soft Dice loss beside the cross-entropy")
    # augmentation in space
    spatial_probability: float = _number(0.0, "part of the slices that are moved and deformed")
    rotation_degrees: float = _number(0.0, "largest rotation")
    scale: tuple[float, float] = _number((1.0, 1.0), "range of the enlargement")
    anisotropy: float = _number(1.0, "largest ratio of the enlargements of rows and columns")
    shear: float = _number(0.0, "largest shear, as a tangent")
    shift: float = _number(0.0, "largest shift, as a part of the slice's size")
    elastic_mm: float = _number(0.0, "standard deviation of the elastic deformation, mm")
    elastic_grid_mm: float = _number(60.0, "distance of its control points, mm")
    pixel_mm: tuple[float, float] = _number(
        (0.0, 0.0), "range from which a pixel's size is drawn, mm, before `scale`; 0 0 keeps it"
    )
    # augmentation of intensities
    window_probability: float = _number(
        0.0, "part of the slices whose HU are clipped to a soft tissue window (`window_hu`)"
    )
    intensity_probability: float = _number(0.0, "with which each of the following is applied")
    brightness_hu: float = _number(0.0, "largest shift, HU")
    contrast: tuple[float, float] = _number(
        (1.0, 1.0), "range of the factor around the body's mean in the slice"
    )
    gamma: tuple[float, float] = _number((1.0, 1.0), "range of the exponent on the volume's window")
    organ_shift_hu: float = _number(
        0.0, "standard deviation of the shift of each organ by itself (contrast phases), HU"
    )
    noise_hu: float = _number(0.0, "largest standard deviation of Gaussian noise, HU")
    blur_pixels: float = _number(0.0, "largest standard deviation of Gaussian blur, pixels")
    low_resolution: float = _number(1.0, "largest factor of coarser sampling")
    # watching
    log_interval: int = _number(50, "steps between lines of progress and of metrics.csv")
    checkpoint_interval: int = _number(1000, "steps between checkpoints")
    evaluation_interval: int = _number(
        5000, "steps between scorings of the held-out volumes; they are scored at the end as well"
    )

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            choices = entry.metadata.get("choices")
            value = getattr(self, entry.name)
            if choices and value not in choices:
                raise RecipeError(f"{entry.name} must be one of {choices}, not {value!r}")
        for name in ("base_channels", "batch_size", "log_interval", "checkpoint_interval"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1")
        if self.clips and not self.clip_hu[0] < self.clip_hu[1]:
            raise RecipeError("clip_hu must be two rising numbers, or 0 0")
        if self.supervised_channels < 0:
            raise RecipeError("supervised_channels must be at least 0")
        if self.evaluation_interval < 1 or self.steps < 0:
            raise RecipeError("evaluation_interval must be at least 1 and steps at least 0")
        if not 0 <= self.held_out_fraction < 1:
            raise RecipeError("held_out_fraction must be from 0 to less than 1")
        if (self.folds or self.fold) and not (self.folds > 1 and 0 <= self.fold < self.folds):
            raise RecipeError("folds must be at least 2, and fold from 0 to folds - 1")
        if not 0 <= self.synthetic_fraction <= 1 or self.synthetic_phantoms < 0:
            raise RecipeError(
                "synthetic_fraction must be from 0 to 1 and synthetic_phantoms at least 0"
            )

    @property
    def clips(self) -> tuple[float, float] | None:
        """`clip_hu`, or None where there is none."""
        return clips(self.clip_hu)


def clips(clip_hu: Sequence[float]) -> tuple[float, float] | None:
    """A recipe's `clip_hu`, also as a list out of JSON, or None where it is 0 0."""
    low, high = clip_hu
    return (low, high) if (low, high) != (0, 0) else None


MAY_CHANGE_WITH_A_LINE = ("learning_rate", "gradient_clip", "precision")
"""What may help a run whose loss is no longer finite; it may differ when the run is taken up."""

MAY_CHANGE_ON_RESUME = (
    *("steps", "log_interval", "checkpoint_interval", "evaluation_interval"),
    *MAY_CHANGE_WITH_A_LINE,
)
"""Numbers that may differ when a run is taken up again; all others would make it another run."""


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """The learning rate of a step, from 0: a linear rise, then constant or half a cosine."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.learning_rate
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1)))


def _is_range(entry: dataclasses.Field) -> bool:
    return bool(get_args(entry.type))


def _checked(name: str, value: Any, source: str) -> Any:  # noqa: ANN401
    """A TOML value as its field's type."""
    entries = {entry.name: entry for entry in dataclasses.fields(Recipe)}
    if name not in entries:
        raise RecipeError(f"{source}: there is no {name} in a recipe")
    entry = entries[name]
    if _is_range(entry):
        if not isinstance(value, list) or len(value) != 2:
            raise RecipeError(f"{source}: {name} must be two numbers, not {value!r}")
        return tuple(float(number) for number in value)
    if entry.type is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not entry.type:
        raise RecipeError(f"{source}: {name} must be {entry.type.__name__}, not {value!r}")
    return value


def load_recipe(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe and replace some of its numbers.

    Args:
        name: of a shipped recipe (`paper`, `best`) or the path of a TOML file. Its sections are for
            the reader; numbers left out have the defaults of `Recipe`.
        overrides: by field name.

    Raises:
        RecipeError: no such recipe, not TOML, or a number that is unknown or of the wrong kind.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
        raise RecipeError(f"no recipe {name}: name one of {shipped} or a .toml file")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not TOML ({error})") from error
    numbers = {}
    for key, value in content.items():
        entries = value.items() if isinstance(value, dict) else [(key, value)]
        numbers.update({name: _checked(name, value, str(path)) for name, value in entries})
    return Recipe(**{**numbers, **(overrides or {})})


def to_toml(recipe: Recipe) -> str:
    """The recipe as a TOML file's text, which `load_recipe` reads back."""
    values = dataclasses.asdict(recipe)
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each number of a recipe; those not given are absent from the namespace."""
    group = parser.add_argument_group("numbers of the recipe, each replacing the recipe's own")
    for entry in dataclasses.fields(Recipe):
        choices = entry.metadata.get("choices")
        group.add_argument(
            f"--{entry.name.replace('_', '-')}",
            type=float if _is_range(entry) else entry.type,
            nargs=2 if _is_range(entry) else None,
            choices=choices,
            metavar=None if choices else ("LOW", "HIGH") if _is_range(entry) else "N",
            default=argparse.SUPPRESS,
            help=entry.metadata["help"],
        )


def overrides_of(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe's numbers among parsed options."""
    given = vars(options)
    return {
        entry.name: tuple(given[entry.name]) if _is_range(entry) else given[entry.name]
        for entry in dataclasses.fields(Recipe)
        if entry.name in given
    }

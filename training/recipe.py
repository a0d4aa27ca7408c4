"""Recipes: every number of a training run, in one readable TOML file; `--set` replaces any."""

import dataclasses
import json
import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from training import TrainingError, shipped_or_own

FOLDER = Path(__file__).parent / "recipes"
"""Where the shipped recipes lie."""

Range = tuple[float, float]


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run; the defaults are the paper's, or switch off what it does not have."""

    # Network.
    base_channels: int = 64  # width of the network's first stage; 16 is the slim network
    attention: Literal["relu-sigmoid", "none"] = "relu-sigmoid"  # of the decoders and the fusion
    supervised_channels: int = 0  # of each supervised map; 0 is a quarter of base_channels (paper)
    matrix_reduction: Literal[1, 2, 4] = 1  # slices are area-averaged by this before the network
    clip_hu: Range = (0.0, 0.0)  # clips HU beside the volume's percentiles; 0 0 clips none
    # Data.
    held_out_fraction: float = 0.1  # patients held out, at least one unless this is 0
    folds: int = 0  # parts of the patients, by the seed; one is held out instead of a fraction
    fold: int = 0  # which of them, from 0
    # Of the slices, those sampled by label: a label, then a patient that shows it, then a slice.
    label_balanced_fraction: float = 0.0
    synthetic_fraction: float = 0.0  # slices drawn from anatomies (training/synthesis.py)
    synthetic_phantoms: int = 0  # synthetic patients among these, beside the files of --anatomy
    slice_size: int = 0  # rows and columns that slices are cropped or padded to; 0 keeps their own
    # Optimisation.
    steps: int = 100_000
    batch_size: int = 2  # slices a step, over all processes
    learning_rate: float = 1e-5  # of Adam
    weight_decay: float = 0.0  # of convolutions, decoupled as in AdamW
    warmup_steps: int = 0  # in which the learning rate rises linearly from 0
    schedule: Literal["constant", "cosine"] = "constant"  # of the learning rate after that
    gradient_clip: float = 0.0  # largest norm of the gradient; 0 does not clip
    ema_decay: float = 0.0  # of the moving average that is scored and exported; 0 has none
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where it is fast, else fp32
    seed: int = 0  # of weights, held-out patients, slices and augmentation
    # Loss. Marginal: a voxel marked 0 is background or any label that is not annotated.
    cross_entropy: Literal["marginal", "plain"] = "marginal"
    dice_weight: float = 0.0  # of the soft Dice loss beside the cross-entropy
    # Augmentation in space.
    spatial_probability: float = 0.0  # part of the slices that are moved and deformed
    rotation_degrees: float = 0.0  # largest rotation
    scale: Range = (1.0, 1.0)  # of the enlargement
    anisotropy: float = 1.0  # largest ratio of the enlargements of rows and columns
    shear: float = 0.0  # largest shear, as a tangent
    shift: float = 0.0  # largest shift, as a part of the slice's size
    elastic_mm: float = 0.0  # standard deviation of the elastic deformation
    elastic_grid_mm: float = 60.0  # distance of its control points
    pixel_mm: Range = (0.0, 0.0)  # a pixel's size is drawn from it, before `scale`; 0 0 keeps it
    # Augmentation of intensities.
    window_probability: float = 0.0  # part of the slices clipped to a soft tissue window
    intensity_probability: float = 0.0  # with which each of the following is applied
    brightness_hu: float = 0.0  # largest shift
    contrast: Range = (1.0, 1.0)  # factor around the body's mean in the slice
    gamma: Range = (1.0, 1.0)  # exponent on the volume's window
    organ_shift_hu: float = 0.0  # standard deviation of each organ's own shift (contrast phases)
    noise_hu: float = 0.0  # largest standard deviation of Gaussian noise
    blur_pixels: float = 0.0  # largest standard deviation of Gaussian blur
    low_resolution: float = 1.0  # largest factor of coarser sampling
    # Reports.
    log_interval: int = 50  # steps between rows of metrics.csv
    evaluation_minutes: float = 30.0  # between scorings of the held-out volumes, scored at the end

    def __post_init__(self) -> None:
        low, high = self.clip_hu
        for holds, rule in (
            (min(self.base_channels, self.batch_size, self.log_interval) >= 1,
             "base_channels, batch_size and log_interval must be at least 1"),
            (min(self.supervised_channels, self.steps, self.synthetic_phantoms) >= 0,
             "supervised_channels, steps and synthetic_phantoms must be at least 0"),
            (low < high or low == high == 0, "clip_hu must be two rising numbers, or 0 0"),
            (0 <= self.held_out_fraction < 1, "held_out_fraction must be from 0 to less than 1"),
            (0 <= self.synthetic_fraction <= 1, "synthetic_fraction must be from 0 to 1"),
            (self.folds == self.fold == 0 or 1 < self.folds > self.fold >= 0,
             "folds must be at least 2, and fold from 0 to folds - 1"),
        ):  # fmt: skip
            if not holds:
                raise TrainingError(rule)

    @property
    def clips(self) -> Range | None:
        """`clip_hu`, or None where there is none."""
        return self.clip_hu if any(self.clip_hu) else None


MAY_CHANGE_ON_RESUME = (
    *("steps", "log_interval", "evaluation_minutes"),
    *("learning_rate", "gradient_clip", "precision"),  # what may help where the loss is NaN
)
"""Numbers that may differ when a run is resumed; all others would make it another run."""


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Return the learning rate of a step, from 0: a linear rise, then constant or half a cosine."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.learning_rate
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1)))


def _checked(name: str, value: Any, source: str) -> Any:  # noqa: ANN401
    """Return a value out of TOML or JSON as its field's type."""
    kinds: dict[str, Any] = {entry.name: entry.type for entry in dataclasses.fields(Recipe)}
    if name not in kinds:
        raise TrainingError(f"{source}: there is no {name} in a recipe")
    kind, values = kinds[name], value if isinstance(value, list) else [value]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    wanted = float if kind == Range else type(choices[0]) if choices else kind
    values = [float(v) if wanted is float and type(v) is int else v for v in values]
    length = len(value) if isinstance(value, list) else 0
    if any(type(v) is not wanted for v in values) or length != (2 if kind == Range else 0):
        what = "two numbers" if kind == Range else wanted.__name__
        raise TrainingError(f"{source}: {name} must be {what}, not {value!r}")
    if choices and values[0] not in choices:
        names = ", ".join(map(str, choices))
        raise TrainingError(f"{source}: {name} must be one of {names}, not {value!r}")
    return tuple(values) if kind == Range else values[0]


def _setting(text: str) -> tuple[str, Any]:
    """Return name and value of `name=value`; two numbers are `0.7,1.4`, words need no quotes."""
    name, _, value = text.partition("=")
    for written in (value, f"[{value}]", json.dumps(value)):
        try:
            return name, tomllib.loads(f"value = {written}")["value"]
        except tomllib.TOMLDecodeError:
            continue
    raise TrainingError(f"{text}: give NAME=VALUE")


def load_recipe(name: str, settings: Iterable[str] = (), **numbers: Any) -> Recipe:  # noqa: ANN401
    """Read a shipped recipe (`paper`) or a TOML file, and replace some of its numbers.

    The file's sections are for the reader; numbers left out have the defaults of `Recipe`. Settings
    are `name=value`, as in `--set`; of `numbers`, None leaves the recipe's own.

    Raises:
        TrainingError: no such recipe, not TOML, or a number that is unknown or of the wrong kind.
    """
    path = shipped_or_own(FOLDER, name, ".toml")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise TrainingError(f"{path}: not TOML ({error})") from error
    found: dict[str, Any] = {}
    for key, value in content.items():
        entries = value.items() if isinstance(value, dict) else [(key, value)]
        found |= {entry: _checked(entry, number, str(path)) for entry, number in entries}
    found |= {entry: _checked(entry, value, "--set") for entry, value in map(_setting, settings)}
    found |= {entry: value for entry, value in numbers.items() if value is not None}
    return Recipe(**found)


def recipe_of(numbers: dict[str, Any]) -> Recipe:
    """Return the recipe of a `run.json`; numbers of other versions are left at their defaults.

    Raises:
        TrainingError: a number is of the wrong kind.
    """
    known = {entry.name for entry in dataclasses.fields(Recipe)} & numbers.keys()
    return Recipe(**{name: _checked(name, numbers[name], "run.json") for name in known})


def to_toml(recipe: Recipe) -> str:
    """Return the recipe as a TOML file's text, which `load_recipe` reads back."""
    values = dataclasses.asdict(recipe)
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())

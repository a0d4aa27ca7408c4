"""The folder of a run: its description, its checkpoints, and whether it is the run of a command."""

import dataclasses
import errno
import json
import math
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inference.files import check_writable, locked, one_line, whole_file, write_atomically
from inference.labels import LABEL_NAMES
from inference.network.weights import WeightsMetadata
from training import TrainingError
from training.augmentation import Intensities
from training.cases import Case
from training.recipe import MAY_CHANGE_ON_RESUME, Recipe, learning_rate_at, recipe_of, to_toml

ADVICE = (
    "the same command with a lower --learning-rate, --set gradient_clip=1 or --set precision=fp32 "
    "resumes at the last checkpoint"
)
"""What may help a run whose loss or weights are no longer finite; these may change on resuming."""

_ERRORS = OSError, RuntimeError, EOFError, UnpicklingError, LookupError, TypeError, ValueError


class Metrics(NamedTuple):
    """The mean loss since the row before, the rate, and the seconds of training so far."""

    step: int
    loss: float
    learning_rate: float
    slices_per_s: float
    seconds: float


@dataclass
class State:
    """Everything of a run that changes from step to step."""

    network: nn.Module
    average: nn.Module | None  # exponential moving
    optimizer: torch.optim.Optimizer
    loss_sum: Tensor  # of the steps since the last row of metrics, on the device
    loss_count: int = 0  # of those steps
    step: int = 0  # done so far
    seconds: float = 0.0  # of training
    metrics: list[Metrics] = field(default_factory=list)  # rows of `metrics.csv`

    @property
    def trained(self) -> nn.Module:
        """The network that is scored and exported: the average where there is one."""
        return self.average or self.network

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole and flushed to the disk or not at all.

        Raises:
            TrainingError: the weights are no longer finite; what is there stays.
            OSError: the file cannot be written.
        """
        content = {
            "network": self.network.state_dict(),
            "average": self.average and self.average.state_dict(),
            "weights": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss_sum": self.loss_sum.item(),
            **{name: getattr(self, name) for name in ("loss_count", "step", "seconds")},
            "metrics": [tuple(row) for row in self.metrics],
        }
        if not all_finite(content):
            there = f"{path} stays as it was" if path.is_file() else "no checkpoint is there"
            raise TrainingError(
                f"the weights are not finite at step {self.step}, so not saved: {there}; {ADVICE}"
            )
        with whole_file(path) as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # torch's own, on top of what the file raised
                raise error.__context__ or error from None

    def load(self, path: Path, device: torch.device) -> None:
        """Resume from what `save` wrote; raises as `read_checkpoint`."""
        content = read_checkpoint(path, device)
        self.network.load_state_dict(content["network"])
        if self.average:
            self.average.load_state_dict(content["average"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.loss_sum.fill_(content["loss_sum"])
        self.loss_count, self.step = content["loss_count"], content["step"]
        self.seconds = content["seconds"]
        self.metrics = [Metrics(*row) for row in content["metrics"]]


def all_finite(content: object) -> bool:
    """Return whether no number in a checkpoint, or in a part of it, is infinite or NaN."""
    if isinstance(content, Tensor):
        return bool(content.isfinite().all())
    if isinstance(content, dict | list | tuple):
        return all(map(all_finite, content.values() if isinstance(content, dict) else content))
    return not isinstance(content, float) or math.isfinite(content)


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `State.save` wrote; its tensors are on `device`.

    Raises:
        TrainingError: the file cannot be read, or is damaged.
    """
    try:
        with path.open("rb") as file:  # torch opens no path that is not UTF-8
            content = torch.load(file, map_location=device, weights_only=True)
        return {**content, "step": int(content["step"])}
    except _ERRORS as error:
        # Torch seeks before the start of a file that is cut short.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise TrainingError(f"{path}: {one_line(error)}") from error
        raise TrainingError(f"{path}: a damaged checkpoint: delete it to start again") from error


def code_revision() -> str:
    """Return the git revision of this code, with "+" if files were changed, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, encoding="utf-8").strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_run(output: Path) -> tuple[dict[str, Any], Recipe]:
    """Return a run's `run.json`, and its recipe.

    Raises:
        TrainingError: there is none, or it is damaged.
    """
    path = output / "run.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return about, recipe_of(about["recipe"])
    except OSError as error:
        raise TrainingError(f"{output}: not a run ({path.name}: {one_line(error)})") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path}: damaged ({one_line(error)})") from error


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Make a run's folder and hold it for as long as it is trained in.

    Raises:
        TrainingError: another process holds it.
        OSError: it cannot be made or written, or its files cannot be renamed.
    """
    output.mkdir(parents=True, exist_ok=True)
    check_writable(output)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(output / "last.pt", wait=False))
        except BlockingIOError as error:
            raise TrainingError(f"{output}: another training is running in this folder") from error
        yield


def describe_run(
    training: list[Case],
    held_out: list[Case],
    intensities: Intensities,
    anatomies: list[str],
    start_from: str | None,
) -> dict[str, Any]:
    """Return the content of `run.json` but for the recipe.

    Anatomies and `start_from` are names of files.
    """

    def describe(case: Case) -> dict[str, Any]:
        return {
            "name": case.name,
            "patient": case.patient,
            "image": str(case.files.image),
            "slices": case.cached.shape[0],
            "annotated_labels": case.annotated,
            "present_labels": case.cached.present,
            "window_hu": case.files.window_hu,
            "data_set": case.files.mapping.description,
        }

    return {
        "intensity_mean": intensities.mean,
        "intensity_std": intensities.std,
        "training": [describe(case) for case in training],
        "held_out": [describe(case) for case in held_out],
        "anatomies": anatomies,
        "start_from": start_from,
    }


def weights_metadata(recipe: Recipe, mean: float, std: float, **texts: str) -> WeightsMetadata:
    """Return the metadata of a run's weights.

    Mean and std are of its intensities, HU; texts not given are empty.
    """
    known: dict[str, Any] = {"trained_on": "", "licence": "", "date": "", "revision": "", **texts}
    return WeightsMetadata(
        **known,
        base_channels=recipe.base_channels,
        num_classes=len(LABEL_NAMES),
        intensity_mean=mean,
        intensity_std=std,
        matrix_reduction=recipe.matrix_reduction,
        attention=recipe.attention,
        supervised_channels=recipe.supervised_channels,
        clip_hu=recipe.clips,
    )


def start_or_resume(output: Path, recipe: Recipe, description: dict[str, Any]) -> list[str]:
    """Write a new run's files, or check that the run there is this one.

    Returns:
        Lines to report before it starts.

    Raises:
        TrainingError: the run there has other numbers or other data, or more steps.
        OSError: the files cannot be written.
    """
    about = json.loads(json.dumps({**description, "recipe": dataclasses.asdict(recipe)}))
    lines = []
    if 0 < recipe.steps <= recipe.warmup_steps:
        lines.append(f"caution: all {recipe.steps} steps are warm-up ({recipe.warmup_steps} steps)")
    if (output / "last.pt").is_file():
        before, known = read_run(output)
        done = read_checkpoint(output / "last.pt")["step"]
        if done > recipe.steps:
            raise TrainingError(
                f"{output} has done {done} steps, more than --steps {recipe.steps}: raise it, or "
                f"export the run (python -m training export {output} --checkpoint last)"
            )
        if done == recipe.steps:
            lines.append(f"{output} has done all its {done} steps: --steps N continues it")
        rates = [learning_rate_at(done, one) for one in (known, recipe)]
        if rates[0] != rates[1] and done < recipe.steps:
            lines.append("its learning rate at step {} was {:.1e}, now {:.1e}".format(done, *rates))
        for name, value in dataclasses.asdict(recipe).items():
            if (was := getattr(known, name)) != value and name not in MAY_CHANGE_ON_RESUME:
                raise TrainingError(
                    f"{output} is a run with {name} {was}, not {value}: name another --output, or "
                    "give the same numbers to resume it"
                )
        for name in description:
            if before.get(name) != about[name]:
                raise TrainingError(
                    f"{output} is a run with other data ({name}): name another --output"
                )
        about = {**before, "recipe": about["recipe"]}
    else:
        about["revision"] = code_revision()
    write_atomically(output / "recipe.toml", to_toml(recipe))
    write_atomically(output / "run.json", json.dumps(about, indent=1))
    return lines

"""The folder of a run: what it says of itself, and whether it is the run that is asked for."""

import dataclasses
import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from inference.files import locked, one_line, write_atomically
from training.augmentation import Intensities
from training.cases import Case
from training.checkpoint import RunError, read_checkpoint
from training.recipe import (
    MAY_CHANGE_ON_RESUME,
    MAY_CHANGE_WITH_A_LINE,
    Recipe,
    learning_rate_at,
    to_toml,
)

METRICS = ("step", "loss", "learning_rate", "slices_per_s", "seconds")
"""Columns of metrics.csv: loss is the mean since the row before, seconds those of training."""


def code_revision() -> str:
    """The git revision of this code, with "+" if files were changed, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_run(output: Path) -> dict:
    """Return what `run.json` says of a run; numbers its version did not know have their defaults.

    Raises:
        RunError: there is none, or it is damaged.
    """
    path = output / "run.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        defaults = json.loads(json.dumps(dataclasses.asdict(Recipe())))
        return {**about, "recipe": {**defaults, **about["recipe"]}}
    except OSError as error:
        raise RunError(f"{output}: not a run ({path.name}: {one_line(error)})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: damaged ({one_line(error)})") from error


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Make a run's folder and hold it for as long as it is trained in.

    Raises:
        RunError: another process holds it.
        OSError: it cannot be made or written.
    """
    output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(output / "last.pt", wait=False))
        except BlockingIOError as error:
            raise RunError(f"{output}: another training is running in this folder") from error
        yield


def describe_run(
    training: list[Case],
    held_out: list[Case],
    intensities: Intensities,
    anatomies: list[str],
    start_from: str | None,
) -> dict:
    """What `run.json` says of a run: everything but its numbers.

    Args:
        training, held_out: cached cases.
        intensities: of the training set.
        anatomies: the files of which slices are drawn.
        start_from: the weights with which the run begins, or None for random ones.
    """

    def describe(case: Case) -> dict:
        return {
            "name": case.name,
            "patient": case.patient,
            "image": str(case.image),
            "slices": case.cached.shape[0],
            "annotated_labels": case.annotated,
            "present_labels": case.cached.present,
            "window_hu": case.window_hu,
            "data_set": case.mapping.description if case.mapping else None,
        }

    return {
        "intensity_mean": intensities.mean,
        "intensity_std": intensities.std,
        "training": [describe(case) for case in training],
        "held_out": [describe(case) for case in held_out],
        "anatomies": anatomies,
        "start_from": start_from,
    }


def start_or_check_run(output: Path, recipe: Recipe, description: dict) -> None:
    """Write a new run's files, or see that the run there is this one.

    Raises:
        RunError: the run there has other numbers or other data.
    """
    numbers = dataclasses.asdict(recipe)
    about = json.loads(json.dumps({**description, "recipe": numbers}))
    if (output / "run.json").is_file() and (output / "last.pt").is_file():
        before = read_run(output)
        for name in MAY_CHANGE_ON_RESUME:
            before["recipe"].pop(name), about["recipe"].pop(name)
        for name, value in about["recipe"].items():
            if before["recipe"][name] != value:
                raise RunError(
                    f"{output} is a run with {name} {before['recipe'][name]}, not {value}: "
                    "name another --output, or give the same numbers to go on"
                )
        for name in description:
            if before.get(name) != about[name]:
                raise RunError(f"{output} is a run with other data ({name}): name another --output")
        about = {**before, "recipe": numbers}
    else:
        about["revision"] = code_revision()
    write_atomically(output / "recipe.toml", to_toml(recipe).encode())
    write_atomically(output / "run.json", json.dumps(about, indent=1).encode())


def take_up(output: Path, recipe: Recipe) -> list[str]:
    """Hold a recipe's steps against those that the run there has behind it; nothing is written.

    Returns:
        What to know before it goes on, a line each: warm-up that never ends, a schedule that is now
        another, a run that is done.

    Raises:
        RunError: the run is beyond the recipe's last step.
    """
    lines = []
    if recipe.steps and recipe.steps <= recipe.warmup_steps:
        lines.append(
            f"caution: all {recipe.steps} steps are warm-up (warmup_steps {recipe.warmup_steps}), "
            f"the learning rate never gets beyond {learning_rate_at(recipe.steps - 1, recipe):.1e} "
            f"of {recipe.learning_rate:.1e}: give more --steps"
            " (or, for a new run, fewer --warmup-steps)"
        )
    if not (output / "last.pt").is_file():
        return lines
    done = read_checkpoint(output / "last.pt", mmap=True)["step"]
    if done > recipe.steps:
        raise RunError(
            f"{output} has done {done} steps, more than --steps {recipe.steps}: give more than "
            f"{done} to train on, or take it as it is (python -m training export {output} "
            "--checkpoint last)"
        )
    if done == recipe.steps:
        lines.append(f"{output} has done all its {done} steps: --steps above {done} would train on")
    known = read_run(output)["recipe"]
    for name in MAY_CHANGE_WITH_A_LINE:
        if known[name] != (value := getattr(recipe, name)):
            lines.append(f"{output}: {name} was {known[name]} and is {value} from step {done}")
    before = known["steps"]
    if before != recipe.steps and recipe.schedule != "constant" and done < recipe.steps:
        was = learning_rate_at(done, dataclasses.replace(recipe, steps=before))
        lines.append(
            f"{output} was to end at step {before} and now ends at {recipe.steps}: from step "
            f"{done} its learning rate is {learning_rate_at(done, recipe):.1e}, not {was:.1e}"
        )
    return lines


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the rows after a checkpoint: their steps are about to be done again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    kept = [line for line in lines[1:] if int(line.split(",")[0]) <= step]
    write_atomically(path, "".join([",".join(METRICS) + "\n", *kept]).encode())

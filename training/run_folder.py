"""The folder of a run: what it says of itself, and whether it is the run that is asked for."""

import dataclasses
import json
import subprocess
from pathlib import Path

from inference.files import write_atomically
from training.augmentation import Intensities
from training.cases import Case
from training.checkpoint import steps_done
from training.recipe import MAY_CHANGE_ON_RESUME, Recipe, learning_rate_at, to_toml

METRICS = ("step", "loss", "learning_rate", "slices_per_s", "seconds")
"""Columns of metrics.csv: loss is the mean since the row before, seconds those of training."""


class RunError(ValueError):
    """A run that cannot be started or taken up; the message is the reason, in one line."""


def code_revision() -> str:
    """The git revision of this code, with "+" if files were changed, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


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
    known = output / "run.json"
    numbers = dataclasses.asdict(recipe)
    about = json.loads(json.dumps({**description, "recipe": numbers}))
    if known.is_file() and (output / "last.pt").is_file():
        before = json.loads(known.read_text(encoding="utf-8"))
        # Numbers that the run's version did not know have their defaults, which change nothing.
        defaults = json.loads(json.dumps(dataclasses.asdict(Recipe())))
        before["recipe"] = {**defaults, **before["recipe"]}
        for name in MAY_CHANGE_ON_RESUME:
            before["recipe"].pop(name), about["recipe"].pop(name)
        for name, value in about["recipe"].items():
            if before["recipe"][name] != value:
                raise RunError(
                    f"{output} is a run with {name} {before['recipe'][name]}, not {value}: "
                    "name another --output, or give the same numbers to go on"
                )
        for name in description:
            if before[name] != about[name]:
                raise RunError(f"{output} is a run with other data ({name}): name another --output")
        about = {**before, "recipe": numbers}
    else:
        about["revision"] = code_revision()
    write_atomically(output / "recipe.toml", to_toml(recipe).encode())
    write_atomically(known, json.dumps(about, indent=1).encode())


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
    done = steps_done(output / "last.pt")
    if done > recipe.steps:
        raise RunError(
            f"{output} has done {done} steps, more than --steps {recipe.steps}: give more than "
            f"{done} to train on, or take it as it is (python -m training export {output} "
            "--checkpoint last)"
        )
    if done == recipe.steps:
        lines.append(f"{output} has done all its {done} steps: --steps above {done} would train on")
    known = output / "run.json"
    before = (
        json.loads(known.read_text(encoding="utf-8"))["recipe"].get("steps")
        if known.is_file()
        else None
    )
    if before not in (None, recipe.steps) and recipe.schedule != "constant" and done < recipe.steps:
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

"""Weights for the container from a run, with a model card beside them."""

import datetime
import inspect
import json
import math
from pathlib import Path

from inference.files import write_atomically
from inference.labels import LABEL_NAMES
from inference.model import AttentionUNet
from inference.weights import WeightsMetadata, save_weights
from training.checkpoint import ADVICE, RunError, all_finite, read_checkpoint
from training.evaluation import (
    Score,
    mean_by_label,
    mean_organ_dsc,
    read_left_out,
    read_scores,
)
from training.recipe import clips
from training.run_folder import read_run

WEAK_DSC = 0.7
"""Labels below this held-out DSC are named among the known weaknesses."""

USELESS_DSC = 0.1
"""Weights whose organs score below this on average carry a warning wherever they are used."""

_FEWEST_SLICES = 2000  # seen in training, below which no network of ours has learned anything


def export(
    run: Path,
    output: Path,
    *,
    checkpoint: str,
    trained_on: str,
    licence: str,
    notes: list[str],
    scores_of: Path | None = None,
    left_out: Path | None = None,
) -> Path:
    """Write a run's weights as safetensors, and `NAME.md` beside them.

    Args:
        run: folder of the run.
        output: path of the weights, NAME.safetensors.
        checkpoint: "best" or "last".
        trained_on: data sets and what a user must know of them, one line.
        licence: of the weights.
        notes: known weaknesses besides those that the scores show.
        left_out: table of `python -m training score` with the scores of these very weights.
        scores_of: folder of another run whose held-out scores the card gives: the run before this
            one, if this one was trained on everything.

    Returns:
        The model card's path.

    Raises:
        RunError: not a run, or it has no such checkpoint.
        OSError: a file cannot be written.
    """
    about, state = _read_run(run, checkpoint)
    recipe = about["recipe"]
    scored = scores_of or run
    scores = read_scores(scored / "held_out.csv") if (scored / "held_out.csv").is_file() else []
    step = max((score.step for score in scores), default=0) if scores_of else state["step"]
    at_step = [score for score in scores if score.step == step]
    try:
        unseen_scores = read_left_out(left_out) if left_out else {}
    except (OSError, ValueError) as error:
        raise RunError(f"{left_out}: {error}") from error
    if scores_of and not at_step:
        raise RunError(f"{scores_of}: no run with held-out scores is there")
    metadata = WeightsMetadata(
        base_channels=recipe["base_channels"],
        num_classes=len(LABEL_NAMES),
        intensity_mean=about["intensity_mean"],
        intensity_std=about["intensity_std"],
        trained_on=trained_on,
        licence=licence,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        revision=about["revision"],
        matrix_reduction=recipe["matrix_reduction"],
        attention=recipe["attention"],
        supervised_channels=recipe["supervised_channels"],
        clip_hu=clips(recipe["clip_hu"]),
        warning=warning_of(about, state["step"], at_step, unseen_scores),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    # Training lays weights out channels last; the file must have them in the order of their shape.
    weights = {name: tensor.contiguous() for name, tensor in state["weights"].items()}
    save_weights(output, weights, metadata)
    card = output.with_suffix(".md")
    text = model_card(
        output.name,
        metadata,
        about,
        state["step"],
        at_step,
        notes,
        unseen_scores,
        of_these=not scores_of,
    )
    write_atomically(card, text.encode())
    return card


def _read_run(run: Path, checkpoint: str) -> tuple[dict, dict]:
    """What a run says of itself, and a checkpoint of it.

    Raises:
        RunError: as `export`.
    """
    path = run / f"{checkpoint}.pt"
    about = read_run(run)
    recipe = about["recipe"]
    if not path.is_file() and not (run / "last.pt").is_file():
        raise RunError(
            f"{run}: no checkpoint yet: a run writes one every {recipe['checkpoint_interval']} "
            "steps, and where it is stopped (Ctrl-C)"
        )
    if not path.is_file():  # the best is only known once a scoring says so
        why = (
            f"the run has not been scored yet (at every {recipe['evaluation_interval']} steps, and "
            "at its end)"
            if about["held_out"]
            else "the run holds no case out, so none of its checkpoints is known to be the best"
        )
        raise RunError(f"{run}: {why}: take its last one, --checkpoint last, or train on")
    state = read_checkpoint(path)
    if not all_finite(state["weights"]):
        raise RunError(f"{path}: its weights are not finite (step {state['step']}): {ADVICE}")
    return about, state


def warning_of(
    about: dict, step: int, scores: list[Score], left_out: dict[str, list[Score]]
) -> str:
    """What speaks against using a run's weights at all, in one line; "" where nothing is known to.

    Args:
        about: what `run.json` holds.
        step: of the checkpoint.
        scores: of held-out cases.
        left_out: scores by data set.
    """
    reasons = []
    slices = step * about["recipe"]["batch_size"]
    if slices < _FEWEST_SLICES and not about["start_from"]:
        reasons.append(f"trained on {slices} slices only ({step} steps)")
    found = {"held-out": scores, **left_out}
    for name, of_set in found.items():
        dsc = mean_organ_dsc(of_set) if of_set else math.nan
        if dsc < USELESS_DSC:
            reasons.append(f"mean organ DSC {dsc:.3f} on {name} cases")
    return f"not fit for use: {'; '.join(reasons)}" if reasons else ""


def _synthetic_lines(about: dict) -> list[str]:
    """What the model card says of slices that were drawn and of weights to begin with."""
    recipe, lines = about["recipe"], []
    if recipe["synthetic_fraction"]:
        sources = list(about["anatomies"])
        if recipe["synthetic_phantoms"]:
            sources.append(f"{recipe['synthetic_phantoms']} patients of synthetic/phantom.py")
        lines += [
            "",
            f"{recipe['synthetic_fraction']:.0%} of the slices were drawn by "
            f"training/synthesis.py, all labels known, from {' and '.join(sources)}.",
        ]
    if about["start_from"]:
        lines += ["", f"The run began with the weights {about['start_from']}."]
    return lines


def model_card(
    name: str,
    metadata: WeightsMetadata,
    about: dict,
    step: int,
    scores: list[Score],
    notes: list[str],
    left_out: dict[str, list[Score]] | None = None,
    *,
    of_these: bool = True,
) -> str:
    """The model card, Markdown.

    Args:
        name: of the weights file.
        metadata: of the weights.
        about: what `run.json` holds.
        step: of the checkpoint.
        scores: of the held-out cases at that step, none if they were not scored there.
        notes: known weaknesses besides those that the scores show.
        left_out: scores of these weights on cases that nobody trained on, by data set.
        of_these: whether the scores are of these weights, not of the run's before them.
    """
    recipe, training, held_out = about["recipe"], about["training"], about["held_out"]
    lines = [
        f"# {name}",
        "",
        "Not a medical device; for research only.",
        "",
        *((f"**Warning: {metadata.warning}.**", "") if metadata.warning else ()),
        f"- network: `AttentionUNet({_arguments(metadata)})`, matrix reduction "
        f"{metadata.matrix_reduction}",
        f"- trained on: {metadata.trained_on}",
        f"- licence: {metadata.licence}",
        f"- exported: {metadata.date}, code revision {metadata.revision}, step {step} of "
        f"{recipe['steps']}, {step * recipe['batch_size']:,} slices",
        f"- intensities: clipped to the volume's percentiles 1 and 99{_and_clip(metadata)}, then "
        "z-scored with mean "
        f"{metadata.intensity_mean:.2f} HU and standard deviation {metadata.intensity_std:.2f} HU",
        "",
        "## Data",
        "",
        f"{len(training)} cases of {len({case['patient'] for case in training})} patients, "
        f"{sum(case['slices'] for case in training):,} slices; {len(held_out)} cases held out"
        + (f" ({', '.join(case['name'] for case in held_out)})." if held_out else "."),
        *_synthetic_lines(about),
        "",
        "| label | training cases annotated | of these present |",
        "|---|---|---|",
    ]
    for label in range(1, len(LABEL_NAMES)):
        annotated = [case for case in training if label in case["annotated_labels"]]
        present = sum(label in case["present_labels"] for case in annotated)
        lines.append(f"| {LABEL_NAMES[label]} | {len(annotated)} | {present} |")
    lines += ["", "## Held-out scores", ""]
    means = mean_by_label(scores)
    if scores:
        weights = (
            "these weights. The checkpoint may have been chosen by these cases' mean DSC"
            if of_these
            else "the weights of an earlier run, which had not seen them: **not with the weights "
            "here**, which were then trained on these cases as well and cannot be scored honestly "
            "on them"
        )
        names = ", ".join(sorted({score.case for score in scores}))
        lines += [
            f"Cases ({names}), never trained on, through the container's own prediction "
            f"with {weights}. DSC and NSD as FLARE 2023 scores them, only labels that a case's "
            "annotator looked for. A label absent from reference and prediction counts 1.",
            "",
            "| label | DSC | NSD | n |",
            "|---|---|---|---|",
            *(
                f"| {LABEL_NAMES[label]} | {dsc:.4f} | {_or_dash(nsd)} | {count} |"
                for label, (dsc, nsd, count) in means.items()
            ),
            f"| **mean of organs** | {mean_organ_dsc(scores):.4f} | | |",
        ]
    else:
        lines.append(
            f"None: the run was not scored at step {step}."
            if held_out
            else "None: no case was held out."
        )
    lines += _left_out_lines(left_out or {})
    lines += ["", "## Known weaknesses", ""]
    unseen = [
        LABEL_NAMES[label]
        for label in range(1, len(LABEL_NAMES))
        if not recipe["synthetic_fraction"]
        and not any(label in case["present_labels"] for case in training)
    ]
    weak = [
        f"{LABEL_NAMES[label]} ({dsc:.2f})"
        for label, (dsc, _, _) in means.items()
        if dsc < WEAK_DSC
    ]
    if unseen:
        lines.append(f"- Never shown in training, so never predicted rightly: {', '.join(unseen)}.")
    if weak:
        lines.append(f"- Held-out DSC below {WEAK_DSC}: {', '.join(weak)}.")
    if 0 < len({score.case for score in scores}) < 10:
        lines.append(
            f"- The held-out scores are of {len({score.case for score in scores})} cases: they say "
            "little of other scanners, phases and diseases."
        )
    lines += [f"- {note}" for note in notes]
    lines += [
        "",
        "## Recipe",
        "",
        "With these lines as FILE.toml, "
        "`python -m training fit --data DIR --output RUN --recipe FILE.toml"
        + "".join(f" --anatomy {name}" for name in about["anatomies"])
        + (f" --start-from {about['start_from']}" if about["start_from"] else "")
        + (f" --held-out {' '.join(case['name'] for case in held_out)}`" if held_out else "`")
        + " trains it again.",
        "",
        "```toml",
        *(f"{name} = {json.dumps(value)}" for name, value in recipe.items()),
        "```",
        "",
    ]
    return "\n".join(lines)


def _and_clip(metadata: WeightsMetadata) -> str:
    if metadata.clip_hu is None:
        return ""
    low, high = metadata.clip_hu
    return f" and to {low:g} to {high:g} HU"


def _arguments(metadata: WeightsMetadata) -> str:
    """Those of `AttentionUNet` that are not its defaults, or its width."""
    defaults = inspect.signature(AttentionUNet).parameters
    return ", ".join(
        f"{name}={value!r}"
        for name, value in metadata.network.items()
        if name == "base_channels" or value != defaults[name].default
    )


def _or_dash(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def _left_out_lines(data_sets: dict[str, list[Score]]) -> list[str]:
    """The table of left-out scores: a row a label, a column a data set."""
    if not data_sets:
        return []
    means = {name: mean_by_label(scores) for name, scores in data_sets.items()}
    counts = {name: len({score.case for score in scores}) for name, scores in data_sets.items()}
    lines = [
        "",
        "## Left-out scores",
        "",
        "These very weights, once, on patients that nobody trained on, tuned on or chose by. DSC "
        "(cases); in stacks of single slices without largest components and only where the label "
        "is in the reference. Only labels that were annotated.",
        "",
        "| label | " + " | ".join(f"{name} ({count})" for name, count in counts.items()) + " |",
        "|---|" + "---|" * len(means),
    ]
    for label in sorted({label for of_set in means.values() for label in of_set}):
        cells = [
            f"{of_set[label][0]:.3f} ({of_set[label][2]})" if label in of_set else ""
            for of_set in means.values()
        ]
        lines.append(f"| {LABEL_NAMES[label]} | {' | '.join(cells)} |")
    cells = [f"**{mean_organ_dsc(scores):.3f}**" for scores in data_sets.values()]
    return [*lines, f"| **mean of organs** | {' | '.join(cells)} |"]

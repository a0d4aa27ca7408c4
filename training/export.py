"""Weights for the container from a run, with a model card beside them."""

import datetime
import inspect
import math
from collections.abc import Sequence
from pathlib import Path

from benchmark.text import table
from inference.files import write_atomically
from inference.labels import LABEL_NAMES
from inference.network.model import AttentionUNet
from inference.network.weights import WeightsMetadata, save_weights
from training import TrainingError
from training.checkpoint import ADVICE, all_finite, read_checkpoint
from training.recipe import Recipe, to_toml
from training.run_folder import read_run, weights_metadata
from training.tables import Score, mean_by_label, mean_organ_dsc, read_scores

WEAK_DSC = 0.7
"""Labels below this held-out DSC are named among the known weaknesses."""

USELESS_DSC = 0.1
"""Weights whose organs score below this on average carry a warning wherever they are used."""

_USES = (
    "## Intended use",
    "",
    "Research: label maps of 13 abdominal organs and tumors in CT of the abdomen in HU, each "
    "checked by a person before anything rests on it.",
    "",
    "## Out of scope",
    "",
    "Diagnosis, treatment and every other clinical use: not a medical device. MR, cone-beam "
    "CT, CT without calibrated HU, other parts of the body, and children.",
)

_FEWEST_SLICES = 2000  # seen in training, below which no network of ours has learned anything


def export(
    run: Path,
    output: Path,
    checkpoint: str,
    notes: Sequence[str] = (),
    scores_of: Path | None = None,
    left_out: Path | None = None,
    **texts: str,
) -> str:
    """Write a run's weights as safetensors, and `NAME.md` beside them.

    Args:
        run: folder of the run.
        output: path of the weights, NAME.safetensors.
        checkpoint: "best" or "last".
        notes: known weaknesses besides those that the scores show.
        scores_of: folder of another run whose held-out scores the card gives: the run before this
            one, if this one was trained on everything.
        left_out: table of `python -m training score` with the scores of these very weights.
        texts: `trained_on` and `licence` of the weights' metadata.

    Returns:
        What speaks against using these weights at all, or "".

    Raises:
        TrainingError: not a run, it has no such checkpoint, or a table cannot be read.
        OSError: a file cannot be written.
    """
    about, recipe = read_run(run)
    state = _read_checkpoint(run, checkpoint, holds_out=bool(about["held_out"]))
    done: int = state["step"]
    try:
        table = (scores_of or run) / "held_out.csv"
        scores = read_scores(table) if scores_of or table.is_file() else []
        unseen = read_scores(left_out) if left_out else []
    except (OSError, ValueError) as error:
        raise TrainingError(f"no scores: {error}") from error
    step = max((score.step for score in scores), default=0) if scores_of else done
    scores = [score for score in scores if score.step == step]
    metadata = weights_metadata(
        recipe,
        about["intensity_mean"],
        about["intensity_std"],
        **texts,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        revision=about["revision"],
        warning=_warning(done, done * recipe.batch_size, about["start_from"], scores, unseen),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    # Training lays weights out channels last; the file must have them in the order of their shape.
    weights = {name: tensor.contiguous() for name, tensor in state["weights"].items()}
    save_weights(output, weights, metadata)
    card = _model_card(
        output.name, metadata, about, recipe, done, scores, unseen, notes, of_these=not scores_of
    )
    write_atomically(output.with_suffix(".md"), card.encode(errors="surrogateescape"))
    return metadata.warning


def _read_checkpoint(run: Path, checkpoint: str, *, holds_out: bool) -> dict:
    """Return a checkpoint of a run; raises as `export`."""
    path = run / f"{checkpoint}.pt"
    if not path.is_file() and not (run / "last.pt").is_file():
        raise TrainingError(f"{run}: no checkpoint yet: stop the run (Ctrl-C) to have one")
    if not path.is_file():  # the best is only known once a scoring says so
        why = "the run has not been scored yet" if holds_out else "the run holds no case out"
        raise TrainingError(f"{run}: {why}: take its last checkpoint, --checkpoint last")
    state = read_checkpoint(path)
    if not all_finite(state["weights"]):
        raise TrainingError(f"{path}: its weights are not finite (step {state['step']}): {ADVICE}")
    return state


def _warning(
    steps: int, slices: int, start_from: str | None, scores: list[Score], unseen: list[Score]
) -> str:
    """Return what speaks against using weights at all, in one line, or ""."""
    reasons = []
    if slices < _FEWEST_SLICES and not start_from:
        reasons.append(f"trained on {slices} slices only ({steps} steps)")
    for name, of_set in {"held-out": scores, **_by_data_set(unseen)}.items():
        if mean_organ_dsc(of_set) < USELESS_DSC:
            reasons.append(f"mean organ DSC {mean_organ_dsc(of_set):.3f} on {name} cases")
    return f"not fit for use: {'; '.join(reasons)}" if reasons else ""


def _by_data_set(scores: list[Score]) -> dict[str, list[Score]]:
    names = dict.fromkeys(score.data_set for score in scores)
    return {name: [score for score in scores if score.data_set == name] for name in names}


def _model_card(
    name: str,
    metadata: WeightsMetadata,
    about: dict,
    recipe: Recipe,
    done: int,
    scores: list[Score],
    unseen: list[Score],
    notes: Sequence[str],
    *,
    of_these: bool,
) -> str:
    """Return the model card, Markdown.

    Args:
        name: of the weights file.
        metadata: of the weights.
        about: what `run.json` holds.
        recipe: of the run.
        done: steps of the checkpoint.
        scores: of the held-out cases, none if they were not scored there.
        unseen: of left-out cases, on whom nobody trained or tuned.
        notes: known weaknesses besides those that the scores show.
        of_these: whether the held-out scores are of these weights, not of the run's before them.
    """
    training, held_out = about["training"], about["held_out"]
    lines = [f"# {name}", ""]
    if metadata.warning:
        lines += [f"**Warning: {metadata.warning}.**", ""]
    clip = " and to {:g} to {:g} HU".format(*metadata.clip_hu) if metadata.clip_hu else ""
    lines += [
        f"- network: `AttentionUNet({_arguments(metadata)})`, matrix reduction "
        f"{metadata.matrix_reduction}",
        f"- intensities: clipped to the volume's percentiles 1 and 99{clip}, then z-scored with "
        f"mean {metadata.intensity_mean:.2f} HU and standard deviation "
        f"{metadata.intensity_std:.2f} HU",
        f"- exported: {metadata.date}, code revision {metadata.revision}, step {done} of "
        f"{recipe.steps}, {done * recipe.batch_size:,} slices",
        *(["- first weights: " + about["start_from"]] if about["start_from"] else []),
        "",
        *_USES,
        "",
        "## Training data",
        "",
        f"{metadata.trained_on[:1].upper()}{metadata.trained_on[1:]}.",
        "",
        f"{len(training)} cases of {len({case['patient'] for case in training})} patients, "
        f"{sum(case['slices'] for case in training):,} slices; held out: "
        f"{', '.join(case['name'] for case in held_out) or 'none'}.",
    ]
    if recipe.synthetic_fraction:
        sources = list(about["anatomies"])
        if recipe.synthetic_phantoms:
            sources.append(f"{recipe.synthetic_phantoms} patients of synthetic/phantom.py")
        lines.append(
            f"{recipe.synthetic_fraction:.0%} of the slices were drawn by training/synthesis.py, "
            f"all labels known, from {' and '.join(sources)}."
        )
    rows = []
    for label in range(1, len(LABEL_NAMES)):
        annotated = [case for case in training if label in case["annotated_labels"]]
        present = sum(label in case["present_labels"] for case in annotated)
        rows.append([LABEL_NAMES[label], len(annotated), present])
    lines += _table(["label", "training cases annotated", "of these present"], rows)
    lines += ["", "## Evaluation", "", "### Held-out cases", ""]
    means = mean_by_label(scores)
    cases = sorted({score.case for score in scores})
    if scores:
        weights = (
            "these weights. The checkpoint may have been chosen by these cases' mean DSC"
            if of_these
            else "the weights of an earlier run, which had not seen them: **not with the weights "
            "here**, which were then trained on these cases as well and cannot be scored honestly "
            "on them"
        )
        lines.append(
            f"Cases ({', '.join(cases)}), never trained on, through the container's own prediction "
            f"with {weights}. DSC and NSD as FLARE 2023 scores them, only labels that a case's "
            "annotator looked for. A label absent from reference and prediction counts 1."
        )
        rows = [
            [LABEL_NAMES[label], f"{dsc:.4f}", "–" if math.isnan(nsd) else f"{nsd:.4f}", count]
            for label, (dsc, nsd, count) in means.items()
        ]
        rows.append(["**mean of organs**", f"{mean_organ_dsc(scores):.4f}", "", ""])
        lines += _table(["label", "DSC", "NSD", "n"], rows)
    else:
        lines.append(f"None at step {done}." if held_out else "No case was held out.")
    if unseen:
        lines += [
            "",
            "### Left-out cases",
            "",
            "These very weights, once, on patients that nobody trained on, tuned on or chose by. "
            "DSC (cases); in stacks of single slices without largest components and only where the "
            "label is in the reference. Only labels that were annotated.",
            *_left_out_table(_by_data_set(unseen)),
        ]
    lines += ["", "## Limitations", ""]
    never = [
        LABEL_NAMES[label]
        for label in range(1, len(LABEL_NAMES))
        if not recipe.synthetic_fraction
        and not any(label in case["present_labels"] for case in training)
    ]
    weak = [f"{LABEL_NAMES[label]} ({m[0]:.2f})" for label, m in means.items() if m[0] < WEAK_DSC]
    if never:
        lines.append(f"- Never shown in training, so never predicted rightly: {', '.join(never)}.")
    if weak:
        lines.append(f"- Held-out DSC below {WEAK_DSC}: {', '.join(weak)}.")
    if 0 < len(cases) < 10:
        lines.append(
            f"- The held-out scores are of {len(cases)} cases: they say little of other scanners, "
            "phases and diseases."
        )
    lines += [f"- {note}" for note in notes]
    lines += ["", "## Licence", "", f"{metadata.licence[:1].upper()}{metadata.licence[1:]}."]
    command = "python -m training fit --data DIR --output RUN --recipe FILE.toml"
    command += "".join(f" --anatomy {anatomy}" for anatomy in about["anatomies"])
    command += f" --start-from {about['start_from']}" if about["start_from"] else ""
    command += f" --held-out {' '.join(case['name'] for case in held_out)}" if held_out else ""
    lines += ["", "## Recipe", "", f"With these lines as FILE.toml, `{command}` trains it again."]
    return "\n".join([*lines, "", "```toml", to_toml(recipe) + "```", ""])


def _table(head: list[str], rows: list[list]) -> list[str]:
    return ["", table(head, "l" * len(head), rows)]


def _left_out_table(data_sets: dict[str, list[Score]]) -> list[str]:
    """Return a row a label, a column a data set."""
    means = [mean_by_label(scores) for scores in data_sets.values()]
    rows = []
    for label in sorted({label for of_set in means for label in of_set}):
        cells = [f"{m[label][0]:.3f} ({m[label][2]})" if label in m else "" for m in means]
        rows.append([LABEL_NAMES[label], *cells])
    organs = [f"**{mean_organ_dsc(scores):.3f}**" for scores in data_sets.values()]
    return _table(["label", *data_sets], [*rows, ["**mean of organs**", *organs]])


def _arguments(metadata: WeightsMetadata) -> str:
    """Return those of `AttentionUNet` that are not its defaults, or its width."""
    defaults = inspect.signature(AttentionUNet).parameters
    return ", ".join(
        f"{name}={value!r}"
        for name, value in metadata.network.items()
        if name == "base_channels" or value != defaults[name].default
    )

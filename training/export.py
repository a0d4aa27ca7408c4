"""Weights for the container from a run, with a model card beside them."""

import datetime
import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.text import table
from inference.files import write_atomically
from inference.labels import LABEL_NAMES
from inference.network.model import AttentionUNet
from inference.network.weights import WeightsMetadata, save_weights
from training import TrainingError
from training.recipe import Recipe, to_toml
from training.run_folder import ADVICE, all_finite, read_checkpoint, read_run, weights_metadata
from training.tables import Score, mean_by_label, mean_organ_dsc, read_scores

WEAK_DSC = 0.7
"""Labels below this held-out DSC are named among the limitations."""

USELESS_DSC = 0.1
"""Weights whose organs score below this on average carry a warning wherever they are used."""

_CARD = Path(__file__).parent / "model_card.md"

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
    """Write a run's weights as `output`, NAME.safetensors, and a model card NAME.md beside them.

    Args:
        run: folder of the run.
        output: path of the weights.
        checkpoint: "best" or "last".
        notes: limitations besides those that the scores show.
        scores_of: folder of the run before, if this one was trained on everything: the card gives
            its held-out scores.
        left_out: table of `python -m training score` with the scores of these very weights.
        texts: `trained_on` and `licence` of the weights' metadata.

    Returns:
        Why these weights should not be used at all, or "".

    Raises:
        TrainingError: not a run, it has no such checkpoint, or a table cannot be read.
        OSError: a file cannot be written.
    """
    about, recipe = read_run(run)
    path = run / f"{checkpoint}.pt"
    if not path.is_file():
        raise TrainingError(
            f"{run}: no {path.name}: stop the run to have a last checkpoint, or "
            "take it (--checkpoint last): the best is known after a scoring"
        )
    state = read_checkpoint(path)
    done: int = state["step"]
    if not all_finite(state["weights"]):
        raise TrainingError(f"{path}: its weights are not finite (step {done}): {ADVICE}")
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


def _warning(
    steps: int, slices: int, start_from: str | None, scores: list[Score], unseen: list[Score]
) -> str:
    """Return why weights should not be used at all, in one line, or ""."""
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
    about: dict[str, Any],
    recipe: Recipe,
    done: int,
    scores: list[Score],
    unseen: list[Score],
    notes: Sequence[str],
    *,
    of_these: bool,
) -> str:
    """Return the model card: `model_card.md`, filled in.

    Held-out `scores` are of these very weights or, where `of_these` is false, of an earlier run's.
    """
    training, held_out = about["training"], about["held_out"]
    labels, cases = range(1, len(LABEL_NAMES)), sorted({score.case for score in scores})
    sources, synthetic, rows = list(about["anatomies"]), "", []
    if recipe.synthetic_phantoms:
        sources.append(f"{recipe.synthetic_phantoms} patients of synthetic/phantom.py")
    if recipe.synthetic_fraction:
        synthetic = (
            f"{recipe.synthetic_fraction:.0%} of the slices were drawn by training/synthesis.py, "
            f"all labels known, from {' and '.join(sources)}.\n"
        )
    for label in labels:
        annotated = [case for case in training if label in case["annotated_labels"]]
        present = sum(label in case["present_labels"] for case in annotated)
        rows.append([LABEL_NAMES[label], len(annotated), present])
    held_out_scores = f"None at step {done}." if held_out else "No case was held out."
    if scores:
        weights = (
            "these weights. The checkpoint may have been chosen by these cases' mean DSC"
            if of_these
            else "the weights of an earlier run, which had not seen them: **not with the weights "
            "here**, which were then trained on these cases as well and cannot be scored honestly "
            "on them"
        )
        held_out_scores = (
            f"Cases ({', '.join(cases)}), never trained on, through the container's own prediction "
            f"with {weights}. DSC and NSD as FLARE 2023 scores them, only annotated labels; one "
            "absent from reference and prediction counts 1.\n\n"
            + _table({"DSC / NSD (cases)": scores})
        )
    left_out_scores = (
        "\n### Left-out cases\n\nThese very weights, once, on patients that nobody trained on, "
        "tuned on or chose by. DSC / NSD (cases); in stacks of single slices without largest "
        "components and NSD, and only where the label is in the reference. Only annotated labels."
        f"\n\n{_table(_by_data_set(unseen))}\n"
    )
    limitations = []
    shown = {label for case in training for label in case["present_labels"]}
    if not recipe.synthetic_fraction and (never := set(labels) - shown):
        names = ", ".join(LABEL_NAMES[label] for label in sorted(never))
        limitations.append(f"Never shown in training, so never predicted rightly: {names}.")
    means = {LABEL_NAMES[label]: dsc for label, (dsc, _, _) in mean_by_label(scores).items()}
    if weak := [f"{name} ({dsc:.2f})" for name, dsc in means.items() if dsc < WEAK_DSC]:
        limitations.append(f"Held-out DSC below {WEAK_DSC}: {', '.join(weak)}.")
    if 0 < len(cases) < 10:
        limitations.append(
            f"Scores of {len(cases)} held-out cases do not carry over to other scanners, phases "
            "and diseases."
        )
    clip = " and to {:g} to {:g} HU".format(*metadata.clip_hu) if metadata.clip_hu else ""
    return _CARD.read_text(encoding="utf-8").format(
        name=name,
        metadata=metadata,
        recipe=recipe,
        done=done,
        warning=f"**Warning: {metadata.warning}.**\n\n" if metadata.warning else "",
        arguments=_arguments(metadata),
        clip=clip,
        slices_seen=done * recipe.batch_size,
        start_from=f"- first weights: {about['start_from']}\n" if about["start_from"] else "",
        trained_on=metadata.trained_on[:1].upper() + metadata.trained_on[1:],
        cases=len(training),
        patients=len({case["patient"] for case in training}),
        slices=sum(case["slices"] for case in training),
        held_out=", ".join(case["name"] for case in held_out) or "none",
        synthetic=synthetic,
        annotated=table(["label", "training cases annotated", "of these present"], "lll", rows),
        held_out_scores=held_out_scores,
        left_out_scores=left_out_scores if unseen else "",
        limitations="".join(f"- {line}\n" for line in (*limitations, *notes)),
        licence=metadata.licence[:1].upper() + metadata.licence[1:],
        toml=to_toml(recipe),
    )


def _table(columns: dict[str, list[Score]]) -> str:
    """Return DSC / NSD (cases), a row a label."""
    means = {name: mean_by_label(scores) for name, scores in columns.items()}
    rows = []
    for label in sorted({label for of_column in means.values() for label in of_column}):
        cells = []
        for dsc, nsd, count in (m.get(label, (math.nan, math.nan, 0)) for m in means.values()):
            surfaces = "–" if math.isnan(nsd) else f"{nsd:.3f}"
            cells.append(f"{dsc:.3f} / {surfaces} ({count})" if count else "")
        rows.append([LABEL_NAMES[label], *cells])
    organs = [f"**{mean_organ_dsc(scores):.3f}**" for scores in columns.values()]
    head = ["label", *columns]
    return table(head, "l" * len(head), [*rows, ["**mean of organs**", *organs]])


def _arguments(metadata: WeightsMetadata) -> str:
    """Return those of `AttentionUNet` that are not its defaults, or its width."""
    defaults = inspect.signature(AttentionUNet).parameters
    return ", ".join(
        f"{name}={value!r}"
        for name, value in metadata.network.items()
        if name == "base_channels" or value != defaults[name].default
    )

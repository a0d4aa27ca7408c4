"""Figures of a run: its curves, and held-out cases beside their reference."""

import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from inference.files import one_line, printable, write_atomically
from inference.labels import LABEL_NAMES
from inference.records.colours import LEGEND_COLOURS, overlay
from training.cases import Case, annotated_only
from training.packing import body_box
from training.run_folder import Metrics
from training.tables import Score, mean_by_label, mean_organ_dsc

_OVERLAY_SLICES = 6


def _save(figure: Figure, path: Path) -> None:
    content = BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_atomically(path, content.getvalue())


def or_warn(draw: Callable[..., None], *arguments: Any) -> None:  # noqa: ANN401
    """Draw; a figure that cannot be drawn or written is a warning and not the end of a run."""
    try:
        draw(*arguments)
    except Exception as error:  # whatever a name does to the library
        print(f"warning: figure not drawn: {one_line(error)}", file=sys.stderr, flush=True)


def draw_curves(path: Path, rows: list[Metrics], scores: list[Score]) -> None:
    """Draw loss, learning rate and held-out DSC of a run against the step.

    Raises:
        OSError: the picture cannot be written.
    """
    figure = Figure(figsize=(15, 4.2), dpi=110, layout="constrained")
    *axes, accuracy = figure.subplots(1, 3)
    for part, name in zip(axes, ("loss", "learning_rate"), strict=True):
        marker = "o" if len(rows) < 3 else None  # a line of one point shows nothing
        part.plot([row.step for row in rows], [getattr(row, name) for row in rows], marker=marker)
        part.set(xlabel="step", title=name.replace("_", " "))
    accuracy.set(xlabel="step", title="held-out DSC", ylim=(0, 1))
    steps = sorted({score.step for score in scores})
    at_step = [[score for score in scores if score.step == step] for step in steps]
    means = [mean_by_label(part) for part in at_step]
    for label in sorted({score.label for score in scores}):
        dsc = [mean[label][0] if label in mean else np.nan for mean in means]
        style = {"color": LEGEND_COLOURS[label] / 255, "marker": "o" if len(steps) < 3 else None}
        accuracy.plot(steps, dsc, label=LABEL_NAMES[label], **style)
    if scores:
        of_organs = [mean_organ_dsc(part) for part in at_step]
        accuracy.plot(steps, of_organs, "k.-", lw=2, label="mean of organs")
        accuracy.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    if len(steps) == 1:  # its axis would be a fraction of a step
        accuracy.set(xlim=(0, 2 * steps[0]))
    _save(figure, path)


def draw_overlay(path: Path, case: Case, prediction: np.ndarray, title: str) -> None:
    """Draw slices of a case, its reference above and a prediction (uint8, SPL) below.

    Raises:
        OSError: the picture cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hu = case.cached.hu
    reference = annotated_only(case.cached.label_map, case.annotated)
    labelled = np.flatnonzero((reference | prediction).any(axis=(1, 2)))
    if not labelled.size:
        labelled = np.arange(len(hu))
    shown = labelled[np.linspace(len(labelled) - 1, 0, _OVERLAY_SLICES).round().astype(int)]
    shown = shown[np.sort(np.unique(shown, return_index=True)[1])]  # of few slices each once
    box = body_box(hu[np.sort(shown)], reference[np.sort(shown)])
    _, row_mm, column_mm = case.cached.spacing
    figure = Figure(figsize=(3 * max(len(shown), 3), 6.8), dpi=70, layout="constrained")
    for row, (name, label_map) in zip(
        figure.subplots(2, len(shown), squeeze=False),
        (("reference", reference), ("prediction", prediction)),
        strict=True,
    ):
        for axes, index in zip(row, shown, strict=True):
            picture = overlay(hu[index][box], label_map[index][box])
            axes.imshow(picture, interpolation="hanning", aspect=row_mm / column_mm)
            axes.set_title(f"{name}, slice {index + 1}", fontsize=9)
            axes.axis("off")
            for x, side in ((0.01, "R"), (0.94, "L")):
                axes.text(x, 0.5, side, color="w", fontsize=9, transform=axes.transAxes)
    present = np.union1d(np.unique(reference[shown]), np.unique(prediction[shown]))
    handles = [
        Patch(color=LEGEND_COLOURS[label] / 255, label=LABEL_NAMES[label])
        for label in present[present > 0]
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=7, fontsize=8)
    figure.suptitle(printable(title))
    _save(figure, path)

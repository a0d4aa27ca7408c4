"""Pictures of a run: its curves, and held-out cases beside their reference."""

import csv
import json
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from inference.colours import LABEL_COLOURS
from inference.files import write_atomically
from inference.labels import LABEL_NAMES
from training.cases import Case
from training.evaluation import mean_by_label, mean_organ_dsc, read_scores, reference_of

_COLOURS = ListedColormap(LABEL_COLOURS / 255)
_OVERLAY_SLICES = 6
_SOFT_TISSUE_HU = (-160, 240)


def _save(figure: Figure, path: Path) -> None:
    content = BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_atomically(path, content.getvalue())


def draw_curves(run: Path) -> None:
    """Draw `curves.png` of a run's folder: loss, learning rate and held-out DSC against the step.

    Raises:
        OSError: metrics.csv cannot be read, or the picture not be written.
    """
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    figure = Figure(figsize=(15, 4.2), dpi=110, layout="constrained")
    loss, rate, accuracy = figure.subplots(1, 3)
    loss.plot(steps, [float(row["loss"]) for row in rows])
    loss.set(xlabel="step", title="training loss")
    rate.plot(steps, [float(row["learning_rate"]) for row in rows])
    rate.set(xlabel="step", title="learning rate")
    accuracy.set(xlabel="step", title="held-out DSC", ylim=(0, 1))
    if (run / "held_out.csv").is_file():
        scores = read_scores(run / "held_out.csv")
        scored = sorted({score.step for score in scores})
        at_step = [[score for score in scores if score.step == step] for step in scored]
        means = [mean_by_label(part) for part in at_step]
        for label in sorted({score.label for score in scores}):
            accuracy.plot(
                scored,
                [mean[label][0] if label in mean else np.nan for mean in means],
                color=mpl.colormaps["tab20"](label),
                label=LABEL_NAMES[label],
            )
        accuracy.plot(
            scored, [mean_organ_dsc(part) for part in at_step], "k.-", label="mean of organs"
        )
        accuracy.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, run / "curves.png")


def draw_overlay(path: Path, case: Case, prediction: np.ndarray, title: str) -> None:
    """Draw slices of a cached case with its reference above and a prediction below.

    Args:
        path: of the PNG.
        case: cached.
        prediction: label map, (slices, rows, columns), uint8.
        title: over the picture.

    Raises:
        OSError: the picture cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hu = np.load(case.cached.image, mmap_mode="r")
    reference = reference_of(case)
    labelled = np.flatnonzero((reference | prediction).any(axis=(1, 2)))
    if not labelled.size:
        labelled = np.arange(len(hu))
    shown = labelled[np.linspace(len(labelled) - 1, 0, _OVERLAY_SLICES).round().astype(int)]
    _, row_mm, column_mm = case.cached.spacing
    figure = Figure(figsize=(3 * _OVERLAY_SLICES, 6.4), dpi=70, layout="constrained")
    for row, (name, label_map) in zip(
        figure.subplots(2, _OVERLAY_SLICES),
        (("reference", reference), ("prediction", prediction)),
        strict=True,
    ):
        for axes, index in zip(row, shown, strict=True):
            low, high = _SOFT_TISSUE_HU
            axes.imshow(hu[index], "gray", vmin=low, vmax=high, aspect=row_mm / column_mm)
            axes.imshow(
                np.ma.masked_equal(label_map[index], 0),
                _COLOURS,
                vmin=0,
                vmax=len(LABEL_NAMES) - 1,
                alpha=0.5,
                interpolation="nearest",
                aspect=row_mm / column_mm,
            )
            axes.set_title(f"{name}, slice {index + 1}", fontsize=9)
            axes.axis("off")
    figure.suptitle(title)
    _save(figure, path)


def compare_runs(runs: list[Path], number: str, picture: Path) -> str:
    """Set runs that differ in one number of their recipes (and in their seeds) side by side.

    Draws training loss and mean held-out organ DSC against the step: a thin line for each run, a
    thick one for the mean of those with the same value.

    Args:
        runs: folders of runs, scored at the same steps.
        number: name of the recipe's number, such as "attention".
        picture: PNG to write.

    Returns:
        A Markdown table: mean held-out organ DSC, and the least and greatest, by value and step.

    Raises:
        OSError: a run's files cannot be read, or the picture not be written.
        KeyError: there is no such number.
    """
    groups: dict[str, list[Path]] = {}
    for run in runs:
        recipe = json.loads((run / "run.json").read_text())["recipe"]
        groups.setdefault(str(recipe[number]), []).append(run)
    figure = Figure(figsize=(11, 4.2), dpi=90, layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.set(xlabel="step", title="training loss", yscale="log")
    accuracy.set(xlabel="step", title="held-out DSC, mean of organs", ylim=(0, 1))
    lines = []
    for value, members in groups.items():
        colour = f"C{len(lines)}"
        losses, scores = [], []
        for run in members:
            with (run / "metrics.csv").open(newline="") as file:
                rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
            losses.append(dict(rows))
            of_run = read_scores(run / "held_out.csv")
            steps = sorted({score.step for score in of_run})
            scores.append(
                {
                    step: mean_organ_dsc([score for score in of_run if score.step == step])
                    for step in steps
                }
            )
        for axes, curves in ((loss, losses), (accuracy, scores)):
            for curve in curves:
                axes.plot(list(curve), list(curve.values()), color=colour, lw=0.7, alpha=0.6)
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            means = [np.mean([curve[step] for curve in curves]) for step in steps]
            axes.plot(steps, means, color=colour, lw=2.5, label=f"{value} ({len(members)} seeds)")
        cells = []
        for step in steps:
            values = [curve[step] for curve in scores]
            cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {value} | {' | '.join(cells)} |")
    accuracy.legend()
    _save(figure, picture)
    head = f"| {number} | {' | '.join(f'step {step}' for step in steps)} |"
    return "\n".join([head, "|---" * (len(steps) + 1) + "|", *lines])

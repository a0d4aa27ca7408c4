"""Pictures of a run: its curves, and held-out cases beside their reference."""

import csv
import json
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from inference.colours import LEGEND_COLOURS, overlay
from inference.files import write_atomically
from inference.labels import LABEL_NAMES
from training.cases import Case
from training.evaluation import mean_by_label, mean_organ_dsc, read_scores, reference_of

_OVERLAY_SLICES = 6
_AIR_BELOW_HU = -300


def _save(figure: Figure, path: Path) -> None:
    content = BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_atomically(path, content.getvalue())


def draw_curves(run: Path) -> None:
    """Draw `curves.png` of a run's folder: loss, learning rate and held-out DSC against the step.

    Raises:
        OSError: metrics.csv cannot be read, or the picture not be written.
    """
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    figure = Figure(figsize=(15, 4.2), dpi=110, layout="constrained")
    loss, rate, accuracy = figure.subplots(1, 3)
    few = {"marker": "o"} if len(rows) < 3 else {}  # a line of one point shows nothing
    loss.plot(steps, [float(row["loss"]) for row in rows], **few)
    loss.set(xlabel="step", title="training loss")
    rate.plot(steps, [float(row["learning_rate"]) for row in rows], **few)
    rate.set(xlabel="step", title="learning rate")
    accuracy.set(xlabel="step", title="held-out DSC", ylim=(0, 1))
    if (run / "held_out.csv").is_file():
        scores = read_scores(run / "held_out.csv")
        scored = sorted({score.step for score in scores})
        at_step = [[score for score in scores if score.step == step] for step in scored]
        means = [mean_by_label(part) for part in at_step]
        few = {"marker": "o"} if len(scored) < 3 else {}
        for label in sorted({score.label for score in scores}):
            accuracy.plot(
                scored,
                [mean[label][0] if label in mean else np.nan for mean in means],
                color=LEGEND_COLOURS[label] / 255,
                label=LABEL_NAMES[label],
                **few,
            )
        accuracy.plot(
            scored, [mean_organ_dsc(part) for part in at_step], "k.-", lw=2, label="mean of organs"
        )
        if len(scored) == 1:  # its axis would be a fraction of a step
            accuracy.set(xlim=(0, 2 * scored[0]))
        accuracy.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, run / "curves.png")


def _body(hu: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of slices (slices, rows, columns) in which there is more than air."""
    tissue = (hu > _AIR_BELOW_HU).any(axis=0)
    box = []
    for axis in (1, 0):
        # A twentieth of the line, so that specks and the table's edge do not count.
        filled = np.flatnonzero(tissue.mean(axis=axis) > 0.05)
        length = tissue.shape[1 - axis]
        start, stop = (filled[0], filled[-1] + 1) if filled.size else (0, length)
        box.append(slice(max(start - 4, 0), min(stop + 4, length)))
    return box[0], box[1]


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
    hu = case.cached.hu
    reference = reference_of(case)
    labelled = np.flatnonzero((reference | prediction).any(axis=(1, 2)))
    if not labelled.size:
        labelled = np.arange(len(hu))
    shown = labelled[np.linspace(len(labelled) - 1, 0, _OVERLAY_SLICES).round().astype(int)]
    shown = shown[np.sort(np.unique(shown, return_index=True)[1])]  # of few slices each once
    box = _body(hu[np.sort(shown)])
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
    figure.legend(
        handles=[
            Patch(color=LEGEND_COLOURS[label] / 255, label=LABEL_NAMES[label])
            for label in present[present > 0]
        ],
        loc="outside lower center",
        ncols=7,
        fontsize=8,
    )
    figure.suptitle(title)
    _save(figure, path)


def draw_best_median_worst(
    folder: Path, data_set: str, scored: list[tuple[float, Case, bytes]]
) -> list[Path]:
    """Draw three cases of a data set: `DATA_SET-best.png`, `-median.png` and `-worst.png`.

    Args:
        folder: for the pictures; made if it is not there.
        data_set: its name.
        scored: for each case its mean DSC, and its label map as `packed` gave it.

    Returns:
        The pictures; with fewer than three cases, fewer of them.

    Raises:
        OSError: a picture cannot be written.
    """
    ranked = sorted(scored, key=lambda entry: (-entry[0], entry[1].name))
    last = len(ranked) - 1
    chosen = {0: "best", last: "worst"} if last > 0 else {0: "best"} if ranked else {}
    if last > 1:
        chosen[last // 2] = "median"
    paths = []
    for place, word in sorted(chosen.items()):
        dsc, case, label_map = ranked[place]
        path = folder / f"{data_set}-{word}.png"
        title = f"{data_set}, {word} of {len(ranked)}: {case.name}, mean DSC {dsc:.3f}"
        draw_overlay(path, case, unpacked(label_map, case.cached.shape), title)
        paths.append(path)
    return paths


def packed(label_map: np.ndarray) -> bytes:
    """A label map, uint8, in a hundredth of its memory: the labels of many cases are kept."""
    return zlib.compress(label_map.tobytes(), 1)


def unpacked(content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """What `packed` packed."""
    return np.frombuffer(zlib.decompress(content), np.uint8).reshape(shape)


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
        ValueError: a run was never scored, or they were never scored at the same step.
    """
    groups: dict[str, list[Path]] = {}
    scored_at: list[set[int]] = []
    for run in runs:
        recipe = json.loads((run / "run.json").read_text(encoding="utf-8"))["recipe"]
        groups.setdefault(str(recipe[number]), []).append(run)
        if not (run / "held_out.csv").is_file():
            raise ValueError(
                f"{run}: never scored: it has no held-out case, or was stopped before its first "
                "evaluation_interval"
            )
        scored_at.append({score.step for score in read_scores(run / "held_out.csv")})
    steps_of_all = sorted(set.intersection(*scored_at))
    if not steps_of_all:
        raise ValueError("the runs were scored at no step that all of them share")
    figure = Figure(figsize=(11, 4.2), dpi=90, layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.set(xlabel="step", title="training loss", yscale="log")
    accuracy.set(xlabel="step", title="held-out DSC, mean of organs", ylim=(0, 1))
    lines = []
    for value, members in groups.items():
        colour = f"C{len(lines)}"
        losses, scores = [], []
        for run in members:
            with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
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
        for step in steps_of_all:
            values = [curve[step] for curve in scores]
            cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {value} | {' | '.join(cells)} |")
    accuracy.legend()
    _save(figure, picture)
    head = f"| {number} | {' | '.join(f'step {step}' for step in steps_of_all)} |"
    return "\n".join([head, "|---" * (len(steps_of_all) + 1) + "|", *lines])

"""Scores as files: the official table and averages, the paper's Table 3, box plots."""

import csv
import io
import json
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np

from benchmark.markdown import cell
from benchmark.scoring.annotated import Annotated
from benchmark.scoring.protocol import COLUMNS, Protocol
from benchmark.scoring.scores import CaseScores
from inference.files import write_atomically
from inference.labels import LABEL_NAMES, ORGANS, TUMOR

PER_CASE_CSV = "accuracy_per_case.csv"
"""The file that `rank`, `compare` and `report` read."""


BOTH_EMPTY = (
    "Where neither the reference nor the prediction has a structure it counts 1, where only one "
    "has it 0 (the challenge's rule): n is the number of cases whose reference has it."
)


def labels_scored(cases: list[CaseScores]) -> list[int]:
    """The labels that any case was scored by, ascending: all of them by the official rule."""
    return sorted({label for case in cases for label in case.dsc})


def cases_with(cases: list[CaseScores], label: int) -> int:
    """In how many cases a label is in the reference, of those that were scored by it."""
    return sum(label in case.in_reference for case in cases)


def official_summary(cases: list[CaseScores]) -> dict[str, float]:
    """Average as the official scores.txt does: over cases, and then over the 13 organs.

    Where only annotated labels were scored, over the cases and organs that were.
    """
    summary = {}
    labels = labels_scored(cases)
    for metric in ("dsc", "nsd"):
        for label in labels:
            scores = [getattr(case, metric) for case in cases]
            mean = np.mean([score[label] for score in scores if label in score])
            summary[f"{COLUMNS[label - 1]}_{metric.upper()}"] = float(np.round(mean, 4))
    for metric in ("DSC", "NSD"):
        organs = [summary[f"{COLUMNS[label - 1]}_{metric}"] for label in labels if label in ORGANS]
        if organs:
            summary[f"Organ_{metric}"] = float(np.round(np.mean(organs), 4))
    return summary


def per_case_csv(cases: list[CaseScores]) -> str:
    """Write the official table: a row for each case, first each label's DSC, then each NSD."""
    labels = labels_scored(cases)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    columns = [f"{COLUMNS[label - 1]}_{metric}" for metric in ("DSC", "NSD") for label in labels]
    table.writerow(["Name", *columns])
    for case in cases:
        scores = [scores.get(label) for scores in (case.dsc, case.nsd) for label in labels]
        table.writerow([case.name, *scores])
    return text.getvalue()


def markdown_report(
    cases: list[CaseScores],
    unscored: dict[str, str],
    unmatched: list[str],
    protocol: Protocol,
    annotated: Annotated | None = None,
) -> str:
    """Write the paper's Table 3, and what to know about the numbers.

    Args:
        cases: at least one.
        unscored: file name of each reference that could not be used, and why.
        unmatched: file names of predictions without a reference.
        protocol: the rules used.
        annotated: which labels count; None is the official rule, all of them.
    """
    scored = labels_scored(cases)
    organs = [label for label in scored if label in ORGANS]
    rows = {LABEL_NAMES[label].capitalize(): [label] for label in scored}
    if organs:
        which = "13 organs" if len(organs) == len(ORGANS) else "the organs scored"
        rows[f"**Average of {which}**"] = organs
    if TUMOR in scored and organs:
        rows["**Average of organs and tumor**"] = scored
    lines = [
        "# Accuracy",
        "",
        f"{len(cases)} cases, rules of {protocol.name}, NSD 0 where DSC is below "
        f"{protocol.nsd_floor:g}. Mean ± standard deviation over the cases (n − 1), in percent; "
        "averages are of each case's mean. Failed cases count as 0. " + BOTH_EMPTY,
        "",
        *([f"**Not the official rule: {annotated.sentence()}.**", ""] if annotated else []),
        "| Structure | n | Cases scored | NSD tolerance (mm) | DSC (%) | NSD (%) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for title, labels in rows.items():
        tolerance = f"{protocol.tolerances_mm[labels[0]]:g}" if len(labels) == 1 else ""
        means = [
            np.array([np.mean(found) for scores in column if (found := _of(scores, labels))])
            for column in ([case.dsc for case in cases], [case.nsd for case in cases])
        ]
        present = str(cases_with(cases, labels[0])) if len(labels) == 1 else ""
        cells = " | ".join(
            f"{100 * values.mean():.2f} ± {100 * values.std(ddof=1):.2f}"
            if len(values) > 1
            else f"{100 * values.mean():.2f}"
            for values in means
        )
        lines.append(f"| {title} | {present} | {len(means[0])} | {tolerance} | {cells} |")
    remarks = [f"{case.name}: **failed**, {case.failure}" for case in cases if case.failure]
    remarks += [f"{case.name}: {warning}" for case in cases for warning in case.warnings]
    remarks += [f"{name}: **not scored**, reference: {why}" for name, why in unscored.items()]
    remarks += [f"{name}: a prediction without a reference, left out" for name in unmatched]
    if remarks:
        lines += ["", "## Remarks", "", *(f"- {cell(remark)}" for remark in remarks)]
    return "\n".join(lines) + "\n"


def _of(scores: dict[int, float], labels: list[int]) -> list[float]:
    return [scores[label] for label in labels if label in scores]


def box_plot(cases: list[CaseScores], metric: str) -> bytes:
    """Draw a PNG with a box for each label over all cases, and the cases as points.

    Args:
        cases: at least one.
        metric: "dsc" or "nsd".
    """
    import matplotlib  # here, for `training` scores volumes and draws nothing

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = labels_scored(cases)
    columns = [_of_all(cases, metric, label) for label in labels]
    figure, axes = pyplot.subplots(figsize=(10, 4.6), layout="constrained")
    places = np.arange(len(labels))
    axes.boxplot(
        columns,
        positions=places,
        widths=0.6,
        showfliers=False,
        showmeans=True,
        patch_artist=True,
        boxprops={"facecolor": "#dbe7f3", "edgecolor": "#3b6ea5"},
        whiskerprops={"color": "#3b6ea5"},
        capprops={"color": "#3b6ea5"},
        medianprops={"color": "#12395f", "linewidth": 1.6},
        meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": "#12395f"},
    )
    spread = np.random.default_rng(0).uniform(-0.18, 0.18, len(cases))  # so that points part
    for place, column in zip(places, columns, strict=True):
        offsets = spread[: len(column)]
        axes.plot(place + offsets, column, ".", color="#D55E00", alpha=0.55, markersize=5)
    names = [f"{LABEL_NAMES[label]}, n={cases_with(cases, label)}" for label in labels]
    axes.set_xticks(places, names, rotation=35, ha="right")
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel(metric.upper())
    axes.set_title(
        f"{metric.upper()} of {len(cases)} cases (line: median, diamond: mean; "
        "n: cases whose reference has it)"
    )
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    pyplot.close(figure)
    return png.getvalue()


def _of_all(cases: list[CaseScores], metric: str, label: int) -> list[float]:
    scores = [getattr(case, metric) for case in cases]
    return [score[label] for score in scores if label in score]


def write_report(
    folder: Path,
    cases: list[CaseScores],
    unscored: dict[str, str],
    unmatched: list[str],
    protocol: Protocol,
    annotated: Annotated | None = None,
) -> None:
    """Write every file of the report; see `markdown_report` for the arguments."""
    summary = official_summary(cases)
    content = {
        "protocol": {
            "name": protocol.name,
            "nsd_floor": protocol.nsd_floor,
            "tolerances_mm": {
                COLUMNS[label - 1]: mm for label, mm in protocol.tolerances_mm.items()
            },
        },
        "annotated_only": annotated.sentence() if annotated else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{
                package: metadata.version(package)
                for package in ("surface-distance", "numpy", "scipy", "nibabel")
            },
        },
        "summary": summary,
        "references_with": {
            COLUMNS[label - 1]: cases_with(cases, label) for label in labels_scored(cases)
        },
        "cases": [
            {
                "name": case.name,
                "dsc": {COLUMNS[label - 1]: value for label, value in case.dsc.items()},
                "nsd": {COLUMNS[label - 1]: value for label, value in case.nsd.items()},
                "in_reference": [COLUMNS[label - 1] for label in sorted(case.in_reference)],
                "failure": case.failure,
                "warnings": case.warnings,
                "seconds": round(case.seconds, 3),
            }
            for case in cases
        ],
        "references_not_scored": unscored,
        "predictions_without_reference": unmatched,
    }
    files = {
        PER_CASE_CSV: per_case_csv(cases).encode(),
        "accuracy.json": json.dumps(content, indent=1).encode(),
        "accuracy.md": markdown_report(cases, unscored, unmatched, protocol, annotated).encode(),
        "accuracy_official.txt": "".join(
            f"{key}: {value:.4f}\n" for key, value in summary.items()
        ).encode(),
        "accuracy_dsc.png": box_plot(cases, "dsc"),
        "accuracy_nsd.png": box_plot(cases, "nsd"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomically(folder / name, data)

"""Scores as files: the official table and averages, the paper's Table 3, box plots."""

import io
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np

from benchmark.containers.results import csv_text
from benchmark.scoring.protocol import COLUMNS, Annotated, Protocol
from benchmark.scoring.scores import CaseScores
from benchmark.text import bullets, cell, log, table
from inference.files import write_atomically
from inference.labels import LABEL_NAMES, ORGANS, TUMOR

PER_CASE_CSV = "accuracy_per_case.csv"
"""The file that `rank`, `compare` and `report` read."""

_METRICS = ("dsc", "nsd")


@dataclass(frozen=True)
class Scoring:
    """A scored folder.

    Attributes:
        cases: at least one.
        protocol: the rules used.
        annotated: which labels count; None is the official rule, all of them.
        unscored: name of each reference that could not be used, and why.
        unmatched: name of each prediction without a reference, or that is no file, and why.
    """

    cases: Sequence[CaseScores]
    protocol: Protocol
    annotated: Annotated | None = None
    unscored: dict[str, str] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)

    @property
    def labels(self) -> list[int]:
        """The labels that any case was scored by, ascending: all of them by the official rule."""
        return sorted({label for case in self.cases for label in case.dsc})

    @property
    def organs(self) -> list[int]:
        """The organs among `labels`."""
        return [label for label in self.labels if label in ORGANS]

    def with_structure(self, label: int) -> int:
        """Return in how many references a label is, of the cases that were scored by it."""
        return sum(label in case.in_reference for case in self.cases)

    def means(self, metric: str, labels: Sequence[int]) -> np.ndarray:
        """Return each case's mean of a metric over labels, of the cases scored by any of them."""
        found = ([s[label] for label in labels if label in s] for s in self._scores(metric))
        return np.array([np.mean(scores) for scores in found if scores])

    def _scores(self, metric: str) -> list[dict[int, float]]:
        return [getattr(case, metric) for case in self.cases]

    def summary(self) -> dict[str, float]:
        """Average as the official scores.txt does: over cases, and then over the 13 organs.

        Where only annotated labels were scored, over the cases and organs that were.
        """
        summary = {
            f"{COLUMNS[label - 1]}_{metric.upper()}": _rounded(self.means(metric, [label]))
            for metric in _METRICS
            for label in self.labels
        }
        for metric in ("DSC", "NSD") if self.organs else ():
            organs = [summary[f"{COLUMNS[label - 1]}_{metric}"] for label in self.organs]
            summary[f"Organ_{metric}"] = _rounded(organs)
        return summary

    def csv(self) -> str:
        """Return the official table: a row for each case, first each label's DSC, then each NSD."""
        labels = self.labels
        titles = [f"{COLUMNS[label - 1]}_{name.upper()}" for name in _METRICS for label in labels]
        rows = (
            [case.name, *(getattr(case, name).get(label) for name in _METRICS for label in labels)]
            for case in self.cases
        )
        return csv_text(["Name", *titles], rows)


def _rounded(values: Sequence[float]) -> float:
    return float(np.round(np.mean(values), 4))


def markdown(scoring: Scoring) -> str:
    """Return the paper's Table 3, and what to know about the numbers."""
    organs, protocol = scoring.organs, scoring.protocol
    lines = {LABEL_NAMES[label].capitalize(): [label] for label in scoring.labels}
    if organs:
        which = "13 organs" if len(organs) == len(ORGANS) else "the organs scored"
        lines[f"**Average of {which}**"] = organs
    if TUMOR in scoring.labels and organs:
        lines["**Average of organs and tumor**"] = scoring.labels
    rows = []
    for title, labels in lines.items():
        single = len(labels) == 1
        means = [100 * scoring.means(metric, labels) for metric in _METRICS]
        cells = [
            f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")
            for values in means
        ]
        present = scoring.with_structure(labels[0]) if single else None
        tolerance = f"{protocol.tolerances_mm[labels[0]]:g}" if single else None
        rows.append([title, present, len(means[0]), tolerance, *cells])
    columns = ["Structure", "n", "Cases scored", "NSD tolerance (mm)", "DSC (%)", "NSD (%)"]
    rule = scoring.annotated and f"**Not the official rule: {scoring.annotated.sentence()}.**"
    remarks = [f"{case.name}: **failed**, {case.failure}" for case in scoring.cases if case.failure]
    remarks += [f"{case.name}: {warning}" for case in scoring.cases for warning in case.warnings]
    remarks += [f"{name}: **not scored**, {why}" for name, why in scoring.unscored.items()]
    remarks += [f"{name}: {why}" for name, why in scoring.unmatched.items()]
    parts = [
        "# Accuracy",
        f"{len(scoring.cases)} cases, rules of {protocol.name}, NSD 0 where DSC is below "
        f"{protocol.nsd_floor:g}. Mean ± standard deviation over the cases (n − 1), in percent; "
        "averages are of each case's mean. Failed cases count as 0. Where neither the reference "
        "nor the prediction has a structure it counts 1, where only one has it 0 (the challenge's "
        "rule): n is the number of cases whose reference has it.",
        rule,
        table(columns, "lrrrrr", rows),
        remarks and "## Remarks\n\n" + bullets(map(cell, remarks)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def box_plot(scoring: Scoring, metric: str) -> bytes:
    """Draw a PNG with a box for each label over all cases, and the cases as points."""
    from matplotlib.figure import Figure  # here, for `training` scores volumes and draws nothing

    labels = scoring.labels
    columns = [scoring.means(metric, [label]) for label in labels]
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(labels))
    shapes = {"showfliers": False, "showmeans": True, "patch_artist": True}
    axes.boxplot(columns, positions=places, widths=0.6, boxprops={"facecolor": "#dbe7f3"}, **shapes)
    shift = np.random.default_rng(0).uniform(-0.18, 0.18, len(scoring.cases))  # so that points part
    for place, column in zip(places, columns, strict=True):
        axes.plot(place + shift[: len(column)], column, ".", color="#D55E00", alpha=0.55)
    names = [f"{LABEL_NAMES[label]}, n={scoring.with_structure(label)}" for label in labels]
    axes.set_xticks(places, names, rotation=35, ha="right")
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel(metric.upper())
    axes.set_title(
        f"{metric.upper()} of {len(scoring.cases)} cases (line: median, triangle: mean; "
        "n: cases whose reference has it)"
    )
    axes.grid(axis="y", alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


def write_report(folder: Path, scoring: Scoring) -> None:
    """Write every file of the report; a plot that fails costs the plot."""
    summary, protocol = scoring.summary(), scoring.protocol

    def named(values: dict[int, float]) -> dict[str, float]:
        return {COLUMNS[label - 1]: value for label, value in values.items()}

    packages = ("surface-distance", "numpy", "scipy", "nibabel")
    content = {
        "protocol": {
            "name": protocol.name,
            "nsd_floor": protocol.nsd_floor,
            "tolerances_mm": named(protocol.tolerances_mm),
        },
        "annotated_only": scoring.annotated.sentence() if scoring.annotated else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in packages},
        "summary": summary,
        "references_with": named(
            {label: scoring.with_structure(label) for label in scoring.labels}
        ),
        "cases": [
            {
                "name": case.name,
                "dsc": named(case.dsc),
                "nsd": named(case.nsd),
                "in_reference": list(named(dict.fromkeys(sorted(case.in_reference)))),
                "failure": case.failure,
                "warnings": case.warnings,
                "seconds": round(case.seconds, 3),
            }
            for case in scoring.cases
        ],
        "references_not_scored": scoring.unscored,
        "predictions_without_reference": list(scoring.unmatched),
    }
    official = "".join(f"{key}: {value:.4f}\n" for key, value in summary.items())
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PER_CASE_CSV, scoring.csv().encode())
    write_atomically(folder / "accuracy.json", json.dumps(content, indent=1).encode())
    write_atomically(folder / "accuracy.md", markdown(scoring).encode())
    write_atomically(folder / "accuracy_official.txt", official.encode())
    for metric in _METRICS:
        path = folder / f"accuracy_{metric}.png"
        try:
            write_atomically(path, box_plot(scoring, metric))
        except Exception as error:  # such as a plotting library that finds no folder to write to
            log(f"{path.name}: not drawn: {error}")

"""Scores as files: the official table and averages, the paper's Table 3, box plots."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.files import csv_text, write_plot
from benchmark.scoring.protocol import COLUMNS, Annotated, Protocol
from benchmark.scoring.scores import CaseScores
from benchmark.text import bullets, cell, table
from inference.files import write_atomically
from inference.labels import LABEL_NAMES, ORGANS, TUMOR

PER_CASE_CSV = "accuracy_per_case.csv"
"""The file that `rank`, `compare` and `report` read."""

_METRICS = ("dsc", "nsd")


@dataclass(frozen=True)
class Scoring:
    """A scored folder."""

    cases: Sequence[CaseScores]  # at least one
    protocol: Protocol
    annotated: Annotated | None = None  # which labels count; None: all, the official rule
    unscored: dict[str, str] = field(default_factory=dict)  # references that were not, and why
    unmatched: dict[str, str] = field(default_factory=dict)  # predictions that were not, and why

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

    def means(self, metric: str, *labels: int) -> np.ndarray:
        """Return each case's mean of a metric over labels, of the cases scored by any of them."""
        scores = [getattr(case, metric) for case in self.cases]
        found = ([of_case[label] for label in labels if label in of_case] for of_case in scores)
        return np.array([np.mean(values) for values in found if values])

    def summary(self) -> dict[str, float]:
        """Average as the official scores.txt does: over cases, and then over the 13 organs.

        Where only annotated labels were scored, over the cases and organs that were.
        """
        summary = {
            f"{COLUMNS[label - 1]}_{metric.upper()}": _rounded(self.means(metric, label))
            for metric in _METRICS
            for label in self.labels
        }
        for metric in ("DSC", "NSD") if self.organs else ():
            organs = [summary[f"{COLUMNS[label - 1]}_{metric}"] for label in self.organs]
            summary[f"Organ_{metric}"] = _rounded(organs)
        return summary

    def csv(self) -> str:
        """Return the official table: a row for each case, first each label's DSC, then each NSD."""
        both = [(metric, label) for metric in _METRICS for label in self.labels]
        titles = [f"{COLUMNS[label - 1]}_{metric.upper()}" for metric, label in both]
        rows = ([c.name, *(getattr(c, metric).get(n) for metric, n in both)] for c in self.cases)
        return csv_text(["Name", *titles], rows)


def _rounded(values: np.ndarray | Sequence[float]) -> float:
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
        means = [100 * scoring.means(metric, *labels) for metric in _METRICS]
        cells = [
            f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")
            for values in means
        ]
        present = tolerance = None
        if len(labels) == 1:
            present = scoring.with_structure(labels[0])
            tolerance = f"{protocol.tolerances_mm[labels[0]]:g}"
        rows.append([title, present, len(means[0]), tolerance, *cells])
    columns = ["Structure", "n", "Cases scored", "NSD tolerance (mm)", "DSC (%)", "NSD (%)"]
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
    ]
    if scoring.annotated:
        parts.append(f"**Not the official rule: {scoring.annotated.sentence()}.**")
    parts.append(table(columns, "lrrrrr", rows))
    if remarks:
        parts += ["## Remarks", bullets(map(cell, remarks))]
    return "\n\n".join(parts) + "\n"


def box_plot(scoring: Scoring, metric: str) -> Any:  # noqa: ANN401
    """Return a figure with a box for each label over all cases, and the cases as points."""
    from matplotlib.figure import Figure  # here, for `training` scores volumes without plots

    labels = scoring.labels
    columns = [scoring.means(metric, label) for label in labels]
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    axes.boxplot(columns, positions=range(len(labels)), showfliers=False, showmeans=True)
    shift = np.random.default_rng(0).uniform(-0.18, 0.18, len(scoring.cases))  # so that points part
    for place, column in enumerate(columns):
        axes.plot(place + shift[: len(column)], column, ".", color="#D55E00", alpha=0.55)
    names = [f"{LABEL_NAMES[label]}, n={scoring.with_structure(label)}" for label in labels]
    axes.set_xticks(range(len(labels)), names, rotation=35, ha="right")
    count = len(scoring.cases)
    notes = "line: median, triangle: mean; n: cases whose reference has it"
    axes.set(ylim=(-0.03, 1.03), title=f"{metric.upper()} of {count} cases ({notes})")
    axes.grid(axis="y", alpha=0.3)
    return figure


def write_report(folder: Path, scoring: Scoring) -> None:
    """Write every file of the report; a plot that fails costs the plot."""
    summary, protocol = scoring.summary(), scoring.protocol

    def named(values: Mapping[int, Any]) -> dict[str, Any]:
        return {COLUMNS[label - 1]: value for label, value in values.items()}

    packages = ("surface-distance", "numpy", "scipy", "nibabel")
    versions = {package: metadata.version(package) for package in packages}
    tolerances = named(protocol.tolerances_mm)
    content = {
        "protocol": {"name": protocol.name, "nsd_floor": protocol.nsd_floor}
        | {"tolerances_mm": tolerances},
        "annotated_only": scoring.annotated.sentence() if scoring.annotated else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | versions,
        "summary": summary,
        "references_with": named({n: scoring.with_structure(n) for n in scoring.labels}),
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
    write_atomically(folder / PER_CASE_CSV, scoring.csv())
    write_atomically(folder / "accuracy.json", json.dumps(content, indent=1))
    write_atomically(folder / "accuracy.md", markdown(scoring))
    write_atomically(folder / "accuracy_official.txt", official)
    for metric in _METRICS:
        write_plot(folder / f"accuracy_{metric}.png", box_plot, scoring, metric)

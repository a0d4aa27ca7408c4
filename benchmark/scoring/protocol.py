"""The scoring rules of the challenge: which labels, which tolerances, which years.

A partly labelled reference marks an organ that nobody annotated as background, so that by the
official rule whoever finds it scores 0. `Annotated` has the labels that were annotated.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

from benchmark.options import HarnessError
from inference.files import case_name
from inference.labels import LABEL_NAMES, ORGANS, TUMOR

COLUMNS = (
    *("Liver", "RK", "Spleen", "Pancreas", "Aorta", "IVC", "RAG", "LAG", "Gallbladder"),
    *("Esophagus", "Stomach", "Duodenum", "LK", "Lesion"),
)
"""The official name of labels 1 to 14 in tables."""

SLICE_LIMITED = (5, 6, 10)
"""Aorta, inferior vena cava and esophagus are scored on the reference's labelled slices only."""


@dataclass(frozen=True)
class Protocol:
    """The scoring rules of one year."""

    name: str  # as on the command line
    tolerances_mm: dict[int, float]  # of each label scored: within it two surfaces agree
    nsd_floor: float  # NSD is set to 0 where DSC is below this


_ORGAN_TOLERANCES_MM = dict(
    zip(ORGANS, (5.0, 3.0, 3.0, 5.0, 2.0, 2.0, 2.0, 2.0, 2.0, 3.0, 5.0, 7.0, 3.0), strict=True)
)

PROTOCOLS = {
    "flare23": Protocol("flare23", {**_ORGAN_TOLERANCES_MM, TUMOR: 2}, nsd_floor=0.2),
    "flare22": Protocol("flare22", _ORGAN_TOLERANCES_MM, nsd_floor=0.0),
}
"""FLARE 2023: 13 organs and tumor; its script's floor was 0.1 until March 2024, when the 2023
results were out, and 0.2 since. FLARE 2022: the same organs, numbers and tolerances; no floor."""


@dataclass(frozen=True)
class Annotated:
    """What was annotated."""

    labels: tuple[int, ...] | None  # in every case (`--labels`), or None where `cases` has them
    cases: dict[str, tuple[int, ...]]  # (`--cases`); a case that is not in it is not scored
    stacks: frozenset[str] = frozenset()  # cases of slices which do not touch

    def rules(self, reference: Path, protocol: Protocol) -> Protocol:
        """Return the protocol with those labels that were annotated in a reference.

        Raises:
            ValueError: it is not in `cases`, or no label of the protocol was annotated.
        """
        labels = self.labels or self.cases.get(case_name(reference))
        if labels is None:
            raise ValueError("it is not in --cases")
        scored = {label: mm for label, mm in protocol.tolerances_mm.items() if label in labels}
        if not scored:
            raise ValueError(f"none of the labels of {protocol.name} was annotated")
        return replace(protocol, tolerances_mm=scored)

    def sentence(self) -> str:
        """Return what a report notes of it."""
        if self.labels is not None:
            which = ", ".join(LABEL_NAMES[label] for label in self.labels)
            return f"only annotated labels are scored (--labels: {which})"
        return "of each case only the labels that were annotated in it are scored (--cases)"


def _is_label(value: object) -> bool:
    return isinstance(value, int) and 1 <= value < len(LABEL_NAMES)


def parse_labels(text: str) -> tuple[int, ...]:
    """Read `1,4`, for argparse."""
    parts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(map(_is_label, parts)):
        raise argparse.ArgumentTypeError(
            f"numbers from 1 to {len(LABEL_NAMES) - 1} with commas between, as in 1,4, not {text!r}"
        )
    return tuple(sorted(set(parts)))


def read_cases_file(path: Path) -> Annotated:
    """Read a `cases.json`: `{"NAME": {"annotated_labels": [1, 4], …}, …}`.

    Raises:
        HarnessError: it cannot be read, or is not of that form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HarnessError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict) or not content:
        raise HarnessError(f"{path}: no cases in it, as {{NAME: {{annotated_labels: [1, 4]}}}}")
    cases, stacks = {}, set()
    for name, about in content.items():
        labels = about.get("annotated_labels") if isinstance(about, dict) else None
        if not isinstance(labels, list) or not all(map(_is_label, labels)):
            raise HarnessError(
                f"{path}: {name} has no annotated_labels, a list of numbers from 1 to "
                f"{len(LABEL_NAMES) - 1}"
            )
        cases[name] = tuple(labels)
        if about.get("slices") == "stack":
            stacks.add(name)
    return Annotated(None, cases, frozenset(stacks))

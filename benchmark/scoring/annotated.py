"""Which labels of a reference count: all by the official rule, or those its annotator looked for.

A partly labelled reference marks an organ that nobody looked for as background, so that by the
official rule whoever finds it scores 0. `--labels` names what was looked for in all cases,
`--cases` a `cases.json` that says it of each (`{"NAME": {"annotated_labels": [1, 4], …}, …}`).
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

from benchmark.scoring.protocol import Protocol
from inference.files import case_name
from inference.labels import LABEL_NAMES


class CasesFileError(ValueError):
    """A `cases.json` that cannot be used; one line says why."""


@dataclass(frozen=True)
class Annotated:
    """What was annotated.

    Attributes:
        labels: in every case, or None where `cases` says it.
        cases: case to its labels; a case that is not in it is not scored.
        stacks: the cases that are stacks of slices which do not touch.
    """

    labels: tuple[int, ...] | None
    cases: dict[str, tuple[int, ...]]
    stacks: frozenset[str] = frozenset()

    def rules(self, reference: Path, protocol: Protocol) -> Protocol:
        """The protocol with those labels that were looked for in a reference.

        Raises:
            CasesFileError: nothing says what was, or none of the protocol's labels was.
        """
        name = case_name(reference)
        labels = self.labels if self.labels is not None else self.cases.get(name)
        if labels is None:
            raise CasesFileError("--cases says nothing of it")
        kept = {label: mm for label, mm in protocol.tolerances_mm.items() if label in labels}
        if not kept:
            raise CasesFileError(f"none of the labels of {protocol.name} was annotated")
        return replace(protocol, tolerances_mm=kept)

    def sentence(self) -> str:
        """What a report says of it."""
        if self.labels is not None:
            which = ", ".join(LABEL_NAMES[label] for label in self.labels)
            return f"only annotated labels are scored (--labels: {which})"
        return "of each case only the labels that were annotated in it are scored (--cases)"


def parse_labels(text: str) -> tuple[int, ...]:
    """Read `1,4`, for argparse."""
    try:
        labels = sorted({int(part) for part in text.split(",")})
    except ValueError:
        labels = [0]
    if not all(1 <= label < len(LABEL_NAMES) for label in labels):
        raise argparse.ArgumentTypeError(
            f"numbers from 1 to {len(LABEL_NAMES) - 1} with commas between, as in 1,4, not {text!r}"
        )
    return tuple(labels)


def read_cases_file(path: Path) -> Annotated:
    """Read a `cases.json`.

    Raises:
        CasesFileError: it cannot be read, or is not of that form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CasesFileError(f"{path}: cannot be read ({error})") from error
    cases, stacks = {}, set()
    for name, about in content.items() if isinstance(content, dict) else ():
        labels = about.get("annotated_labels") if isinstance(about, dict) else None
        if not isinstance(labels, list) or not all(
            isinstance(label, int) and 1 <= label < len(LABEL_NAMES) for label in labels
        ):
            raise CasesFileError(
                f"{path}: {name} has no annotated_labels, a list of numbers from 1 to "
                f"{len(LABEL_NAMES) - 1}"
            )
        cases[name] = tuple(labels)
        if about.get("slices") == "stack":
            stacks.add(name)
    if not cases:
        raise CasesFileError(f"{path}: no cases in it, as {{NAME: {{annotated_labels: [1, 4]}}}}")
    return Annotated(None, cases, frozenset(stacks))

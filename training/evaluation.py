"""Held-out volumes through the service's own prediction, scored in 3D as the challenge does.

A stack of slices that do not touch has no surfaces and no components in 3D: there the network's own
labels are compared, pixel by pixel over the whole stack, with no NSD. It shows a few centimetres
of a patient, so that a label absent from its reference says little: only those present are scored.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmark.scoring.protocol import PROTOCOLS
from benchmark.scoring.scores import score_label_maps
from inference.components import keep_largest_components
from inference.files import write_atomically
from inference.labels import LABEL_NAMES, ORGANS
from inference.prediction import Predictor
from inference.weights import WeightsMetadata, as_stored
from training.cases import Case
from training.slices import annotated_mask, annotated_only


@dataclass(frozen=True)
class Score:
    """DSC and NSD of one label of one held-out case at one step; a stack's NSD is NaN."""

    step: int
    case: str
    label: int
    dsc: float
    nsd: float


def reference_of(case: Case) -> np.ndarray:
    """A cached case's label map, labels that its annotator did not look for as 0."""
    labels = case.cached.label_map
    return annotated_only(labels, annotated_mask(case.annotated))


def _score_stack(case: Case, prediction: np.ndarray, step: int) -> list[Score]:
    reference = reference_of(case)
    scores = []
    for label in case.annotated:
        truth, found = reference == label, prediction == label
        if truth.any():
            dsc = 2 * np.count_nonzero(truth & found) / (truth.sum() + found.sum())
            scores.append(Score(step, case.name, label, float(dsc), float("nan")))
    return scores


def _score_volume(case: Case, prediction: np.ndarray, step: int) -> list[Score]:
    protocol = PROTOCOLS["flare23"]
    found = score_label_maps(
        reference_of(case).T,
        prediction.T,
        case.cached.spacing[::-1],
        replace(
            protocol,
            tolerances_mm={label: protocol.tolerances_mm[label] for label in case.annotated},
        ),
    )
    return [
        Score(step, case.name, label, found.dsc[label], found.nsd[label])
        for label in case.annotated
    ]


def score_cases(
    cases: list[Case],
    state_dict: dict[str, Tensor],
    metadata: WeightsMetadata,
    device: torch.device,
    *,
    batch_size: int | None,
    step: int,
    on_case: Callable[[Case, np.ndarray, list[Score]], None] = lambda case, prediction, scores: (
        None
    ),
) -> list[Score]:
    """Predict and score cases with the weights as an export would hold them.

    Only labels that a case's annotator looked for are scored; the largest components are kept but
    in stacks, which are scored as this module's head says.

    Args:
        cases: cached.
        state_dict: of `AttentionUNet`, in training form.
        metadata: for the predictor.
        device: to predict on.
        batch_size: slices at once; None is the predictor's own choice.
        step: for the result.
        on_case: called with each case, its label map (slices, rows, columns) and its scores.
    """
    exported = {name: as_stored(name, tensor.detach()) for name, tensor in state_dict.items()}
    predictor = Predictor([(exported, metadata)], device, batch_size=batch_size)
    scores = []
    for case in cases:
        prediction = predictor.predict(
            case.cached.hu,
            window=case.cached.window,
            reduction=metadata.reduction_at(case.cached.spacing),
        )
        if case.stack:
            of_case = _score_stack(case, prediction, step)
        else:
            keep_largest_components(prediction)
            of_case = _score_volume(case, prediction, step)
        on_case(case, prediction, of_case)
        scores += of_case
    return scores


def mean_by_label(scores: list[Score]) -> dict[int, tuple[float, float, int]]:
    """For each label scored its mean DSC, mean NSD (NaN without one) and number of cases."""
    means = {}
    for label in sorted({score.label for score in scores}):
        of_label = [score for score in scores if score.label == label]
        surfaces = [score.nsd for score in of_label if not np.isnan(score.nsd)]
        means[label] = (
            float(np.mean([score.dsc for score in of_label])),
            float(np.mean(surfaces)) if surfaces else float("nan"),
            len(of_label),
        )
    return means


def mean_organ_dsc(scores: list[Score]) -> float:
    """The mean over the organs scored of their mean DSC; NaN if there are none."""
    organs = [dsc for label, (dsc, _, _) in mean_by_label(scores).items() if label in ORGANS]
    return float(np.mean(organs)) if organs else float("nan")


def summary_line(scores: list[Score]) -> str:
    """One line: the mean organ DSC and that of each label."""
    parts = [
        f"{LABEL_NAMES[label]} {dsc:.3f}" for label, (dsc, _, _) in mean_by_label(scores).items()
    ]
    return f"held-out DSC: organs {mean_organ_dsc(scores):.3f}; {', '.join(parts)}"


def write_scores(path: Path, scores: list[Score]) -> None:
    """Write scores as CSV: step, case, label, name, dsc, nsd."""
    table = StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("step", "case", "label", "name", "dsc", "nsd"))
    for score in scores:
        writer.writerow(
            (score.step, score.case, score.label, LABEL_NAMES[score.label], score.dsc, score.nsd)
        )
    write_atomically(path, table.getvalue().encode())


def write_left_out(path: Path, data_sets: dict[str, list[Score]]) -> None:
    """Write the scores of left-out cases as CSV: data_set, case, label, name, dsc, nsd."""
    table = StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("data_set", "case", "label", "name", "dsc", "nsd"))
    for data_set, scores in data_sets.items():
        for score in scores:
            name = LABEL_NAMES[score.label]
            writer.writerow((data_set, score.case, score.label, name, score.dsc, score.nsd))
    write_atomically(path, table.getvalue().encode())


def read_left_out(path: Path) -> dict[str, list[Score]]:
    """Read what `write_left_out` wrote, by data set.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is another file.
    """
    data_sets: dict[str, list[Score]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            try:
                dsc, nsd = float(row["dsc"]), float(row["nsd"])
                score = Score(0, row["case"], int(row["label"]), dsc, nsd)
                data_sets.setdefault(row["data_set"], []).append(score)
            except (KeyError, TypeError) as error:
                raise ValueError("not a table of left-out scores") from error
    return data_sets


def read_scores(path: Path) -> list[Score]:
    """Read what `write_scores` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Score(
                int(row["step"]),
                row["case"],
                int(row["label"]),
                float(row["dsc"]),
                float(row["nsd"]),
            )
            for row in csv.DictReader(file)
        ]

"""Held-out volumes through the service's own prediction, scored in 3D as the challenge does.

A stack of slices that do not touch has no surfaces and no components in 3D: there the network's own
labels are compared, pixel by pixel over the whole stack, with no NSD. It shows a few centimetres
of a patient, so that a label absent from its reference says little: only those present are scored.
"""

import csv
import dataclasses
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmark.scoring.protocol import PROTOCOLS
from benchmark.scoring.scores import score_label_maps
from inference.components import keep_largest_components
from inference.files import write_atomically
from inference.labels import LABEL_NAMES, ORGANS
from inference.network.weights import WeightsMetadata, as_stored
from inference.prediction import Predictor
from training.cases import Case
from training.slices import annotated_mask, annotated_only


class Score(NamedTuple):
    """DSC and NSD of one label of one case at one step of training; a stack's NSD is NaN."""

    step: int
    data_set: str
    case: str
    label: int
    dsc: float
    nsd: float


def reference_of(case: Case) -> np.ndarray:
    """Return a cached case's label map, labels that its annotator did not look for as 0."""
    return annotated_only(case.cached.label_map, annotated_mask(case.annotated))


def _score(case: Case, prediction: np.ndarray) -> dict[int, tuple[float, float]]:
    """Return DSC and NSD by label."""
    reference = reference_of(case)
    if case.stack:
        scores = {}
        for label in np.intersect1d(case.annotated, reference).tolist():
            truth, found = reference == label, prediction == label
            dsc = 2 * np.count_nonzero(truth & found) / (truth.sum() + found.sum())
            scores[label] = float(dsc), float("nan")
        return scores
    protocol = PROTOCOLS["flare23"]
    tolerances = {label: protocol.tolerances_mm[label] for label in case.annotated}
    found = score_label_maps(
        reference.T,
        prediction.T,
        case.cached.spacing[::-1],
        dataclasses.replace(protocol, tolerances_mm=tolerances),
    )
    return {label: (found.dsc[label], found.nsd[label]) for label in case.annotated}


def score_cases(
    cases: list[Case],
    state_dict: dict[str, Tensor],
    metadata: WeightsMetadata,
    device: torch.device,
    *,
    step: int = 0,
    batch_size: int | None = None,
    on_case: Callable[[Case, np.ndarray, list[Score]], None] | None = None,
) -> list[Score]:
    """Predict and score cases with the weights as an export would hold them.

    Only labels that a case's annotator looked for are scored; the largest components are kept but
    in stacks, which are scored as this module's head says.

    Args:
        cases: cached.
        state_dict: of `AttentionUNet`, in training form.
        metadata: for the predictor.
        device: to predict on.
        step: for the result.
        batch_size: slices at once; None is the predictor's own choice.
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
        if not case.stack:
            keep_largest_components(prediction)
        of_case = [
            Score(step, case.data_set, case.name, label, dsc, nsd)
            for label, (dsc, nsd) in _score(case, prediction).items()
        ]
        if on_case:
            on_case(case, prediction, of_case)
        scores += of_case
    return scores


def mean_by_label(scores: list[Score]) -> dict[int, tuple[float, float, int]]:
    """Return for each label scored its mean DSC, mean NSD (NaN without one) and number of cases."""
    means = {}
    for label in sorted({score.label for score in scores}):
        dsc, nsd = np.array([(s.dsc, s.nsd) for s in scores if s.label == label]).T
        surfaces = nsd[~np.isnan(nsd)]
        mean_nsd = float(surfaces.mean()) if surfaces.size else float("nan")
        means[label] = float(dsc.mean()), mean_nsd, len(dsc)
    return means


def mean_organ_dsc(scores: list[Score]) -> float:
    """Return the mean over the organs scored of their mean DSC; NaN if there are none."""
    organs = [dsc for label, (dsc, _, _) in mean_by_label(scores).items() if label in ORGANS]
    return float(np.mean(organs)) if organs else float("nan")


def summary_lines(scores: list[Score]) -> list[str]:
    """Return a line for each label: mean DSC, mean NSD and the number of cases."""
    rows = [
        f"  {LABEL_NAMES[label]:<22} DSC {dsc:.3f}  NSD {nsd:.3f}  n {count}"
        for label, (dsc, nsd, count) in mean_by_label(scores).items()
    ]
    return [*rows, f"  {'mean of organs':<22} DSC {mean_organ_dsc(scores):.3f}"]


def write_scores(path: Path, scores: list[Score]) -> None:
    """Write scores as CSV, the fields of `Score` and the label's name.

    Raises:
        OSError: the file cannot be written.
    """
    table = StringIO()
    writer = csv.DictWriter(table, (*Score._fields, "name"), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**score._asdict(), "name": LABEL_NAMES[score.label]} for score in scores)
    write_atomically(path, table.getvalue().encode(errors="surrogateescape"))


def read_scores(path: Path) -> list[Score]:
    """Read what `write_scores` wrote; columns of earlier versions that are missing are empty.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is another file.
    """
    kinds = {"step": int, "data_set": str, "case": str, "label": int, "dsc": float, "nsd": float}
    missing = {"step": "0", "data_set": ""}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return [
            Score(**{name: kind({**missing, **row}[name]) for name, kind in kinds.items()})
            for row in rows
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a table of scores") from error

"""Held-out volumes through the service's own prediction, scored in 3D as the challenge does.

A stack of slices that do not touch has no surfaces and no components in 3D: there the network's own
labels are compared, pixel by pixel over the whole stack, with no NSD. It shows a few centimetres
of a patient, so that a label absent from its reference means little: only those present are scored.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from benchmark.scoring.protocol import PROTOCOLS
from benchmark.scoring.scores import score_label_maps
from inference.components import keep_largest_components
from inference.network.weights import WeightsMetadata, as_stored
from inference.prediction import Predictor
from training.cases import Case, annotated_only
from training.tables import Score


def _score(case: Case, prediction: np.ndarray) -> dict[int, tuple[float, float]]:
    """Return DSC and NSD by label."""
    reference = annotated_only(case.cached.label_map, case.annotated)
    if case.files.stack:
        scores = {}
        for label in np.intersect1d(case.annotated, reference).tolist():
            truth, found = reference == label, prediction == label
            dsc = 2 * np.count_nonzero(truth & found) / (truth.sum() + found.sum())
            scores[label] = float(dsc), float("nan")
        return scores
    protocol = PROTOCOLS["flare23"]
    tolerances = {label: protocol.tolerances_mm[label] for label in case.annotated}
    slice_mm, row_mm, column_mm = case.cached.spacing
    scored = score_label_maps(
        reference.T,
        prediction.T,
        (column_mm, row_mm, slice_mm),
        dataclasses.replace(protocol, tolerances_mm=tolerances),
    )
    return {label: (scored.dsc[label], scored.nsd[label]) for label in case.annotated}


def score_cases(
    cases: list[Case],
    state_dict: dict[str, Tensor],
    metadata: WeightsMetadata,
    device: torch.device,
    *,
    step: int = 0,
    batch_size: int | None = None,
) -> Iterator[tuple[Case, np.ndarray, list[Score]]]:
    """Predict and score cases with the weights as an export would hold them.

    Only annotated labels are scored, for `step`; the largest components are taken but in stacks,
    which are scored as this module's head describes. The state is that of `AttentionUNet` in
    training form; the batch size is slices predicted at once, None the predictor's own choice.

    Returns:
        Each case with its label map (slices, rows, columns) and its scores, as they come.
    """
    exported = {name: as_stored(name, tensor.detach()) for name, tensor in state_dict.items()}
    predictor = Predictor([(exported, metadata)], device, batch_size=batch_size)
    for case in cases:
        prediction = predictor.predict(
            case.cached.hu,
            window=case.cached.window,
            reduction=metadata.reduction_at(case.cached.spacing),
        )
        if not case.files.stack:
            keep_largest_components(prediction)
        yield case, prediction, [
            Score(step, case.files.data_set, case.name, label, dsc, nsd)
            for label, (dsc, nsd) in _score(case, prediction).items()
        ]  # fmt: skip

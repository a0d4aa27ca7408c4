"""The demonstration weights on phantoms they were not trained on (seeds 1000 to 1089 were)."""

import numpy as np
import pytest
import torch

from inference.components import keep_largest_components
from inference.intensity import percentiles
from inference.labels import ORGANS
from inference.network.weights import DEMONSTRATION_WEIGHTS, load_weights
from inference.prediction import Predictor
from synthetic.phantom import draw_phantom

SEEDS = (11, 12, 13)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def phantoms():
    return [draw_phantom((36, 512, 512), (7.0, 0.8, 0.8), seed) for seed in SEEDS]


def label_maps(phantoms, dtype):
    predictor = Predictor([load_weights(DEMONSTRATION_WEIGHTS)], torch.device("cpu"), dtype=dtype)
    return [
        predictor.predict(phantom.volume, window=percentiles(phantom.volume))
        for phantom in phantoms
    ]


@pytest.fixture(scope="module")
def in_fp32(phantoms):
    return label_maps(phantoms, torch.float32)


def test_organs_are_found(phantoms, in_fp32):
    dsc = np.zeros((len(phantoms), len(ORGANS)))
    for row, phantom, label_map in zip(dsc, phantoms, in_fp32, strict=True):
        kept = label_map.copy()
        keep_largest_components(kept)
        for index, organ in enumerate(ORGANS):
            truth, found = phantom.label_map == organ, kept == organ
            row[index] = 2 * (truth & found).sum() / (truth.sum() + found.sum())
    assert dsc.mean() >= 0.85, dsc.mean(axis=0).round(3)


def test_half_precision_changes_few_labels(phantoms, in_fp32):
    in_bf16 = label_maps(phantoms[:1], torch.bfloat16)
    assert (in_bf16[0] == in_fp32[0]).mean() >= 0.999

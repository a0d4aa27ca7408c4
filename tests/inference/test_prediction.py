"""The predictor against the plain network, one slice at a time."""

import numpy as np
import pytest
import torch
from conftest import metadata_of, smooth_hu, trained_looking_network

from inference.network.labelling import upsampled_labels
from inference.prediction import Predictor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network():
    return trained_looking_network(8, seed=1)


def predictor_of(network, *, dtype=torch.float32, batch_size=None, lanes=None, **changes):
    metadata = metadata_of(network, **changes)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return Predictor([(state, metadata)], CPU, dtype=dtype, batch_size=batch_size, lanes=lanes)


@torch.no_grad()
def plain_labels(network, hu, low, high):
    """Paper section 2.1 and 2.2 as they read, in fp32; rows and columns multiples of 16."""
    z = (np.clip(hu, low, high).astype(np.float32) - 20) / 150
    labels = [network(torch.from_numpy(s)[None, None].expand(1, 3, -1, -1)).argmax(1)[0] for s in z]
    return np.stack(labels).astype(np.uint8)


@pytest.fixture(scope="module")
def hu():
    return smooth_hu((7, 48, 64))


@pytest.mark.parametrize("batch_size", [None, 1, 3, 50])
def test_labels_are_the_plain_networks(network, hu, batch_size):
    labels = predictor_of(network, batch_size=batch_size).predict(hu, window=(-400, 500))
    expected = plain_labels(network, hu, -400, 500)
    assert labels.dtype == np.uint8
    assert labels.flags.c_contiguous
    assert (labels == expected).mean() >= 0.9999
    assert len(np.unique(expected)) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2])
def test_slices_in_several_threads_keep_their_places(network, hu, batch_size):
    predictor = predictor_of(network, batch_size=batch_size, lanes=3)
    done = []
    labels = predictor.predict(hu, window=(-400, 500), on_slices=done.append)
    one_by_one = predictor_of(network, batch_size=batch_size, lanes=1)
    assert (labels == one_by_one.predict(hu, window=(-400, 500))).mean() >= 0.9999
    assert sum(done) == len(hu)
    # What goes wrong in one of them is the volume's error, and the next volume is predicted.
    with pytest.raises(RuntimeError, match="clamp"):
        predictor.predict(hu, window=(None, None))
    assert (predictor.predict(hu, window=(-400, 500)) == labels).all()


def test_slope_and_intercept_are_hu(network, hu):
    predictor = predictor_of(network)
    expected = predictor.predict(hu, window=(-400.0, 500.0))
    stored = (hu.astype(np.int32) + 1024) * 2
    window = ((-400 + 1024) * 2.0, (500 + 1024) * 2.0)
    labels = predictor.predict(stored, window=window, slope=0.5, intercept=-1024.0)
    assert (labels == expected).mean() > 0.999


@pytest.mark.parametrize("size", [(48, 50), (37, 64), (1, 1), (97, 31)])
@torch.no_grad()
def test_other_sizes_run_padded(network, hu, size):
    rows, columns = size
    hu = np.tile(hu, (1, 3, 1))[:2, :rows, :columns]
    labels = predictor_of(network).predict(hu, window=(-400, 500))
    assert labels.shape == hu.shape
    padded = np.pad(hu, ((0, 0), (0, -rows % 16), (0, -columns % 16)), mode="edge")
    expected = plain_labels(network, padded, -400, 500)[:, :rows, :columns]
    assert (labels == expected).mean() >= 0.999


@torch.no_grad()
def test_matrix_reduction(network, hu):
    labels = predictor_of(network, matrix_reduction=2).predict(hu, window=(-400, 500))
    z = (np.clip(hu, -400, 500).astype(np.float32) - 20) / 150
    means = z.reshape(7, 24, 2, 32, 2).mean(axis=(2, 4))
    means = np.pad(means, ((0, 0), (0, 8), (0, 0)), mode="edge")  # 24 rows to 32
    logits = network(torch.from_numpy(means)[:, None].expand(-1, 3, -1, -1))
    logits = torch.nn.functional.interpolate(logits, scale_factor=2, mode="bilinear")
    assert (labels == logits.argmax(1).numpy()[:, :48]).mean() >= 0.999


@pytest.mark.parametrize("reduction", [2, 4])
def test_labels_of_upsampled_logits(reduction):
    """Against interpolating every logit; the last rows and columns included."""
    torch.manual_seed(reduction)
    coarse = torch.randn(3, 15, 5, 7)
    logits = torch.nn.functional.interpolate(coarse, scale_factor=3, mode="bilinear")
    expected = torch.nn.functional.interpolate(logits, scale_factor=reduction, mode="bilinear")
    labels = upsampled_labels(logits.permute(0, 2, 3, 1), reduction)
    assert labels.dtype == torch.uint8
    assert (labels == expected.argmax(dim=1)).float().mean() > 0.9999  # but for ties in rounding


def test_coarse_pixels_are_not_reduced(network, hu):
    """A factor given for a volume counts, not the weights' own."""
    reduced = predictor_of(network, matrix_reduction=2)
    plain = predictor_of(network)
    window = (-400.0, 500.0)
    labels = reduced.predict(hu, window=window, reduction=1)
    assert (labels == plain.predict(hu, window=window)).all()
    assert (labels != reduced.predict(hu, window=window)).any()

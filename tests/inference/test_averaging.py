"""Several weights at once, against the plain networks' probabilities averaged in fp32."""

import hashlib
import json

import nibabel
import numpy as np
import pytest
import torch
from conftest import errors_of, metadata_of, smooth_hu, trained_looking_network

from inference.network.weights import common_metadata, save_weights
from inference.prediction import Predictor
from inference.records.provenance import format_signature

CPU = torch.device("cpu")
STATISTICS = [(20.0, 150.0), (80.0, 60.0), (-40.0, 210.0)]
"""Mean and standard deviation, HU, by which each network's slices are normalised."""


@pytest.fixture(scope="module")
def networks():
    return [trained_looking_network(width, seed=seed) for seed, width in enumerate((8, 4, 12))]


def weights_of(networks, **changes):
    return [
        (
            {name: tensor.clone() for name, tensor in network.state_dict().items()},
            metadata_of(network, intensity_mean=mean, intensity_std=std, **changes),
        )
        for network, (mean, std) in zip(networks, STATISTICS, strict=True)
    ]


@pytest.fixture(scope="module")
def hu():
    return smooth_hu((5, 48, 64))


@torch.no_grad()
def plain_average(networks, hu, window):
    """The mean of the probabilities, (slices, classes, rows, columns)."""
    total = 0
    for network, (mean, std) in zip(networks, STATISTICS, strict=True):
        z = (np.clip(hu, *window).astype(np.float32) - mean) / std
        slices = torch.from_numpy(z.astype(np.float32))[:, None].expand(-1, 3, -1, -1)
        total = total + network(slices).softmax(1)
    return total / len(networks)


@pytest.mark.slow
def test_labels_are_those_of_the_mean_probabilities(networks, hu):
    window = (-400, 500)
    predictor = Predictor(weights_of(networks), CPU, dtype=torch.float32)
    labels = predictor.predict(hu, window=window)
    expected = plain_average(networks, hu, window).argmax(1).numpy()
    assert (labels == expected).mean() >= 0.9999
    # They are no single network's, nor those of the logits' mean.
    for weights in weights_of(networks):
        alone = Predictor([weights], CPU, dtype=torch.float32).predict(hu, window=window)
        assert (alone == expected).mean() < 0.95


@pytest.mark.slow
def test_of_slices_that_are_reduced_probabilities_are_upsampled(networks, hu):
    window = (-400, 500)
    weights = weights_of(networks, matrix_reduction=2)
    labels = Predictor(weights, CPU, dtype=torch.float32).predict(hu, window=window)
    padded = np.pad(hu, ((0, 0), (0, 16), (0, 0)), mode="edge")  # to a multiple of 32
    clipped = torch.from_numpy(np.clip(padded, *window).astype(np.float32))[:, None]
    reduced = torch.nn.functional.avg_pool2d(clipped, 2)[:, 0].numpy()
    mean = plain_average(networks, reduced, window)
    upsampled = torch.nn.functional.interpolate(mean, scale_factor=2, mode="bilinear")
    assert (labels == upsampled.argmax(1)[:, :48].numpy()).mean() >= 0.9999


def test_on_cuda_too(networks, cuda_device, hu):
    window = (-400, 500)
    cuda_device()
    device = torch.device("cuda", 0)
    predictor = Predictor(weights_of(networks), device, dtype=torch.float32, batch_size=2)
    labels = predictor.predict(hu, window=window)
    assert (labels == plain_average(networks, hu, window).argmax(1).numpy()).mean() >= 0.9999


@pytest.fixture
def files(networks, tmp_path):
    paths = []
    for number, (state, metadata) in enumerate(weights_of(networks)):
        paths.append(tmp_path / f"fold-{number}.safetensors")
        save_weights(paths[-1], state, metadata)
    return paths


@pytest.mark.slow
def test_label_map_and_manifest_name_all_weights(files, folders, run, cts, tmp_path, predicted):
    cts("a")
    manifest = tmp_path / "m.jsonl"
    arguments = ["--manifest", manifest, "--weights", *files]
    assert run(*arguments) == 0

    digests = "+".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    line = json.loads(manifest.read_text())
    assert line["weights"] == "fold-0.safetensors+fold-1.safetensors+fold-2.safetensors"
    assert line["weights_sha256"] == digests
    digest = hashlib.sha256(digests.encode()).hexdigest()
    signature = format_signature("fold-0+fold-1+fold-2", digest)
    header = nibabel.load(folders[1] / "a.nii.gz").header
    assert header["descrip"].item().decode() == signature == line["made_by"]

    # With the same weights it is skipped, with others it is recomputed.
    for count, some in ((1, arguments), (2, arguments[:-1])):
        assert run("--keep-existing", *some) == 0
        assert len(predicted) == count


def test_the_one_that_cannot_be_used_is_named(files, run, cts, networks, tmp_path, capsys):
    cts("a")
    assert common_metadata([metadata_of(network) for network in networks]).base_channels == 12
    other = tmp_path / "other.safetensors"
    save_weights(other, *weights_of(networks, matrix_reduction=2)[0])
    for path, named in ((tmp_path / "none.safetensors", "none.safetensors"), (other, "1 and 2")):
        assert run("--weights", files[0], path) == 2
        assert named in errors_of(capsys)[0]

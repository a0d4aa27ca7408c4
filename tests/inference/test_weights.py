"""Weights files: what is saved comes back, and what is not weights is refused."""

import dataclasses
import json
import pickle

import pytest
import torch
from conftest import metadata_of, trained_looking_network
from safetensors import safe_open
from safetensors.torch import save_file

from inference.network.model import AttentionUNet
from inference.network.weights import (
    DEMONSTRATION_WEIGHTS,
    SLIM,
    WEIGHTS,
    WeightsError,
    load_weights,
    read_metadata,
    save_weights,
)


@pytest.mark.parametrize("supervised_channels", [0, 6])
def test_round_trip(tmp_path, supervised_channels):
    network = trained_looking_network(supervised_channels=supervised_channels)
    changes = {"intensity_mean": -12.5, "matrix_reduction": 2}
    metadata = metadata_of(network, supervised_channels=supervised_channels, **changes)
    path, saved = tmp_path / "w.safetensors", network.state_dict()
    saved["decoders.0.refine.1.running_var"].fill_(1e6)  # fp16 ends at 65,504
    save_weights(path, saved, metadata)
    state, loaded = load_weights(path)
    assert loaded == metadata
    for name, tensor in saved.items():
        is_fp16 = tensor.is_floating_point() and "running_" not in name
        expected = tensor.half() if is_fp16 else tensor
        assert torch.equal(state[name], expected), name
    AttentionUNet(**loaded.network).load_state_dict(state)
    with safe_open(path, framework="numpy") as file:
        fields = json.loads(file.metadata()["abdoseg"])
    # Versions that know no others read files of the paper's.
    assert ("supervised_channels" in fields) == bool(supervised_channels)


def test_pickle_is_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    path = tmp_path / "w.safetensors"
    for save in (lambda: path.write_bytes(pickle.dumps(Trap())), lambda: torch.save({}, path)):
        save()
        with pytest.raises(WeightsError, match="not a safetensors file"):
            load_weights(path)


def test_other_safetensors_are_refused(tmp_path, weights_file):
    with pytest.raises(WeightsError, match="no such file"):
        read_metadata(tmp_path / "none.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="no abdoseg metadata"):
        read_metadata(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("trained_with", "pixel_mm", "reduction"),
    [(1, 3.0, 1), (2, 0.8, 2), (2, 1.0, 2), (2, 1.1, 1), (4, 0.5, 4), (4, 0.6, 2), (4, 3.0, 1)],
)
def test_a_reduced_pixel_is_at_most_2_mm(trained_with, pixel_mm, reduction):
    metadata = metadata_of(trained_looking_network(), matrix_reduction=trained_with)
    assert metadata.reduction_at((10.0, 0.5, pixel_mm)) == reduction


def test_files_from_before_attention_was_a_choice_have_it(tmp_path):
    network = trained_looking_network()
    fields = dataclasses.asdict(metadata_of(network))
    del fields["attention"]
    header = {"abdoseg": json.dumps(fields)}
    save_file(network.state_dict(), tmp_path / "w.safetensors", header)
    assert read_metadata(tmp_path / "w.safetensors").attention == "relu-sigmoid"


@pytest.mark.parametrize(
    ("path", "attention"), [(DEMONSTRATION_WEIGHTS, "none"), (WEIGHTS / SLIM, "relu-sigmoid")]
)
def test_attention_that_contradicts_the_weights_is_refused(tmp_path, path, attention):
    state_dict, metadata = load_weights(path)
    assert metadata.attention != attention
    other = dataclasses.replace(metadata, attention=attention)
    save_weights(tmp_path / "w.safetensors", state_dict, other)
    with pytest.raises(WeightsError, match="attention"):
        load_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("attention", ["none", "relu-sigmoid"])
def test_attention_is_known_before_the_first_step(tmp_path, attention):
    """Its weights are random then; only what was seen of slices tells."""
    torch.manual_seed(1)
    network = AttentionUNet(base_channels=8, attention=attention).train()
    with torch.no_grad():
        for _ in range(30):
            network(torch.randn(2, 1, 32, 32).repeat(1, 3, 1, 1))
    path = tmp_path / "w.safetensors"
    save_weights(path, network.state_dict(), metadata_of(network, attention=attention))
    assert load_weights(path)[1].attention == attention
    if attention != "none":
        save_weights(path, network.state_dict(), metadata_of(network, attention="none"))
        with pytest.raises(WeightsError, match="attention"):
            load_weights(path)

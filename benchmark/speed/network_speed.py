"""Time the steps from the plain network to the service's, on slices already normalised."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmark.speed.plain_pipeline import load_network
from inference.device import choose_device, choose_dtype
from inference.network.folding import fold
from inference.network.model import DOWNSAMPLING, AttentionUNet
from inference.network.weights import WeightsMetadata, load_weights, read_metadata
from inference.prediction import Predictor
from inference.startup import reuse_freed_memory


def median_seconds(device: torch.device, repeats: int, step: Callable[[], object]) -> float:
    """Return the median time of a step, until the device has done it, after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def tflop_a_slice(metadata: WeightsMetadata, size: tuple[int, int]) -> float:
    """Return the 10**12 operations of the folded network for a slice of rows and columns.

    By torch's own counter; a multiplication and an addition are two. No device is used.
    """
    with torch.device("meta"):
        network, slices = fold(AttentionUNet(**metadata.network)), torch.empty(1, 1, *size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(slices)
    return counter.get_total_flops() / 1e12


def measure_network(weights: Path, device: str, size: tuple[int, int]) -> dict:
    """Time `measure_steps` on eight slices of a volume's rows and columns.

    Returns:
        `device`, its name; `matrix`, what the network sees of a slice; `steps`.
    """
    chosen, reduction = choose_device(device), read_metadata(weights).matrix_reduction
    matrix = [-(-length // (reduction * DOWNSAMPLING)) * DOWNSAMPLING for length in size]
    torch.manual_seed(0)
    slices = torch.randn(8, 1, *matrix)  # not zeros, which some hardware multiplies faster
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "CPU"
    steps = measure_steps(weights, chosen, slices, repeats=3)
    return {"device": name, "matrix": matrix, "steps": steps}


@torch.inference_mode()
def measure_steps(
    weights: Path, device: torch.device, slices: Tensor, repeats: int
) -> list[tuple[str, float]]:
    """Time the network as each step is added to those before.

    Args:
        weights, device: of the network.
        slices: z-scored, (N, 1, H, W), fp32, on the host.
        repeats: passes over all slices, after one to warm up; the median counts.

    Returns:
        (name of the step, milliseconds a slice), from the plain network to the service's.
    """
    steps = []

    def add(name: str, label_all: Callable[[], object]) -> None:
        steps.append((name, 1000 * median_seconds(device, repeats, label_all) / len(slices)))

    def one_by_one(network: nn.Module, slices: Tensor) -> Callable[[], None]:
        def label_all() -> None:
            for one in slices.split(1):
                network(one.to(device)).float().cpu().numpy().argmax(axis=1).astype(np.uint8)

        return label_all

    plain, _ = load_network(weights, device)
    add("plain: fp32, one slice at a time", one_by_one(plain, slices.expand(-1, 3, -1, -1)))
    network = fold(plain).to(memory_format=torch.channels_last)
    slices = slices.contiguous(memory_format=torch.channels_last)
    add("folded, channels last", one_by_one(network, slices))
    dtype = choose_dtype(device)
    name = f"precision {str(dtype).removeprefix('torch.')}"
    add(name, one_by_one(network.to(dtype), slices.to(dtype)))
    predictor = Predictor([load_weights(weights)], device)
    name = "as the service predicts: normalising too"
    if device.type == "cpu":
        reuse_freed_memory()
        name += f", {predictor.lanes} slices at once, freed memory reused"
    voxels = slices[:, 0].numpy()
    window = (float(voxels.min()), float(voxels.max()))
    add(name, lambda: predictor.predict(voxels, window=window, reduction=1))
    return steps

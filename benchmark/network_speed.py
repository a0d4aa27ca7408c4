"""What each step from the plain network to the service's is worth, on slices already normalised.

A process of its own, because the harness imports no torch: prints one JSON object.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmark.plain_pipeline import load_network
from inference.folding import fold
from inference.model import DOWNSAMPLING
from inference.prediction import Predictor, choose_device, choose_dtype
from inference.weights import load_weights, read_metadata


def _labels_on_host(logits: Tensor) -> np.ndarray:
    return logits.float().cpu().numpy().argmax(axis=1).astype(np.uint8)


def _labels_on_device(logits: Tensor) -> np.ndarray:
    return logits.argmax(dim=1).to(torch.uint8).cpu().numpy()


@torch.inference_mode()
def measure_steps(
    weights: Path, device: torch.device, slices: Tensor, repeats: int
) -> list[tuple[str, float]]:
    """Time the network as each step is added to those before.

    Args:
        weights: safetensors file.
        device: where to run.
        slices: z-scored, (N, 1, H, W), fp32, on the host.
        repeats: passes over all slices, after one to warm up; the median counts.

    Returns:
        (what the step is, milliseconds a slice), from the plain network to the service's.
    """
    steps = []

    def add(
        name: str,
        network: Callable[[Tensor], Tensor],
        slices: Tensor,
        batch_size: int,
        labels: Callable[[Tensor], np.ndarray],
    ) -> None:
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            for first in range(0, len(slices), batch_size):
                labels(network(slices[first : first + batch_size].to(device)))
            seconds.append(time.perf_counter() - start)
        steps.append((name, 1000 * statistics.median(seconds[1:]) / len(slices)))

    network, _ = load_network(weights, device)
    in_colour = slices.expand(-1, 3, -1, -1)
    add("plain: fp32, one slice at a time", network, in_colour, 1, _labels_on_host)

    network = fold(network).to(memory_format=torch.channels_last)
    slices = slices.contiguous(memory_format=torch.channels_last)
    add("norms folded, one channel, channels last", network, slices, 1, _labels_on_host)

    dtype = choose_dtype(device)
    network, slices = network.to(dtype), slices.to(dtype)
    precision = str(dtype).removeprefix("torch.")
    add(f"precision {precision}", network, slices, 1, _labels_on_host)

    state_dict, metadata = load_weights(weights)
    predictor = Predictor(state_dict, metadata, device)
    batch_size = min(predictor.fitting_batch_size(slices.shape[2:], 1), len(slices))
    add(f"batches of {batch_size}", network, slices, batch_size, _labels_on_host)
    add("labels on the device", network, slices, batch_size, _labels_on_device)
    return steps


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmark.network_speed", description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE.safetensors")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--slices", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(512, 512), metavar=("ROWS", "COLUMNS")
    )
    parser.add_argument("--repeat", type=int, default=3, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    device = choose_device(options.device)
    torch.manual_seed(0)
    reduction = read_metadata(options.weights).matrix_reduction
    size = [-(-length // (reduction * DOWNSAMPLING)) * DOWNSAMPLING for length in options.size]
    # Never zeros: some hardware multiplies them faster.
    slices = torch.randn(options.slices, 1, *size)
    steps = measure_steps(options.weights, device, slices, options.repeat)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    threads = torch.get_num_threads()
    print(json.dumps({"device": name, "threads": threads, "matrix": size, "steps": steps}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

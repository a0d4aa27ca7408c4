"""What each step from the plain network to the service's is worth, on slices already normalised.

With --sweep instead: every type, form and batch size, against the device's own matrix rate. A
process of its own, because the harness imports no torch: prints one JSON object, with --sweep a
line with all that is known whenever something has been measured.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmark.speed.plain_pipeline import load_network
from inference import cuda
from inference.device import choose_device, choose_dtype
from inference.folding import fold
from inference.model import DOWNSAMPLING, AttentionUNet
from inference.prediction import Predictor
from inference.weights import WeightsMetadata, load_weights, read_metadata

SWEEP_BATCH_SIZES = (1, 2, 4, 8, 16, 32)

_SWEEP_MEMORY_MB = 2000.0  # the service's default, for which its batch size is asked


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

    def add_pass(name: str, label_all: Callable[[], object]) -> None:
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            label_all()
            seconds.append(time.perf_counter() - start)
        steps.append((name, 1000 * statistics.median(seconds[1:]) / len(slices)))

    def add(
        name: str,
        network: Callable[[Tensor], Tensor],
        slices: Tensor,
        batch_size: int,
        labels: Callable[[Tensor], np.ndarray],
    ) -> None:
        def label_all() -> None:
            for first in range(0, len(slices), batch_size):
                labels(network(slices[first : first + batch_size].to(device)))

        add_pass(name, label_all)

    network, _ = load_network(weights, device)
    in_colour = slices.expand(-1, 3, -1, -1)
    add("plain: fp32, one slice at a time", network, in_colour, 1, _labels_on_host)

    network = fold(network).to(memory_format=torch.channels_last)
    slices = slices.contiguous(memory_format=torch.channels_last)
    add("folded, channels last", network, slices, 1, _labels_on_host)

    dtype = choose_dtype(device)
    network, halved = network.to(dtype), slices.to(dtype)
    precision = str(dtype).removeprefix("torch.")
    add(f"precision {precision}", network, halved, 1, _labels_on_host)
    if device.type == "cuda":
        network.fuse_on_cuda()
        add("bias, ReLU and sum in the convolutions", network, halved, 1, _labels_on_host)

    state_dict, metadata = load_weights(weights)
    predictor = Predictor([(state_dict, metadata)], device)
    if device.type == "cuda":
        batch_size = min(predictor.default_batch_size(slices.shape[2:], 1), len(slices))
        add(f"batches of {batch_size}", network, halved, batch_size, _labels_on_host)
        add("labels on the device", network, halved, batch_size, _labels_on_device)
    voxels = slices[:, 0].numpy()
    window = (float(voxels.min()), float(voxels.max()))
    name = "as the service predicts: normalising too"
    if device.type == "cpu":
        name += f", {predictor.lanes} slices at once, freed memory reused"
    add_pass(name, lambda: predictor.predict(voxels, window=window, reduction=1))
    return steps


def gflop_a_slice(metadata: WeightsMetadata, size: tuple[int, int]) -> dict[str, float]:
    """What a slice costs by torch's own counter, on no device.

    Args:
        metadata: of the network.
        size: rows and columns that it sees.

    Returns:
        10**9 operations, a multiplication and an addition being two: `plain` and `folded`.
    """

    def count(network: nn.Module, channels: int) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, channels, *size, device="meta"))
        return counter.get_total_flops() / 1e9

    def made() -> AttentionUNet:
        with torch.device("meta"):
            return AttentionUNet(**metadata.network).eval()

    return {
        "plain": count(made(), 3),
        "folded": count(fold(made()), 1),
    }


def _seconds(device: torch.device, repeats: int, step: Callable[[], object]) -> float:
    """Median time of a step until the device has done it, after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


@torch.inference_mode()
def sweep(
    weights: Path,
    device: torch.device,
    size: tuple[int, int],
    *,
    batch_sizes: tuple[int, ...] = SWEEP_BATCH_SIZES,
    matrix: int = 8192,
    repeats: int = 5,
    on_result: Callable[[dict], None] = lambda found: None,
) -> dict:
    """Time the folded network in every type, form and batch size, each on its own.

    Args:
        weights: safetensors file.
        device: where to run.
        size: rows and columns that the network sees.
        batch_sizes: tried until the device's memory is full.
        matrix: rows and columns of the matrix products.
        repeats: of each measurement; the median counts.
        on_result: called with all that is known whenever something has been measured.

    Returns:
        `matrix_tflops` by type; `context_mb`, in use beside torch's allocator after a first pass
        (None on a CPU); `default_batch_size`, the service's for 2,000 MB; `gflop`
        (`gflop_a_slice`); `failed` (what could not be measured: why); and `runs`, each with
        `dtype`, `fused`, `searches` (cuDNN's own),
        `batch_size`, `ms` a slice, `tflops` (of what the form itself does), `peak_mb` that the
        allocator reserved, and `widths`: values a pixel alive at the peak, in units of
        base_channels (None on a CPU).
    """
    on_cuda = device.type == "cuda"
    state_dict, metadata = load_weights(weights)
    predictor = Predictor([(state_dict, metadata)], device, gpu_memory_mb=_SWEEP_MEMORY_MB)
    default_batch_size = predictor.default_batch_size(size, 1)
    found = {
        "matrix_tflops": {},
        "context_mb": None,
        "default_batch_size": default_batch_size,
        "gflop": gflop_a_slice(metadata, size),
        "runs": [],
        "failed": {},
    }

    def attempt(name: str, measure: Callable[[], None]) -> bool:
        """Whether there is memory for more; nothing that goes wrong ends the sweep."""
        try:
            measure()
        except Exception as error:
            found["failed"][name] = " ".join(str(error).split())[:200] or type(error).__name__
            return not cuda.is_out_of_memory(error)
        finally:
            on_result(found)
        return True

    def read_context() -> None:
        noise = np.random.default_rng(0).integers(-500, 500, (1, *size), np.int16)
        predictor.predict(noise, window=(-500.0, 500.0), reduction=1)
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        found["context_mb"] = (total - free - torch.cuda.memory_reserved(device)) / 2**20

    if on_cuda:
        attempt("a first pass", read_context)
    predictor.release()
    if on_cuda:
        torch.cuda.set_per_process_memory_fraction(1.0, device)

    dtypes = (torch.float16, torch.bfloat16) if on_cuda else (choose_dtype(device),)

    def multiply(dtype: torch.dtype) -> None:
        factor = torch.randn(matrix, matrix, device=device).to(dtype)
        seconds = _seconds(device, repeats, lambda: factor @ factor)
        found["matrix_tflops"][_name(dtype)] = 2 * matrix**3 / seconds / 1e12

    for dtype in dtypes:
        attempt(f"matrix product, {_name(dtype)}", lambda dtype=dtype: multiply(dtype))

    def add(
        dtype: torch.dtype,
        batch_size: int,
        *,
        fused: bool = on_cuda,
        searches: bool = False,
    ) -> None:
        network = load_network(weights, torch.device("cpu"))[0]
        network = fold(network)
        if fused:
            network.fuse_on_cuda()
        network = network.to(device, dtype, memory_format=torch.channels_last)
        slices = torch.randn(batch_size, 1, *size, device=device).to(dtype)
        slices = slices.contiguous(memory_format=torch.channels_last)
        before = peak = 0
        if on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        torch.backends.cudnn.benchmark = searches
        try:
            step = _seconds(device, repeats, lambda: network(slices).argmax(dim=1))
        finally:
            torch.backends.cudnn.benchmark = False
        if on_cuda:
            peak = torch.cuda.max_memory_allocated(device)
        seconds, pixels = step / batch_size, batch_size * size[0] * size[1]
        found["runs"].append(
            {
                "dtype": _name(dtype),
                "fused": fused,
                "searches": searches,
                "batch_size": batch_size,
                "ms": 1000 * seconds,
                "tflops": found["gflop"]["folded"] / seconds / 1000,
                "peak_mb": torch.cuda.max_memory_reserved(device) / 2**20 if on_cuda else None,
                "widths": (peak - before) / (2 * metadata.base_channels * pixels)
                if on_cuda
                else None,
            }
        )

    for dtype in dtypes:
        for batch_size in batch_sizes:
            name = f"{_name(dtype)}, batch of {batch_size}"
            if not attempt(name, lambda dtype=dtype, size=batch_size: add(dtype, size)):
                break
    if on_cuda:
        for batch_size in sorted({1, min(default_batch_size, max(batch_sizes))}):
            for option in ({"fused": False}, {"searches": True}):
                attempt(
                    f"{option}, batch of {batch_size}",
                    lambda size=batch_size, option=option: add(torch.float16, size, **option),
                )
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmark network-speed`."""
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE.safetensors")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--slices", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(512, 512), metavar=("ROWS", "COLUMNS")
    )
    parser.add_argument("--repeat", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument(
        "--sweep", action="store_true", help="every type, form and batch size, instead of the steps"
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}",
    )


def run(options: argparse.Namespace) -> int:
    """Run it.

    Returns:
        0.
    """
    device = choose_device(options.device)
    torch.manual_seed(0)
    reduction = read_metadata(options.weights).matrix_reduction
    size = [-(-length // (reduction * DOWNSAMPLING)) * DOWNSAMPLING for length in options.size]
    if options.sweep:
        sweep(
            options.weights,
            device,
            tuple(size),
            on_result=lambda found: print(json.dumps(found), flush=True),
        )
        return 0
    # Never zeros: some hardware multiplies them faster.
    slices = torch.randn(options.slices, 1, *size)
    steps = measure_steps(options.weights, device, slices, options.repeat)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    threads = torch.get_num_threads()
    print(json.dumps({"device": name, "threads": threads, "matrix": size, "steps": steps}))
    return 0

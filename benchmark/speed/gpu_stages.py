"""The stages of `gpu-sweep` that need no cold process: `… gpu_stages FOLDER DEVICE`.

Prints a JSON object for each measurement as soon as it is made: `stage`, `what`, and the figures by
the heads of the page's columns. An error is printed as `not measured` and costs that measurement.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from benchmark.speed.gpu_sweep import FULL_SIZE, PAPER_SIZE, STAGES
from benchmark.speed.network_speed import median_seconds, tflop_a_slice
from inference.cuda import runtime as cuda
from inference.device import choose_device
from inference.files import one_line
from inference.intensity import percentiles
from inference.labels import LABEL_NAMES
from inference.network.model import AttentionUNet
from inference.network.weights import DEMONSTRATION, FULL, SLIM, WEIGHTS, load_weights, save_weights
from inference.prediction import Predictor
from inference.volume import read_volume

BATCH_SIZES = (1, 2, 4, 8, 16)

CHOICES = ("fused_kernels", "dense_borders")
"""Choices that act while a process predicts."""


def widened(state_dict: dict[str, Tensor], wide: AttentionUNet) -> dict[str, Tensor]:
    """Return weights with which a wide network, of any weights, is the same function.

    Each channel is there several times, and what reads it takes an equal part of each copy.
    """
    weights = {}
    for name, new in wide.state_dict().items():
        tensor = state_dict[name]
        for axis, length in enumerate(new.shape):
            copied = torch.arange(length) * tensor.shape[axis] // length
            tensor = tensor.index_select(axis, copied)
            if tensor.ndim == 4 and axis == (0 if "upsample" in name else 1):  # what is read
                tensor = tensor / copied.bincount()[copied].view(-1, *[1] * (3 - axis))
        weights[name] = tensor
    return weights


def write_weights(folder: Path) -> None:
    """Write weights of 64 channels: the best that ship, and of the paper's network.

    Where there are none, slim ones are `widened`. The paper's network, with attention and without
    reduction, is widened from the demonstration's, which were trained at reduction 2.
    """
    full = FULL if (WEIGHTS / FULL).is_file() else SLIM
    for name, source, reduction in ((FULL_SIZE, full, 2), (PAPER_SIZE, DEMONSTRATION, 1)):
        state_dict, narrow = load_weights(WEIGHTS / source)
        changes = {"base_channels": 64, "supervised_channels": 16, "matrix_reduction": reduction}
        metadata = dataclasses.replace(narrow, **changes)  # type: ignore[arg-type]
        with torch.device("meta"):
            wide = AttentionUNet(**metadata.network)
        save_weights(folder / name, widened(state_dict, wide), metadata)


def compared(found: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    """Return `voxels unlike` of two label maps, of `all`, and `DSC` of each organ that is there."""
    dsc = {}
    for label, organ in enumerate(LABEL_NAMES):
        ours, theirs = found == label, expected == label
        if label and (total := int(ours.sum()) + int(theirs.sum())):
            dsc[organ] = 2 * int((ours & theirs).sum()) / total
    return {"voxels unlike": int((found != expected).sum()), "of all": found.size, "DSC": dsc}


class Stages:
    """The stages, each a method that prints what it measures.

    Args:
        folder: of the sweep: its volumes, real CTs in `cts`, and weights.
        device: as `choose_device` takes it.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, choose_device(device)
        self.on_cuda = self.device.type == "cuda"
        self.rate = math.nan  # of convolutions, TFLOP/s

    def emit(self, stage: str, what: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Print what `measure` returns, or why it failed."""
        try:
            line = {"stage": stage, "what": what, **measure()}
        except Exception as error:
            line = {"stage": "not measured", "what": f"{stage}: {what}", "why": one_line(error)}
        print(json.dumps(line), flush=True)
        torch.backends.cudnn.benchmark = False
        if self.on_cuda:
            torch.cuda.empty_cache()

    def predictor(self, weights: Path, choice: str = "") -> Predictor:
        """Return a predictor as the service makes it, without one of its `CHOICES`, if given."""
        changed: dict[str, Any] = {choice: False} if choice else {}
        return Predictor([load_weights(weights)], self.device, **changed)

    def random(self, *shape: int) -> Tensor:
        """Return random numbers on the device, channels last: in fp16, or on a CPU in fp32."""
        dtype = torch.float16 if self.on_cuda else torch.float32
        tensor = torch.randn(*shape, device=self.device)
        return tensor.to(dtype, memory_format=torch.channels_last)

    def rates(self) -> None:
        """Measure the most that the device does of convolutions."""
        channels, side, batch = (256, 128, 16) if self.on_cuda else (64, 32, 1)
        features = self.random(batch, channels, side, side)
        weight = self.random(channels, channels, 3, 3)

        def rate() -> dict[str, Any]:
            torch.backends.cudnn.benchmark = True
            seconds = median_seconds(self.device, 10, partial(conv2d, features, weight, padding=1))
            self.rate = 18 * channels**2 * side**2 * batch / seconds / 1e12
            return {"rate": self.rate}

        self.emit("rates", "3x3 convolution (TFLOP/s)", rate)

    def labels(self) -> None:
        """Compare labels with those of a CPU in fp32, and change each choice once."""
        full, slim = self.folder / FULL_SIZE, WEIGHTS / SLIM
        pairs = [(ct, one) for ct in sorted(self.folder.glob("cts/*")) for one in (slim, full)]
        synthetic = self.folder / "middle.nii.gz"
        pairs += [(synthetic, WEIGHTS / DEMONSTRATION), (synthetic, self.folder / PAPER_SIZE)]
        for number, (ct, weights) in enumerate(pairs):
            for choice in ("", *(CHOICES if number == 0 else ())):
                what = f"{weights.stem}, {ct.name}" + (f", {choice} changed" if choice else "")
                self.emit("labels", what, partial(self.compare, ct, weights, choice))

    def compare(self, ct: Path, weights: Path, choice: str) -> dict[str, Any]:
        """Compare the labels of some slices in the middle of a volume."""
        slices = max(1, len(read_volume(self.folder / "middle.nii.gz").voxels) // 25)
        volume = read_volume(ct)
        first = max(0, (len(volume.voxels) - slices) // 2)
        voxels, (low, high) = volume.voxels[first : first + slices], percentiles(volume.voxels)
        how: dict[str, Any] = {"window": (low, high)}
        how |= {"slope": volume.slope, "intercept": volume.intercept}
        exact = Predictor([load_weights(weights)], torch.device("cpu"), dtype=torch.float32)
        found = self.predictor(weights, choice).predict(voxels, **how)
        return compared(found, exact.predict(voxels, **how))

    def network(self) -> None:
        """Time the network alone in every batch size, and with cuDNN's own search."""
        side = read_volume(self.folder / "short.nii.gz").voxels.shape[1]
        for weights, reduction in ((PAPER_SIZE, 1), (FULL_SIZE, 2)):
            predictor, edge = self.predictor(self.folder / weights), side // reduction
            usual = cuda.BATCH_SIZES[reduction]
            for batch, search in (*((batch, False) for batch in BATCH_SIZES), (usual, True)):
                what = f"{edge}×{edge}, batch of {batch}" + ", cuDNN's search" * search
                time_it = partial(self.time_network, predictor, edge, batch, search)
                self.emit("network", what, time_it)

    def time_network(
        self, predictor: Predictor, edge: int, batch: int, search: bool
    ) -> dict[str, Any]:
        """Time a batch, and read what it allocates beside the weights."""
        torch.backends.cudnn.benchmark = search
        slices = self.random(batch, 1, edge, edge).to(predictor.dtype)
        before = 0
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        with torch.inference_mode():
            seconds = median_seconds(
                self.device, 5, lambda: predictor.network(slices).argmax(dim=1)
            )
        rate = tflop_a_slice(predictor.metadata, (edge, edge)) * batch / seconds
        found = {"ms a slice": 1e3 * seconds / batch, "TFLOP/s": rate, "share": rate / self.rate}
        if self.on_cuda:
            peak = torch.cuda.max_memory_allocated(self.device) - before
            allowed = 2 * predictor.metadata.live_values * slices.numel()
            found |= {"peak (MB)": peak / 2**20, "allowed for (MB)": allowed / 2**20}
        return found

    def choices(self) -> None:
        """Time predictions with a choice as it is and changed."""
        for choice in CHOICES:
            self.emit("choices", choice, partial(self.time_choice, choice))

    def time_choice(self, choice: str) -> dict[str, Any]:
        """Time predictions as it is (A) and changed (B) in the order A B B A, after one of each."""
        weights = self.folder / (FULL_SIZE if choice == "dense_borders" else PAPER_SIZE)
        voxels = read_volume(self.folder / "short.nii.gz").voxels
        sides = self.predictor(weights), self.predictor(weights, choice)
        seconds: tuple[list[float], list[float]] = ([], [])
        for side in (0, 1, 0, 1, 1, 0, 0, 1, 1, 0):
            started = time.perf_counter()
            sides[side].predict(voxels, window=(-200, 300))
            seconds[side].append(time.perf_counter() - started)
        return {"as it is (s)": seconds[0][1:], "changed (s)": seconds[1][1:]}


def main() -> None:
    """Run all stages."""
    folder, device = sys.argv[1:]
    torch.manual_seed(0)
    write_weights(Path(folder))
    stages = Stages(Path(folder), device)

    def run(stage: str) -> dict[str, float]:
        started = time.monotonic()
        getattr(stages, stage)()
        return {"seconds": time.monotonic() - started}

    for stage in STAGES:
        stages.emit("seconds", stage, partial(run, stage))


if __name__ == "__main__":
    main()

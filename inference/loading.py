"""The network of a run: which weights on which device is decided here, once, and loaded."""

import argparse
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from . import startup
from .cuda import driver
from .network.weights import common_metadata, default_weights, read_metadata
from .phases import PhaseTimer
from .records.provenance import Provenance
from .terminal import log

if TYPE_CHECKING:
    import torch

    from .prediction import Predictor


class NetworkLoader:
    """Decides which weights and device a command line uses, and loads the network.

    Torch is imported when the network is loaded, while the first volume is being read, or when the
    weights are asked for and depend on what devices there are.

    Attributes:
        provenance: of what the network will label; its device and precision once it is loaded.

    Args:
        options: of `parse_arguments`; `device` may be changed until it is first needed.
        timer: of the phases "imports" and "context".

    Raises:
        WeightsError: there are no weights, or they cannot be used.
    """

    def __init__(self, options: argparse.Namespace, timer: PhaseTimer) -> None:
        self.provenance = Provenance(lambda: self.weights, options.organs)
        self._options, self._timer = options, timer
        self._named = tuple(options.weights)
        # On CUDA the network takes no memory of the host's.
        self._on_cpu = self._named or (default_weights(on_cuda=False)[0],)
        self._metadata = common_metadata([read_metadata(path) for path in self._on_cpu])

    @cached_property
    def weights(self) -> tuple[Path, ...]:
        """The files of the weights; torch is imported where the device decides."""
        on_cuda = self._named or (default_weights(on_cuda=True)[0],)
        if self._options.device.startswith("cuda") or on_cuda == self._on_cpu:
            return on_cuda
        on_cpu = self._options.device == "cpu" or self._chosen_device.type == "cpu"
        return self._on_cpu if on_cpu else on_cuda

    def host_bytes(self) -> int:
        """Return what the weights take on the host: their files, mapped, and twice that in fp32."""
        return 3 * sum(path.stat().st_size for path in self._on_cpu)

    def slice_bytes(self, pixels: int, pixel_mm: float) -> int:
        """Return what the network takes on the host for a slice, by its pixels and their size."""
        reduction = self._metadata.reduction_at((1.0, pixel_mm, pixel_mm))
        return self._metadata.slice_bytes(pixels, reduction, 4)

    @cached_property
    def predictor(self) -> "Predictor":
        """The network on its device; loaded when first asked for, and printed.

        Raises:
            StartError: torch cannot be imported, or the device cannot be used.
            ValueError: the device asked for is not there, or the weights do not fit the network.
        """
        prediction = self._prediction
        with self._timer.phase("context"):
            from .cuda import runtime as cuda
            from .network.weights import load_weights

            try:
                predictor = prediction.Predictor(
                    map(load_weights, self.weights),
                    self._chosen_device,
                    batch_size=self._options.batch_size,
                    gpu_memory_mb=self._options.gpu_memory,
                )
            except cuda.DeviceError as error:  # another machine's may be free
                raise startup.StartError(str(error)) from error
        self._report(predictor)
        return predictor

    @cached_property
    def _prediction(self) -> ModuleType:
        with self._timer.phase("imports"):
            if self._options.device != "cpu":
                startup.initialise_cuda()
            startup.reuse_freed_memory()
            with startup.starting():
                startup.import_torch()
                import torch

                from . import prediction
                from .device import thread_count

                torch.set_num_threads(thread_count())
        return prediction

    @cached_property
    def _chosen_device(self) -> "torch.device":
        _ = self._prediction  # torch is imported as the command line does it
        from .device import choose_device

        return choose_device(self._options.device)

    def _report(self, predictor: "Predictor") -> None:
        import torch

        from .cuda import runtime as cuda

        device, on_cuda = predictor.device, predictor.device.type == "cuda"
        names = " + ".join(path.name for path in self.weights)
        self.provenance.device = torch.cuda.get_device_name(device) if on_cuda else "cpu"
        self.provenance.precision = str(predictor.dtype).removeprefix("torch.")
        if not self._options.quiet:
            where = f"{self.provenance.device} ({device})"
            if not on_cuda:
                where = f"the CPU, {torch.get_num_threads()} threads"
                if self._options.device != "cpu":
                    why = "" if driver.cuda_version() is None else f", {cuda.why_no_device()}"
                    where = f"No CUDA device found{why}: running on {where}"
            why = ", averaged" if len(self.weights) > 1 else ""
            if not self._named:
                why = f" ({default_weights(on_cuda=on_cuda)[1]})"
            log(f"{where}, {self.provenance.precision}, {names}{why}")
        if predictor.metadata.warning:
            log(f"warning: {names}: {predictor.metadata.warning}")

"""Command line of the service: `python -m inference`."""

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .case import Case
from .cuda import driver
from .cuda.choices import CudaChoices
from .files import discard_unfinished, one_line
from .memory import PROCESS_BYTES, MemoryBudget, memory_limit, slice_bytes
from .network.weights import common_metadata, default_weights, read_metadata
from .options import parse_arguments
from .outputs import Outputs
from .phases import LOG_VARIABLE, PhaseTimer
from .progress import Progress, closing_table, say
from .records.colours import write_colour_tables
from .records.flags import count_in_words
from .records.manifest import Records
from .records.provenance import Provenance
from .service import Service
from .signals import Stopped, signals_raise
from .startup import CANNOT_START, StartError, import_torch, starting, why_not_started

if TYPE_CHECKING:
    from .dicom.segmentation import SegmentationWriter
    from .prediction import Predictor

_SWITCH_INTERVAL = 0.0002  # s; Python's own is 25 times as long


def _begin_device(choices: CudaChoices) -> None:
    """Begin what of a CUDA device needs no torch, if there is one."""
    if choices.expandable_segments and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    driver.initialise()


def find_weights(options: argparse.Namespace) -> list[Path]:
    """The weights' files that options ask for; torch is imported only where the device decides.

    Raises:
        ValueError: the device asked for is not there.
    """
    if options.weights:
        return options.weights
    on_cpu, on_cuda = (default_weights(on_cuda=on_cuda)[0] for on_cuda in (False, True))
    if on_cpu == on_cuda or options.device == "cpu":
        return [on_cpu]
    _begin_device(CudaChoices.from_environment())  # before torch, as it must be
    with starting():
        import_torch()
        from .device import choose_device

    return [on_cuda if choose_device(options.device).type == "cuda" else on_cpu]


def _make_predictor(
    options: argparse.Namespace,
    timer: PhaseTimer,
    memory: int,
    provenance: Provenance,
) -> "Predictor":
    """Import torch and put the network on the device.

    Raises:
        ValueError: the device asked for is not there, or the weights do not fit the network.
    """
    choices = CudaChoices.from_environment()
    with timer.phase("imports"):
        if options.device != "cpu":
            _begin_device(choices)
        with starting():
            import_torch()
            import torch

            from .cuda import runtime as cuda
            from .device import choose_device, choose_dtype, thread_count
            from .network.weights import load_weights
            from .prediction import Predictor

        torch.set_num_threads(thread_count())
    with timer.phase("context"):
        device = choose_device(options.device)
        ready = cuda.warm_up(device, choose_dtype(device)) if device.type == "cuda" else None
        weights, why = options.weights, ", averaged" if len(options.weights) > 1 else ""
        if not weights:
            weight, reason = default_weights(on_cuda=device.type == "cuda")
            weights, why = [weight], f" ({reason})"
        predictor = Predictor(
            [load_weights(path) for path in weights],
            device,
            batch_size=options.batch_size,
            gpu_memory_mb=options.gpu_memory,
            host_bytes=max(0, memory - PROCESS_BYTES) // 2,
            choices=choices,
            ready=ready,
            ends_context=True,
        )
    names = " + ".join(path.name for path in weights)
    precision = str(predictor.dtype).removeprefix("torch.")
    on_cuda = device.type == "cuda"
    provenance.device = torch.cuda.get_device_name(device) if on_cuda else "cpu"
    provenance.precision = precision
    if not options.quiet:
        if device.type == "cuda":
            where = f"{torch.cuda.get_device_name(device)} ({device})"
        else:
            reason = "" if options.device == "cpu" else "No CUDA device found: running on "
            if reason and driver.cuda_version() is not None:
                reason = f"No CUDA device found, {cuda.why_no_device()}: running on "
            where = f"{reason}the CPU, {torch.get_num_threads()} threads"
        say(f"{where}, {precision}, {names}{why}")
    if predictor.metadata.warning:
        say(f"warning: {names}: {predictor.metadata.warning}")
    return predictor


def make_service(
    options: argparse.Namespace,
    timer: PhaseTimer,
    *,
    memory: int | None = None,
    on_slices: Callable[[Case, int], None] = lambda case, slices: None,
    on_case: Callable[[Case], None] = lambda case: None,
) -> Service:
    """The service that options ask for.

    Args:
        options: of `parse_arguments`.
        timer, on_slices, on_case: as in `Service`.
        memory: bytes that the process may take; by default its cgroup's or machine's limit.
    """
    # The first volume is read while torch is being imported: neither should wait long for the
    # other to let go of the interpreter.
    sys.setswitchinterval(_SWITCH_INTERVAL)
    warnings.filterwarnings("ignore")  # of libraries, in the middle of our lines; what matters of
    for library in ("nibabel", "pydicom", "highdicom"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # a file is told by our own errors
    memory = memory_limit() if memory is None else memory
    provenance = Provenance(lambda: find_weights(options), options.organs)
    weights = options.weights or [default_weights(on_cuda=False)[0]]
    budget = MemoryBudget(memory - PROCESS_BYTES - _weights_bytes(weights))
    return Service(
        outputs=Outputs(
            options.output,
            provenance,
            options.organs,
            with_label_map=options.format != "seg",
            per_organ=options.per_organ,
            segmentation=_segmentation_writer(options, provenance),
        ),
        make_predictor=lambda: _make_predictor(options, timer, memory, provenance),
        timer=timer,
        keep_existing=options.keep_existing,
        budget=budget,
        network_bytes=_network_bytes(weights),
        with_preview=options.preview,
        with_records=options.statistics is not None or options.manifest is not None,
        on_slices=on_slices,
        on_case=on_case,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        As `run`.
    """
    return run(parse_arguments(arguments), make_service)


def run(options: argparse.Namespace, make: Callable[..., Service]) -> int:
    """Run what options ask for, and say what becomes of each case and of all.

    Args:
        options: of `parse_arguments`.
        make: called as `make_service`; makes what runs the cases, here or elsewhere: its `run`,
            and `stop` if it has one, are called as `Service`'s, its `recorded` is set, and its
            `provenance` is what a manifest says.

    Returns:
        0 if every case is done (or was before), 1 if some failed or a record of them could not be
        written, 2 for wrong usage, `CANNOT_START`, 128 and its number for a signal that ended it.
    """
    start = time.monotonic()
    log = os.environ.get(LOG_VARIABLE)
    timer = PhaseTimer(Path(log) if log else None, warn=lambda text: say(f"warning: {text}"))
    if not options.quiet:
        for line in options.left_out:
            say(f"left out: {line}")
    progress = Progress(len(options.paths), quiet=options.quiet)
    service = make(options, timer, on_slices=progress.on_slices, on_case=lambda case: end(case))
    try:
        if options.colours:
            write_colour_tables(options.output)
    except OSError as error:
        say(f"error: --colours: {one_line(error)}")
        return 2
    try:
        records = Records(
            options.statistics,
            options.manifest,
            keep=options.keep_existing,
            timer=timer,
            provenance=service.provenance,
        )
    except ValueError as error:
        say(f"error: {one_line(error)}")
        return 2
    service.recorded = records.recorded

    def end(case: Case) -> None:
        records.add(case)
        progress.on_case(case)

    stopped = None
    try:
        with signals_raise(getattr(service, "stop", None)):
            cases = service.run(options.paths)
    except (ValueError, OSError) as error:
        say(f"error: {one_line(error)}")
        return 2
    except (StartError, MemoryError) as error:
        say(f"error: it cannot start: {why_not_started(error)}")
        return CANNOT_START
    except Stopped as signalled:
        stopped = signalled
        discard_unfinished()
    try:
        records.close()
    except ValueError as error:
        say(f"error: {one_line(error)}")
        return 1 if stopped is None else 128 + stopped.number
    if stopped:
        say(f"stopped by {stopped}: the label maps written so far are whole")
        return 128 + stopped.number
    failed = sum(case.status == "failed" for case in cases)
    if not options.quiet:
        elapsed = time.monotonic() - start
        for line in closing_table(cases, timer).splitlines():
            say(line, sys.stdout)
        done = f"{len(cases) - failed} of {len(cases)} cases in {elapsed:.1f} s"
        if flagged := count_in_words(case.flags for case in cases if case.status != "failed"):
            say(flagged, sys.stdout)
        say(f"{done}: {options.output}", sys.stdout)
    return 1 if failed or records.incomplete else 0


def _segmentation_writer(
    options: argparse.Namespace, provenance: Provenance
) -> "SegmentationWriter | None":
    """What writes DICOM SEG, if it is asked for."""
    if options.format == "nifti":
        return None
    from .dicom.segmentation import SegmentationWriter

    return SegmentationWriter(options.seg_type, provenance)


def _weights_bytes(weights: list[Path]) -> int:
    """What weights take on the host: their files, mapped, and twice as much in fp32."""
    return 3 * sum(path.stat().st_size for path in weights)


def _network_bytes(weights: list[Path]) -> Callable[[int, float], int]:
    """What the network takes on the host for a slice, by its pixels and their size in mm."""
    metadata = common_metadata([read_metadata(path) for path in weights])

    def need(pixels: int, pixel_mm: float) -> int:
        reduction = metadata.reduction_at((1.0, pixel_mm, pixel_mm))
        return slice_bytes(pixels, metadata.live_values, reduction, 4)

    return need

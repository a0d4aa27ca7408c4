"""Command line of the service: `python -m inference`."""

import argparse
import os
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from inference.phases import LOG_VARIABLE, PhaseTimer
from inference.service import STAGES, Case, Service, one_line
from inference.statistics import write_statistics
from inference.volume import find_cases
from inference.weights import FULL, SLIM, WeightsError, default_weights, read_metadata

if TYPE_CHECKING:
    from inference.prediction import Predictor

_ROOT = Path(__file__).parents[1]

_SWITCH_INTERVAL = 0.0002  # s; Python's own is 25 times as long


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse and check everything that can be checked without torch; exits with 2 if wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m inference",
        description="Segment 13 organs and tumors in abdominal CT volumes.",
        epilog="Exit codes: 0 every case is done, 1 some cases failed and the rest are written, "
        f"2 wrong usage. With {LOG_VARIABLE}=FILE in the environment, the time of each phase is "
        "appended to FILE as JSON lines.",
    )
    parser.add_argument(
        "--input",
        type=Path,
        default=_ROOT / "inputs",
        metavar="DIR|FILE",
        help="folder of NAME_0000.nii.gz (or .nii) volumes, or one file (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=_ROOT / "outputs",
        metavar="DIR",
        help="folder for the label maps NAME.nii.gz (default: %(default)s)",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="trained weights, .safetensors (default: the best in weights/ for the device: "
        f"{FULL} on CUDA, {SLIM} on a CPU)",
    )
    parser.add_argument(
        "--device", default="auto", metavar="auto|cuda[:N]|cpu", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="slices predicted at once (default: what fits --gpu-memory, at most 32; 1 on a CPU)",
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        default=2000,
        metavar="MB",
        help="device memory for the whole process (default: %(default)s)",
    )
    parser.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE.csv|.json",
        help="write volume (mL) and mean HU of each label and case",
    )
    parser.add_argument(
        "--preview", action="store_true", help="write a contact sheet NAME.png for each case"
    )
    parser.add_argument(
        "--keep-existing", action="store_true", help="skip cases whose label map is there already"
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    options = parser.parse_args(arguments)

    if not options.input.exists():
        parser.error(f"--input {options.input}: no such file or folder")
    options.paths = find_cases(options.input)
    if not options.paths:
        parser.error(f"--input {options.input}: no .nii.gz or .nii file there")
    if not options.paths[0].name.endswith((".nii.gz", ".nii")):
        parser.error(f"--input {options.input}: not a .nii.gz or .nii file")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", options.device):
        parser.error(f"--device {options.device}: choose auto, cpu, cuda or cuda:N")
    if options.batch_size is not None and options.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    if options.gpu_memory <= 0:
        parser.error("--gpu-memory must be more than 0 MB")
    if options.statistics and options.statistics.suffix not in (".csv", ".json"):
        parser.error(f"--statistics {options.statistics}: the name must end in .csv or .json")
    try:
        if options.weights is None:
            default_weights(on_cuda=False)
        else:
            read_metadata(options.weights)
    except (WeightsError, OSError) as error:
        parser.error(f"--weights {options.weights or ''}: {one_line(error)}")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {options.output}: {one_line(error)}")
    if not os.access(options.output, os.W_OK):
        parser.error(f"--output {options.output}: not writable")
    return options


def _import_torch() -> None:
    """Import torch without its rules for tensors that have a shape and no values.

    They are written in Python, take a quarter of torch's import and are for its compiler; the
    service neither compiles nor traces. Whoever imports them afterwards gets them.
    """
    if "torch" in sys.modules:
        return
    rules = "torch._meta_registrations"
    sys.modules[rules] = ModuleType(rules)
    try:
        import torch
    finally:
        del sys.modules[rules]
    del torch._meta_registrations


def _make_predictor(options: argparse.Namespace, timer: PhaseTimer) -> "Predictor":
    """Import torch and put the network on the device.

    Raises:
        ValueError: the device asked for is not there, or the weights do not fit the network.
    """
    with timer.phase("imports"):
        _import_torch()
        import torch

        from inference.prediction import Predictor, choose_device
        from inference.weights import load_weights
    with timer.phase("context"):
        device = choose_device(options.device)
        weights, why = options.weights, ""
        if weights is None:
            weights, reason = default_weights(on_cuda=device.type == "cuda")
            why = f" ({reason})"
        predictor = Predictor(
            *load_weights(weights),
            device,
            batch_size=options.batch_size,
            gpu_memory_mb=options.gpu_memory,
        )
    if not options.quiet:
        if device.type == "cuda":
            where = f"{torch.cuda.get_device_name(device)} ({device})"
        else:
            reason = "" if options.device == "cpu" else "No CUDA device found: running on "
            where = f"{reason}the CPU, {torch.get_num_threads()} threads"
        precision = str(predictor.dtype).removeprefix("torch.")
        print(f"{where}, {precision}, {weights.name}{why}", file=sys.stderr)
    return predictor


class _Progress:
    """A bar per case when standard error is a terminal, a line per case otherwise."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self.total = total
        self.quiet = quiet
        self.ended = 0
        self.bar = None

    def on_slices(self, case: Case, count: int) -> None:
        if self.quiet or not sys.stderr.isatty():
            return
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=case.shape[0], desc=case.name, unit="slice", leave=False)
        self.bar.update(count)
        if self.bar.n >= self.bar.total:
            self.bar.close()
            self.bar = None

    def on_case(self, case: Case) -> None:
        self.ended += 1
        if case.status == "failed":
            print(f"error: {case.path}: {case.reason}", file=sys.stderr, flush=True)
        elif not self.quiet:
            print(
                f"[{self.ended}/{self.total}] {case.name}: {case.status}",
                file=sys.stderr,
                flush=True,
            )


def _table(cases: list[Case], timer: PhaseTimer) -> str:
    """The closing table: case, shape, seconds per stage, status."""
    rows = [("case", "shape", *STAGES, "status")]
    for case in cases:
        seconds = timer.seconds(case.name) if case.status != "kept" else {}
        rows.append(
            (
                case.name,
                "x".join(map(str, case.shape)) or "-",
                *(f"{seconds[stage]:.2f}" if stage in seconds else "-" for stage in STAGES),
                case.status,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 if every case is done (or was before), 1 if some failed, 2 for wrong usage.
    """
    start = time.monotonic()
    # The first volume is read while torch is being imported: neither should wait long for the
    # other to let go of the interpreter.
    sys.setswitchinterval(_SWITCH_INTERVAL)
    options = _parse_arguments(arguments)
    log = os.environ.get(LOG_VARIABLE)
    timer = PhaseTimer(Path(log) if log else None)
    progress = _Progress(len(options.paths), quiet=options.quiet)
    service = Service(
        output=options.output,
        make_predictor=lambda: _make_predictor(options, timer),
        timer=timer,
        keep_existing=options.keep_existing,
        with_statistics=options.statistics is not None,
        with_preview=options.preview,
        on_slices=progress.on_slices,
        on_case=progress.on_case,
    )
    try:
        cases = service.run(options.paths)
    except ValueError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the label maps written so far are whole", file=sys.stderr)
        return 130
    if options.statistics:
        write_statistics(options.statistics, (row for case in cases for row in case.statistics))
    failed = sum(case.status == "failed" for case in cases)
    if not options.quiet:
        print(_table(cases, timer))
        elapsed = time.monotonic() - start
        print(f"{len(cases) - failed} of {len(cases)} cases in {elapsed:.1f} s: {options.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # everything is written; taking torch apart piece by piece would take 0.3 s

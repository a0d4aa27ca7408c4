"""The options of `python -m inference`, parsed and checked without torch.

`--help` needs no package that is not Python's own: what does is imported where it is checked.
"""

import argparse
import os
import re
import stat
from pathlib import Path

from inference.files import (
    case_name,
    file_identity,
    find_entries,
    one_line,
    printable,
    why_not_a_volume,
)
from inference.labels import LABEL_NAMES
from inference.phases import LOG_VARIABLE
from inference.shards import parse_shard, shard_file, shard_of

_ROOT = Path(__file__).parents[1]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m inference",
        description="Segment 13 organs and tumors in abdominal CT volumes.",
        epilog="Exit codes: 0 every case is done, 1 some cases failed and the rest are written, "
        "2 wrong usage, 143 ended by SIGTERM, 130 by Ctrl-C. "
        f"With {LOG_VARIABLE}=FILE in the environment, the time of each phase is appended to FILE "
        "as JSON lines. Example: python -m inference --input CTS --output LABELS "
        "--statistics volumes.csv",
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
        help="trained weights, .safetensors (default: weights/submission.safetensors, else the "
        "best in weights/ for the device)",
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
        "--keep-existing",
        action="store_true",
        help="skip cases whose label map is there already, whole, on its input's grid, and made by "
        "these weights and this version",
    )
    parser.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE.jsonl",
        help="append a line of JSON for each case as it ends: input and its SHA-256, weights, "
        "versions, seconds, volumes, flags",
    )
    parser.add_argument(
        "--shard",
        metavar="I/N|auto|auto/N",
        help="only the I-th (from 0) of N parts of the cases, balanced by file size; auto takes it "
        "from a Slurm array, auto/N takes the index from it or from a Kubernetes Indexed Job. The "
        "files of --statistics and --manifest get the shard in their names: volumes.0-of-4.csv",
    )
    parser.add_argument(
        "--organs",
        type=_labels,
        default=(),
        metavar="NAME,NAME…",
        help="only these in the label maps, such as liver,left-kidney; tables, pictures and flags "
        "are of all",
    )
    parser.add_argument(
        "--per-organ",
        action="store_true",
        help="write a mask NAME/liver.nii.gz of each organ beside NAME.nii.gz as well",
    )
    parser.add_argument(
        "--colours",
        action="store_true",
        help="write names and colours of the labels for 3D Slicer and ITK-SNAP into the output "
        "folder",
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    return parser


def _labels(text: str) -> tuple[int, ...]:
    """The labels of a list of names such as liver,left-kidney, ascending."""
    numbers = {name: number for number, name in enumerate(LABEL_NAMES) if number}
    names = [re.sub("[-_ ]+", " ", name.strip().lower()) for name in text.split(",")]
    unknown = [name for name in names if name not in numbers]
    if unknown:
        known = ", ".join(name.replace(" ", "-") for name in numbers)
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose of {known}")
    return tuple(sorted({numbers[name] for name in names}))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse and check everything that can be checked without torch; exits with 2 if wrong."""
    from inference.weights import WeightsError, default_weights, read_metadata

    parser = make_parser()
    options = parser.parse_args(arguments)

    options.paths = _find_inputs(options.input, parser)
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
        parser.error(printable(f"--output {options.output}: {one_line(error)}"))
    if not os.access(options.output, os.W_OK):
        parser.error(printable(f"--output {options.output}: not writable"))
    shard = _parse_shard(options, parser) if options.shard else None
    _protect_inputs(options, parser)  # those of other shards too
    if shard:
        options.paths = shard_of(options.paths, *shard)
    return options


def _parse_shard(options: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[int, int]:
    """Which shard of how many; its table and manifest get names of their own."""
    try:
        shard = parse_shard(options.shard, os.environ)
    except ValueError as error:
        parser.error(f"--shard {one_line(error)}")
    for name in ("statistics", "manifest"):
        if path := getattr(options, name):
            setattr(options, name, shard_file(path, *shard))
    return shard


def _find_inputs(source: Path, parser: argparse.ArgumentParser) -> list[Path]:
    try:
        mode = source.stat().st_mode
        paths = find_entries(source)
    except FileNotFoundError:
        parser.error(printable(f"--input {source}: no such file or folder"))
    except OSError as error:
        parser.error(printable(f"--input {source}: {error.strerror}"))
    if stat.S_ISDIR(mode):
        if not paths:
            parser.error(printable(f"--input {source}: no .nii.gz or .nii file there"))
    elif reason := why_not_a_volume(source):
        parser.error(printable(f"--input {source}: {reason}"))
    return paths


def _protect_inputs(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse a call that would write over what it reads, under whatever name or link."""
    inputs = {file_identity(path): path for path in options.paths if not why_not_a_volume(path)}
    written = {
        "--output": [options.output / f"{case_name(path)}.nii.gz" for path in inputs.values()],
        "--statistics": [options.statistics] if options.statistics else [],
        "--manifest": [options.manifest] if options.manifest else [],
    }
    for flag, paths in written.items():
        for path in paths:
            if (source := inputs.get(file_identity(path))) is not None:
                parser.error(
                    printable(
                        f"{flag} {path} is an input, {source}: it would be written over; name "
                        "another folder"
                    )
                )

"""The options of `python -m inference`, parsed and checked without torch.

`--help` needs no package that is not Python's own: what does is imported where it is checked.
"""

import argparse
import os
import re
import stat
from pathlib import Path

from . import __version__
from .files import SUFFIXES, check_writable, file_identity, find_entries, one_line, why_not_a_volume
from .labels import LABEL_NAMES
from .phases import LOG_VARIABLE
from .shards import parse_shard, shard_file, shard_of
from .sources import NiftiFile, Source
from .terminal import Parser, log

_IN_TREE = __package__ == "inference"  # not installed as `abdoseg`
_ROOT = Path(__file__).parents[1] if _IN_TREE else Path()


def make_parser(package: str = "inference") -> argparse.ArgumentParser:
    """Return the parser of `python -m PACKAGE`, or of `abdoseg` where that is installed."""
    program = f"python -m {package}" if _IN_TREE else "abdoseg"
    parser = Parser(
        prog=program,
        description="Segment 13 organs and tumors in abdominal CT volumes.",
        epilog="Exit codes: 0 every case is done, 1 some cases failed and the rest are written, "
        "2 wrong usage, 3 it could not start (a package, a library, memory or a usable device is "
        "missing), 143 ended by SIGTERM, 129 by SIGHUP, 130 by Ctrl-C. "
        f"With {LOG_VARIABLE}=FILE in the environment, the time of each phase is appended to FILE "
        f"as JSON lines. Example: {program} --input CTS --output LABELS "
        "--statistics volumes.csv; of DICOM series: --input SERIES --output LABELS --format both",
    )
    parser.add_argument(
        "--input",
        type=Path,
        default=_ROOT / "inputs",
        metavar="DIR|FILE",
        help="folder of NAME_0000.nii.gz (or .nii) volumes or, where there is none, of DICOM "
        "series in any folders below it; or one file, or a zip of DICOM (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=_ROOT / "outputs",
        metavar="DIR",
        help="folder for the label maps NAME.nii.gz (default: %(default)s)",
    )
    parser.add_argument(
        "--format",
        choices=("nifti", "seg", "both"),
        default="nifti",
        help="of the label maps: NAME.nii.gz, NAME.seg.dcm (DICOM SEG, for DICOM input), or both "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seg-type",
        choices=("binary", "deflated", "labelmap"),
        default="binary",
        help="of a DICOM SEG: bits for each label, which every viewer reads; the same compressed; "
        "or the standard's newer label map, compressed (default: %(default)s)",
    )
    parser.add_argument(
        "--names",
        choices=("number", "uid", "folder"),
        default="number",
        help="of DICOM series: by series number and description, by a digest of the UID, or by "
        "folder; the first two do not identify the patient (default: %(default)s)",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="trained weights, .safetensors; of several the probabilities are averaged, which "
        "takes as long as all of them (default: weights/submission.safetensors, else the best in "
        "weights/ for the device)",
    )
    parser.add_argument(
        "--device", default="auto", metavar="auto|cuda[:N]|cpu", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="slices predicted at once (default: on CUDA 4, or 16 and 32 of slices "
        "reduced by 2 and 4, if they fit in --gpu-memory; 1 on a CPU)",
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
    parser.add_argument("--version", action="version", version=f"abdoseg {__version__}")
    return parser


def _labels(text: str) -> tuple[int, ...]:
    """Return the labels of a list of names such as liver,left-kidney, ascending."""
    numbers = {name: number for number, name in enumerate(LABEL_NAMES) if number}
    names = [re.sub("[-_ ]+", " ", name.strip().lower()) for name in text.split(",")]
    unknown = [name for name in names if name not in numbers]
    if unknown:
        known = ", ".join(name.replace(" ", "-") for name in numbers)
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose of {known}")
    return tuple(sorted({numbers[name] for name in names}))


def parse_arguments(
    arguments: list[str] | None, parser: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """Parse and check everything that can be checked without torch; exits with 2 if wrong."""
    parser = parser or make_parser()
    options = parser.parse_args(arguments)

    options.skipped = []
    options.sources = _find_inputs(options, parser)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", options.device):
        parser.error(f"--device {options.device}: choose auto, cpu, cuda or cuda:N")
    if options.batch_size is not None and options.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    if options.gpu_memory <= 0:
        parser.error("--gpu-memory must be more than 0 MB")
    if options.statistics and options.statistics.suffix not in (".csv", ".json"):
        parser.error(f"--statistics {options.statistics}: the name must end in .csv or .json")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        check_writable(options.output)
    except OSError as error:
        reason = f"files cannot be written and renamed there ({one_line(error)})"
        parser.error(f"--output {options.output}: {reason}")
    shard = None
    if options.shard:
        try:
            shard = parse_shard(options.shard, os.environ)
        except ValueError as error:
            parser.error(f"--shard {one_line(error)}")
        options.statistics, options.manifest = (
            path and shard_file(path, *shard) for path in (options.statistics, options.manifest)
        )
    _protect_inputs(options, parser)  # those of other shards too
    if shard:
        options.sources = shard_of(options.sources, *shard)
    return options


def _find_inputs(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Source]:
    """Return the volumes or series of the input; what else is there goes to `options.skipped`."""
    source = options.input
    try:
        mode = source.stat().st_mode
        paths = find_entries(source)
    except FileNotFoundError:
        parser.error(f"--input {source}: no such file or folder")
    except OSError as error:
        parser.error(f"--input {source}: {error.strerror}")
    if stat.S_ISDIR(mode):
        reason = "" if paths else "no .nii.gz or .nii file there"
    else:
        reason = why_not_a_volume(source)
    if not reason:
        if options.format != "nifti":
            parser.error(f"--format {options.format}: a DICOM SEG belongs to a DICOM series")
        beside = set(source.iterdir()) - set(paths) if stat.S_ISDIR(mode) else ()
        if others := sorted(path.name for path in beside if not path.name.startswith(".")):
            count = f"{len(others)} entries" if len(others) > 1 else "1 entry"
            options.skipped = [f"{count} of {source} without .nii.gz or .nii, such as {others[0]}"]
        return [NiftiFile(path) for path in paths]
    of_volume = source.name.lower().endswith(SUFFIXES) and not stat.S_ISDIR(mode)
    if of_volume or not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        parser.error(f"--input {source}: {reason}")
    from .dicom.discovery import find_series  # only for those who have DICOM

    if not options.quiet:
        log("No NIfTI file there: looking for DICOM series")
    try:
        series, options.skipped = find_series(source, options.names)
    except (OSError, ValueError) as error:
        parser.error(f"--input {source}: {one_line(error)}")
    if not series:
        skipped = "".join(f"; skipped: {line}" for line in options.skipped)
        parser.error(f"--input {source}: {reason}, and no CT series in DICOM{skipped}")
    return [*series]


def _protect_inputs(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse a call that would write over what it reads, under whatever name or link."""
    from .outputs import Outputs

    outputs = Outputs(options)
    sources = [source for source in options.sources if not source.refusal]
    inputs = {file_identity(file): file for source in sources for file in source.files}
    written = [("--output", path) for source in sources for path in outputs.files(source.name)]
    written += [("--statistics", options.statistics), ("--manifest", options.manifest)]
    for flag, path in written:
        if path and (source := inputs.get(file_identity(path))) is not None:
            parser.error(
                f"{flag} {path} is an input, {source}: it would be written over; name another "
                "folder"
            )
    of_dicom = not all(isinstance(source, NiftiFile) for source in options.sources)
    if of_dicom and file_identity(options.output) == file_identity(options.input):
        parser.error(
            f"--output {options.output} is the folder of the DICOM series: the next run would take "
            "label maps in it for volumes; name another folder"
        )

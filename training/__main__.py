"""Command line of training: `python -m training COMMAND`."""

import argparse
import dataclasses
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from inference import startup
from inference.files import one_line
from inference.volume import VolumeError
from training import TrainingError
from training.cases import (
    Case,
    find_training_cases,
    intensity_statistics,
    label_table,
    split_patients,
)
from training.data_set import DataSet
from training.label_mapping import CHALLENGE, load_label_mapping, nnunet_label_mapping
from training.options import RECIPE_OPTIONS, make_parser
from training.packing import Packer, check_clip
from training.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from training.processes import Processes, StopRequest

_START_AND_END_S = 2.0  # of the interpreter, in a run by the clock


def _find(
    options: argparse.Namespace,
    parser: argparse.ArgumentParser,
    *,
    left_out: tuple[bool, ...] = (False,),
) -> list[DataSet]:
    """Return the cases of each `--data DIR[=MAP]`, those that are left out or not.

    Ends the program where they cannot be used.
    """
    found: list[DataSet] = []
    try:
        for folder, _, name in (argument.partition("=") for argument in options.data):
            path = Path(folder)
            mapping = load_label_mapping(name) if name else nnunet_label_mapping(path) or CHALLENGE
            if mapping.ignored:
                print(f"{folder}: not our labels, taken as 0: {', '.join(mapping.ignored)}")
            cases, unused = find_training_cases(path, mapping)
            files = [case for case in cases if case.left_out in left_out]
            found.append(DataSet(path, files, unused))
    except (TrainingError, OSError) as error:
        parser.error(str(error))
    counts = Counter(case.name for data_set in found for case in data_set.files)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        parser.error(f"--data: case names occur twice: {', '.join(twice[:5])}")
    return found


def _fit(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    started = time.monotonic()
    numbers = {name: getattr(options, name) for name in RECIPE_OPTIONS}
    try:
        recipe = load_recipe(options.recipe, options.set, **numbers)
    except TrainingError as error:
        parser.error(str(error))
    if recipe.folds and options.held_out is not None:
        parser.error("--held-out and folds: give one of them")
    if recipe.synthetic_fraction and not options.anatomy and not recipe.synthetic_phantoms:
        parser.error("synthetic slices are drawn from --anatomy FILE or synthetic_phantoms")
    # Torch takes seconds to import: wrong usage is reported before.
    from torch import distributed

    from inference.signals import handling_stop_signals
    from training.processes import StopRequest, join_processes
    from training.run_folder import held

    found = _find(options, parser)
    try:
        check_clip([case for part in found for case in part.files], recipe.clips)
        processes = join_processes(options.device)
    except (ValueError, RuntimeError) as error:
        parser.error(f"--data or --device {options.device}: {str(error).splitlines()[0]}")
    stop = StopRequest()
    with handling_stop_signals(stop.note), ExitStack() as stack:
        try:
            if processes.count > 1:
                stack.callback(distributed.destroy_process_group)
            if processes.first:
                stack.enter_context(held(options.output))
            step = _train(options, recipe, found, processes, stop, started)
        except KeyboardInterrupt:
            print("stopped at once", file=sys.stderr)
            return 128 + stop.signal
    if stop.signal:
        processes.report(f"stopped at step {step}; the same command resumes there")
    return 128 + stop.signal if stop.signal else 0


def _read_cases(
    options: argparse.Namespace,
    recipe: Recipe,
    found: list[DataSet],
    processes: "Processes",
) -> "tuple[list[Case], list[Case], list[Case]]":
    """Return the cases to train on, the synthetic ones, and those held out."""
    from training import synthesis
    from training.processes import first_then_others

    report = processes.report
    cache = options.cache or options.output.resolve().parent / "cache"
    first_then_others(processes, lambda: [data_set.read(cache, report) for data_set in found])
    for data_set in found:
        report(data_set.describe())
    training: list[Case] = []
    held_out = [case for data_set in found for case in data_set.cases]
    if recipe.synthetic_fraction < 1:  # else the cases that were read are only scored
        training, held_out = split_patients(held_out, recipe, options.held_out)
    report(label_table(training, held_out))
    report(f"held out: {', '.join(case.name for case in held_out) or 'none'}")
    synthetic: list[Case] = []
    if recipe.synthetic_fraction:  # last: it takes a minute, and the data has been checked
        sources = options.anatomy, recipe.synthetic_phantoms, cache, synthesis.SLICES
        synthetic = first_then_others(processes, lambda: synthesis.synthetic_cases(*sources))
    return training, synthetic, held_out


def _train(
    options: argparse.Namespace,
    recipe: Recipe,
    found: list[DataSet],
    processes: "Processes",
    stop: "StopRequest",
    started: float,
) -> int:
    """Read the data, train, and export a run by the clock; returns the steps done."""
    from inference.network.weights import load_weights
    from training.augmentation import Intensities
    from training.export import export
    from training.fit import Run
    from training.run_folder import describe_run, start_or_resume

    output = options.output
    training, synthetic, held_out = _read_cases(options, recipe, found, processes)
    start = None
    if options.start_from:
        _, metadata = start = load_weights(options.start_from)
        intensities = Intensities(metadata.intensity_mean, metadata.intensity_std)
    elif recipe.clips:
        intensities = Intensities.within(recipe.clips)
    else:
        intensities = Intensities(
            *intensity_statistics([case.cached for case in training or synthetic])
        )
    anatomies = [Path(file).name for file in options.anatomy]
    start_from = options.start_from and options.start_from.name
    about = describe_run(training, held_out, intensities, anatomies, start_from)
    deadline = None
    if options.minutes:
        deadline = started + 60 * options.minutes - _START_AND_END_S
        recipe = dataclasses.replace(recipe, steps=sys.maxsize)  # known at the end
    if processes.first:
        processes.report("\n".join(start_or_resume(output, recipe, about)))
    run = Run(training, synthetic, held_out, recipe, intensities, output, processes, start)
    step = run.train(stop, deadline)
    if deadline and processes.first and not stop.signal:
        start_or_resume(output, dataclasses.replace(recipe, steps=step), about)
        weights, names = output / "weights.safetensors", (part.folder.name for part in found)
        export(output, weights, "last", trained_on=", ".join(names), licence="not stated")
        processes.report(f"{weights} ({weights.stat().st_size / 1e6:.1f} MB)")
    return step


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:

    cases, unused = [], 0
    for data_set in _find(options, parser):
        print(data_set.read(None).describe(), flush=True)
        cases += data_set.cases
        unused += sum(map(len, data_set.unused.values()))
    print(label_table(cases, []))
    print(f"{len(cases)} cases to train on, {unused} not used")
    return 1 if unused or not cases else 0


def _pack(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:

    try:
        clip_hu = load_recipe(options.recipe).clips
    except TrainingError as error:
        parser.error(str(error))
    if not clip_hu:
        parser.error(f"--recipe {options.recipe}: its clip_hu is 0 0: 8 bits need a range")
    if options.output.is_dir() and any(options.output.iterdir()):
        parser.error(f"--output {options.output}: not empty")
    left_out = (False, True) if options.left_out else (False,)
    packer, failed = Packer(options.output, clip_hu, options.step), 0
    found = _find(options, parser, left_out=left_out)
    for case in (case for data_set in found for case in data_set.files):
        try:
            packer.add(case)
        except VolumeError as error:
            print(f"{case.name}: not packed: {error}", flush=True)
            failed += 1
    for number, (size, about) in enumerate(packer.parts, 1):
        print(f"{options.output}/part-{number}: {len(about)} cases, {size / 2**20:.1f} MiB")
    return 1 if failed else 0


def _export(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    output = options.output
    if output.suffix != ".safetensors":
        parser.error(f"--output {output}: the name must end in .safetensors")
    from training.export import export

    given = {name: getattr(options, name) for name in ("trained_on", "licence", "left_out")}
    notes, scores_of = tuple(options.note), options.scores_of
    warning = export(options.run, output, options.checkpoint, notes, scores_of, **given)
    if warning:
        print(f"warning: {output}: {warning} (in the card and in the file)", file=sys.stderr)
    print(f"{output} ({output.stat().st_size / 1e6:.1f} MB), {output.with_suffix('.md')}")
    return 0


def _score(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    found = _find(options, parser, left_out=(True,))
    if not any(data_set.files for data_set in found):
        parser.error("--data: no case has the split left_out in its cases.json")
    from inference.device import choose_device
    from inference.network.weights import load_weights
    from training.evaluation import score_cases
    from training.pictures import draw_overlay
    from training.tables import Score, summary, write_table

    try:
        weights, metadata = load_weights(options.weights)
        check_clip([case for part in found for case in part.files], metadata.clip_hu)
        device = choose_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    cache = options.cache or options.output.resolve().parent / "cache"
    scores: list[Score] = []
    for data_set in found:
        data_set.unused, of_set = {}, []
        data_set.read(cache)
        for case, prediction, of_case in score_cases(data_set.cases, weights, metadata, device):
            of_set += of_case
            if options.pictures and of_case:
                dsc = sum(score.dsc for score in of_case) / len(of_case)
                path = options.pictures / f"{data_set.folder.name}-{dsc:.3f}-{case.name}.png"
                draw_overlay(path, case, prediction, f"{case.name}: mean DSC {dsc:.3f}")
        scores += of_set
        print(data_set.describe(), summary(of_set), sep="\n", flush=True)
        write_table(options.output, Score, scores)
    return 0


def _compare(options: argparse.Namespace, _: argparse.ArgumentParser) -> int:
    from training.tables import comparison_table

    print(comparison_table(options.runs, options.by))
    return 0


COMMANDS = {
    "fit": _fit,
    "check": _check,
    "pack": _pack,
    "export": _export,
    "score": _score,
    "compare": _compare,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code, as in `--help`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments = ["fit", *arguments]
    parser = make_parser()
    options = parser.parse_args(arguments)
    output = getattr(options, "output", None)
    if output:
        startup.use_for_temporary_files(output.parent if output.suffix else output)
    from inference.network.weights import WeightsError

    try:
        return COMMANDS[options.command](options, parser)
    except (TrainingError, VolumeError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        path = Path(error.filename or output or "")
        place = path.parent if path.suffix == ".partial" else path
        print(f"error: {place}: {one_line(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(startup.run(lambda: main))

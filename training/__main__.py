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
from training import TrainingError
from training import recipe as recipes
from training.options import make_parser, recipe_numbers

if TYPE_CHECKING:
    import numpy as np

    from training.cases import Case
    from training.label_mapping import LabelMapping


def _data_sets(arguments: list[str]) -> "dict[Path, LabelMapping | None]":
    """Return the folder of each `--data DIR[=MAP]`, and how its label numbers become ours.

    Raises:
        TrainingError, OSError: a label map cannot be read.
    """
    from training.label_mapping import load_label_mapping, nnunet_label_mapping

    found = {}
    for argument in arguments:
        folder, _, name = argument.partition("=")
        mapping = load_label_mapping(name) if name else nnunet_label_mapping(Path(folder))
        if mapping and mapping.ignored:
            print(f"{folder}: not labels of ours, taken as 0: {', '.join(mapping.ignored)}")
        found[Path(folder)] = mapping
    return found


def _cases(
    options: argparse.Namespace, parser: argparse.ArgumentParser, *, left_out: bool = False
) -> "dict[Path, list[Case]]":
    """Return the cases of each data set; ends the program where they cannot be used together."""
    from training.cases import find_training_cases

    try:
        found = {
            folder: find_training_cases(folder, mapping, left_out=left_out)
            for folder, mapping in _data_sets(options.data).items()
        }
    except (TrainingError, OSError) as error:
        parser.error(str(error))
    counts = Counter(case.name for cases in found.values() for case in cases)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        parser.error(f"--data: case names occur twice: {', '.join(twice[:5])}")
    return found


def _fit(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    started = time.monotonic()
    try:
        recipe = recipes.load_recipe(options.recipe, options.set, **recipe_numbers(options))
    except TrainingError as error:
        parser.error(str(error))
    if recipe.folds and options.held_out is not None:
        parser.error("--held-out and folds both say what is held out: give one of them")
    if recipe.synthetic_fraction and not options.anatomy and not recipe.synthetic_phantoms:
        parser.error("synthetic slices are drawn of --anatomy FILE or synthetic_phantoms")
    # Torch takes seconds to import: wrong usage is reported before.
    from torch import distributed

    from inference.network.weights import load_weights
    from inference.signals import handling_stop_signals
    from training import synthesis
    from training.augmentation import Intensities
    from training.cases import intensity_statistics, label_table, split_patients
    from training.data_set import read_data_set
    from training.export import export
    from training.fit import fit
    from training.packing import check_clip
    from training.processes import StopRequest, first_then_others, join_processes
    from training.run_folder import describe_run, held, start_or_resume

    found = _cases(options, parser)
    try:
        check_clip([case for cases in found.values() for case in cases], recipe.clips)
        processes = join_processes(options.device)
    except (ValueError, RuntimeError) as error:
        parser.error(f"--data or --device {options.device}: {str(error).splitlines()[0]}")
    report = processes.report
    cache = options.cache or options.output.resolve().parent / "cache"
    stop = StopRequest()
    with handling_stop_signals(stop.note), ExitStack() as stack:
        if processes.count > 1:
            stack.callback(distributed.destroy_process_group)
        try:
            if processes.first:
                stack.enter_context(held(options.output))
            data_sets = first_then_others(
                processes,
                lambda: [read_data_set(*entry, cache, report) for entry in found.items()],
            )
            for data_set in data_sets:
                report("\n".join(data_set.describe()))
            cases = [case for data_set in data_sets for case in data_set.cases]
            if recipe.synthetic_fraction == 1:  # what is read is for scoring alone
                training, held_out = [], cases
            else:
                fold = (recipe.fold, recipe.folds) if recipe.folds else None
                training, held_out = split_patients(
                    cases, recipe.held_out_fraction, recipe.seed, options.held_out, fold
                )
            report(label_table(training, held_out))
            report(f"held out: {', '.join(case.name for case in held_out) or 'none'}")
            start = intensities = synthesise = None
            if options.start_from:
                _, metadata = start = load_weights(options.start_from)
                intensities = Intensities(metadata.intensity_mean, metadata.intensity_std)
            elif recipe.clips:
                intensities = Intensities.within(recipe.clips)
            elif training:
                intensities = Intensities(*intensity_statistics(training))
            # Only now: drawing patients takes a minute, and the data is known to be in order.
            if recipe.synthetic_fraction:
                synthesise = first_then_others(
                    processes,
                    lambda: synthesis.load(
                        options.anatomy, recipe.synthetic_phantoms, cache, report
                    ),
                )
            if intensities is None:
                intensities = Intensities(*synthesis.intensity_statistics(synthesise))
            description = describe_run(
                training,
                held_out,
                intensities,
                [Path(file).name for file in options.anatomy],
                options.start_from and options.start_from.name,
            )
            if options.minutes:  # the steps are known at the end
                recipe = dataclasses.replace(recipe, steps=sys.maxsize)
            if processes.first:
                for line in start_or_resume(options.output, recipe, description):
                    report(line)
            done = fit(
                training,
                held_out,
                recipe,
                intensities,
                options.output,
                processes,
                stop,
                workers=options.workers,
                on_device={"device": True, "host": False}.get(options.data_on),
                deadline=started + 60 * options.minutes if options.minutes else None,
                synthesise=synthesise,
                start=start,
            )
            if options.minutes and processes.first and not stop.signal:
                recipe = dataclasses.replace(recipe, steps=done)
                start_or_resume(options.output, recipe, description)
                weights = options.output / "weights.safetensors"
                names = ", ".join(folder.name for folder in found)
                texts = {"trained_on": names, "licence": "not stated", "notes": []}
                export(options.output, weights, checkpoint="last", **texts)
                report(f"{weights} ({weights.stat().st_size / 1e6:.1f} MB)")
        except KeyboardInterrupt:
            print("stopped without saving", file=sys.stderr)
            return 128 + stop.signal
        if stop.signal:
            report(f"stopped at step {done}; the same command goes on from there")
        return 128 + stop.signal if stop.signal else 0


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from training.cases import label_table
    from training.data_set import read_data_set, unpaired

    data_sets = []
    for folder, cases in _cases(options, parser).items():
        data_set = read_data_set(folder, cases, None)
        data_set.lost |= unpaired(folder)
        print("\n".join(data_set.describe()), flush=True)
        data_sets.append(data_set)
    cases = [case for data_set in data_sets for case in data_set.cases]
    print(label_table(cases, []))
    lost = sum(len(names) for data_set in data_sets for names in data_set.lost.values())
    print(f"{len(cases)} cases to train on, {lost} not used")
    return 1 if lost or not cases else 0


def _pack(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from inference.volume import VolumeError
    from training.cache import read_case
    from training.cases import CachedVolume, find_files
    from training.packing import Packer, pack_case

    try:
        clip_hu = recipes.load_recipe(options.recipe).clips
    except TrainingError as error:
        parser.error(str(error))
    if not clip_hu:
        parser.error(f"--recipe {options.recipe}: its clip_hu is 0 0: 8 bits need a range")
    if options.output.is_dir() and any(options.output.iterdir()):
        parser.error(f"--output {options.output}: not empty")
    found = _cases(options, parser)
    if options.left_out:
        left_out = _cases(options, parser, left_out=True)
        found = {folder: cases + left_out[folder] for folder, cases in found.items()}
    packer, lost = Packer(options.output), 0
    for folder, cases in found.items():
        described = find_files(folder).described
        for case in cases:
            try:
                hu, labels, about = read_case(case)
                annotated = case.annotated or CachedVolume.of(hu, labels, about).present
                if not annotated:
                    raise VolumeError("nothing is labelled")
            except VolumeError as error:
                print(f"{case.name}: not packed: {error}", flush=True)
                lost += 1
                continue
            *files, packed = pack_case(hu, labels, clip_hu, options.step)
            known = {"annotated_labels": annotated, "packed": {**about, **packed}}
            packer.add(case.name, *files, {**described.get(case.name, {}), **known})
    for number, (size, about) in enumerate(zip(packer.sizes, packer.described, strict=True), 1):
        print(f"{options.output}/part-{number}: {len(about)} cases, {size / 2**20:.1f} MiB")
    return 1 if lost else 0


def _export(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if options.output.suffix != ".safetensors":
        parser.error(f"--output {options.output}: the name must end in .safetensors")
    from training.export import export

    warning = export(
        options.run,
        options.output,
        checkpoint=options.checkpoint,
        trained_on=options.trained_on,
        licence=options.licence,
        notes=options.note,
        scores_of=options.scores_of,
        left_out=options.left_out,
    )
    if warning:
        print(
            f"warning: {options.output}: {warning} (in the card and in the file)", file=sys.stderr
        )
    size = options.output.stat().st_size / 1e6
    print(f"{options.output} ({size:.1f} MB), {options.output.with_suffix('.md')}")
    return 0


def _score(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    found = _cases(options, parser, left_out=True)
    if not any(found.values()):
        parser.error("--data: no case has the split left_out in its cases.json")
    from inference.device import choose_device
    from inference.network.weights import load_weights
    from training.data_set import read_data_set
    from training.evaluation import Score, score_cases, summary_lines, write_scores
    from training.packing import check_clip
    from training.pictures import draw_best_median_worst, packed

    try:
        weights, metadata = load_weights(options.weights)
        check_clip([case for cases in found.values() for case in cases], metadata.clip_hu)
        device = choose_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    cache = options.cache or options.output.resolve().parent / "cache"
    scores: list[Score] = []
    for folder, cases in found.items():
        data_set = read_data_set(folder, cases, cache)
        pictured: list = []

        def keep(
            case: "Case", label_map: "np.ndarray", of_case: list, kept: list = pictured
        ) -> None:
            if options.pictures and of_case:
                dsc = sum(score.dsc for score in of_case) / len(of_case)
                kept.append((dsc, case, packed(label_map)))

        of_set = score_cases(data_set.cases, weights, metadata, device, on_case=keep)
        scores += of_set
        print("\n".join([*data_set.describe(), *summary_lines(of_set)]), flush=True)
        write_scores(options.output, scores)
        if options.pictures:
            for path in draw_best_median_worst(options.pictures, folder.name, pictured):
                print(f"  {path}", flush=True)
    return 0


def _compare(options: argparse.Namespace, _: argparse.ArgumentParser) -> int:
    from training.comparison import comparison_table

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
    """Run the command line; returns the exit code, as `--help` says."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments = ["fit", *arguments]
    parser = make_parser()
    options = parser.parse_args(arguments)
    if output := getattr(options, "output", None):
        startup.use_for_temporary_files(output.parent if output.suffix else output)
    from inference.network.weights import WeightsError
    from inference.volume import VolumeError

    try:
        return COMMANDS[options.command](options, parser)
    except (TrainingError, VolumeError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or options.output}: {one_line(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(startup.run(lambda: main))

"""Command line of training: `python -m training COMMAND`."""

import argparse
import sys
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from inference import startup
from inference.files import one_line
from training import recipe as recipes
from training.options import make_parser

if TYPE_CHECKING:
    import numpy as np

    from training.cases import Case
    from training.label_mapping import LabelMapping

COMMANDS = ("fit", "check", "pack", "export", "score", "compare", "folds")


def _data_sets(arguments: list[str]) -> "dict[Path, LabelMapping | None]":
    """The folder of each `--data DIR[=MAP]`, and how its label numbers become ours.

    Raises:
        DataError, OSError: a label map cannot be read.
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


def _cases(arguments: list[str], *, left_out: bool = False) -> "dict[Path, list[Case]]":
    """The cases of each `--data DIR[=MAP]`.

    Raises:
        DataError, OSError: a data set or a label map cannot be read.
    """
    from training.cases import find_training_cases

    return {
        folder: find_training_cases(folder, mapping, left_out=left_out)
        for folder, mapping in _data_sets(arguments).items()
    }


def _fit(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        recipe = recipes.load_recipe(options.recipe, recipes.overrides_of(options))
    except recipes.RecipeError as error:
        parser.error(str(error))
    if recipe.folds and options.held_out is not None:
        parser.error("--held-out and --folds both say what is held out: give one of them")
    if recipe.synthetic_fraction and not options.anatomy and not recipe.synthetic_phantoms:
        parser.error("synthetic slices are drawn of --anatomy FILE or --synthetic-phantoms N")
    from torch import distributed  # torch takes seconds to import; wrong usage is told before

    from inference.volume import VolumeError
    from inference.weights import WeightsError, load_weights
    from training import synthesis
    from training.anatomies import AnatomyError
    from training.augmentation import Intensities
    from training.cache import cache_cases
    from training.cases import intensity_statistics, label_table, split_patients
    from training.fit import fit
    from training.label_mapping import DataError
    from training.packing import check_clip
    from training.processes import first_then_others, join_processes
    from training.run_folder import RunError, describe_run, held, start_or_check_run, take_up

    try:
        data_sets = _cases(options.data)
        check_clip([case for part in data_sets.values() for case in part], recipe.clips)
        processes = join_processes(options.device)
    except (DataError, OSError) as error:
        parser.error(str(error))
    except (ValueError, RuntimeError) as error:  # of torch: not a device, or none that is here
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    names = [case.name for part in data_sets.values() for case in part]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        parser.error(f"--data: case names occur twice: {', '.join(twice[:5])}")

    report = partial(print, flush=True) if processes.first else lambda line: None
    stack = ExitStack()
    try:
        if processes.first:
            stack.enter_context(held(options.output))
        cache = options.cache or options.output.resolve().parent / "cache"
        for line in take_up(options.output, recipe):
            report(line)
        cases = first_then_others(
            processes,
            lambda: [c for part in data_sets.values() for c in cache_cases(part, cache, report)],
        )
        if recipe.synthetic_fraction == 1:  # what is read is for scoring alone
            training, held_out = [], cases
        else:
            training, held_out = split_patients(
                cases,
                recipe.held_out_fraction,
                recipe.seed,
                options.held_out,
                (recipe.fold, recipe.folds) if recipe.folds else None,
            )
        report(label_table(training, held_out))
        report(
            f"{len(training)} cases to train on, held out: "
            f"{', '.join(case.name for case in held_out) or 'none'}"
        )
        start = intensities = None
        if options.start_from:
            _, metadata = start = load_weights(options.start_from)
            intensities = Intensities(metadata.intensity_mean, metadata.intensity_std)
        elif recipe.clips:
            intensities = Intensities.within(recipe.clips)
        elif training:
            intensities = Intensities(*intensity_statistics(training))
        # Only now: drawing patients takes a minute, and the data is known to be in order.
        synthesise = None
        if recipe.synthetic_fraction:
            synthesise = first_then_others(
                processes,
                lambda: synthesis.load(options.anatomy, recipe.synthetic_phantoms, cache, report),
            )
        if intensities is None:
            intensities = Intensities(*synthesis.intensity_statistics(synthesise))
        report(f"HU mean {intensities.mean:.1f}, sd {intensities.std:.1f}")
        if processes.first:
            description = describe_run(
                training,
                held_out,
                intensities,
                [Path(file).name for file in options.anatomy],
                options.start_from and options.start_from.name,
            )
            start_or_check_run(options.output, recipe, description)
        return fit(
            training,
            held_out,
            recipe,
            intensities,
            options.output,
            processes,
            workers=options.workers,
            synthesise=synthesise,
            start=start,
        )
    except (DataError, RunError, VolumeError, WeightsError, AnatomyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or options.output}: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "stopped before the first step; what was read and drawn is kept in "
            f"{cache}: the same command goes on from there",
            file=sys.stderr,
        )
        return 130
    finally:
        stack.close()
        if processes.count > 1:
            distributed.destroy_process_group()


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from training.check import check_data_set, describe, table
    from training.label_mapping import DataError

    checks = []
    try:
        for folder, mapping in _data_sets(options.data).items():
            checks.append(check_data_set(folder, mapping, partial(print, flush=True)))
            print("\n".join(describe(checks[-1])), flush=True)
    except (DataError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    print(table(checks))
    names = Counter(case.name for check in checks for case in check.cases)
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        print(f"fit refuses these together: case names occur twice: {', '.join(twice[:5])}")
    used = sum(len(check.cases) for check in checks)
    lost = sum(len(cases) for check in checks for cases in check.lost.values())
    doubtful = len({name for check in checks for part in check.cautions.values() for name in part})
    print(f"{used} cases to train on, {lost} not used, {doubtful} with a caution")
    return 1 if lost or twice or not used else 0


def _pack(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from inference.volume import VolumeError
    from training.cache import read_case
    from training.cases import CachedVolume, find_training_cases, read_description
    from training.label_mapping import DataError
    from training.packing import Packer, pack_case

    try:
        clip_hu = recipes.load_recipe(options.recipe).clips
        if not clip_hu:
            parser.error(f"--recipe {options.recipe}: its clip_hu is 0 0: 8 bits need a range")
        if options.output.is_dir() and any(options.output.iterdir()):
            parser.error(f"--output {options.output}: not empty")
        data_sets = [
            (
                folder,
                [c for part in parts for c in find_training_cases(folder, mapping, left_out=part)],
            )
            for folder, mapping in _data_sets(options.data).items()
            for parts in [(False, True) if options.left_out else (False,)]
        ]
    except (recipes.RecipeError, DataError, OSError) as error:
        parser.error(str(error))
    packer, lost = Packer(options.output), 0
    for folder, cases in data_sets:
        described = read_description(folder)
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
            about = {
                **described.get(case.name, {}),
                "annotated_labels": annotated,
                "packed": {**about, **packed},
            }
            packer.add(case.name, *files, about)
    for number, (size, about) in enumerate(zip(packer.sizes, packer.described, strict=True), 1):
        print(f"{options.output}/part-{number}: {len(about)} cases, {size / 2**20:.1f} MiB")
    return 1 if lost else 0


def _export(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if options.output.suffix != ".safetensors":
        parser.error(f"--output {options.output}: the name must end in .safetensors")
    from inference.weights import read_metadata
    from training.checkpoint import RunError
    from training.export import export

    try:
        card = export(
            options.run,
            options.output,
            checkpoint=options.checkpoint,
            trained_on=options.trained_on,
            licence=options.licence,
            notes=options.note,
            scores_of=options.scores_of,
            left_out=options.left_out,
        )
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if warning := read_metadata(options.output).warning:
        print(
            f"warning: {options.output}: {warning} (in the card and in the file)", file=sys.stderr
        )
    print(f"{options.output} ({options.output.stat().st_size / 1e6:.1f} MB), {card}")
    return 0


def _score(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from inference.device import choose_device
    from inference.labels import LABEL_NAMES, ORGANS
    from inference.weights import WeightsError, load_weights
    from training.cache import cache_cases
    from training.evaluation import mean_by_label, score_cases, write_left_out
    from training.label_mapping import DataError
    from training.packing import check_clip
    from training.pictures import draw_best_median_worst, packed

    try:
        data_sets = _cases(options.data, left_out=True)
    except (DataError, OSError) as error:
        parser.error(str(error))
    if not any(data_sets.values()):
        parser.error("--data: no case has the split left_out in its cases.json")
    try:
        weights, metadata = load_weights(options.weights)
        check_clip([case for part in data_sets.values() for case in part], metadata.clip_hu)
        device = choose_device(options.device)
    except (WeightsError, ValueError) as error:
        parser.error(str(error))
    cache = options.cache or options.output.resolve().parent / "cache"
    scored = {}
    for folder, cases in data_sets.items():
        cases = cache_cases(cases, cache)
        kept: list = []

        def keep(case: "Case", label_map: "np.ndarray", of_case: list, kept: list = kept) -> None:
            if options.pictures and of_case:
                dsc = sum(score.dsc for score in of_case) / len(of_case)
                kept.append((dsc, case, packed(label_map)))

        scores = score_cases(
            cases, weights, metadata, device, batch_size=None, step=0, on_case=keep
        )
        scored[folder.name] = scores
        print(f"{folder}: {len(cases)} cases left out")
        means = mean_by_label(scores)
        for label, (dsc, nsd, count) in means.items():
            print(f"  {LABEL_NAMES[label]:<22} DSC {dsc:.3f}  NSD {nsd:.3f}  n {count}")
        organs = [dsc for label, (dsc, _, _) in means.items() if label in ORGANS]
        if organs:
            print(
                f"  mean of {len(organs)} organs: DSC {sum(organs) / len(organs):.3f}", flush=True
            )
        write_left_out(options.output, scored)
        if options.pictures:
            for path in draw_best_median_worst(options.pictures, folder.name, kept):
                print(f"  {path}", flush=True)
    return 0


def _compare(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from training.pictures import compare_runs

    try:
        print(compare_runs(options.runs, options.by, options.picture))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyError:
        parser.error(f"--by {options.by}: there is no such number in the runs' recipes")
    return 0


def _folds(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from training.folds import fold_table

    try:
        print(fold_table(options.runs))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is as `--help` says."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments = ["fit", *arguments]
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command == "fit":
        startup.use_for_temporary_files(options.output)
    commands = {
        "fit": _fit,
        "check": _check,
        "pack": _pack,
        "export": _export,
        "score": _score,
        "compare": _compare,
        "folds": _folds,
    }
    return commands[options.command](options, parser)


if __name__ == "__main__":
    sys.exit(startup.run(lambda: main))

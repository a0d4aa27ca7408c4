"""Command line of training: `python -m training fit`, `export`, `score` and `compare`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from training import recipe as recipes

if TYPE_CHECKING:
    from training.cases import Case

COMMANDS = ("fit", "export", "score", "compare")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Train the network, and export weights for the container.",
        epilog="Without a command, fit is meant. Exit codes: 0 done, 1 failed, 2 wrong usage, "
        "143 stopped by SIGTERM (130 by Ctrl-C) with a checkpoint saved.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    fit = commands.add_parser(
        "fit",
        help="train on labelled CT, or go on where a run stopped",
        description="Train on labelled CT. The same command again goes on at the last checkpoint. "
        "On many devices: torchrun --nproc-per-node N -m training fit …",
        epilog="example: python -m training fit --data CTS --recipe slim --output runs/slim",
    )
    fit.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="DIR[=MAP]",
        help="data set with imagesTr*/ and labelsTr*/, or images/ and labels/; cases.json in it "
        "says what each annotator looked for. MAP turns its own label numbers into ours: amos, "
        "btcv, totalsegmentator, complete (our numbers, all looked for) or a .json file; "
        "repeatable",
    )
    fit.add_argument(
        "--anatomy",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="label map in TotalSegmentator's class numbers of which the recipe's synthetic "
        "slices are drawn; repeatable",
    )
    fit.add_argument(
        "--start-from",
        type=Path,
        metavar="FILE.safetensors",
        help="exported weights to begin with; their intensity mean and deviation are kept",
    )
    fit.add_argument("--output", type=Path, required=True, metavar="RUN", help="folder of the run")
    fit.add_argument(
        "--recipe",
        default="best",
        metavar="paper|best|slim|FILE.toml",
        help="the run's numbers (default: %(default)s)",
    )
    fit.add_argument(
        "--held-out",
        nargs="*",
        metavar="NAME",
        help="cases or patients to hold out, instead of a fraction chosen by the seed",
    )
    fit.add_argument(
        "--cache", type=Path, metavar="DIR", help="of read volumes (default: cache/ beside RUN)"
    )
    fit.add_argument(
        "--device", default="auto", metavar="auto|cuda[:N]|cpu", help="(default: %(default)s)"
    )
    fit.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that read slices; 4 or more where a GPU waits (default: %(default)s)",
    )
    recipes.add_arguments(fit)

    export = commands.add_parser(
        "export",
        help="write a run's weights and model card",
        description="Write the safetensors that the container runs, and a model card beside it.",
        epilog="example: python -m training export runs/slim --output weights/mine.safetensors "
        "--trained-on 'FLARE 2023' --licence MIT",
    )
    export.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    export.add_argument(
        "--output", type=Path, required=True, metavar="FILE.safetensors", help="to write"
    )
    export.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="(default: %(default)s)"
    )
    export.add_argument(
        "--trained-on", required=True, metavar="TEXT", help="data sets, in one line"
    )
    export.add_argument("--licence", required=True, metavar="TEXT", help="of the weights")
    export.add_argument(
        "--scores-of",
        type=Path,
        metavar="RUN",
        help="for weights trained on every case: the run before, whose held-out scores the model "
        "card gives as that run's",
    )
    export.add_argument(
        "--left-out",
        type=Path,
        metavar="FILE.csv",
        help="what `score` wrote of these weights, for the model card",
    )
    export.add_argument(
        "--note",
        action="append",
        default=[],
        metavar="TEXT",
        help="a known weakness, for the model card; repeatable",
    )

    score = commands.add_parser(
        "score",
        help="score exported weights on cases that were left out of training",
        description="Predict the left-out cases of data sets (split left_out in cases.json) with "
        "exported weights, print the DSC of every label by data set, and write a row a case and "
        "label. Stacks of slices are scored without largest components. Whoever chooses weights "
        "by these scores can no longer call them left out: tune on --held-out patients of fit.",
        epilog="example: python -m training score weights/abdomen-slim.safetensors "
        "--data CTS --output left-out.csv",
    )
    score.add_argument("weights", type=Path, metavar="FILE.safetensors")
    score.add_argument(
        "--data", action="append", required=True, metavar="DIR[=MAP]", help="as in fit"
    )
    score.add_argument(
        "--output", type=Path, required=True, metavar="FILE.csv", help="to write, a row a score"
    )
    score.add_argument(
        "--cache", type=Path, metavar="DIR", help="of read volumes (default: cache/ beside it)"
    )
    score.add_argument(
        "--device", default="auto", metavar="auto|cuda[:N]|cpu", help="(default: %(default)s)"
    )

    compare = commands.add_parser(
        "compare",
        help="set runs that differ in one number side by side",
        description="Print a table of the held-out organ DSC of runs that differ in one number of "
        "their recipes, mean over seeds (least to greatest), and draw their curves.",
        epilog="example: python -m training compare runs/a runs/b --by attention "
        "--picture curves.png",
    )
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    compare.add_argument("--by", required=True, metavar="NUMBER", help="such as attention")
    compare.add_argument("--picture", type=Path, required=True, metavar="FILE.png", help="to write")
    return parser


def _data_sets(arguments: list[str], *, left_out: bool = False) -> "dict[str, list[Case]]":
    """The cases of each `--data DIR[=MAP]`, by the folder's name as it was given.

    Raises:
        DataError, OSError: a data set or a label map cannot be read.
    """
    from training.cases import find_training_cases
    from training.label_mapping import load_label_mapping, nnunet_label_mapping

    found = {}
    for argument in arguments:
        folder, _, name = argument.partition("=")
        mapping = load_label_mapping(name) if name else nnunet_label_mapping(Path(folder))
        if mapping and mapping.ignored:
            print(f"{folder}: not labels of ours, taken as 0: {', '.join(mapping.ignored)}")
        found[folder] = find_training_cases(Path(folder), mapping, left_out=left_out)
    return found


def _fit(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        recipe = recipes.load_recipe(options.recipe, recipes.overrides_of(options))
    except recipes.RecipeError as error:
        parser.error(str(error))
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
    from training.processes import join_processes
    from training.run_folder import RunError, describe_run, start_or_check_run

    try:
        cases = [case for part in _data_sets(options.data).values() for case in part]
    except (DataError, OSError) as error:
        parser.error(str(error))
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        parser.error(f"--data: case names occur twice: {', '.join(twice[:5])}")

    processes = join_processes(options.device)
    report = print if processes.first else lambda line: None
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        cache = options.cache or options.output.resolve().parent / "cache"
        if processes.first:  # fills the cache; the others then find everything there
            cases = cache_cases(cases, cache, report)
        if processes.count > 1:
            distributed.barrier()
            if not processes.first:
                cases = cache_cases(cases, cache, report)
        synthesise = None
        if recipe.synthetic_fraction:
            synthesise = synthesis.load(options.anatomy, recipe.synthetic_phantoms, cache)
        if recipe.synthetic_fraction == 1:  # what is read is for scoring alone
            training, held_out = [], cases
        else:
            training, held_out = split_patients(
                cases, recipe.held_out_fraction, recipe.seed, options.held_out
            )
        start = None
        if options.start_from:
            start, metadata = load_weights(options.start_from)
            intensities = Intensities(metadata.intensity_mean, metadata.intensity_std)
        elif training:
            intensities = Intensities(*intensity_statistics(training))
        else:
            intensities = Intensities(*synthesis.intensity_statistics(synthesise))
        report(label_table(training, held_out))
        report(
            f"{len(training)} cases to train on, held out: "
            f"{', '.join(case.name for case in held_out) or 'none'}; "
            f"HU mean {intensities.mean:.1f}, sd {intensities.std:.1f}"
        )
        if processes.first:
            description = describe_run(
                training,
                held_out,
                intensities,
                [path.name for path in options.anatomy],
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
    finally:
        if processes.count > 1:
            distributed.destroy_process_group()


def _export(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if options.output.suffix != ".safetensors":
        parser.error(f"--output {options.output}: the name must end in .safetensors")
    from training.export import ExportError, export

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
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output} ({options.output.stat().st_size / 1e6:.1f} MB), {card}")
    return 0


def _score(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from inference.labels import LABEL_NAMES, ORGANS
    from inference.prediction import choose_device
    from inference.weights import WeightsError, load_weights
    from training.cache import cache_cases
    from training.evaluation import mean_by_label, score_cases, write_left_out
    from training.label_mapping import DataError

    try:
        data_sets = _data_sets(options.data, left_out=True)
    except (DataError, OSError) as error:
        parser.error(str(error))
    if not any(data_sets.values()):
        parser.error("--data: no case has the split left_out in its cases.json")
    try:
        weights, metadata = load_weights(options.weights)
        device = choose_device(options.device)
    except (WeightsError, ValueError) as error:
        parser.error(str(error))
    cache = options.cache or options.output.resolve().parent / "cache"
    scored = {}
    for folder, cases in data_sets.items():
        cases = cache_cases(cases, cache)
        scores = score_cases(cases, weights, metadata, device, batch_size=None, step=0)
        scored[Path(folder).name] = scores
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
    return 0


def _compare(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from training.pictures import compare_runs

    try:
        print(compare_runs(options.runs, options.by, options.picture))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyError:
        parser.error(f"--by {options.by}: there is no such number in the runs' recipes")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is as `--help` says."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments = ["fit", *arguments]
    parser = _parser()
    options = parser.parse_args(arguments)
    commands = {"fit": _fit, "export": _export, "score": _score, "compare": _compare}
    return commands[options.command](options, parser)


if __name__ == "__main__":
    sys.exit(main())

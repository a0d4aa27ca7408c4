"""Command line of training: `python -m training fit`, `export` and `compare`."""

import argparse
import sys
from pathlib import Path

from training import recipe as recipes

COMMANDS = ("fit", "export", "compare")


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
        "--note",
        action="append",
        default=[],
        metavar="TEXT",
        help="a known weakness, for the model card; repeatable",
    )

    compare = commands.add_parser(
        "compare",
        help="set runs that differ in one number side by side",
        description="Print a table of the held-out organ DSC of runs that differ in one number of "
        "their recipes, mean over seeds (least to greatest), and draw their curves.",
    )
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    compare.add_argument("--by", required=True, metavar="NUMBER", help="such as attention")
    compare.add_argument("--picture", type=Path, required=True, metavar="FILE.png", help="to write")
    return parser


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
    from training import data, synthesis
    from training.augmentation import Intensities
    from training.fit import RunError, describe_run, fit, join_processes, start_or_check_run

    try:
        cases = []
        for argument in options.data:
            folder, _, name = argument.partition("=")
            folder = Path(folder)
            mapping = data.load_label_mapping(name) if name else data.nnunet_label_mapping(folder)
            if mapping and mapping.ignored:
                print(f"{folder}: not labels of ours, taken as 0: {', '.join(mapping.ignored)}")
            cases += data.find_training_cases(folder, mapping)
    except (data.DataError, OSError) as error:
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
            cases = data.cache_cases(cases, cache, report)
        if processes.count > 1:
            distributed.barrier()
            if not processes.first:
                cases = data.cache_cases(cases, cache, report)
        synthesise = None
        if recipe.synthetic_fraction:
            synthesise = synthesis.load(options.anatomy, recipe.synthetic_phantoms, cache)
        if recipe.synthetic_fraction == 1:  # what is read is for scoring alone
            training, held_out = [], cases
        else:
            training, held_out = data.split_patients(
                cases, recipe.held_out_fraction, recipe.seed, options.held_out
            )
        start = None
        if options.start_from:
            start, metadata = load_weights(options.start_from)
            intensities = Intensities(metadata.intensity_mean, metadata.intensity_std)
        elif training:
            intensities = Intensities(*data.intensity_statistics(training))
        else:
            intensities = Intensities(*synthesis.intensity_statistics(synthesise))
        report(data.label_table(training, held_out))
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
    except (data.DataError, RunError, VolumeError, WeightsError, synthesis.AnatomyError) as error:
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
        )
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output} ({options.output.stat().st_size / 1e6:.1f} MB), {card}")
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
    commands = {"fit": _fit, "export": _export, "compare": _compare}
    return commands[options.command](options, parser)


if __name__ == "__main__":
    sys.exit(main())

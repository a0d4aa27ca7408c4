"""The options of `python -m training`."""

import argparse
from pathlib import Path

from inference.terminal import Parser
from training import recipe as recipes


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = Parser(
        prog="python -m training",
        description="Train the network, and export weights for the container.",
        epilog="Without a command, fit is meant. Exit codes: 0 done, 1 failed, 2 wrong usage, "
        "143 stopped by SIGTERM (130 by Ctrl-C) with a checkpoint saved. Example: "
        "python -m training fit --data CTS --recipe slim --output runs/slim",
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
        metavar="FILE[=MAP]",
        help="label map of many structures of which the recipe's synthetic slices are drawn; MAP "
        "says whose numbers they are: totalsegmentator (the default), spl or a .json file; "
        "repeatable",
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

    check = commands.add_parser(
        "check",
        help="read data sets as training would, and say what it would make of them",
        description="Read every volume and label map of data sets, write nothing, and say: which "
        "cases would be trained on, which not and why, what is doubtful of the others (headers, "
        "labels, intensities), and how many cases and slices there are for each label. Exit code 1 "
        "if a case would not be used.",
        epilog="example: python -m training check --data CTS --data BTCV=btcv",
    )
    check.add_argument(
        "--data", action="append", required=True, metavar="DIR[=MAP]", help="as in fit"
    )

    pack = commands.add_parser(
        "pack",
        help="write data sets as small files that need no header library",
        description="Write the cases of data sets as 8-bit PNG files of at most 15 MB in parts of "
        "at most 45 MiB, clipped to the recipe's clip_hu and cropped to the body, with all that "
        "cases.json says. fit, score and check take the folder as --data. Exit code 1 if a case "
        "could not be packed.",
        epilog="example: python -m training pack --data CTS --recipe slim --output packed",
    )
    pack.add_argument(
        "--data", action="append", required=True, metavar="DIR[=MAP]", help="as in fit"
    )
    pack.add_argument("--output", type=Path, required=True, metavar="DIR", help="an empty folder")
    pack.add_argument(
        "--recipe",
        default="slim",
        metavar="NAME|FILE.toml",
        help="whose clip_hu bounds the HU (default: %(default)s)",
    )
    pack.add_argument(
        "--step",
        type=float,
        default=0.0,
        metavar="HU",
        help="least distance of two levels; more of it packs smaller (default: what 8 bits hold)",
    )
    pack.add_argument(
        "--left-out", action="store_true", help="pack the left-out cases as well, for score"
    )

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
        "--pictures",
        type=Path,
        metavar="DIR",
        help="draw the best, the median and the worst case of each data set beside its reference",
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

    folds = commands.add_parser(
        "folds",
        help="set the folds of a cross-validation side by side",
        description="Print a table of the last held-out DSC of runs that were trained with --folds "
        "K and --fold 0 to K - 1: by label and fold, and over all cases. Patients are dealt to the "
        "folds by the recipe's seed.",
        epilog="example: python -m training folds runs/fold-0 runs/fold-1 runs/fold-2 (each of "
        "python -m training fit … --folds 3 --fold 0 --output runs/fold-0)",
    )
    folds.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    return parser

"""The options of `python -m training`."""

import argparse
import dataclasses
from pathlib import Path

from inference.terminal import Parser, existing
from training.recipe import Recipe

RECIPE_OPTIONS = {"steps": int, "batch_size": int, "learning_rate": float, "seed": int}
"""Numbers of a recipe that have options of their own, and their types."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    parser = Parser(
        prog="python -m training",
        description="Train the network, and export weights for the container.",
        epilog="Without a command, fit is meant. Exit codes: 0 done, 1 failed, or done in part "
        "(check, pack); 2 wrong usage; 143 stopped by SIGTERM (130 by Ctrl-C, 129 by SIGHUP) with "
        "a checkpoint saved.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, more: str, example: str) -> argparse.ArgumentParser:
        epilog = f"example: python -m training {name} {example}"
        return commands.add_parser(name, help=text, description=more, epilog=epilog)

    def add_data(parser: argparse.ArgumentParser, text: str = "as in fit") -> None:
        parser.add_argument(
            "--data", action="append", required=True, metavar="DIR[=MAP]", help=text
        )

    def add_places(parser: argparse.ArgumentParser) -> None:
        text = "of read volumes (default: cache/ beside the output)"
        parser.add_argument("--cache", type=Path, metavar="DIR", help=text)
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")

    fit = add(
        "fit",
        "train on labelled CT, or resume a run",
        "Train on labelled CT. The same command again resumes at the last checkpoint. "
        "On many devices: torchrun --nproc-per-node N -m training fit …",
        "--data CTS --recipe slim --output runs/slim",
    )
    add_data(
        fit,
        "data set with imagesTr*/ and labelsTr*/, images/ and labels/, or packed; its cases.json "
        "lists the labels annotated in each case. MAP turns its label numbers into ours: amos, "
        "btcv, totalsegmentator, complete (ours, all annotated) or a .json file; repeatable",
    )
    text = "label map to draw synthetic slices of; MAP: totalsegmentator, spl or .json; repeatable"
    fit.add_argument("--anatomy", action="append", default=[], metavar="FILE[=MAP]", help=text)
    fit.add_argument("--start-from", type=existing, metavar="FILE", help="first weights")
    fit.add_argument("--output", type=Path, required=True, metavar="RUN", help="folder of the run")
    text = "paper, best, slim, phantom or FILE.toml: the run's numbers (default: %(default)s)"
    fit.add_argument("--recipe", default="best", help=text)
    for name, kind in RECIPE_OPTIONS.items():
        text = "instead of the recipe's"
        fit.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)
    names = ", ".join(entry.name for entry in dataclasses.fields(Recipe))
    text = f"contrast=0.7,1.4 instead of the recipe's; repeatable; of {names} (training/recipe.py)"
    fit.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=text)
    text = "cases or patients to hold out, instead of a fraction chosen by the seed"
    fit.add_argument("--held-out", nargs="*", metavar="NAME", help=text)
    text = "end the command after M minutes, whatever the steps, and export weights"
    fit.add_argument("--minutes", type=float, metavar="M", help=text)
    add_places(fit)

    check = add(
        "check",
        "read data sets as training would, and report their cases",
        "Read every volume and label map of data sets, write nothing, and report which cases would "
        "be trained on, which not and why, which should be checked, and how many cases and slices "
        "there are for each label. Exit code 1 if a case would not be used.",
        "--data CTS --data BTCV=btcv",
    )
    add_data(check)

    pack = add(
        "pack",
        "write data sets as small files that need no header library",
        "Write the cases of data sets as 8-bit PNG files of at most 15 MB in parts of at most "
        "45 MiB, clipped to the recipe's clip_hu and cropped to the body. fit, score and check "
        "take the folder as --data.",
        "--data CTS --recipe slim --output packed",
    )
    add_data(pack)
    pack.add_argument("--output", type=Path, required=True, metavar="DIR", help="an empty folder")
    pack.add_argument("--recipe", default="slim", help="for its clip_hu (default: %(default)s)")
    text = "least distance of two levels; more packs smaller (default: what 8 bits hold)"
    pack.add_argument("--step", type=float, default=0.0, metavar="HU", help=text)
    pack.add_argument("--left-out", action="store_true", help="left-out cases as well, for score")

    export = add(
        "export",
        "write a run's weights and model card",
        "Write the safetensors that the container runs, and a model card beside it.",
        "runs/slim --output weights/mine.safetensors --trained-on 'FLARE 2023' --licence MIT",
    )
    export.add_argument("run", type=existing, metavar="RUN", help="folder of the run")
    export.add_argument("--output", type=Path, required=True, help="NAME.safetensors, to write")
    text = "(default: %(default)s)"
    export.add_argument("--checkpoint", choices=("best", "last"), default="best", help=text)
    export.add_argument("--trained-on", required=True, metavar="TEXT", help="data sets, in a line")
    export.add_argument("--licence", required=True, metavar="TEXT", help="of the weights")
    text = "for weights trained on every case: the run before, for its held-out scores"
    export.add_argument("--scores-of", type=existing, metavar="RUN", help=text)
    text = "table of `score` for these weights, for the card"
    export.add_argument("--left-out", type=existing, metavar="FILE.csv", help=text)
    text = "a limitation, for the card; repeatable"
    export.add_argument("--note", action="append", default=[], metavar="TEXT", help=text)

    score = add(
        "score",
        "score exported weights on cases that were left out of training",
        "Predict the left-out cases of data sets (split left_out in cases.json) with exported "
        "weights, print the DSC of every label by data set, and write a row a case and label. "
        "Whoever chooses weights by these scores can no longer call them left out: tune on "
        "--held-out patients of fit.",
        "weights/abdomen-slim.safetensors --data CTS --output left-out.csv",
    )
    score.add_argument("weights", type=existing, metavar="FILE.safetensors")
    add_data(score)
    score.add_argument("--output", type=Path, required=True, help="FILE.csv, to write")
    text = "draw every case beside its reference; the names begin with data set and mean DSC"
    score.add_argument("--pictures", type=Path, metavar="DIR", help=text)
    add_places(score)

    compare = add(
        "compare",
        "compare the held-out scores of runs",
        "Print a table of the last held-out DSC of runs: by label, over the cases of all runs with "
        "the same value of a number of their recipes. Two values of the same cases are compared by "
        "patient, with a standard error.",
        "runs/fold-* or: runs/a runs/b --by attention",
    )
    compare.add_argument("runs", type=existing, nargs="+", metavar="RUN", help="folders of runs")
    text = "such as attention (default: %(default)s)"
    compare.add_argument("--by", default="fold", metavar="NUMBER", help=text)
    return parser

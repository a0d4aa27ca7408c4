"""Command line of the benchmark harness; `python -m benchmark COMMAND --help` describes each."""

import argparse
import ast
import importlib
import sys
from pathlib import Path

from inference import startup
from inference.terminal import Parser

COMMANDS = {
    "efficiency": (
        "benchmark.containers.efficiency",
        "--inputs CTS --outputs LABELS --report REPORT --image abdoseg:latest",
    ),
    "check": ("benchmark.checking.check", "--archive TEAM.tar.gz"),
    "accuracy": (
        "benchmark.scoring.accuracy",
        "--reference TRUTH --prediction LABELS --report REPORT",
    ),
    "rank": ("benchmark.judging.rank", "REPORT-A REPORT-B --report RANKING"),
    "compare": ("benchmark.judging.compare", "REPORT-A REPORT-B"),
    "challenge": (
        "benchmark.challenge.challenge",
        "--archives TEAMS --inputs CTS --reference TRUTH --report CHALLENGE",
    ),
    "report": ("benchmark.judging.report", "REPORT-A REPORT-B --output page.html"),
    "speed": ("benchmark.speed.speed", "--weights weights/phantom-slim.safetensors"),
    "plain-pipeline": (
        "benchmark.speed.plain_pipeline",
        "--input CTS --output LABELS --weights weights/abdomen-slim.safetensors",
    ),
    "gpu-sweep": ("benchmark.speed.gpu_sweep", "--report RESULTS"),
    "phantom": ("benchmark.phantom", "--output PHANTOMS --cases 4"),
    "demo": ("benchmark.demo", "--output demo"),
}
"""Sub-command: the module with its `add_arguments(parser)` and `run(arguments) -> exit code`, the
first line of which is its help; and an example of its options."""

_CONTINUED = {"efficiency": "; --resume continues it", "challenge": "; the same command continues"}


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command.

    Only its own module is imported, so that `--help` is quick and one command's missing dependency
    does not stop another.

    Returns:
        0 all done, 1 some cases failed and the rest is written, 2 wrong usage or a run that cannot
        go on, 128 + N if signal N ended it.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(
        prog="python -m benchmark",
        description="Measure a segmentation container as the FLARE challenge's organisers do.",
        epilog="Each command has its own --help, with an example: python -m benchmark check --help",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, example) in COMMANDS.items():
        source = Path(__file__).parents[1] / f"{module_name.replace('.', '/')}.py"
        text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
        help_line = text.partition("\n")[0].replace("%", "%%")
        subparser = subparsers.add_parser(name, help=help_line)
        if argv[:1] == [name]:
            module = importlib.import_module(module_name)
            subparser.description = module.__doc__
            subparser.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(subparser)
            subparser.epilog = f"example: python -m benchmark {name} {example}"
    arguments = parser.parse_args(argv)

    from benchmark.options import HarnessError
    from benchmark.text import log
    from inference.signals import Stopped, signals_raise

    try:
        with signals_raise():
            return module.run(arguments)
    except (HarnessError, OSError) as error:  # what is finished stays as it is
        log(f"benchmark {arguments.command}: {error}")
        return 2
    except Stopped as stopped:
        more = _CONTINUED.get(arguments.command, "")
        log(f"stopped by {stopped}; nothing is left running{more}")
        return 128 + stopped.number


if __name__ == "__main__":
    sys.exit(startup.run(lambda: main))

"""Command line of the benchmark harness: `python -m benchmark COMMAND --help` says the rest."""

import argparse
import importlib
import sys

COMMANDS = {
    "efficiency": (
        "benchmark.efficiency",
        "run a container case by case and measure time, GPU memory, CPU and RAM",
    ),
    "accuracy": (
        "benchmark.accuracy",
        "score label maps: DSC and NSD of every organ, as the official script does",
    ),
    "rank": ("benchmark.rank", "rank teams as the challenge does, with the ranks' confidence"),
    "compare": ("benchmark.compare", "paired ratios of two runs, case by case"),
    "report": ("benchmark.report", "one self-contained HTML page about one run or several"),
    "speed": ("benchmark.speed", "where the time goes: the service against the plain pipeline"),
}
"""Sub-command: the module with its `add_arguments(parser)` and `run(arguments) -> exit code`, and
its line of help."""


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command.

    Only its own module is imported, so that `--help` is quick and one command's missing dependency
    does not stop another.

    Returns:
        0 all done, 1 some cases failed, 2 wrong usage, 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m benchmark",
        description="Measure a segmentation container as the FLARE challenge's organisers do.",
        epilog="Each command has its own --help.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, help_line) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=help_line)
        if argv[:1] == [name]:
            module = importlib.import_module(module_name)
            subparser.description = module.__doc__
            subparser.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(subparser)
    arguments = parser.parse_args(argv)
    try:
        return module.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

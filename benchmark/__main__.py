"""Command line of the benchmark harness; `python -m benchmark COMMAND --help` describes each."""

import argparse
import importlib
import sys

from inference import startup
from inference.terminal import Parser

COMMANDS = {
    "efficiency": (
        "benchmark.containers.efficiency",
        "run a container case by case and measure time, GPU memory, CPU and RAM",
        "--inputs CTS --outputs LABELS --report REPORT --image abdoseg:latest",
    ),
    "check": (
        "benchmark.checking.check",
        "try a submission as the challenge will, before it counts",
        "--archive TEAM.tar.gz",
    ),
    "accuracy": (
        "benchmark.scoring.accuracy",
        "score label maps: DSC and NSD of every organ, as the official script does",
        "--reference TRUTH --prediction LABELS --report REPORT",
    ),
    "rank": (
        "benchmark.judging.rank",
        "rank teams as the challenge does, with the ranks' confidence",
        "REPORT-A REPORT-B --report RANKING",
    ),
    "compare": (
        "benchmark.judging.compare",
        "paired ratios of two runs, case by case",
        "REPORT-A REPORT-B",
    ),
    "challenge": (
        "benchmark.challenge.challenge",
        "run a whole challenge: every team's archive run, scored, ranked, on one page",
        "--archives TEAMS --inputs CTS --reference TRUTH --report CHALLENGE",
    ),
    "report": (
        "benchmark.judging.report",
        "one self-contained HTML page about one run or several",
        "REPORT-A REPORT-B --output page.html",
    ),
    "speed": (
        "benchmark.speed.speed",
        "where the time goes: the service against the plain pipeline",
        "--weights weights/phantom-slim.safetensors",
    ),
    "plain-pipeline": (
        "benchmark.speed.plain_pipeline",
        "the paper's pipeline written plainly, the baseline of speed",
        "--input CTS --output LABELS --weights weights/abdomen-slim.safetensors",
    ),
    "gpu-sweep": (
        "benchmark.speed.gpu_sweep",
        "every figure that needs a GPU, as one page",
        "--report RESULTS",
    ),
    "phantom": (
        "benchmark.phantom",
        "draw synthetic CT with exact label maps",
        "--output PHANTOMS --cases 4",
    ),
    "demo": (
        "benchmark.demo",
        "segment a synthetic CT and write pictures (what `make demo` runs)",
        "--output demo",
    ),
}
"""Sub-command: the module with its `add_arguments(parser)` and `run(arguments) -> exit code`, its
line of help, and an example of its options."""

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
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal may know ASCII alone
            stream.reconfigure(errors="backslashreplace")
    parser = Parser(
        prog="python -m benchmark",
        description="Measure a segmentation container as the FLARE challenge's organisers do.",
        epilog="Each command has its own --help, with an example: python -m benchmark check --help",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, help_line, example) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=help_line)
        if argv[:1] == [name]:
            module = importlib.import_module(module_name)
            subparser.description = module.__doc__
            subparser.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(subparser)
            example = f"example: python -m benchmark {name} {example}"
            subparser.epilog = "\n\n".join(filter(None, (subparser.epilog, example)))
    arguments = parser.parse_args(argv)

    from benchmark.options import HarnessError
    from benchmark.signals import signals_raise
    from benchmark.text import log
    from inference.signals import Stopped

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

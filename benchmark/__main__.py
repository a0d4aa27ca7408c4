"""Command line of the benchmark harness: `python -m benchmark COMMAND --help` says the rest."""

import argparse
import importlib
import sys

from inference import startup

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
        "an organiser's evening: every team's archive run, scored, ranked, on one page",
        "--archives TEAMS --inputs CTS --reference TRUTH --report EVENING",
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
        "segment a synthetic CT and leave pictures (what `make demo` runs)",
        "--output demo",
    ),
}
"""Sub-command: the module with its `add_arguments(parser)` and `run(arguments) -> exit code`, its
line of help, and an example of its options."""


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
    if report := getattr(arguments, "report", None):
        startup.use_for_temporary_files(report)
    try:
        return module.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(startup.run(lambda: main))

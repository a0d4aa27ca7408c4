"""Measure a team's container as the organisers do, case by case.

One container start per case, alone in its inputs folder. The files of a run folder:

    TEAM_Efficiency.csv    the official table, one row a case
    efficiency.md          the same in the shape of the paper's Table 4
    environment.json       machine, image, command
    efficiency/CASE.json   every sample and every number of a case (CASE.repeatN.json: repetitions)
    efficiency/CASE.png    GPU memory, RAM and CPU against time, of the run that the tables show
    efficiency/CASE.log    what the container printed
"""

import argparse
import re
import shlex
import sys
from pathlib import Path

from benchmark.containers.cases import list_cases
from benchmark.containers.device import open_gpu, read_idle
from benchmark.containers.engine import (
    EngineError,
    docker,
    image_id,
    load_archive,
    remove_abandoned,
)
from benchmark.containers.environment import describe_machine
from benchmark.containers.gpu import Gpu
from benchmark.containers.measurement import file_stem, measure_case, peaks_and_areas
from benchmark.containers.repeats import PENALTY, median_run
from benchmark.containers.run_folder import earlier_results, write_json, write_tables
from benchmark.containers.runner import signals_raise
from benchmark.containers.tables import OFFICIAL_INTERVAL, by, markdown_table
from benchmark.containers.targets import Command, Container, Folders, MemoryLimit
from benchmark.messages import UsageError, say
from benchmark.options import not_negative, odd_count, positive
from inference.files import printable, write_atomically
from inference.signals import Stopped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command line of `python -m benchmark efficiency`."""
    parser.epilog = (
        "Exit code 0: every case ran and wrote a valid label map; 1: some did not; 2: wrong usage."
    )
    parser.add_argument(
        "--inputs", type=Path, required=True, metavar="DIR", help="folder of NAME_0000.nii.gz"
    )
    parser.add_argument(
        "--outputs", type=Path, required=True, metavar="DIR", help="where NAME.nii.gz go"
    )
    parser.add_argument(
        "--report", type=Path, required=True, metavar="DIR", help="where the measurements go"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--image", metavar="NAME:TAG", help="a Docker image that is here")
    target.add_argument(
        "--archive",
        type=Path,
        metavar="TEAM.tar.gz",
        help="a `docker save` file; the image in it is named as the file, in lower case",
    )
    target.add_argument(
        "--command",
        dest="shell_command",
        metavar="'COMMAND'",
        help="a local command, such as 'sh predict.sh --input {inputs} --output {outputs}'",
    )
    parser.add_argument("--team", help="name in the tables (default: the image's; 'command')")
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="device (default: 0)")
    parser.add_argument(
        "--interval",
        type=positive,
        default=OFFICIAL_INTERVAL,
        metavar="S",
        help="seconds between samples (default and official: 0.1)",
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=PENALTY["seconds"],
        metavar="S",
        help="end a case after this time (default: 3600)",
    )
    parser.add_argument(
        "--memory-limit",
        type=MemoryLimit.parse,
        default="28g",
        metavar="SIZE",
        help="RAM and shared memory of a case (default and official: 28g)",
    )
    parser.add_argument(
        "--time-tolerance",
        type=not_negative,
        default=15.0,
        metavar="S",
        help="seconds that cost nothing (default: 15, as in 2023; 2022: 0)",
    )
    parser.add_argument(
        "--memory-tolerance",
        type=not_negative,
        default=4096.0,
        metavar="MB",
        help="GPU memory that costs nothing (default: 4096, as in 2023; 2022: 2048)",
    )
    parser.add_argument(
        "--repeat",
        type=odd_count,
        default=1,
        metavar="K",
        help="run every case K times, an odd number; every table and page takes the run of median "
        "time (default: 1)",
    )
    parser.add_argument(
        "--warm-up",
        action="store_true",
        help="run the first case once before, and discard it, so that no run that counts has to "
        "read the image from the disk",
    )
    parser.add_argument(
        "--phases",
        action="store_true",
        help="ask for a phase log through ABDOSEG_PHASE_LOG, which adds one -e to the organisers' "
        "command line",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the cases that REPORT already holds"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure every case and write the run folder.

    Returns:
        0 if every case is ok, 1 if some are not, 2 for wrong usage or an engine that does not
        work, 128 + N if signal N ended the run.
    """
    try:
        with signals_raise():
            return measure(arguments)
    except (UsageError, EngineError, OSError) as error:  # finished cases stay as they are
        say(f"benchmark efficiency: {error}")
        return 2
    except Stopped as stopped:
        say(f"stopped by {stopped}; nothing is left running. --resume goes on from here")
        return 128 + stopped.number


def measure(arguments: argparse.Namespace) -> int:
    """Measure every case and write the run folder, as `run` does, whose caller sees to signals.

    Returns:
        0 if every case is ok, 1 if some are not.

    Raises:
        UsageError, EngineError, OSError: nothing could be measured, or no more.
    """
    unreadable: dict[str, str] = {}
    cases = list_cases(arguments.inputs, unreadable)
    if arguments.outputs.resolve() == arguments.inputs.resolve():
        raise UsageError("--outputs must be another folder than --inputs")
    gpu, gpu_note = open_gpu(arguments.gpu)
    try:
        target, team, identity = _find_target(arguments, gpu)
        report = arguments.report
        (report / "efficiency").mkdir(parents=True, exist_ok=True)
        arguments.outputs.mkdir(parents=True, exist_ok=True)
        idle = read_idle(gpu, arguments.interval)
        environment = describe_machine(gpu, gpu_note) | identity
        environment |= {"idle_gpu_mb": idle.gpu_mb, "idle_gpu_processes": list(idle.processes)}
        done = earlier_results(arguments, cases, environment)
        write_json(report / "environment.json", environment)

        results: dict[str, list[dict]] = {case.name: [] for case in cases}
        first = True
        not_measured = list(unreadable)
        for name, why in unreadable.items():
            say(f"{printable(name)}: not measured: {printable(why)}")
        rounds = [(repeat, case) for repeat in range(arguments.repeat) for case in cases]
        for number, (repeat, case) in enumerate(rounds, start=1):
            result = done.get((case.name, repeat))
            kept = result is not None
            if not kept:
                try:
                    if first and arguments.warm_up:
                        say("warming up: a run that is discarded")
                        measure_case(case, repeat, target, team, gpu, idle, arguments, first=True)
                        (arguments.outputs / f"{case.name}.nii.gz").unlink(missing_ok=True)
                        first = False
                    result = measure_case(
                        case, repeat, target, team, gpu, idle, arguments, first=first
                    )
                    first = False
                except OSError as error:
                    not_measured.append(case.name)
                    say(f"{printable(case.name)}: not measured: {error}")
                    continue
            result |= peaks_and_areas(result, arguments)
            stem = report / "efficiency" / file_stem(case.name, repeat)
            write_json(stem.with_name(f"{stem.name}.json"), result)
            runs = results[case.name]
            runs.append(result)
            picture = report / "efficiency" / f"{case.name}.png"
            if not kept or not picture.exists():
                _draw(picture, median_run(runs), runs, gpu_note)
            write_tables(report, results, environment)
            say(printable(_progress_line(number, len(rounds), result, kept)))
        say(markdown_table(results), sys.stdout)
        well = all(run["status"] == "ok" for runs in results.values() for run in runs)
        return 0 if well and not not_measured else 1
    finally:
        if gpu:
            gpu.close()


def _draw(path: Path, result: dict, runs: list[dict], gpu_note: str | None) -> None:
    """Draw a case's curves; a plot that fails costs the plot."""
    try:
        from benchmark.containers.curves import draw_curves  # matplotlib wants a folder to write to

        write_atomically(path, draw_curves(result, gpu_note, runs))
    except Exception as error:  # whatever a name or a number does to the plotting library
        say(f"{printable(path.name)}: not drawn: {printable(error)}")


def _find_target(
    arguments: argparse.Namespace, gpu: Gpu | None
) -> tuple[Container | Command, str, dict]:
    """What to run, the team's name, and what makes two runs the same for --resume."""
    index = gpu.index if gpu else None
    limit, phases = arguments.memory_limit, arguments.phases
    if arguments.shell_command:
        missing = [
            name for name in ("{inputs}", "{outputs}") if name not in arguments.shell_command
        ]
        if missing:
            raise UsageError(
                f"--command needs {' and '.join(missing)} where the folder is to stand"
            )
        target = Command(arguments.shell_command, limit, index, phases)
        identity = {"image": None, "image_digest": None, "docker": None}
        identity["command"] = arguments.shell_command
        team = arguments.team or "command"
    else:
        remove_abandoned()
        if arguments.archive:
            if not arguments.archive.is_file():
                raise UsageError(f"--archive {arguments.archive} is not a file")
            image = load_archive(arguments.archive)
        else:
            last = arguments.image.rpartition("/")[2]
            image = arguments.image if ":" in last else f"{arguments.image}:latest"
        digest = image_id(image)
        if digest is None:
            raise UsageError(f"there is no image {image} here: `docker pull` it, or use --archive")
        target = Container(image, limit, index, phases)
        placeholder = Folders(Path("INPUTS"), Path("OUTPUTS"), Path())
        identity = {
            "image": image,
            "image_digest": digest,
            "docker": docker("version", "--format", "{{.Server.Version}}").stdout.strip(),
            "command": shlex.join(target.command_line("NAME", placeholder)),
        }
        team = arguments.team or image.rpartition("/")[2].partition(":")[0]
    if re.search(r"[/\0]", team) or team.startswith("."):
        raise UsageError(f"--team {team}: a name that can begin a file's name is needed")
    identity |= {
        "team": team,
        "interval_s": arguments.interval,
        "memory_limit": str(limit),
        "timeout_s": arguments.timeout,
        "phases": phases,
        "repeat": arguments.repeat,
        "warm_up": arguments.warm_up,
        "tolerances": {"seconds": arguments.time_tolerance, "mb": arguments.memory_tolerance},
    }
    return target, team, identity


def _progress_line(number: int, count: int, run: dict, kept: bool) -> str:
    parts = [f"[{number}/{count}] {run['case']} ({by(run['image_size'])}): {run['seconds']:.2f} s"]
    if run["peak_gpu_mb"] is not None:
        parts.append(f"peak {run['peak_gpu_mb']:,.0f} MB, {run['auc_flare_mb_s']:,.0f} MB·s")
    if run["max_ram_mb"] is not None:
        parts.append(f"RAM {run['max_ram_mb']:,.0f} MB")
    parts.append(run["status"] + (f" ({run['reason']})" if run["reason"] else ""))
    if kept:
        parts.append("from the earlier run")
    return ", ".join(parts)

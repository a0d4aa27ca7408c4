"""Measure a team's container as the organisers do, case by case.

One container start per case, alone in its inputs folder. The files of a run folder:

    TEAM_Efficiency.csv    the official table, one row a case
    efficiency.md          the same in the shape of the paper's Table 4
    environment.json       machine, image, command
    efficiency/CASE.json   every sample and every number of a case (CASE.repeatN.json: repetitions)
    efficiency/CASE.png    GPU memory, RAM and CPU against time, of the run that the tables show
    efficiency/CASE.log    what the container printed

Exit code 0: every case ran and wrote a valid label map; 1: some did not.
"""

import argparse
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.containers import engine, results
from benchmark.containers.curves import draw_curves
from benchmark.containers.machine import INTERVAL, Gpu, describe_machine, open_gpu
from benchmark.containers.measurement import Case, Conditions, list_cases, run_alone
from benchmark.containers.results import EFFICIENCY_SUFFIX, NOT_MEASURED, Result, Tolerances
from benchmark.containers.runner import Command, Container
from benchmark.containers.tables import efficiency_table, markdown_page
from benchmark.files import read_json, write_json, write_plot
from benchmark.options import HarnessError, memory_size, odd_count, positive
from benchmark.text import log, show
from inference.files import whole_file, write_atomically
from inference.startup import use_for_temporary_files

# Without which a file is no result of a case.
_RESULT_KEYS = {"case", "status", "seconds", "repeat", "interval_s", "image_size", "output"}

# The entries of `environment.json` in which a run that is resumed must agree.
_SAME = (
    *("team", "image_digest", "command", "gpu", "gpu_note", "interval_s", "memory_limit"),
    *("timeout_s", "repeat", "warm_up", "tolerances"),
)


class ResumeError(HarnessError):
    """The run in the report folder is another than the one to resume."""


@dataclass(frozen=True)
class Settings:
    """What is measured, how, and where it goes."""

    outputs: Path
    report: Path
    target: Container | Command
    team: str
    how: Conditions
    resume: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command line of `python -m benchmark efficiency`."""
    add = parser.add_argument
    for name, text in (
        ("--inputs", "folder of NAME_0000.nii.gz"),
        ("--outputs", "where NAME.nii.gz go"),
        ("--report", "where the measurements go"),
    ):
        add(name, type=Path, required=True, metavar="DIR", help=text)
    target = parser.add_mutually_exclusive_group(required=True).add_argument
    target("--image", metavar="NAME:TAG", help="a Docker image that is here")
    text = "a `docker save` file; the image in it is named as the file, in lower case"
    target("--archive", type=Path, metavar="TEAM.tar.gz", help=text)
    text = "a local command, such as 'sh predict.sh --input {inputs} --output {outputs}'"
    target("--command", dest="shell_command", metavar="'COMMAND'", help=text)
    add("--team", help="name in the tables (default: the image's; 'command')")
    add_run_options(parser)
    text = "ask for a phase log through ABDOSEG_PHASE_LOG, which adds one -e to the command line"
    add("--phases", action="store_true", help=text)
    add("--resume", action="store_true", help="do not repeat the cases that REPORT already has")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of how cases are run, which `challenge` has as well."""
    add_container_options(parser, results.PENALTY["seconds"])
    add = parser.add_argument
    text = "run every case K times, an odd number; the run of median time counts (default: 1)"
    add("--repeat", type=odd_count, default=1, metavar="K", help=text)
    text = (
        "run the first case once before, and discard it, so that no run that counts has to read "
        "the image from the disk"
    )
    add("--warm-up", action="store_true", help=text)


def conditions(arguments: argparse.Namespace, gpu: Gpu, tolerances: Tolerances) -> Conditions:
    """Return the conditions that `add_run_options` asks for."""
    repeats = (arguments.repeat, arguments.warm_up)
    return Conditions(gpu, arguments.timeout, tolerances, arguments.memory_limit, *repeats)


def add_container_options(parser: argparse.ArgumentParser, seconds: float) -> None:
    """Add the options of one container start, which `check` has as well."""
    add = parser.add_argument
    text = "GPU by NVML's number (default: the first of CUDA_VISIBLE_DEVICES, or else 0)"
    add("--gpu", type=int, metavar="N", help=text)
    text = "end a run after this time (default: %(default)g; the challenge waits for 3600)"
    add("--timeout", type=positive, default=seconds, metavar="S", help=text)
    text = "RAM and shared memory of a run (default and official: 28g)"
    add("--memory-limit", type=memory_size, default="28g", metavar="SIZE", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Measure every case and write the run folder; 0 if every case is ok, 1 if some are not."""
    cases, refused = list_cases(arguments.inputs)
    if arguments.inputs.resolve() == arguments.outputs.resolve():
        raise HarnessError("--outputs must be another folder than --inputs")
    with open_gpu(arguments.gpu) as gpu:
        how = conditions(arguments, gpu, results.TOLERANCES["flare23"])
        target: Container | Command
        if command := arguments.shell_command:
            if missing := [name for name in ("{inputs}", "{outputs}") if name not in command]:
                names = " and ".join(missing)
                raise HarnessError(f"--command needs {names} in place of the folder")
            target = Command(command, how.memory_limit, gpu.device, arguments.phases)
        else:
            engine.remove_abandoned()
            archive = arguments.archive
            image = engine.load_archive(archive) if archive else engine.find_image(arguments.image)
            target = Container(image, how.memory_limit, gpu.device, arguments.phases)
        team = arguments.team or (engine.team_of(target.image) if target.image else "command")
        if re.search(r"[/\0]", team) or team.startswith("."):
            raise HarnessError(f"--team {team}: a name that can start a file's name is needed")
        places = (arguments.outputs, arguments.report)
        settings = Settings(*places, target, team, how, arguments.resume)
        measured = measure(settings, cases, refused)
    show(efficiency_table(measured))
    runs = [run for runs in measured.values() for run in runs]
    whole = len(runs) == len(cases) * arguments.repeat and not refused
    return 0 if whole and all(run["status"] == "ok" for run in runs) else 1


def measure(
    settings: Settings, cases: list[Case], refused: dict[str, str]
) -> dict[str, list[Result]]:
    """Measure every case and write the run folder.

    Returns:
        Of each case its results; a case that could not be run, for a full disk, has fewer.

    Raises:
        ResumeError: the run to resume is another one.
        HarnessError, OSError: nothing could be measured, or no more; finished cases are written.
    """
    report, outputs, target, how = settings.report, settings.outputs, settings.target, settings.how
    folder = report / "efficiency"
    how.gpu.read_idle()
    environment = describe_machine(how.gpu) | {
        "image": target.image,
        "image_digest": target.image and engine.image_id(target.image),
        "docker": engine.engine_version() if target.image else None,
        "command": target.shown_command,
        "team": settings.team,
        "interval_s": INTERVAL,
        "memory_limit": target.memory_limit,
        "timeout_s": how.timeout,
        "phases": target.phases,
        "repeat": how.repeat,
        "warm_up": how.warm_up,
        "tolerances": how.tolerances._asdict(),
        "idle_gpu_mb": how.gpu.idle_mb,
        "idle_gpu_processes": list(how.gpu.idle_processes),
        "not_measured": dict(refused),
    }
    folder.mkdir(parents=True, exist_ok=True)
    outputs.mkdir(parents=True, exist_ok=True)
    use_for_temporary_files(report)
    done = _earlier_results(settings, cases, environment)
    write_json(report / "environment.json", environment)
    for name, reason in refused.items():
        log(f"{name}: not measured: {reason}")

    def run_once(case: Case, stem: str, *, discard: bool = False) -> Result:
        log_path = folder / f"{stem}.log"
        with run_alone(case, target, report / f".work-{case.name}", log_path, how) as run:
            result, _, label_map = run
            if _has_label_map(result) and stem == case.name and label_map.exists() and not discard:
                copy = whole_file(outputs / label_map.name)
                with label_map.open("rb") as source, copy as target_file:
                    shutil.copyfileobj(source, target_file)
        return result

    measured: dict[str, list[Result]] = {case.name: [] for case in cases}
    first = True
    rounds = [(repeat, case) for repeat in range(how.repeat) for case in cases]
    for number, (repeat, case) in enumerate(rounds, start=1):
        stem = _stem(case.name, repeat)
        result = done.get(stem)
        try:
            if result is None:
                if first and how.warm_up:
                    log("warming up: a run that is discarded")
                    run_once(case, stem, discard=True)
                    first = False
                about = {"team": settings.team, "repeat": repeat, "first": first}
                result = run_once(case, stem) | about
                first = False
        except OSError as error:
            environment["not_measured"][case.name] = str(error)
            log(f"{case.name}: not measured: {error}")
            continue
        write_json(folder / f"{stem}.json", result)
        runs = measured[case.name]
        runs.append(result)
        plot = folder / f"{case.name}.png"
        if stem not in done or not plot.exists():
            write_plot(plot, draw_curves, results.median_run(runs), how.gpu.note, len(runs))
        table = results.efficiency_csv(measured)
        write_atomically(report / f"{settings.team}{EFFICIENCY_SUFFIX}", table)
        page = markdown_page(measured, environment)
        write_atomically(report / "efficiency.md", page)
        line = results.progress_line(case.name, result) + ", resumed" * (stem in done)
        log(f"[{number}/{len(rounds)}] {line}")
    write_json(report / "environment.json", environment)
    return measured


def _stem(case: str, repeat: int) -> str:
    return f"{case}.repeat{repeat}" if repeat else case


def _has_label_map(result: Result) -> bool:
    return result["status"] in ("ok", "invalid output")


def _earlier_results(
    settings: Settings, cases: list[Case], environment: dict[str, Any]
) -> dict[str, Result]:
    """Return what --resume need not run again, by `_stem`; remove what is to be run again.

    Raises:
        ResumeError: the run in the report folder is another one.
        HarnessError: it is not to be resumed, or a label map is in the way that it did not write.
            Nothing is removed then.
    """
    report, folder = settings.report, settings.report / "efficiency"
    described = read_json(report / "environment.json") or {}
    earlier = {path.stem: read_json(path) or {} for path in folder.glob("*.json")}
    if earlier and not settings.resume:
        raise HarnessError(f"{report} has an earlier run: add --resume, or name another --report")
    if earlier and (others := [n for n in _SAME if described.get(n) != environment[n]]):
        raise ResumeError(
            f"--resume: the run in {report} has another {', '.join(others)}: name another --report"
        )
    usable, stale = {}, []
    for case in cases:
        label_map = settings.outputs / f"{case.name}.nii.gz"
        for stem in (_stem(case.name, repeat) for repeat in range(settings.how.repeat)):
            result = earlier.get(stem, {})
            whole = set(result) >= _RESULT_KEYS and isinstance(result.get("samples"), dict)
            whole = whole and result["status"] != NOT_MEASURED
            if whole and (label_map.is_file() or stem != case.name or not _has_label_map(result)):
                usable[stem] = result
        if case.name not in usable and os.path.lexists(label_map):
            if case.name not in earlier:
                raise HarnessError(
                    f"{label_map} is in the way: empty {settings.outputs}, or continue the run "
                    "that wrote it with --resume and its --report"
                )
            stale.append(label_map)
    for path in (*stale, *(folder / f"{stem}.json" for stem in earlier if stem not in usable)):
        path.unlink()
    return usable

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
from dataclasses import dataclass, replace
from pathlib import Path

from benchmark.containers import engine, results
from benchmark.containers.curves import draw_curves
from benchmark.containers.environment import describe_machine
from benchmark.containers.gpu import gpu_of, read_idle
from benchmark.containers.measurement import Case, Conditions, list_cases, run_alone
from benchmark.containers.results import NOT_MEASURED
from benchmark.containers.runner import Command, Container
from benchmark.containers.sampler import Samples
from benchmark.containers.tables import efficiency_table, markdown_page
from benchmark.files import read_json, write_json, write_plot
from benchmark.options import UsageError, memory_size, not_negative, odd_count, positive
from benchmark.text import by, log, show
from inference.files import whole_file, write_atomically
from inference.startup import use_for_temporary_files

EFFICIENCY_SUFFIX = "_Efficiency.csv"
"""After the team's name: the organisers' table."""

SCORE_FILES = (
    *("accuracy_per_case.csv", "accuracy.json", "accuracy.md", "accuracy_official.txt"),
    *("accuracy_dsc.png", "accuracy_nsd.png"),
)
"""What `python -m benchmark accuracy` writes: scores of label maps that a new run replaces."""

_RESULT_KEYS = {"case", "status", "seconds", "repeat", "interval_s", "image_size", "output"}
"""Without which a file is no result of a case."""

_SAME = (
    *("team", "image_digest", "command", "gpu", "gpu_note", "interval_s", "memory_limit"),
    *("timeout_s", "warm_up"),
)
"""The entries of `environment.json` in which a run that is resumed must agree."""


class ResumeError(UsageError):
    """The run in the report folder is another than the one to resume."""


@dataclass(frozen=True)
class Settings:
    """What is measured, how, and where it goes."""

    inputs: Path
    outputs: Path
    report: Path
    target: Container | Command
    team: str
    how: Conditions
    repeat: int = 1
    warm_up: bool = False
    resume: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command line of `python -m benchmark efficiency`."""
    add = parser.add_argument
    folder = {"type": Path, "required": True, "metavar": "DIR"}
    add("--inputs", **folder, help="folder of NAME_0000.nii.gz")
    add("--outputs", **folder, help="where NAME.nii.gz go")
    add("--report", **folder, help="where the measurements go")
    target = parser.add_mutually_exclusive_group(required=True).add_argument
    target("--image", metavar="NAME:TAG", help="a Docker image that is here")
    text = "a `docker save` file; the image in it is named as the file, in lower case"
    target("--archive", type=Path, metavar="TEAM.tar.gz", help=text)
    text = "a local command, such as 'sh predict.sh --input {inputs} --output {outputs}'"
    target("--command", dest="shell_command", metavar="'COMMAND'", help=text)
    add("--team", help="name in the tables (default: the image's; 'command')")
    add_run_options(parser)
    defaults = Conditions()
    text = "seconds between samples (default and official: 0.1)"
    add("--interval", type=positive, default=defaults.interval, metavar="S", help=text)
    seconds, mb = defaults.tolerances
    text = "seconds that cost nothing (default: %(default)g, as in 2023; 2022: 0)"
    add("--time-tolerance", type=not_negative, default=seconds, metavar="S", help=text)
    text = "GPU memory that costs nothing (default: %(default)g, as in 2023; 2022: 2048)"
    add("--memory-tolerance", type=not_negative, default=mb, metavar="MB", help=text)
    text = "ask for a phase log through ABDOSEG_PHASE_LOG, which adds one -e to the command line"
    add("--phases", action="store_true", help=text)
    add("--resume", action="store_true", help="do not repeat the cases that REPORT already holds")


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
    folders = (arguments.inputs, arguments.outputs, arguments.report)
    if folders[0].resolve() == folders[1].resolve():
        raise UsageError("--outputs must be another folder than --inputs")
    with gpu_of(arguments.gpu) as (gpu, gpu_note):
        more = (arguments.memory_limit, gpu and gpu.device, arguments.phases)
        if command := arguments.shell_command:
            if missing := [name for name in ("{inputs}", "{outputs}") if name not in command]:
                names = " and ".join(missing)
                raise UsageError(f"--command needs {names} where the folder is to stand")
            target, team = Command(command, *more), "command"
        else:
            engine.remove_abandoned()
            archive = arguments.archive
            image = engine.load_archive(archive) if archive else engine.find_image(arguments.image)
            target, team = Container(image, *more), engine.team_of(image)
        team = arguments.team or team
        if re.search(r"[/\0]", team) or team.startswith("."):
            raise UsageError(f"--team {team}: a name that can start a file's name is needed")
        tolerances = results.Tolerances(arguments.time_tolerance, arguments.memory_tolerance)
        times = {"interval": arguments.interval, "timeout": arguments.timeout}
        how = Conditions(gpu, gpu_note, **times, tolerances=tolerances)
        repeats = (arguments.repeat, arguments.warm_up, arguments.resume)
        measured = measure(Settings(*folders, target, team, how, *repeats), cases, refused)
    show(efficiency_table(measured))
    runs = [run for runs in measured.values() for run in runs]
    whole = len(runs) == len(cases) * arguments.repeat and not refused
    return 0 if whole and all(run["status"] == "ok" for run in runs) else 1


def measure(
    settings: Settings, cases: list[Case], refused: dict[str, str]
) -> dict[str, list[dict]]:
    """Measure every case and write the run folder.

    Args:
        settings: what and how.
        cases: the volumes.
        refused: names of what is no volume in the inputs folder, and why, for the report.

    Returns:
        Of each case its results; a case that could not be run, for a full disk, has fewer.

    Raises:
        ResumeError: the run to resume is another one.
        HarnessError, OSError: nothing could be measured, or no more; finished cases are written.
    """
    report, outputs, target, how = settings.report, settings.outputs, settings.target, settings.how
    folder = report / "efficiency"
    idle = read_idle(how.gpu, how.interval)
    how = replace(how, idle=idle)
    image = target.image if isinstance(target, Container) else None
    environment = describe_machine(how.gpu, how.gpu_note) | {
        "image": image,
        "image_digest": image and engine.image_id(image),
        "docker": engine.engine_version() if image else None,
        "command": target.shown_command,
        "team": settings.team,
        "interval_s": how.interval,
        "memory_limit": target.memory_limit,
        "timeout_s": how.timeout,
        "phases": target.phases,
        "repeat": settings.repeat,
        "warm_up": settings.warm_up,
        "tolerances": how.tolerances._asdict(),
        "idle_gpu_mb": idle.gpu_mb,
        "idle_gpu_processes": list(idle.processes),
        "not_measured": dict(refused),
    }
    folder.mkdir(parents=True, exist_ok=True)
    outputs.mkdir(parents=True, exist_ok=True)
    use_for_temporary_files(report)
    done = _earlier_results(settings, cases, environment)
    write_json(report / "environment.json", environment)
    for name, reason in refused.items():
        log(f"{name}: not measured: {reason}")

    def run_once(case: Case, repeat: int, *, first: bool, discard: bool = False) -> dict:
        log_path = folder / f"{_stem(case.name, repeat)}.log"
        with run_alone(case, target, report / f".work-{case.name}", log_path, how) as run:
            result, _, label_map = run
            counts = result["status"] in ("ok", "invalid output") and repeat == 0
            if counts and label_map.exists() and not discard:
                copy = whole_file(outputs / label_map.name)
                with label_map.open("rb") as source, copy as target_file:
                    shutil.copyfileobj(source, target_file)
        return result | {"team": settings.team, "repeat": repeat, "first": first}

    measured: dict[str, list[dict]] = {case.name: [] for case in cases}
    first = True
    rounds = [(repeat, case) for repeat in range(settings.repeat) for case in cases]
    for number, (repeat, case) in enumerate(rounds, start=1):
        result = done.get((case.name, repeat))
        earlier = result is not None
        try:
            if earlier:
                times = (result["seconds"], result["interval_s"])
                samples = Samples(**result["samples"])
                result |= results.peaks_and_areas(samples, *times, how.tolerances)
            else:
                if first and settings.warm_up:
                    log("warming up: a run that is discarded")
                    run_once(case, repeat, first=True, discard=True)
                    first = False
                result = run_once(case, repeat, first=first)
                first = False
        except OSError as error:
            environment["not_measured"][case.name] = str(error)
            log(f"{case.name}: not measured: {error}")
            continue
        if result["status"] == NOT_MEASURED:
            environment["not_measured"][case.name] = result["reason"]
        write_json(folder / f"{_stem(case.name, repeat)}.json", result)
        runs = measured[case.name]
        runs.append(result)
        plot = folder / f"{case.name}.png"
        if not earlier or not plot.exists():
            shown = results.median_run(runs)
            write_plot(plot, draw_curves, shown, how.gpu_note, len(runs))
        table = results.efficiency_csv(measured)
        write_atomically(report / f"{settings.team}{EFFICIENCY_SUFFIX}", table.encode())
        page = markdown_page(measured, environment)
        write_atomically(report / "efficiency.md", page.encode())
        log(_progress_line(number, len(rounds), result, earlier))
    write_json(report / "environment.json", environment)
    return measured


def _progress_line(number: int, count: int, run: dict, earlier: bool) -> str:
    parts = [f"[{number}/{count}] {run['case']} ({by(run['image_size'])}): {run['seconds']:.2f} s"]
    if run["peak_gpu_mb"] is not None:
        parts.append(f"peak {run['peak_gpu_mb']:,.0f} MB, {run['auc_flare_mb_s']:,.0f} MB·s")
    if run["max_ram_mb"] is not None:
        parts.append(f"RAM {run['max_ram_mb']:,.0f} MB")
    parts.append(run["status"] + (f" ({run['reason']})" if run["reason"] else ""))
    return ", ".join(parts + ["from the earlier run"] * earlier)


def _stem(case: str, repeat: int) -> str:
    """Return what the names of a case's files start with, repetitions apart."""
    return f"{case}.repeat{repeat}" if repeat else case


def _earlier_results(
    settings: Settings, cases: list[Case], environment: dict
) -> dict[tuple[str, int], dict]:
    """Return what --resume need not run again; remove anything else of an earlier run.

    Raises:
        ResumeError: the run to resume is another one.
        UsageError: a label map is in the way that no earlier run of this report wrote. Nothing is
            removed then.
    """
    report, outputs = settings.report, settings.outputs
    folder = report / "efficiency"
    described = read_json(report / "environment.json") or {}
    earlier = {path.stem: read_json(path) for path in folder.glob("*.json")}
    before = {"warm_up": False} | described  # which older reports do not have
    differences = [name for name in _SAME if before.get(name) != environment[name]]
    usable = {}
    if earlier and not settings.resume:
        log(f"replacing the earlier run in {report}, its scores with it")
    elif earlier and differences:
        raise ResumeError(
            f"--resume: the run in {report} has another {', '.join(differences)}: name another "
            "--report, or leave --resume out to replace it"
        )
    for case in cases if settings.resume else ():
        written = (outputs / f"{case.name}.nii.gz").is_file()
        for repeat in range(settings.repeat):
            result = earlier.get(_stem(case.name, repeat)) or {}
            whole = set(result) >= _RESULT_KEYS and isinstance(result.get("samples"), dict)
            scored = result.get("status") in ("ok", "invalid output") and repeat == 0
            if whole and result["status"] != NOT_MEASURED and (written or not scored):
                usable[case.name, repeat] = result
    fresh = [case.name for case in cases if (case.name, 0) not in usable]
    in_the_way = [name for name in fresh if os.path.lexists(outputs / f"{name}.nii.gz")]
    for name in in_the_way:
        if name not in earlier:
            raise UsageError(
                f"{outputs / name}.nii.gz is in the way: empty {outputs}, or continue the run that "
                "wrote it with --resume and its --report"
            )
    for name in in_the_way:
        (outputs / f"{name}.nii.gz").unlink()
    stems = {_stem(*key) for key in usable}
    for path in folder.iterdir():
        if path.suffix in (".json", ".png", ".log") and path.stem not in stems:
            path.unlink()
    if earlier and not settings.resume:
        for name in ("efficiency.md", f"{described.get('team')}{EFFICIENCY_SUFFIX}", *SCORE_FILES):
            if Path(name).name == name:  # a name that was read, not one that may lead elsewhere
                (report / name).unlink(missing_ok=True)
    return usable

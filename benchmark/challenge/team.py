"""One team's archive: read through, loaded, checked, run, scored, and removed again.

The state of a team is in `fate.json` of its folder, so that a second call continues where the
first was stopped. A team that breaks has a folder all the same, in which every case failed. What is
not the team's fault, such as a full disk or a lost GPU, makes it "not run"; the next call tries it.
"""

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmark.challenge.archive import ArchiveError, inspect_archive
from benchmark.checking.check import check_image
from benchmark.checking.pages import headline
from benchmark.containers import engine, results
from benchmark.containers.efficiency import ResumeError, Settings, measure
from benchmark.containers.machine import GpuLost
from benchmark.containers.measurement import Case, Conditions
from benchmark.containers.results import EFFICIENCY_SUFFIX
from benchmark.containers.runner import Container
from benchmark.files import read_json, write_json
from benchmark.options import HarnessError
from benchmark.scoring.accuracy import score_folder
from benchmark.scoring.protocol import PROTOCOLS
from benchmark.text import log, plural
from inference.files import printable, write_atomically

DONE, FAILED, NOT_RUN, RUNNING = "done", "failed", "not run", "running"

_RESERVE_BYTES = 2 << 30  # free space that stays on every disk, whatever is loaded

# What the engine prints when no team's container could start.
_ORGANISERS_FAULT = re.compile(
    r"could not select device driver|Cannot connect to the Docker|no space left on device"
)


@dataclass
class Fate:
    """The state of a team.

    DONE, whatever its cases did; FAILED, as it could not be run (ranked, every case failed);
    NOT_RUN, through no fault of its own (not ranked, tried again); or RUNNING.
    """

    state: str
    reason: str | None = None  # one line; None if done
    archive: dict[str, str | int] = field(default_factory=dict)  # name, size, time of the file
    cases: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)  # that were loaded, to be removed
    check: str | None = None  # what the check found, in a line; None if it was not made


@dataclass(frozen=True)
class Challenge:
    """What is the same for every team."""

    cases: list[Case]
    references: list[Path]  # their label maps
    protocol: str  # the year's rules
    check: bool  # whether each image is checked before it is run
    how: Conditions


class _EndedAs(Exception):
    """A team cannot be run: the state that this leaves it in, and the reason."""

    def __init__(self, state: str, reason: object) -> None:
        super().__init__(reason)
        self.state = state


def team_name(archive: Path) -> str:
    """Return a team's name: its archive's up to the first dot."""
    return archive.name.partition(".")[0]


def run_team(archive: Path, folder: Path, challenge: Challenge) -> Fate:
    """Load, check, run and score a team, or do what is missing of that, in its run folder.

    Returns:
        Its state, which is also written.

    Raises:
        EngineError: the engine does not answer, so that no team can be run.
        Stopped: a signal came; the team's images are removed, and its finished cases are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, str | int] = {}  # as of a link that leads nowhere
    if archive.exists():
        found = archive.stat()
        about = {"name": archive.name, "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}
    fate = Fate(RUNNING, archive=about, cases=[case.name for case in challenge.cases])
    with contextlib.suppress(TypeError):  # no such file, or a damaged one
        earlier = Fate(**read_json(folder / "fate.json") or {})
        fate.images = earlier.images
        if earlier.archive != about:
            log(f"{archive.name} has changed: starting the team again")
            shutil.rmtree(folder)
            folder.mkdir()
        elif earlier.cases == fate.cases and earlier.state in (DONE, FAILED):
            return earlier
    try:
        _run(archive, folder, challenge, fate)
        fate.state = DONE
    except _EndedAs as error:
        fate.state, fate.reason = error.state, printable(error)
    if fate.state == FAILED:  # the tables of a team every case of which failed
        for part in ("labels", "efficiency"):
            shutil.rmtree(folder / part, ignore_errors=True)
        failed = {
            "penalty": results.PENALTY,
            "peak_gpu_mb": None if challenge.how.gpu.note else 0.0,
        }
        runs = {case.name: [failed | {"file": case.image.name}] for case in challenge.cases}
        table = results.efficiency_csv(runs)
        write_atomically(folder / f"{folder.name}{EFFICIENCY_SUFFIX}", table)
        _score(folder, challenge)
    write_json(folder / "fate.json", asdict(fate))
    return fate


def _run(archive: Path, folder: Path, challenge: Challenge, fate: Fate) -> None:
    _remove_images(fate, folder)  # which a killed run, or an earlier archive, has left
    if shutil.disk_usage(folder).free < _RESERVE_BYTES:
        reason = f"disk: less than {_RESERVE_BYTES / 1e9:.1f} GB are free for --report"
        raise _EndedAs(NOT_RUN, reason)
    free = engine.free_image_bytes()
    free = None if free is None else max(0, free - _RESERVE_BYTES)
    if not archive.is_file():
        raise _EndedAs(NOT_RUN, "archive: no regular file is there")
    try:
        images, load_bytes = inspect_archive(archive)
    except ArchiveError as error:
        raise _EndedAs(FAILED, f"archive: {error}") from error
    if free is not None and load_bytes > free:
        reason = f"disk: loading takes {load_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB may be used"
        raise _EndedAs(NOT_RUN, f"{reason}; free some and call again")
    image = engine.archive_image(archive)
    if image not in images:
        names = ", ".join(images) or "no named image"
        raise _EndedAs(FAILED, f"archive: it contains {names}, but the organisers run {image}")
    if here := [name for name in images if engine.image_id(name) is not None]:
        reason = f"an image {', '.join(here)} is here already and would be replaced: rename or "
        raise _EndedAs(NOT_RUN, f"{reason}remove it (docker image rm {here[0]}) and call again")
    fate.images = images
    write_json(folder / "fate.json", asdict(fate))
    try:
        log(f"  loading {archive.name}")
        with _teams_fault("load"):
            engine.load_archive(archive)
        if challenge.check:
            log("  checking")
            how = replace(challenge.how, timeout=600.0)
            try:
                fate.check = headline(check_image(folder.name, image, [], folder, how))
            except (HarnessError, OSError) as error:  # the team is run all the same
                fate.check = f"not made: {printable(error)}"
        log("  running")
        target = Container(image, challenge.how.memory_limit, challenge.how.gpu.device)
        settings = Settings(folder / "labels", folder, target, folder.name, challenge.how)
        with _teams_fault("run"):
            _measure(settings, challenge.cases)
    finally:
        _remove_images(fate, folder)
    log("  scoring")
    _score(folder, challenge)


def _measure(settings: Settings, cases: list[Case]) -> None:
    try:
        try:
            measured = measure(replace(settings, resume=True), cases, {})
        except ResumeError as error:
            log(f"  measuring again: {error}")
            for folder in (settings.outputs, settings.report / "efficiency"):
                shutil.rmtree(folder, ignore_errors=True)
            measured = measure(settings, cases, {})
    except GpuLost as error:
        raise _EndedAs(NOT_RUN, error) from error
    reasons = []
    for runs in measured.values():
        reasons += ["see above"] * (settings.how.repeat - len(runs))
        reasons += [run["reason"] for run in runs if run["status"] == results.NOT_MEASURED]
    if reasons:
        reason = f"{plural(len(reasons), 'run')} not measured: {reasons[-1]}; call again"
        raise _EndedAs(NOT_RUN, reason)


def _score(folder: Path, challenge: Challenge) -> None:
    labels = folder / "labels"
    labels.mkdir(exist_ok=True)
    score_folder(challenge.references, labels, folder, PROTOCOLS[challenge.protocol])


def _remove_images(fate: Fate, folder: Path) -> None:
    """Remove the images that a team's archive brought, and report what cannot be removed."""
    reasons = {image: engine.remove_image(image) for image in fate.images}
    fate.images = [image for image, reason in reasons.items() if reason]
    for image in fate.images:
        log(f"  {image} is still here: {reasons[image]}")
    write_json(folder / "fate.json", asdict(fate))


@contextlib.contextmanager
def _teams_fault(stage: str) -> Iterator[None]:
    """Take what the engine refuses as the team's own failure, if the engine itself is well."""
    try:
        yield
    except engine.EngineError as error:
        if not engine.engine_version():
            raise
        state = NOT_RUN if _ORGANISERS_FAULT.search(str(error)) else FAILED
        raise _EndedAs(state, f"{stage}: {error}") from error

"""One team's archive: looked at, loaded, checked, run, scored, and removed again.

What becomes of a team is kept in `fate.json` of its folder, so that a second call goes on where the
first was stopped. A team that breaks has a folder all the same, in which every case failed. What is
not the team's fault, such as a full disk, leaves it as "not run" for the next call.
"""

import argparse
import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

from benchmark.checking import check
from benchmark.checking.pages import CHECK_JSON, headline
from benchmark.containers import efficiency
from benchmark.containers.archive import (
    ArchiveError,
    free_image_bytes,
    inspect_archive,
    remove_image,
)
from benchmark.containers.cases import Case
from benchmark.containers.engine import EngineError, docker, image_id, load_archive
from benchmark.containers.run_folder import EFFICIENCY_SUFFIX, write_json
from benchmark.containers.tables import failed_csv_table
from benchmark.messages import UsageError, say
from benchmark.scoring import accuracy
from inference.files import printable, write_atomically
from inference.signals import Stopped

DONE, FAILED, NOT_RUN, RUNNING = "done", "failed", "not run", "running"

FATE_JSON = "fate.json"

_RESERVE_BYTES = 2 << 30
"""Left free on every disk, whatever is loaded."""

_ORGANISERS_FAULT = re.compile(r"could not select device driver|Cannot connect to the Docker")
"""What the engine says when no team's container could start."""


@dataclass
class Fate:
    """What became of a team.

    Attributes:
        state: DONE (whatever its cases did), FAILED (it could not be run; ranked, every case
            failed), NOT_RUN (through no fault of its own; not ranked, tried again) or RUNNING.
        reason: one line; None if done.
        archive: name, size and time of the file.
        cases: names of the cases run.
        images: that were loaded, to be removed.
        check: what the check found, in a line; None if it was not made.
    """

    state: str
    reason: str | None = None
    archive: dict = field(default_factory=dict)
    cases: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    check: str | None = None


@dataclass(frozen=True)
class Evening:
    """What is the same for every team.

    Attributes:
        inputs, reference, report: folders.
        cases: of `inputs`.
        gpu: whether a device is measured.
        efficiency_options, accuracy_options: more words for the two commands' lines.
        check: whether each image is checked before it is run.
    """

    inputs: Path
    reference: Path
    report: Path
    cases: list[Case]
    gpu: bool
    efficiency_options: Sequence[str]
    accuracy_options: Sequence[str]
    check: bool


class _Unusable(Exception):
    """The team cannot be run, by its own fault; the message is the reason."""


class _NotNow(Exception):
    """The team cannot be run, through no fault of its own; the message is the reason."""


def team_name(archive: Path) -> str:
    """A team's name: its archive's up to the first dot."""
    return archive.name.partition(".")[0]


def read_fate(folder: Path) -> Fate | None:
    """What became of a team before; None where nothing readable says it."""
    try:
        return Fate(**json.loads((folder / FATE_JSON).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def run_team(archive: Path, folder: Path, evening: Evening) -> Fate:
    """Take a team through the evening, or through what is left of it.

    Args:
        archive: the team's.
        folder: its run folder, made if need be.
        evening: the rest.

    Returns:
        What became of it, which is also written.

    Raises:
        EngineError: the engine does not answer, so that no team can be run.
        Stopped: a signal came; the team's images are removed, and its cases so far are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {"name": archive.name, "bytes": archive.stat().st_size}
    about["mtime_ns"] = archive.stat().st_mtime_ns
    names = [case.name for case in evening.cases]
    earlier = read_fate(folder)
    same = earlier is not None and earlier.archive == about
    if same and earlier.cases == names and earlier.state in (DONE, FAILED):
        return earlier
    if earlier is not None and not same:
        say(f"{archive.name} has changed: the team starts anew")
        _clear(folder, earlier)
    fate = Fate(RUNNING, archive=about, cases=names, images=earlier.images if same else [])
    try:
        _take_through(archive, folder, evening, fate)
        fate.state, fate.reason = DONE, None
    except _Unusable as error:
        fate.state, fate.reason = FAILED, printable(error)
        _write_failure(folder, evening)
    except _NotNow as error:
        fate.state, fate.reason = NOT_RUN, printable(error)
    write_json(folder / FATE_JSON, asdict(fate))
    return fate


def _take_through(archive: Path, folder: Path, evening: Evening, fate: Fate) -> None:
    _remove(fate, folder)  # what a killed evening has left
    free = _free_bytes(evening)
    try:
        content = inspect_archive(archive, free)
    except ArchiveError as error:
        raise _Unusable(f"archive: {error}") from error
    except OSError as error:
        raise _NotNow(f"archive: {error}") from error
    if free is not None and content.load_bytes > free:
        raise _NotNow(
            f"disk: loading takes more than the {free / 1e9:.1f} GB that may be used; "
            "free some and call again"
        )
    image = f"{team_name(archive).lower()}:latest"
    if image not in content.images:
        raise _Unusable(
            f"archive: it holds {', '.join(content.images) or 'no named image'}, but the "
            f"organisers run {image}"
        )
    if here := [name for name in content.images if image_id(name) is not None]:
        raise _NotNow(
            f"an image {', '.join(here)} is here already and would be replaced: rename or remove "
            f"it (docker image rm {here[0]}) and call again"
        )
    fate.images = list(content.images)
    write_json(folder / FATE_JSON, asdict(fate))
    try:
        say(f"  loading {archive.name}")
        with _teams_fault("load"):
            load_archive(archive)
        if evening.check:
            say("  checking")
            fate.check = check_image(image, folder, evening)
        say("  running")
        with _teams_fault("run"):
            _measure(image, folder, evening)
    finally:
        _remove(fate, folder)
    say("  scoring")
    _score(folder, evening)


def check_image(image: str, folder: Path, evening: Evening) -> str:
    """Check an image as `python -m benchmark check` does, its report beside the run's.

    Returns:
        What was found, in a line. Whatever it is, the image is run: the check is for the team.

    Raises:
        Stopped: a signal came.
    """
    words = ["--image", image, "--report", str(folder), "--large-slices", "0"]
    code = check.run(_options(check, words))
    if code > 128:
        raise Stopped(code - 128)
    if code == 2:
        return "not made"
    return headline(json.loads((folder / CHECK_JSON).read_text(encoding="utf-8")))


def _measure(image: str, folder: Path, evening: Evening) -> None:
    words = [
        *("--inputs", str(evening.inputs), "--outputs", str(folder / "labels")),
        *("--report", str(folder), "--image", image, "--team", folder.name),
        *evening.efficiency_options,
    ]
    try:
        efficiency.measure(_options(efficiency, [*words, "--resume"]))
    except UsageError as error:
        say(f"  what was measured before is not kept: {printable(error)}")
        shutil.rmtree(folder / "labels", ignore_errors=True)
        efficiency.measure(_options(efficiency, words))


def _score(folder: Path, evening: Evening) -> None:
    labels = folder / "labels"
    labels.mkdir(exist_ok=True)
    words = [
        *("--reference", str(evening.reference), "--prediction", str(labels)),
        *("--report", str(folder), *evening.accuracy_options),
    ]
    if accuracy.run(_options(accuracy, words)) == 2:
        raise _NotNow("the label maps could not be scored")


def _write_failure(folder: Path, evening: Evening) -> None:
    """The tables of a team that could not be run: every case failed."""
    for part in ("labels", "efficiency"):
        shutil.rmtree(folder / part, ignore_errors=True)
    files = [case.image.name for case in evening.cases]
    table = failed_csv_table(files, gpu=evening.gpu)
    write_atomically(folder / f"{folder.name}{EFFICIENCY_SUFFIX}", table.encode())
    _score(folder, evening)


def _options(command: ModuleType, words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def _free_bytes(evening: Evening) -> int | None:
    """What may be used of the engine's disk; None if it cannot be seen.

    Raises:
        _NotNow: the report's own disk is full.
    """
    if shutil.disk_usage(evening.report).free < _RESERVE_BYTES:
        raise _NotNow(f"disk: less than {_RESERVE_BYTES / 1e9:.1f} GB are free for --report")
    free = free_image_bytes()
    return None if free is None else max(0, free - _RESERVE_BYTES)


def _remove(fate: Fate, folder: Path) -> None:
    """Remove the images that a team's archive brought; what cannot be removed is said."""
    left = []
    for image in fate.images:
        if reason := remove_image(image):
            left.append(image)
            say(f"  {image} is still here: {printable(reason)}")
    fate.images = left
    write_json(folder / FATE_JSON, asdict(fate))


def _clear(folder: Path, earlier: Fate) -> None:
    for image in earlier.images:
        remove_image(image)
    shutil.rmtree(folder)
    folder.mkdir()


@contextlib.contextmanager
def _teams_fault(stage: str) -> Iterator[None]:
    """Take what the engine refuses as the team's own failure, if the engine itself is well."""
    try:
        yield
    except EngineError as error:
        if docker("version", "--format", "{{.Server.Version}}").returncode != 0:
            raise
        if _ORGANISERS_FAULT.search(str(error)):
            raise _NotNow(f"{stage}: {error}") from error
        raise _Unusable(f"{stage}: {error}") from error

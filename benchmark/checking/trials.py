"""One run of a check: a volume through the team's container, in one of several ways."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.checking.volumes import Subject
from benchmark.containers.measurement import Conditions, run_alone
from benchmark.containers.outputs import log_tail
from benchmark.containers.results import Result
from benchmark.containers.runner import Container
from inference.files import printable
from inference.volume import read_volume

ORGANISERS = "organisers' command"
NO_NETWORK = "no network"
HARDENED = "read-only and hardened"
SMALL_SHARED_MEMORY = "64 MB of shared memory"

_RIGHTS = (
    *("--user", "1000:1000", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--network", "none", "--read-only", "--tmpfs", "/tmp"),
)

MODES: dict[str, dict[str, Any]] = {
    ORGANISERS: {},
    NO_NETWORK: {"extra": ("--network", "none")},
    HARDENED: {"extra": _RIGHTS, "read_only_inputs": True},
    SMALL_SHARED_MEMORY: {"shared_memory": False},  # the engine's own default, as in 2021 and 2022
}
"""What each way changes in the organisers' command line, as fields of `Container`."""

_MOST_FILES = 1000  # that are listed


@dataclass(frozen=True)
class Trial:
    """What one run did."""

    label: str  # of the volume
    mode: str  # the way it was run
    result: Result  # as `run_alone` yields it
    label_map: Path  # of a copy of it, if it wrote one
    digest: str | None = None  # SHA-256 of its bytes
    empty: bool | None = None  # whether it has no label but background; None if unreadable
    extra_files: list[str] = field(default_factory=list)  # in the outputs folder beside it
    printed: str = ""  # the last of what the container printed

    @property
    def ended(self) -> bool:
        """Return whether it ended by itself with exit code 0."""
        return self.result["exit_code"] == 0

    @property
    def ran(self) -> bool:
        """Return whether it ended by itself with exit code 0 and left a label map."""
        return self.ended and self.result["output"]["found"]

    def as_json(self) -> Result:
        """Return the run's entry of `check.json`."""
        result = {k: v for k, v in self.result.items() if k not in ("samples", "sampler", "phases")}
        names = {"volume": self.label, "mode": self.mode, "sha256": self.digest}
        return names | result | {"empty": self.empty, "left": self.extra_files}


def run_trial(
    subject: Subject, image: str, mode: str, number: int, work: Path, logs: Path, how: Conditions
) -> Trial:
    """Run one volume in folders of its own, one of `MODES`.

    Args:
        subject, image, mode: what is run, and the way.
        number: of the run, for names.
        work: a folder for label maps.
        logs: a folder for what the containers print.

    Raises:
        EngineError: the engine did not start the container.
        OSError: the folders cannot be made or written.
    """
    case = subject.case
    target = Container(image, how.memory_limit, how.gpu.device, **MODES[mode])
    words = printable(f"{number:02d}-{subject.label}-{mode}")
    log = logs / ("".join(c if c.isalnum() else "-" for c in words) + ".log")
    with run_alone(case, target, work / f"run-{number}", log, how) as (result, folders, found):
        digest, empty, label_map = None, None, work / f"{number}.nii.gz"
        if result["output"]["found"]:
            found.rename(label_map)
            with label_map.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        if result["output"]["scorable"]:
            empty = not read_volume(label_map).voxels.any()
        extra = list(_extra_files(folders.outputs, f"{case.name}.nii.gz"))
        return Trial(subject.label, mode, result, label_map, digest, empty, extra, log_tail(log))


def _extra_files(outputs: Path, label_map: str) -> Iterator[str]:
    """Yield whatever a container wrote beside its label map, links not followed."""
    found = 0
    for folder, folders, files in os.walk(outputs):
        for name in sorted([*folders, *files]):
            path = Path(folder) / name
            shown = str(path.relative_to(outputs))
            if shown == label_map:
                continue
            if (found := found + 1) > _MOST_FILES:
                yield "and more"
                return
            kind = " (a folder)" if path.is_dir() else ""
            if path.is_symlink():
                kind = " (a link)"
            elif not (path.is_dir() or path.is_file()):
                kind = " (neither file nor folder)"
            yield printable(shown) + kind

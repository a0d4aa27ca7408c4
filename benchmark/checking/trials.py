"""One run of a check: a volume through the team's container, in one of several ways."""

import filecmp
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmark.checking.volumes import Subject
from benchmark.containers.areas import flare_area
from benchmark.containers.device import Idle
from benchmark.containers.gpu import Gpu
from benchmark.containers.measurement import take_output
from benchmark.containers.output_check import OutputCheck
from benchmark.containers.runner import Outcome, log_tail, run_case
from benchmark.containers.sampler import Sampler, Samples
from benchmark.containers.tables import OFFICIAL_INTERVAL
from benchmark.containers.targets import Container, Folders
from benchmark.messages import say
from inference.files import printable
from inference.volume import read_volume

ORGANISERS = "organisers' command"
NO_NETWORK = "no network"
HARDENED = "read-only and hardened"
SMALL_SHARED_MEMORY = "64 MB of shared memory"

_MODES: dict[str, tuple[str, ...]] = {
    ORGANISERS: (),
    NO_NETWORK: ("--network", "none"),
    HARDENED: (
        *("--user", "1000:1000", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
        *("--network", "none", "--read-only", "--tmpfs", "/tmp"),
    ),
    SMALL_SHARED_MEMORY: (),  # the engine's own default, as in 2021 and 2022
}
"""Options that each way adds to the organisers' command line."""

_MOST_LEFT = 1000  # files left behind that are counted


@dataclass(frozen=True)
class VariedContainer(Container):
    """A team's image, run with the organisers' command line but for what a mode changes.

    Attributes:
        mode: one of the ways above.
    """

    mode: str = ORGANISERS

    def command_line(self, name: str, folders: Folders) -> list[str]:
        """`docker container run` for a container called `name`."""
        line = super().command_line(name, folders)
        if self.mode == SMALL_SHARED_MEMORY:
            line = [word for word in line if not word.startswith("--shm-size=")]
        if self.mode == HARDENED:
            line = [f"{word}:ro" if word.endswith(":/workspace/inputs/") else word for word in line]
        start = line.index("run") + 1
        return [*line[:start], *_MODES[self.mode], *line[start:]]


@dataclass(frozen=True)
class Trial:
    """What one run did.

    Attributes:
        label: of the volume.
        mode: the way it was run.
        image_size: of the volume, as stored.
        outcome: how the run ended.
        output: what is to be said of the label map.
        label_map: a copy of it, None if there was none.
        digest: SHA-256 of its bytes.
        empty: whether it has no label but background; None if it cannot be looked at.
        left: what else is in the outputs folder, kinds in brackets.
        inputs_touched: whether the inputs folder is not as it was.
        printed: the last of what the container printed.
        peak_gpu_mb, auc_flare_mb_s, auc_tolerated_mb_s: of device memory (MB, MB·s), None without
            a device; the last of what lies above the tolerance.
        max_ram_mb: the most resident memory that was seen; 0 if the run ended before a reading.
    """

    label: str
    mode: str
    image_size: tuple[int, ...]
    outcome: Outcome
    output: OutputCheck
    label_map: Path | None = None
    digest: str | None = None
    empty: bool | None = None
    left: list[str] = field(default_factory=list)
    inputs_touched: bool = False
    printed: str = ""
    peak_gpu_mb: float | None = None
    auc_flare_mb_s: float | None = None
    auc_tolerated_mb_s: float | None = None
    max_ram_mb: float = 0.0

    @property
    def ran(self) -> bool:
        """It ended by itself with exit code 0 and left a label map."""
        return self.outcome.status == "ok" and self.output.found


@dataclass(frozen=True)
class Bench:
    """Where and how the runs of one check are made.

    Attributes:
        report: the report folder; `check/` in it gets what the containers print.
        work: a folder for volumes and label maps, removed at the end of the check.
        gpu, idle: the device, and how it was before.
        timeout: seconds after which a run is ended.
        memory_tolerance: MB of device memory that cost nothing.
    """

    report: Path
    work: Path
    gpu: Gpu | None
    idle: Idle
    timeout: float
    memory_tolerance: float

    def run(self, subject: Subject, target: VariedContainer, number: int) -> Trial:
        """Run one volume in folders of its own.

        Args:
            subject: the volume.
            target: the container.
            number: of the run, for names.

        Raises:
            EngineError: the engine did not start the container.
            OSError: the folders cannot be made or written.
        """
        case, place = subject.case, self.work / f"run-{number}"
        words = printable(f"{number:02d}-{subject.label}-{target.mode}")
        log = self.report / "check" / ("".join(c if c.isalnum() else "-" for c in words) + ".log")
        folders = Folders(place / "inputs", place / "outputs", log)
        try:
            for folder in (folders.inputs, folders.outputs):
                folder.mkdir(parents=True)
                folder.chmod(0o777)  # as the organisers do: a container may run as any user
            shutil.copy(case.image, folders.inputs)
            (folders.inputs / case.image.name).chmod(0o644)
            sampler = Sampler(self.gpu, OFFICIAL_INTERVAL, self.idle.processes)
            outcome, samples, _ = run_case(target, case.name, folders, self.timeout, sampler)
            collected = self.work / f"label-map-{number}"  # which the container does not see
            collected.mkdir()
            output = take_output(folders.outputs, collected, case)
            label_map = collected / f"{case.name}.nii.gz"
            return Trial(
                label=subject.label,
                mode=target.mode,
                image_size=case.size,
                outcome=outcome,
                output=output,
                label_map=label_map if output.found else None,
                digest=_digest(label_map) if output.found else None,
                empty=not read_volume(label_map).voxels.any() if output.scorable else None,
                left=list(_left_behind(folders.outputs, label_map.name)),
                inputs_touched=_touched(folders.inputs, case.image),
                printed=log_tail(log),
                max_ram_mb=max(samples.ram_mb),
                **self._gpu_figures(samples),
            )
        finally:
            shutil.rmtree(place, ignore_errors=True)
            if place.exists():
                say(f"{place} cannot be removed: its files are another user's")

    def _gpu_figures(self, samples: Samples) -> dict[str, float]:
        if not samples.gpu_used_mb:
            return {}
        used = samples.gpu_used_mb
        return {
            "peak_gpu_mb": max(used),
            "auc_flare_mb_s": flare_area(used, OFFICIAL_INTERVAL),
            "auc_tolerated_mb_s": flare_area(used, OFFICIAL_INTERVAL, self.memory_tolerance),
        }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _left_behind(outputs: Path, label_map: str) -> Iterator[str]:
    """Whatever a container left beside its label map, links not followed."""
    count = 0
    for folder, folders, files in os.walk(outputs):
        for name in sorted([*folders, *files]):
            path = Path(folder) / name
            shown = str(path.relative_to(outputs))
            if shown == label_map:
                continue
            if (count := count + 1) > _MOST_LEFT:
                yield "and more"
                return
            if path.is_symlink():
                kind = " (a link)"
            elif path.is_dir():
                kind = " (a folder)"
            else:
                kind = "" if path.is_file() else " (neither file nor folder)"
            yield printable(shown) + kind


def _touched(inputs: Path, image: Path) -> bool:
    """Whether the container changed its inputs folder."""
    copy = inputs / image.name
    if [path.name for path in inputs.iterdir()] != [image.name]:
        return True
    if copy.is_symlink() or not copy.is_file():
        return True
    return not filecmp.cmp(copy, image, shallow=False)

"""One run of a check: a volume through the team's container, in one of several ways."""

import filecmp
import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmark.checking.volumes import Subject
from benchmark.containers.gpu import Gpu, Idle
from benchmark.containers.measurement import run_alone
from benchmark.containers.outputs import OutputCheck, log_tail
from benchmark.containers.results import OFFICIAL_INTERVAL, TOLERANCES, peaks_and_areas
from benchmark.containers.runner import Container, Outcome
from inference.files import printable
from inference.volume import read_volume

ORGANISERS = "organisers' command"
NO_NETWORK = "no network"
HARDENED = "read-only and hardened"
SMALL_SHARED_MEMORY = "64 MB of shared memory"

MODES: dict[str, dict] = {
    ORGANISERS: {},
    NO_NETWORK: {"extra": ("--network", "none")},
    HARDENED: {
        "extra": (
            *("--user", "1000:1000", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
            *("--network", "none", "--read-only", "--tmpfs", "/tmp"),
        ),
        "read_only_inputs": True,
    },
    SMALL_SHARED_MEMORY: {"shared_memory": False},  # the engine's own default, as in 2021 and 2022
}
"""What each way changes in the organisers' command line, as fields of `Container`."""

_MOST_LEFT = 1000  # files left behind that are counted


@dataclass(frozen=True)
class Trial:
    """What one run did.

    Attributes:
        label: of the volume.
        mode: the way it was run.
        image_size: of the volume, as stored.
        outcome: how the run ended.
        output: what is wrong with the label map.
        figures: its peaks and areas, as `peaks_and_areas` returns them.
        label_map: a copy of it, None if there was none.
        digest: SHA-256 of its bytes.
        empty: whether it has no label but background; None if it cannot be read.
        left: what else is in the outputs folder, kinds in brackets.
        inputs_touched: whether the inputs folder is not as it was.
        printed: the last of what the container printed.
        gpu_error: why reading the GPU stopped, if it did.
    """

    label: str
    mode: str
    image_size: tuple[int, ...]
    outcome: Outcome
    output: OutputCheck
    figures: dict = field(default_factory=dict)
    label_map: Path | None = None
    digest: str | None = None
    empty: bool | None = None
    left: list[str] = field(default_factory=list)
    inputs_touched: bool = False
    printed: str = ""
    gpu_error: str | None = None

    @property
    def ran(self) -> bool:
        """It ended by itself with exit code 0 and left a label map."""
        return self.outcome.status == "ok" and self.output.found

    @property
    def max_ram_mb(self) -> float:
        """The most memory that was read; 0 if the run ended before a reading."""
        return self.figures.get("max_ram_mb") or 0.0

    @property
    def peak_gpu_mb(self) -> float | None:
        """The most GPU memory; None where it was not read."""
        return self.figures.get("peak_gpu_mb")

    def as_json(self) -> dict:
        """Return the run's entry of `check.json`."""
        keys = ("peak_gpu_mb", "auc_flare_mb_s", "auc_flare_tolerated_mb_s")
        return {
            "volume": self.label,
            "mode": self.mode,
            "image_size": list(self.image_size),
            **asdict(self.outcome),
            "max_ram_mb": self.max_ram_mb,
            **{key: self.figures.get(key) for key in keys},
            "output": asdict(self.output),
            "sha256": self.digest,
            "empty": self.empty,
            "left": self.left,
            "inputs_touched": self.inputs_touched,
        }


@dataclass(frozen=True)
class Bench:
    """Where and how the runs of one check are made.

    Attributes:
        image, memory_limit: as in `Container`.
        logs: folder for what the containers print.
        work: a folder for volumes and label maps, removed at the end of the check.
        gpu, idle: the GPU, and how it was before.
        timeout: seconds after which a run is ended.
    """

    image: str
    memory_limit: str
    logs: Path
    work: Path
    gpu: Gpu | None
    idle: Idle
    timeout: float

    def run(self, subject: Subject, mode: str, number: int) -> Trial:
        """Run one volume in folders of its own; `number` is for names.

        Raises:
            EngineError: the engine did not start the container.
            OSError: the folders cannot be made or written.
        """
        case = subject.case
        device = self.gpu and self.gpu.device
        target = Container(self.image, self.memory_limit, device, **MODES[mode])
        words = printable(f"{number:02d}-{subject.label}-{mode}")
        log = self.logs / ("".join(c if c.isalnum() else "-" for c in words) + ".log")
        how = (self.gpu, self.idle, OFFICIAL_INTERVAL, self.timeout)
        with run_alone(case, target, self.work / f"run-{number}", log, *how) as run:
            digest = empty = label_map = None
            if run.output.found:
                label_map = run.label_map.rename(self.work / f"{number}.nii.gz")
                with label_map.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            if run.output.scorable:
                empty = not read_volume(label_map).voxels.any()
            limits = (OFFICIAL_INTERVAL, TOLERANCES["flare23"])
            return Trial(
                label=subject.label,
                mode=mode,
                image_size=case.size,
                outcome=run.outcome,
                output=run.output,
                figures=peaks_and_areas(run.samples, run.outcome.seconds, *limits),
                label_map=label_map,
                digest=digest,
                empty=empty,
                left=list(_left_behind(run.folders.outputs, f"{case.name}.nii.gz")),
                inputs_touched=_touched(run.folders.inputs, case.image),
                printed=log_tail(log),
                gpu_error=run.cost.gpu_error,
            )


def _left_behind(outputs: Path, label_map: str) -> Iterator[str]:
    """Yield whatever a container left beside its label map, links not followed."""
    found = 0
    for folder, folders, files in os.walk(outputs):
        for name in sorted([*folders, *files]):
            path = Path(folder) / name
            shown = str(path.relative_to(outputs))
            if shown == label_map:
                continue
            if (found := found + 1) > _MOST_LEFT:
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
    return copy.is_symlink() or not copy.is_file() or not filecmp.cmp(copy, image, shallow=False)

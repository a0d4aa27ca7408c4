"""One volume of a run: what becomes of it, and what of it is in memory."""

from dataclasses import dataclass, field
from pathlib import Path

from .records.flags import Flag
from .sources import Source
from .volume import Volume


@dataclass
class Case:
    """One volume of a run, and what becomes of it.

    Its status is "waiting", then "done", "kept" (its label map was there before) or "failed".
    Statistics and what is known of the input are there if records are asked for.
    """

    source: Source
    name: str  # NAME of `NAME_0000.nii.gz`
    status: str = "waiting"
    reason: str = ""  # why it failed, in one line
    warnings: list[str] = field(default_factory=list)  # which cost no label map, or why it is anew
    shape: tuple[int, ...] = ()  # (i, j, k), as the file's header has it, once read
    flags: list[Flag] = field(default_factory=list)  # doubts about the label map
    statistics: dict[str, dict] = field(default_factory=dict)  # of `label_statistics`
    input_info: dict = field(default_factory=dict)  # the record's fields of the input


@dataclass
class ReadCase:
    """A case whose volume is in memory."""

    case: Case
    volume: Volume
    window: tuple[float, float]  # its 1st and 99th percentile, in the units of its voxels
    files_state: set[tuple[Path, int, int]] | None  # of its source, before it was read
    memory: int  # bytes taken of the budget for it

"""One volume of a run: what becomes of it, and what of it is in memory."""

from dataclasses import dataclass, field
from pathlib import Path

from .records.flags import Flag
from .sources import Source
from .volume import Volume


@dataclass
class Case:
    """One volume of a run, and what becomes of it.

    Attributes:
        source: the volume's file, or its DICOM series.
        name: NAME of `NAME_0000.nii.gz`.
        status: "waiting", then "done", "kept" (its label map was there before) or "failed".
        reason: why it failed, in one line.
        warnings: what else went wrong and costs no label map; why one that was there is recomputed.
        shape: as the file's header has it, (i, j, k), once read.
        flags: doubts about the label map.
        statistics: of `label_statistics`, if records are asked for.
        input_info: the record's fields of the input, if records are asked for.
    """

    source: Source
    name: str
    status: str = "waiting"
    reason: str = ""
    warnings: list[str] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    flags: list[Flag] = field(default_factory=list)
    statistics: dict[str, dict] = field(default_factory=dict)
    input_info: dict = field(default_factory=dict)


@dataclass
class ReadCase:
    """A case whose volume is in memory.

    Attributes:
        case: whose volume it is.
        volume: as read.
        window: its 1st and 99th percentile, in the units of its voxels.
        files_state: of its source, before it was read.
        memory: bytes taken of the budget for it.
    """

    case: Case
    volume: Volume
    window: tuple[float, float]
    files_state: set[tuple[Path, int, int]] | None
    memory: int

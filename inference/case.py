"""One volume on its way through the pipeline."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .components import ComponentSizes
from .records.flags import Flag
from .sources import Source
from .volume import Volume


@dataclass
class Case:
    """One volume on its way through the pipeline, and afterwards what became of it.

    Attributes:
        source: the volume's file, or its DICOM series.
        name: NAME of `NAME_0000.nii.gz`.
        status: "waiting", then "done", "kept" (its label map was there before) or "failed".
        reason: why it failed, in one line.
        warnings: what else went wrong and costs no label map; why one that was there is made again.
        shape: as the file's header says it, (i, j, k), once read.
        kept: its label map was there before; what is said of it elsewhere may be missing.
        sizes: voxels by label, of the label map and of what was cleared.
        flags: doubts about the label map.
        statistics: of `label_statistics`, if records are asked for.
        input_info: what its record says of the input, if records are asked for.
        volume, window, clip_hu, label_map: what the stages hand on; dropped when the case ends.
        input_state: of `files_state`, before it was read.
        memory: bytes taken of the budget.
    """

    source: Source
    name: str
    status: str = "waiting"
    reason: str = ""
    warnings: list[str] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    kept: bool = False
    sizes: ComponentSizes | None = None
    flags: list[Flag] = field(default_factory=list)
    statistics: dict[str, dict] = field(default_factory=dict)
    input_info: dict = field(default_factory=dict)
    volume: Volume | None = None
    window: tuple[float, ...] = ()
    clip_hu: tuple[float, float] | None = None
    label_map: np.ndarray | None = None
    input_state: set[tuple[Path, int, int]] | None = None
    memory: int = 0

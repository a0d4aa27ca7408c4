"""A folder of CT volumes through the pipeline: read, normalise, predict, keep components, write.

One volume is read ahead and one is written behind while the device works on the one between, so at
most three are in memory. The first is read while torch is still being imported.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from inference.components import keep_largest_components
from inference.intensity import percentiles
from inference.phases import PhaseTimer
from inference.statistics import LabelStatistics, label_statistics
from inference.volume import Volume, case_name, read_volume, write_label_map

if TYPE_CHECKING:
    from inference.prediction import Predictor

STAGES = ("read", "percentiles", "predict", "components", "write")
"""The phases of one case, in order."""


@dataclass
class Case:
    """One volume on its way through the pipeline, and afterwards what became of it.

    Attributes:
        path: the volume's file.
        name: NAME of `NAME_0000.nii.gz`.
        status: "waiting", then "done", "kept" (its label map was there before) or "failed".
        reason: why it failed, in one line.
        shape: (slices, rows, columns), once read.
        statistics: of the label map, if asked for.
        volume, window, label_map: what the stages hand on; dropped when the case ends.
    """

    path: Path
    name: str
    status: str = "waiting"
    reason: str = ""
    shape: tuple[int, ...] = ()
    statistics: list[LabelStatistics] = field(default_factory=list)
    volume: Volume | None = None
    window: tuple[float, ...] = ()
    label_map: np.ndarray | None = None


@dataclass
class Service:
    """Segments volumes one after another.

    Attributes:
        output: folder of the label maps.
        make_predictor: imports torch and puts the network on its device; called once, while the
            first volume is being read.
        timer: to which every phase is reported.
        keep_existing: leave a case alone whose label map is there.
        with_statistics: compute `Case.statistics`.
        with_preview: write a contact sheet `NAME.png` beside each label map.
        on_slices: called with a case and the number of its slices just predicted.
        on_case: called with each case when it has ended; from one of two threads.
    """

    output: Path
    make_predictor: Callable[[], "Predictor"]
    timer: PhaseTimer
    keep_existing: bool = False
    with_statistics: bool = False
    with_preview: bool = False
    on_slices: Callable[[Case, int], None] = lambda case, slices: None
    on_case: Callable[[Case], None] = lambda case: None

    def run(self, paths: list[Path]) -> list[Case]:
        """Segment every volume; a case that fails does not stop the others.

        Args:
            paths: NIfTI files.

        Returns:
            One `Case` per path, in order, each "done", "kept" or "failed".
        """
        cases = self._plan(paths)
        waiting = [case for case in cases if case.status == "waiting"]
        if not waiting:
            return cases
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            unread = iter(waiting)
            reading = reader.submit(self._read_next, unread)
            predictor = self.make_predictor()
            writing = None
            while just_read := reading.result():
                reading = reader.submit(self._read_next, unread)
                for case in just_read:
                    self._attempt(case, lambda case: self._predict(case, predictor))
                    if writing is not None:
                        writing.result()  # so that label maps do not pile up behind a slow disk
                    writing = writer.submit(self._end, case)
            predictor.release()  # while the last label map is still being finished
        return cases

    def _plan(self, paths: list[Path]) -> list[Case]:
        """Name the cases, and settle those that need no work."""
        cases: list[Case] = []
        first_path: dict[str, Path] = {}
        for path in paths:
            case = Case(path, case_name(path))
            cases.append(case)
            earlier = first_path.setdefault(case.name, path)
            if earlier != path:
                case.status = "failed"
                case.reason = f"its output would be that of {earlier.name}"
            elif self.keep_existing and self._output_path(case).exists():
                case.status = "kept"
            if case.status != "waiting":
                self.on_case(case)
        return cases

    def _output_path(self, case: Case) -> Path:
        return self.output / f"{case.name}.nii.gz"

    def _read(self, case: Case) -> None:
        with self.timer.phase("read", case.name):
            case.volume = read_volume(case.path)
        case.shape = case.volume.voxels.shape
        with self.timer.phase("percentiles", case.name):
            case.window = percentiles(case.volume.voxels)

    def _read_next(self, unread: Iterator[Case]) -> list[Case]:
        """Read on up to a case that can be read, so that bad ones do not use up the read-ahead.

        Returns:
            The cases taken, none at the end; all but the last have failed.
        """
        taken = []
        for case in unread:
            self._attempt(case, self._read)
            taken.append(case)
            if case.status != "failed":
                break
        return taken

    def _predict(self, case: Case, predictor: "Predictor") -> None:
        with self.timer.phase("predict", case.name):
            case.label_map = predictor.predict(
                case.volume.voxels,
                window=case.window,
                slope=case.volume.slope,
                intercept=case.volume.intercept,
                reduction=predictor.metadata.reduction_at(case.volume.spacing),
                on_slices=lambda count: self.on_slices(case, count),
            )

    def _finish(self, case: Case) -> None:
        with self.timer.phase("components", case.name):
            keep_largest_components(case.label_map)
        with self.timer.phase("write", case.name):
            write_label_map(self._output_path(case), case.label_map, case.volume)
        if self.with_statistics:
            case.statistics = label_statistics(case.name, case.label_map, case.volume)
        if self.with_preview:
            from inference.preview import write_preview  # Pillow, only for those who ask

            write_preview(self.output / f"{case.name}.png", case.label_map, case.volume)
        case.status = "done"

    def _end(self, case: Case) -> None:
        self._attempt(case, self._finish)
        case.volume = case.label_map = None
        self.on_case(case)

    def _attempt(self, case: Case, step: Callable[[Case], None]) -> None:
        """Take a case one step further; whatever goes wrong fails this case alone."""
        if case.status == "failed":
            return
        try:
            step(case)
        except Exception as error:  # a folder of thousands must not stop at one file's surprise
            case.status = "failed"
            case.reason = one_line(error)


def one_line(error: BaseException) -> str:
    """An error as one line for the user."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "not enough memory"
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"

"""A folder of CT volumes through the pipeline: read, normalise, predict, keep components, write.

One volume is read ahead and one is written behind while the device works on the one between, so at
most three are in memory. The first is read while torch is still being imported.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import nibabel
import numpy as np

from .case import Case
from .components import ComponentSizes, keep_largest_components
from .files import file_identity, one_line, output_key, printable
from .intensity import percentiles
from .label_map import label_map_header, read_label_map
from .labels import LABEL_NAMES
from .memory import MemoryBudget, case_bytes, memory_limit
from .outputs import Outputs
from .phases import PhaseTimer
from .records.flags import find_flags
from .records.manifest import content_info, grid_info
from .records.provenance import Provenance
from .records.statistics import label_statistics
from .sources import Source, files_state
from .volume import VolumeError, header_grid

if TYPE_CHECKING:
    from .prediction import Predictor

STAGES = ("read", "percentiles", "predict", "components", "write")
"""The phases of one case, in order."""


@dataclass
class Service:
    """Segments volumes one after another.

    Attributes:
        outputs: what is written of each case; statistics, previews and flags are of all labels,
            whichever its label map shows.
        make_predictor: imports torch and puts the network on its device; called once, while the
            first volume is being read.
        timer: to which every phase is reported.
        keep_existing: leave a case alone whose whole label map by the same maker is there.
        recorded: what the run's records hold of a case, by its name: its manifest line, as far as
            there is one; None if something asked for is missing, for which a label map that is
            there is read again.
        budget: of memory, which the cases under way share; a case that it can never hold fails.
        network_bytes: what the network takes for a slice, by its pixels and their size, mm.
        with_preview: write a contact sheet `NAME.png` beside each label map.
        with_records: fill `Case.input_info` and `Case.statistics`.
        on_slices: called with a case and the number of its slices just predicted.
        on_case: called with each case when it has ended; from one of two threads.
    """

    outputs: Outputs
    make_predictor: Callable[[], "Predictor"]
    timer: PhaseTimer
    keep_existing: bool = False
    recorded: Callable[[str], dict | None] = lambda name: {}
    budget: MemoryBudget = field(default_factory=lambda: MemoryBudget(memory_limit()))
    network_bytes: Callable[[int, float], int] = lambda pixels, pixel_mm: 0
    with_preview: bool = False
    with_records: bool = False
    on_slices: Callable[[Case, int], None] = lambda case, slices: None
    on_case: Callable[[Case], None] = lambda case: None
    _predicting: bool = field(default=False, init=False)
    _stop: BaseException | None = field(default=None, init=False)

    @property
    def provenance(self) -> Provenance | None:
        """What makes the label maps."""
        return self.outputs.provenance

    def stop(self, error: BaseException) -> bool:
        """Ask to end with an error as soon as the case that is being predicted is written.

        Returns:
            Whether it will; if no case is being predicted there is nothing to wait for.
        """
        if self._predicting:
            self._stop = error
        return self._predicting

    def run(self, sources: list[Source]) -> list[Case]:
        """Segment every volume; a case that fails does not stop the others.

        Args:
            sources: NIfTI files, or DICOM series.

        Returns:
            One `Case` per source, in order, each "done", "kept" or "failed".

        Raises:
            KeyboardInterrupt: raised by a signal's handler; what was being written is whole.
        """
        cases = self.plan(sources)
        waiting = [case for case in cases if case.status == "waiting"]
        if waiting:
            self.segment(waiting)
        return cases

    def segment(self, cases: Iterable[Case]) -> None:
        """Take planned cases through the pipeline until there are no more, each as it comes.

        Args:
            cases: that are "waiting"; asked for the next one, in another thread, as soon as the
                one before is read, and may then take its time.

        Raises:
            KeyboardInterrupt: as `run`.
        """
        reader, writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        case: Case | None = None
        writing: Future | None = None
        unread = iter(cases)
        reading = reader.submit(self._read_next, unread, writer)
        try:
            predictor = self.make_predictor()
            if self.provenance:  # the weights' check sum, while the writer has nothing to do
                writer.submit(lambda: self.provenance.signature)
            while case := reading.result():
                reading = reader.submit(self._read_next, unread, writer)
                self._predicting = True
                self._attempt(case, lambda case: self._predict(case, predictor))
                before, writing, case = writing, writer.submit(self._end, case), None
                self._predicting = False
                if self._stop:
                    raise self._stop
                if before is not None:
                    before.result()  # so that label maps do not pile up behind a slow disk
            predictor.release()  # while the last label map is still being finished
            if writing is not None:
                writing.result()
        finally:
            # A case that was being read or predicted is given up, one that is predicted is written.
            # The reader may wait for the memory of both.
            self._predicting = False
            if case is not None:
                self._drop(case)
            reading.add_done_callback(self._drop_read)
            reader.shutdown(wait=False, cancel_futures=True)
            writer.shutdown()

    def plan(self, sources: list[Source]) -> list[Case]:
        """Name the cases, and settle those that need no work."""
        cases: list[Case] = []
        first: dict[str, Source] = {}
        inputs = {file_identity(file) for source in sources for file in source.files} - {None}
        for source in sources:
            case = Case(source, source.name)
            cases.append(case)
            case.reason = self.outputs.why_not(case, inputs)
            if not case.reason:  # what cannot be read takes no name from a good file
                earlier = first.setdefault(output_key(case.name), source)
                if earlier != source:
                    case.reason = f"same output name as {printable(earlier)}"
            if case.reason:
                case.status = "failed"
            elif self.keep_existing and all(map(os.path.lexists, self.outputs.of(case.name))):
                record = self.recorded(case.name)
                stale = self.outputs.why_stale(case, record)
                if not stale and self.outputs.labels and record is None:
                    stale = "it shows some organs only, and the records of all are missing"
                case.kept = not stale and self.outputs.with_label_map
                if stale:
                    case.warnings.append(f"recomputing: {stale}")
                elif record is not None and self._has_preview(case):
                    case.status = "kept"
            if case.status != "waiting":
                self.on_case(case)
        return cases

    def _has_preview(self, case: Case) -> bool:
        return not self.with_preview or self.outputs.preview(case.name).exists()

    def _read(self, case: Case) -> None:
        case.input_state = files_state(case.source)
        with self.timer.phase("read", case.name):
            case.volume = case.source.read(
                lambda header, size: self._admit(case, header, size),
                (lambda content: case.input_info.update(content_info(content)))
                if self.with_records
                else None,
            )
        case.warnings += case.volume.notes
        label_map_header(case.volume.header)  # or the case fails before it is predicted
        if self.with_records:
            case.input_info.update(grid_info(case.volume))
        case.shape = tuple(int(n) for n in case.volume.header.get_data_shape()[:3])
        with self.timer.phase("percentiles", case.name):
            case.window = percentiles(case.volume.voxels)

    def _admit(self, case: Case, header: nibabel.Nifti1Header, file_bytes: int) -> None:
        """Wait until there is memory for a case.

        Raises:
            ValueError: there never is.
        """
        shape = [int(length) for length in header.get_data_shape()]
        voxels = math.prod(shape)
        spacing = header_grid(header).spacing
        need = case_bytes(file_bytes, voxels, header.get_data_dtype().itemsize)
        # Whichever way the axes run, a slice has no more pixels than this.
        need += self.network_bytes(voxels // min((*shape, 1, 1)[:3]), max(spacing))
        if self.outputs.segmentation:  # of 14 bits a voxel at most, and a copy of the labels
            need += 3 * voxels
        self.budget.take(need)
        case.memory = need

    def _read_next(self, unread: Iterator[Case], writer: ThreadPoolExecutor) -> Case | None:
        """Read on up to a case that can be read, so that bad ones do not use up the read-ahead.

        Returns:
            That case, None at the end; those that failed are ended by the writer.
        """
        for case in unread:
            self._attempt(case, self._read)
            if case.status != "failed":
                return case
            writer.submit(self._end, case)
        return None

    def _predict(self, case: Case, predictor: "Predictor") -> None:
        case.clip_hu = predictor.metadata.clip_hu
        if case.kept:
            case.label_map = read_label_map(self.outputs.label_map(case.name), case.volume)
            return
        with self.timer.phase("predict", case.name):
            case.label_map = predictor.predict(
                case.volume.voxels,
                window=case.window,
                slope=case.volume.slope,
                intercept=case.volume.intercept,
                reduction=predictor.metadata.reduction_at(case.volume.spacing),
                on_slices=lambda count: self.on_slices(case, count),
            )
        if self.with_records and self.provenance:
            made = self.provenance
            case.input_info.update(device=made.device, precision=made.precision)

    def _finish(self, case: Case) -> None:
        if case.kept:
            voxels = np.bincount(case.label_map.ravel(order="K"), minlength=len(LABEL_NAMES))
            voxels[0] = 0
            case.sizes = ComponentSizes(voxels, np.zeros_like(voxels))
        else:
            if files_state(case.source) not in (case.input_state, None):
                raise VolumeError("it changed while it was segmented")
            with self.timer.phase("components", case.name):
                case.sizes = keep_largest_components(case.label_map)
            with self.timer.phase("write", case.name):
                self.outputs.write(case)
        case.status = "kept" if case.kept else "done"
        self._add(case, "flags", self._find_flags)
        if self.with_records:
            self._add(case, "statistics", self._compute_statistics)
        if self.with_preview:
            self._add(case, "preview", self._draw_preview)

    def _find_flags(self, case: Case) -> None:
        case.flags = find_flags(case.label_map, case.sizes, case.volume, case.window, case.clip_hu)

    def _compute_statistics(self, case: Case) -> None:
        case.statistics = label_statistics(case.label_map, case.volume)

    def _draw_preview(self, case: Case) -> None:
        from .records.preview import write_preview  # Pillow, only for those who ask

        write_preview(self.outputs.preview(case.name), case.label_map, case.volume, case.name)

    def _add(self, case: Case, what: str, make: Callable[[Case], None]) -> None:
        """Make what comes with a label map; where that fails the case is done all the same."""
        try:
            make(case)
        except Exception as error:
            case.warnings.append(f"no {what}: {one_line(error)}")

    def _end(self, case: Case) -> None:
        self._attempt(case, self._finish)
        self._drop(case)
        self.on_case(case)

    def _drop_read(self, reading: "Future[Case | None]") -> None:
        """Give back the memory of a case that was read, and that nobody will predict."""
        if not reading.cancelled() and not reading.exception() and (case := reading.result()):
            self._drop(case)

    def _drop(self, case: Case) -> None:
        case.volume = case.label_map = None
        self.budget.give_back(case.memory)
        case.memory = 0

    def _attempt(self, case: Case, step: Callable[[Case], None]) -> None:
        """Take a case one step further; whatever goes wrong fails this case alone."""
        if case.status == "failed":
            return
        try:
            step(case)
        except Exception as error:  # a folder of thousands must not stop at one file's surprise
            case.status = "failed"
            case.reason = one_line(error)
            self._drop(case)

"""The pipeline: volumes are read, normalised, predicted, reduced to components and written.

One volume is read ahead and one is written behind while the device works on the one between, so at
most three are in memory. The first is read while torch is still being imported.
"""

import argparse
import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import nibabel
import numpy as np

from .case import Case, ReadCase
from .components import keep_largest_components
from .files import one_line, output_key, printable
from .intensity import percentiles
from .label_map import label_map_header
from .memory import PROCESS_BYTES, MemoryBudget, case_bytes, memory_limit
from .outputs import Outputs
from .phases import PhaseTimer
from .records.flags import find_flags
from .records.manifest import content_info, grid_info
from .records.statistics import label_statistics
from .sources import Source, files_state
from .volume import VolumeError, header_grid

if TYPE_CHECKING:
    from .loading import NetworkLoader
    from .prediction import Predictor

Result = TypeVar("Result")

STAGES = ("read", "percentiles", "predict", "components", "write")
"""The phases of one case, in order."""


class Observer:
    """What a service asks and calls for each case; this one knows and does nothing."""

    def recorded(self, name: str) -> dict | None:
        """Return the record of a case; None if one is missing that was asked for."""
        return {}

    def on_slices(self, case: Case, count: int, total: int) -> None:
        """Called when so many slices more of a case's total have been predicted."""

    def on_case(self, case: Case) -> None:
        """Called when a case has ended; from one of two threads."""


class Service:
    """Segments volumes one after another.

    Statistics, previews and flags are of all labels, whichever a label map shows. A case that the
    budget of memory can never hold fails.

    Args:
        options: of `parse_arguments`.
        loader: loads the network, once, while the first volume is being read.
        observer: of every case.
        timer: of every phase.
        memory: bytes that the process may take; by default `memory_limit`.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        loader: "NetworkLoader",
        observer: Observer,
        timer: PhaseTimer,
        memory: int | None = None,
    ) -> None:
        self.loader, self.observer, self.timer = loader, observer, timer
        self.outputs = Outputs(options, loader.provenance)
        memory = memory_limit() if memory is None else memory
        self.budget = MemoryBudget(memory - PROCESS_BYTES - loader.host_bytes())
        self._keep_existing: bool = options.keep_existing
        self._with_records = options.statistics is not None or options.manifest is not None
        self._predicting = False
        self._stop: BaseException | None = None

    def stop(self, error: BaseException) -> bool:
        """Ask to end with an error as soon as the case that is being predicted is written.

        Returns:
            Whether it will; if no case is being predicted there is nothing to wait for.
        """
        if self._predicting:
            self._stop = error
        return self._predicting

    def run(self, sources: Sequence[Source]) -> list[Case]:
        """Segment every volume; a case that fails does not stop the others.

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

    def plan(self, sources: Sequence[Source]) -> list[Case]:
        """Name the cases, and end those that need no work."""
        cases = [Case(source, source.name) for source in sources]
        first: dict[str, Source] = {}
        for case in cases:
            case.reason = self.outputs.why_not(case.source)
            if not case.reason:  # what cannot be read takes no name from a good file
                earlier = first.setdefault(output_key(case.name), case.source)
                if earlier != case.source:
                    folded = "" if earlier.name == case.name else ", but for case or accents"
                    case.reason = f"same output name as {printable(earlier)}{folded}"
            if case.reason:
                case.status = "failed"
            elif self._keep_existing and all(map(os.path.lexists, self.outputs.files(case.name))):
                record = self.observer.recorded(case.name)
                stale = self.outputs.why_stale(case, record)
                if not stale and record is not None:
                    case.status = "kept"
                else:
                    case.warnings.append(f"recomputing: {stale or 'its record is missing'}")
            if case.status != "waiting":
                self.observer.on_case(case)
        return cases

    def segment(self, cases: Iterable[Case]) -> None:
        """Run planned cases through the pipeline until there are no more, each as it comes.

        Args:
            cases: that are "waiting"; asked for the next one, in another thread, as soon as the
                one before is read, and may then take its time.
        """
        reader, writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        writing: Future | None = None
        unread = iter(cases)
        reading = reader.submit(self._read_next, unread, writer)
        try:
            predictor = self.loader.predictor
            clip_hu = predictor.metadata.clip_hu
            # The weights' check sum, while the writer has nothing to do.
            writer.submit(lambda: self.outputs.signature)
            while (read := reading.result()) is not None:
                reading = reader.submit(self._read_next, unread, writer)
                self._predicting = True
                label_map = self._attempt(read.case, self._predict, read, predictor)
                before, writing = writing, writer.submit(self._end, read, label_map, clip_hu)
                self._predicting = False
                del read, label_map  # the writer's alone
                if self._stop:
                    raise self._stop
                if before is not None:
                    before.result()  # so that label maps do not pile up behind a slow disk
            predictor.release()  # while the last label map is still being finished
            if writing is not None:
                writing.result()
        finally:
            # A case that was being read or predicted is given up, one that is predicted is written.
            self._predicting = False
            self.budget.close()  # the reader may wait for memory
            reader.shutdown(wait=False, cancel_futures=True)
            writer.shutdown()

    def _read_next(self, unread: Iterator[Case], writer: ThreadPoolExecutor) -> ReadCase | None:
        """Read on up to a case that can be read, so that bad ones do not use up the read-ahead."""
        for case in unread:
            if (read := self._attempt(case, self._read, case)) is not None:
                return read
            writer.submit(self.observer.on_case, case)
        return None

    def _read(self, case: Case) -> ReadCase:
        state, memory = files_state(case.source), 0

        def admit(header: nibabel.Nifti1Header, file_bytes: int) -> None:
            nonlocal memory
            need = self._need(header, file_bytes)
            self.budget.take(need)
            memory = need

        def on_content(content: bytes) -> None:
            if self._with_records:
                case.input_info.update(content_info(content))

        try:
            with self.timer.phase("read", case.name):
                volume = case.source.read(admit, on_content)
            case.warnings += volume.notes
            label_map_header(volume.header)  # or the case fails before it is predicted
            if self._with_records:
                case.input_info.update(grid_info(volume))
            case.shape = tuple(int(n) for n in volume.header.get_data_shape()[:3])
            with self.timer.phase("percentiles", case.name):
                low, high = percentiles(volume.voxels)
        except BaseException:
            self.budget.give_back(memory)
            raise
        return ReadCase(case, volume, (low, high), state, memory)

    def _need(self, header: nibabel.Nifti1Header, file_bytes: int) -> int:
        """Return the bytes of memory that a case needs."""
        shape = [int(length) for length in header.get_data_shape()]
        voxels = math.prod(shape)
        need = case_bytes(file_bytes, voxels, header.get_data_dtype().itemsize)
        # Whichever way the axes run, a slice has no more pixels than this.
        pixels = voxels // min((*shape, 1, 1)[:3])
        need += self.loader.slice_bytes(pixels, max(header_grid(header).spacing))
        if self.outputs.format != "nifti":  # of 14 bits a voxel at most, and a copy of the labels
            need += 3 * voxels
        return need

    def _predict(self, read: ReadCase, predictor: "Predictor") -> np.ndarray:
        case, volume = read.case, read.volume
        reduction = predictor.metadata.reduction_at(volume.spacing)
        count, *size = volume.voxels.shape
        # One lane is in what the case needs.
        more = (predictor.lanes - 1) * predictor.host_bytes(tuple(size), reduction)
        with self.timer.phase("predict", case.name), self.budget.taken_if_free(more) as free:
            label_map = predictor.predict(
                volume.voxels,
                window=read.window,
                slope=volume.slope,
                intercept=volume.intercept,
                reduction=reduction,
                lanes=None if free else 1,
                on_slices=lambda done: self.observer.on_slices(case, done, count),
            )
        if self._with_records:
            made = self.loader.provenance
            case.input_info.update(device=made.device, precision=made.precision)
        return label_map

    def _end(
        self, read: ReadCase, label_map: np.ndarray | None, clip_hu: tuple[float, float] | None
    ) -> None:
        """Write what was predicted, if it was."""
        if label_map is not None:
            self._attempt(read.case, self._finish, read, label_map, clip_hu)
        self.budget.give_back(read.memory)
        self.observer.on_case(read.case)

    def _finish(
        self, read: ReadCase, label_map: np.ndarray, clip_hu: tuple[float, float] | None
    ) -> None:
        case, volume = read.case, read.volume
        if files_state(case.source) not in (read.files_state, None):
            raise VolumeError("it changed while it was segmented")
        with self.timer.phase("components", case.name):
            sizes = keep_largest_components(label_map)
        with self.timer.phase("write", case.name):
            case.warnings += self.outputs.write(case, volume, label_map)
        case.status = "done"
        with _optional(case, "flags"):
            case.flags = find_flags(label_map, sizes, volume, read.window, clip_hu)
        if self._with_records:
            with _optional(case, "statistics"):
                case.statistics = label_statistics(label_map, volume)
        if self.outputs.with_preview:
            with _optional(case, "preview"):
                from .records.preview import write_preview  # Pillow, only for those who ask

                write_preview(self.outputs.preview(case.name), label_map, volume, case.name)

    def _attempt(
        self, case: Case, step: Callable[..., Result], *arguments: object
    ) -> Result | None:
        """Run one step of a case; whatever goes wrong fails this case alone."""
        try:
            return step(*arguments)
        except Exception as error:  # a folder of thousands must not stop at one file's surprise
            case.status, case.reason = "failed", one_line(error)
            return None


@contextlib.contextmanager
def _optional(case: Case, what: str) -> Iterator[None]:
    """Turn what goes wrong beside a label map into a warning."""
    try:
        yield
    except Exception as error:
        case.warnings.append(f"no {what}: {one_line(error)}")

"""A folder of CT volumes through the pipeline: read, normalise, predict, keep components, write.

One volume is read ahead and one is written behind while the device works on the one between, so at
most three are in memory. The first is read while torch is still being imported.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel
import numpy as np

from inference.components import ComponentSizes, keep_largest_components
from inference.files import file_identity, one_line, printable
from inference.flags import Flag, find_flags
from inference.intensity import percentiles
from inference.label_map import (
    is_label_map_of,
    label_map_header,
    only,
    organ_mask_path,
    read_label_map,
    write_label_map,
    write_organ_masks,
)
from inference.labels import LABEL_NAMES
from inference.manifest import describe_content, describe_grid
from inference.memory import MemoryBudget, case_bytes, memory_limit
from inference.phases import PhaseTimer
from inference.provenance import Provenance
from inference.sources import (
    Source,
    read_source,
    source_files,
    source_header,
    source_name,
    source_notes,
    why_not_a_source,
)
from inference.statistics import LabelStatistics, label_statistics
from inference.volume import Volume

if TYPE_CHECKING:
    from inference.dicom.segmentation import SegmentationWriter
    from inference.prediction import Predictor

STAGES = ("read", "percentiles", "predict", "components", "write")
"""The phases of one case, in order."""


@dataclass
class Case:
    """One volume on its way through the pipeline, and afterwards what became of it.

    Attributes:
        path: the volume's file, or its DICOM series.
        name: NAME of `NAME_0000.nii.gz`.
        status: "waiting", then "done", "kept" (its label map was there before) or "failed".
        reason: why it failed, in one line.
        warnings: what else went wrong and costs no label map; why one that was there is made again.
        shape: as the file's header says it, (i, j, k), once read.
        kept: its label map was there before; what is said of it elsewhere may be missing.
        sizes: voxels by label, of the label map and of what was cleared.
        flags: doubts about the label map.
        statistics: of the label map, if asked for.
        about: what a manifest says of the input, if asked for.
        volume, window, label_map: what the stages hand on; dropped when the case ends.
        memory: bytes taken of the budget.
    """

    path: Source
    name: str
    status: str = "waiting"
    reason: str = ""
    warnings: list[str] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    kept: bool = False
    sizes: ComponentSizes | None = None
    flags: list[Flag] = field(default_factory=list)
    statistics: list[LabelStatistics] = field(default_factory=list)
    about: dict = field(default_factory=dict)
    volume: Volume | None = None
    window: tuple[float, ...] = ()
    label_map: np.ndarray | None = None
    memory: int = 0


@dataclass
class Service:
    """Segments volumes one after another.

    Attributes:
        output: folder of the label maps.
        make_predictor: imports torch and puts the network on its device; called once, while the
            first volume is being read.
        timer: to which every phase is reported.
        provenance: what makes the label maps, as their headers say it; None: the program alone.
        keep_existing: leave a case alone whose whole label map by the same maker is there.
        has_records: tells of a case's name whether all that was asked for besides its label map is
            there too; if not, a label map that is kept is read again for it.
        budget: of memory, which the cases under way share; a case that it can never hold fails.
        network_bytes: what the network takes for a slice, by its pixels and their size, mm.
        labels: that label maps show; () for all. Statistics, previews and flags are of all.
        per_organ: write a mask of each label into a folder `NAME` as well.
        with_statistics: compute `Case.statistics`.
        with_preview: write a contact sheet `NAME.png` beside each label map.
        with_about: fill `Case.about`.
        with_label_map: write the label map itself, `NAME.nii.gz`.
        segmentation: writes and knows again `NAME.seg.dcm`, if there is to be one.
        on_slices: called with a case and the number of its slices just predicted.
        on_case: called with each case when it has ended; from one of two threads.
    """

    output: Path
    make_predictor: Callable[[], "Predictor"]
    timer: PhaseTimer
    provenance: Provenance | None = None
    keep_existing: bool = False
    has_records: Callable[[str], bool] = lambda name: True
    budget: MemoryBudget = field(default_factory=lambda: MemoryBudget(memory_limit()))
    network_bytes: Callable[[int, float], int] = lambda pixels, pixel_mm: 0
    labels: tuple[int, ...] = ()
    per_organ: bool = False
    with_statistics: bool = False
    with_preview: bool = False
    with_about: bool = False
    with_label_map: bool = True
    segmentation: "SegmentationWriter | None" = None
    on_slices: Callable[[Case, int], None] = lambda case, slices: None
    on_case: Callable[[Case], None] = lambda case: None
    _predicting: bool = field(default=False, init=False)
    _stop: BaseException | None = field(default=None, init=False)

    @property
    def _maker(self) -> str | None:
        return self.provenance.made_by if self.provenance else None

    @property
    def _masked_labels(self) -> tuple[int, ...]:
        return self.labels or tuple(range(1, len(LABEL_NAMES)))

    def stop(self, error: BaseException) -> bool:
        """Ask to end with an error as soon as the case that is being predicted is written.

        Returns:
            Whether it will; if no case is being predicted there is nothing to wait for.
        """
        if self._predicting:
            self._stop = error
        return self._predicting

    def run(self, paths: list[Source]) -> list[Case]:
        """Segment every volume; a case that fails does not stop the others.

        Args:
            paths: NIfTI files, or DICOM series.

        Returns:
            One `Case` per path, in order, each "done", "kept" or "failed".

        Raises:
            KeyboardInterrupt: raised by a signal's handler; what was being written is whole.
        """
        cases = self.plan(paths)
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
        writing: Future | None = None
        try:
            unread = iter(cases)
            reading = reader.submit(self._read_next, unread, writer)
            predictor = self.make_predictor()
            if self.provenance:  # the weights' check sum, while the writer has nothing to do
                writer.submit(lambda: self.provenance.made_by)
            while case := reading.result():
                reading = reader.submit(self._read_next, unread, writer)
                self._attempt(case, lambda case: self._predict(case, predictor))
                if writing is not None:
                    writing.result()  # so that label maps do not pile up behind a slow disk
                writing = writer.submit(self._end, case)
                if self._stop:
                    raise self._stop
            predictor.release()  # while the last label map is still being finished
            if writing is not None:
                writing.result()
        finally:
            # A case that was being read or predicted is given up; one being written is finished.
            reader.shutdown(wait=False, cancel_futures=True)
            if writing is not None:
                wait([writing])
            writer.shutdown()

    def plan(self, paths: list[Source]) -> list[Case]:
        """Name the cases, and settle those that need no work."""
        cases: list[Case] = []
        first_path: dict[str, Source] = {}
        inputs = {file_identity(file) for path in paths for file in source_files(path)} - {None}
        for path in paths:
            case = Case(path, source_name(path))
            cases.append(case)
            earlier = first_path.setdefault(case.name, path)
            if earlier != path:
                case.reason = f"its output would be that of {printable(earlier.name)}"
            else:
                case.reason = self._why_not(case, inputs)
            if case.reason:
                case.status = "failed"
            elif self.keep_existing and all(map(os.path.lexists, self._outputs(case))):
                damage = self._damage(case)
                if not damage and self.labels and not self.has_records(case.name):
                    damage = "it shows some organs, and what is said of all is missing"
                case.kept = not damage and self.with_label_map
                if damage:
                    case.warnings.append(f"its label map is made again: {damage}")
                elif self.has_records(case.name):
                    case.status = "kept"
            if case.status != "waiting":
                self.on_case(case)
        return cases

    def _why_not(self, case: Case, inputs: set[tuple[int, int]]) -> str:
        """What can be said against a case before it is read, or ""."""
        if reason := why_not_a_source(case.path):
            return reason
        longest = os.pathconf(self.output, "PC_NAME_MAX") if self.output.is_dir() else 255
        for output in self._outputs(case):
            if len(os.fsencode(output.name)) > longest:
                return f"its label map's name would have more than {longest} bytes"
            if file_identity(output) in inputs:
                return f"its label map would replace an input, {printable(output.name)}"
        return ""

    def _outputs(self, case: Case) -> list[Path]:
        """What is written of a case, its preview left out."""
        outputs = [self._output_path(case)] if self.with_label_map else []
        if self.segmentation:
            outputs.append(self._segmentation_path(case))
        if self.per_organ:
            folder = self.output / case.name
            outputs += [organ_mask_path(folder, label) for label in self._masked_labels]
        return outputs

    def _damage(self, case: Case) -> str:
        """Why what is there of a case is not whole, or ""."""
        try:
            header = source_header(case.path)
        except (ValueError, OSError) as error:
            return one_line(error)
        damage = ""
        if self.with_label_map:
            damage = is_label_map_of(self._output_path(case), header, self._maker)
        if not damage and self.segmentation:
            damage = self.segmentation.damage(self._segmentation_path(case), case.path)
        return damage

    def _segmentation_path(self, case: Case) -> Path:
        return self.output / f"{case.name}.seg.dcm"

    def _output_path(self, case: Case) -> Path:
        return self.output / f"{case.name}.nii.gz"

    def _read(self, case: Case) -> None:
        with self.timer.phase("read", case.name):
            case.volume = read_source(
                case.path,
                lambda header, size: self._admit(case, header, size),
                (lambda content: case.about.update(describe_content(content)))
                if self.with_about
                else None,
            )
        case.warnings += source_notes(case.path)
        label_map_header(case.volume.header)  # or the case fails before it is predicted
        if self.with_about:
            case.about.update(describe_grid(case.volume))
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
        steps = [float(step) for step in header.get_zooms()[:3] if math.isfinite(step)]
        need = case_bytes(file_bytes, voxels, header.get_data_dtype().itemsize)
        # Whichever way the axes run, a slice has no more pixels than this.
        need += self.network_bytes(voxels // min((*shape, 1, 1)[:3]), max(steps, default=1.0))
        if self.segmentation:  # of 14 bits a voxel at most, and a copy of the labels
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
        if case.kept:
            case.label_map = read_label_map(self._output_path(case), case.volume)
            return
        self._predicting = True
        try:
            with self.timer.phase("predict", case.name):
                case.label_map = predictor.predict(
                    case.volume.voxels,
                    window=case.window,
                    slope=case.volume.slope,
                    intercept=case.volume.intercept,
                    reduction=predictor.metadata.reduction_at(case.volume.spacing),
                    on_slices=lambda count: self.on_slices(case, count),
                )
        finally:
            self._predicting = False
        if self.with_about and self.provenance:
            made = self.provenance
            case.about.update(device=made.device, precision=made.precision)

    def _finish(self, case: Case) -> None:
        if case.kept:
            voxels = np.bincount(case.label_map.ravel(order="K"), minlength=len(LABEL_NAMES))
            voxels[0] = 0
            case.sizes = ComponentSizes(voxels, np.zeros_like(voxels))
        else:
            with self.timer.phase("components", case.name):
                case.sizes = keep_largest_components(case.label_map)
            with self.timer.phase("write", case.name):
                self._write(case)
        case.status = "kept" if case.kept else "done"
        self._add(case, "flags", self._find_flags)
        if self.with_statistics:
            self._add(case, "statistics", self._compute_statistics)
        if self.with_preview:
            self._add(case, "preview", self._draw_preview)

    def _write(self, case: Case) -> None:
        """Write a case's files, the label map last: where it is, all are."""
        maker = self._maker
        if self.per_organ:
            folder, labels = self.output / case.name, self._masked_labels
            write_organ_masks(folder, case.label_map, case.volume, labels, maker)
        shown = only(self.labels, case.label_map) if self.labels else case.label_map
        if self.segmentation:
            output = self._segmentation_path(case)
            self.segmentation.write(output, shown, case.volume, case.path)
        if self.with_label_map:
            write_label_map(self._output_path(case), shown, case.volume, maker)

    def _find_flags(self, case: Case) -> None:
        case.flags = find_flags(case.label_map, case.sizes, case.volume, case.window)

    def _compute_statistics(self, case: Case) -> None:
        case.statistics = label_statistics(case.name, case.label_map, case.volume, case.flags)

    def _draw_preview(self, case: Case) -> None:
        from inference.preview import write_preview  # Pillow, only for those who ask

        write_preview(self.output / f"{case.name}.png", case.label_map, case.volume, case.name)

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

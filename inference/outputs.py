"""The files of each case: its label map, and what else was asked for."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .case import Case
from .files import check_writable, one_line
from .label_map import select_labels, why_not_label_map_of, write_label_map
from .labels import LABEL_NAMES
from .records.provenance import Provenance
from .sources import Source, why_changed
from .volume import Volume

if TYPE_CHECKING:
    from .dicom.segmentation import SegmentationWriter


class Outputs:
    """The files of each case.

    Args:
        options: of `parse_arguments`.
        provenance: what makes the label maps, for their headers; None: the program alone.
    """

    def __init__(self, options: argparse.Namespace, provenance: Provenance | None = None) -> None:
        self.folder: Path = options.output
        self.format: str = options.format
        self.labels: tuple[int, ...] = options.organs
        self.with_preview: bool = options.preview
        self._per_organ: bool = options.per_organ
        self._provenance = provenance
        self._writer: SegmentationWriter | None = None
        if provenance and self.format != "nifti":
            from .dicom import segmentation

            self._writer = segmentation.SegmentationWriter(options.seg_type, provenance)

    def label_map(self, name: str) -> Path:
        """Return the path of a case's label map."""
        return self.folder / f"{name}.nii.gz"

    def preview(self, name: str) -> Path:
        """Return the path of a case's contact sheet."""
        return self.folder / f"{name}.png"

    def files(self, name: str) -> list[Path]:
        """Return all files of a case."""
        paths = [self.label_map(name)] if self.format != "seg" else []
        if self.format != "nifti":
            paths.append(self._segmentation(name))
        if self._per_organ:
            paths += self._masks(name).values()
        return [*paths, self.preview(name)] if self.with_preview else paths

    def why_not(self, source: Source) -> str:
        """Return why a source cannot be segmented, as far as names show, or ""."""
        if source.refusal:
            return source.refusal
        longest = os.pathconf(self.folder, "PC_NAME_MAX") if self.folder.is_dir() else 255
        if any(len(os.fsencode(path.name)) > longest for path in self.files(source.name)):
            return f"its label map's name would have more than {longest} bytes"
        if set(source.name) & set(':?*"<>|\\'):  # which NTFS, exFAT and CIFS refuse
            try:
                check_writable(self.folder, f".{source.name}")
            except OSError as error:
                return f"its label map's name cannot be written there ({one_line(error)})"
        return ""

    def why_stale(self, case: Case, record: dict | None) -> str:
        """Return why a case's files are not whole or not of its input by this signature, or ""."""
        try:
            header, stale = case.source.header, ""
            if self.format != "seg":
                path = self.label_map(case.name)
                stale = why_not_label_map_of(path, header, self.signature)
            if not stale and self._writer:
                stale = self._writer.why_stale(self._segmentation(case.name), case.source)
            made_ns = min(path.stat().st_mtime_ns for path in self.files(case.name))
            return stale or why_changed(case.source, record, made_ns)
        except (ValueError, OSError) as error:
            return one_line(error)

    def write(self, case: Case, volume: Volume, label_map: np.ndarray) -> list[str]:
        """Write a case's files; the label map also where no SEG can be made.

        Args:
            case: whose they are.
            volume: of the case.
            label_map: (slices, rows, columns), SPL, uint8.

        Returns:
            Warnings.

        Raises:
            VolumeError: no SEG can be made.
            OSError: a file cannot be written.
        """
        if self._per_organ:
            (self.folder / case.name).mkdir(exist_ok=True)
            for label, path in self._masks(case.name).items():
                mask = (label_map == label).view(np.uint8)
                write_label_map(path, mask, volume, self.signature)
        shown = select_labels(label_map, self.labels) if self.labels else label_map
        try:
            if not self._writer:
                return []
            output = self._segmentation(case.name)
            return self._writer.write(output, shown, volume, case.source)
        finally:
            if self.format != "seg":
                write_label_map(self.label_map(case.name), shown, volume, self.signature)

    def _segmentation(self, name: str) -> Path:
        return self.folder / f"{name}.seg.dcm"

    @property
    def signature(self) -> str | None:
        """The signature of each label map."""
        return self._provenance.signature if self._provenance else None

    def _masks(self, name: str) -> dict[int, Path]:
        """Return the paths of a case's masks, such as `NAME/right_kidney.nii.gz`, by label."""
        labels = self.labels or range(1, len(LABEL_NAMES))
        files = {label: LABEL_NAMES[label].replace(" ", "_") for label in labels}
        return {label: self.folder / name / f"{file}.nii.gz" for label, file in files.items()}

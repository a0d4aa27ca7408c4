"""Series of CT written by pydicom, as scanners write them."""

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import gdcm
import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from inference.dicom.discovery import find_series
from inference.dicom.series import Series

INTERCEPT = -1024
IDENTITY = {
    "PatientName": "Doe^Jane",
    "PatientID": "MRN4711",
    "PatientBirthDate": "19700101",
    "AccessionNumber": "ACC0815",
    "ReferringPhysicianName": "Roe^Richard",
}
HU = np.random.default_rng(5).integers(-1000, 1500, (6, 12, 10), np.int16)
"""(slices, rows, columns)."""

_GDCM = {
    JPEGLossless: gdcm.TransferSyntax.JPEGLosslessProcess14,
    JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    JPEG2000Lossless: gdcm.TransferSyntax.JPEG2000Lossless,
    JPEGLSLossless: gdcm.TransferSyntax.JPEGLSLossless,
    RLELossless: gdcm.TransferSyntax.RLELossless,
}


@dataclass
class Grid:
    """Where slices lie: LPS, mm.

    Attributes:
        position: of the first pixel of the first slice.
        orientation: along a row, along a column.
        pixel_mm: between rows, between columns.
        step: from slice to slice.
    """

    position: np.ndarray = field(default_factory=lambda: np.array([-30.0, -40.0, 100.0]))
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0)
    pixel_mm: tuple[float, float] = (1.25, 1.5)
    step: np.ndarray = field(default_factory=lambda: np.array([0.0, 0.0, 4.0]))

    @classmethod
    def of_affine(cls, affine: np.ndarray) -> "Grid":
        """Return the grid of a NIfTI affine: its first axis becomes the columns, the next rows."""
        lps = np.diag([-1, -1, 1]) @ affine[:3]
        lengths = np.linalg.norm(lps[:, :2], axis=0)
        unit = lps[:, :2] / lengths
        pixel_mm = (float(lengths[1]), float(lengths[0]))
        return cls(lps[:, 3], (*unit[:, 0], *unit[:, 1]), pixel_mm, lps[:, 2])

    def at(self, index: int) -> list[float]:
        """Return the position of a slice."""
        return [float(np.round(n, 6)) for n in self.position + index * np.asarray(self.step)]


def header(seed: int = 0, **attributes) -> Dataset:
    """Return what the files of one series have in common; None leaves an attribute out."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    uids = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
    defaults = {
        **IDENTITY, **{uid: generate_uid(entropy_srcs=[uid, str(seed)]) for uid in uids},
        "SOPClassUID": CTImageStorage, "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "Modality": "CT", "Manufacturer": "test", "PatientSex": "F", "StudyDate": "20200101",
        "StudyTime": "120000", "StudyID": "1", "PositionReferenceIndicator": "", "SeriesNumber": 3,
        "SeriesDescription": "Abdomen 5.0 Doe", "AcquisitionNumber": 1, "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16,
        "HighBit": 15, "PixelRepresentation": 1, "KVP": 120,
    }  # fmt: skip
    for keyword, value in (defaults | attributes).items():
        if value is not None:
            setattr(dataset, keyword, value)
    return dataset


def single_slices(hu: np.ndarray, grid: Grid | None = None, **attributes) -> list[Dataset]:
    """Return a data set for each slice, in order.

    Args:
        hu: (slices, rows, columns), int16.
        grid: where they lie.
        attributes: of all, and `seed`, as `header` takes them.
    """
    grid, slices = grid or Grid(), []
    for index, pixels in enumerate(hu):
        dataset = header(**attributes)
        dataset.SOPInstanceUID = generate_uid(entropy_srcs=[dataset.SeriesInstanceUID, str(index)])
        dataset.InstanceNumber = index + 1
        dataset.SliceThickness = float(np.round(np.linalg.norm(grid.step), 6))
        dataset.ImagePositionPatient = grid.at(index)
        dataset.ImageOrientationPatient = [float(np.round(n, 9)) for n in grid.orientation]
        dataset.PixelSpacing = [float(np.round(n, 6)) for n in grid.pixel_mm]
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, INTERCEPT
        _set_pixels(dataset, pixels)
        slices.append(dataset)
    return slices


def _set_pixels(dataset: Dataset, hu: np.ndarray) -> None:
    dataset.Rows, dataset.Columns = hu.shape[-2:]
    dataset.PixelData = (hu - INTERCEPT).astype("<i2").tobytes()
    dataset["PixelData"].VR = "OW"


def item_of(**attributes) -> list[Dataset]:
    """Return a sequence of one item."""
    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return [item]


def enhanced(hu: np.ndarray, order: list[int] | None = None, **attributes) -> Dataset:
    """Return one data set of many frames, on the default grid; `order` of the slices as frames."""
    grid, order = Grid(), order or list(range(len(hu)))
    dataset = header(**attributes)
    dataset.SOPClassUID = EnhancedCTImageStorage
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[dataset.SeriesInstanceUID, "all"])
    dataset.InstanceNumber, dataset.NumberOfFrames = 1, len(hu)
    dataset.SharedFunctionalGroupsSequence = item_of(
        PixelMeasuresSequence=item_of(
            PixelSpacing=list(grid.pixel_mm), SliceThickness=float(np.linalg.norm(grid.step))
        ),
        PlaneOrientationSequence=item_of(ImageOrientationPatient=list(grid.orientation)),
        PixelValueTransformationSequence=item_of(
            RescaleSlope=1, RescaleIntercept=INTERCEPT, RescaleType="HU"
        ),
    )
    dataset.PerFrameFunctionalGroupsSequence = [
        item_of(
            PlanePositionSequence=item_of(ImagePositionPatient=grid.at(index)),
            FrameContentSequence=item_of(FrameAcquisitionNumber=1),
        )[0]
        for index in order
    ]
    _set_pixels(dataset, hu[order])
    return dataset


def to_bytes(dataset: Dataset) -> bytes:
    """Return a file's content."""
    content = BytesIO()
    pydicom.dcmwrite(content, dataset, enforce_file_format=True)
    return content.getvalue()


def write(folder: Path, datasets: list[Dataset], seed: int | None = 0) -> list[Path]:
    """Write the files, named in a random order; return their paths in that of the data sets."""
    folder.mkdir(parents=True, exist_ok=True)
    names = np.random.default_rng(seed).permutation(len(datasets))
    paths = [folder / f"IM{name:04}" for name in names]
    for path, dataset in zip(paths, datasets, strict=True):
        path.write_bytes(to_bytes(dataset))
    return paths


def found_in(folder: Path, datasets: list[Dataset] = ()) -> list[Series]:
    """Write files into a folder, and return the series that are found there."""
    write(folder, datasets)
    return find_series(folder)[0]


def recoded(dataset: Dataset, syntax: str, folder: Path) -> Dataset:
    """Return a data set in another transfer syntax; it is compressed by GDCM, in files."""
    if syntax not in _GDCM:
        if syntax == ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()
        dataset.file_meta.TransferSyntaxUID = syntax
        return dataset
    path = folder / "recoded.dcm"
    path.write_bytes(to_bytes(dataset))
    reader, writer = gdcm.ImageReader(), gdcm.ImageWriter()
    change = gdcm.ImageChangeTransferSyntax()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(_GDCM[syntax]))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    assert writer.Write()
    dataset.PixelData = pydicom.dcmread(path).PixelData  # GDCM rewrites positions of frames
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = syntax
    path.unlink()
    return dataset

"""Series of CT written by pydicom, as scanners write them."""

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import gdcm
import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_encoder
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

INTERCEPT = -1024

_GDCM = {
    JPEGLossless: gdcm.TransferSyntax.JPEGLosslessProcess14,
    JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    JPEG2000Lossless: gdcm.TransferSyntax.JPEG2000Lossless,
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
        """Of a NIfTI affine: its first axis becomes the columns, its second the rows."""
        lps = np.diag([-1, -1, 1]) @ affine[:3]
        lengths = np.linalg.norm(lps[:, :2], axis=0)
        unit = lps[:, :2] / lengths
        pixel_mm = (float(lengths[1]), float(lengths[0]))
        return cls(lps[:, 3], (*unit[:, 0], *unit[:, 1]), pixel_mm, lps[:, 2])


def header(seed: int = 0, **attributes) -> Dataset:
    """What the files of one series have in common."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = CTImageStorage
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.Modality = "CT"
    dataset.Manufacturer = "test"
    dataset.PatientName = "Doe^Jane"
    dataset.PatientID = "MRN4711"
    dataset.PatientBirthDate = "19700101"
    dataset.PatientSex = "F"
    dataset.StudyDate = "20200101"
    dataset.StudyTime = "120000"
    dataset.AccessionNumber = "ACC0815"
    dataset.ReferringPhysicianName = "Roe^Richard"
    dataset.StudyID = "1"
    dataset.StudyInstanceUID = generate_uid(entropy_srcs=["study", str(seed)])
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=["series", str(seed)])
    dataset.FrameOfReferenceUID = generate_uid(entropy_srcs=["frame", str(seed)])
    dataset.PositionReferenceIndicator = ""
    dataset.SeriesNumber = 3
    dataset.SeriesDescription = "Abdomen 5.0 Doe"
    dataset.AcquisitionNumber = 1
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 1
    dataset.KVP = 120
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def single_slices(hu: np.ndarray, grid: Grid | None = None, **attributes) -> list[Dataset]:
    """A data set for each slice, in order.

    Args:
        hu: (slices, rows, columns), int16.
        grid: where they lie.
    """
    grid, slices = grid or Grid(), []
    for index, pixels in enumerate(hu):
        dataset = header(**attributes)
        dataset.SOPInstanceUID = generate_uid(entropy_srcs=[dataset.SeriesInstanceUID, str(index)])
        dataset.InstanceNumber = index + 1
        dataset.SliceThickness = float(np.round(np.linalg.norm(grid.step), 6))
        dataset.ImagePositionPatient = [
            float(np.round(n, 6)) for n in np.add(grid.position, index * np.asarray(grid.step))
        ]
        dataset.ImageOrientationPatient = [float(np.round(n, 9)) for n in grid.orientation]
        dataset.PixelSpacing = [float(np.round(n, 6)) for n in grid.pixel_mm]
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, INTERCEPT
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.PixelData = (pixels - INTERCEPT).astype("<i2").tobytes()
        dataset["PixelData"].VR = "OW"
        slices.append(dataset)
    return slices


def enhanced(
    hu: np.ndarray, grid: Grid | None = None, order: list[int] | None = None, **attributes
):
    """One data set of many frames.

    Args:
        order: of the slices as frames.
    """
    grid = grid or Grid()
    order = list(range(len(hu))) if order is None else order
    dataset = header(**attributes)
    dataset.SOPClassUID = EnhancedCTImageStorage
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[dataset.SeriesInstanceUID, "all"])
    dataset.InstanceNumber = 1
    dataset.NumberOfFrames = len(hu)
    dataset.Rows, dataset.Columns = hu.shape[1:]
    shared, measures, plane, values = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = list(grid.pixel_mm)
    measures.SliceThickness = float(np.linalg.norm(grid.step))
    plane.ImageOrientationPatient = list(grid.orientation)
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 1, INTERCEPT, "HU"
    shared.PixelMeasuresSequence = [measures]
    shared.PlaneOrientationSequence = [plane]
    shared.PixelValueTransformationSequence = [values]
    dataset.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for index in order:
        group, place, content = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = list(map(float, grid.position + index * grid.step))
        content.FrameAcquisitionNumber = 1
        group.PlanePositionSequence = [place]
        group.FrameContentSequence = [content]
        groups.append(group)
    dataset.PerFrameFunctionalGroupsSequence = groups
    dataset.PixelData = (hu[order] - INTERCEPT).astype("<i2").tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


def to_bytes(dataset: Dataset) -> bytes:
    """A file's content."""
    content = BytesIO()
    pydicom.dcmwrite(content, dataset, enforce_file_format=True)
    return content.getvalue()


def write(folder: Path, datasets: list[Dataset], seed: int | None = 0) -> list[Path]:
    """Write the files, named in an order that says nothing.

    Returns:
        Their paths, in the order of the data sets.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = np.random.default_rng(seed).permutation(len(datasets))
    paths = [folder / f"IM{name:04}" for name in names]
    for path, dataset in zip(paths, datasets, strict=True):
        path.write_bytes(to_bytes(dataset))
    return paths


def _by_gdcm(content: bytes, syntax: str, folder: Path) -> Dataset:
    """A data set compressed by GDCM, which goes by files."""
    plain, packed = folder / "plain.dcm", folder / "packed.dcm"
    plain.write_bytes(content)
    reader, change, writer = (
        gdcm.ImageReader(),
        gdcm.ImageChangeTransferSyntax(),
        gdcm.ImageWriter(),
    )
    reader.SetFileName(str(plain))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(_GDCM[syntax]))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(packed))
    assert writer.Write()
    dataset = pydicom.dcmread(packed)
    plain.unlink(), packed.unlink()
    return dataset


def recoded(dataset: Dataset, syntax: str, folder: Path) -> Dataset:
    """The same in another transfer syntax."""
    if syntax in _GDCM:
        return _by_gdcm(to_bytes(dataset), syntax, folder)
    if syntax in (RLELossless, JPEGLSLossless):
        encoder = get_encoder(syntax)
        count = int(dataset.get("NumberOfFrames", 1))
        frames = [encoder.encode(dataset, index=index) for index in range(count)]
        dataset.PixelData = encapsulate(frames)
        dataset["PixelData"].VR = "OB"
    elif syntax == ExplicitVRBigEndian:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()
    dataset.file_meta.TransferSyntaxUID = syntax
    return dataset

"""Series written by pydicom, read back as the NIfTI file of the same phantom is."""

from io import BytesIO

import nibabel
import numpy as np
import pydicom
import pytest
from conftest import ORIENTATIONS, RAS_AFFINE, reoriented, save_nifti
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from inference.dicom.discovery import find_series
from inference.dicom.pixels import Decoder, DecoderError
from inference.volume import VolumeError, read_volume
from tests.inference.dicom.writing import Grid, enhanced, recoded, single_slices, to_bytes, write

HU = np.random.default_rng(5).integers(-1000, 1500, (6, 12, 10), np.int16)
"""(slices, rows, columns)."""


def only(folder):
    (series,) = find_series(folder).series
    return series


def in_hu(volume):
    return volume.slope * volume.voxels.astype(np.float64) + volume.intercept


def positions(volume):
    """RAS of the first voxel and of its three neighbours, of the SPL array."""
    corners = np.array([(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
    shape = np.array(volume.voxels.shape)
    stored = np.empty_like(corners)
    for axis, (disk, flip) in enumerate(zip(volume.disk_axes, volume.disk_flips, strict=True)):
        places = corners[:, axis]
        stored[:, disk] = shape[axis] - 1 - places if flip else places
    return nibabel.affines.apply_affine(volume.affine, stored)


def same(series_volume, nifti_volume):
    np.testing.assert_array_equal(in_hu(series_volume), in_hu(nifti_volume))
    np.testing.assert_allclose(positions(series_volume), positions(nifti_volume), atol=1e-4)
    np.testing.assert_allclose(series_volume.spacing, nifti_volume.spacing, rtol=1e-5)


OBLIQUE = nibabel.affines.from_matvec(
    nibabel.eulerangles.euler2mat(0.1, 0.2, 0.3) @ RAS_AFFINE[:3, :3], RAS_AFFINE[:3, 3]
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("affine", "orientations"),
    [(RAS_AFFINE, ORIENTATIONS), (OBLIQUE, ORIENTATIONS[::5])],
    ids=["straight", "oblique"],
)
def test_every_order_of_axes_is_read_as_its_nifti(tmp_path, ct, affine, orientations):
    for index, orientation in enumerate(orientations):
        turned, turned_affine = reoriented(ct[:9, :8, :7], affine, orientation)
        folder = tmp_path / f"o{index}"
        write(folder, single_slices(turned.transpose(2, 1, 0), Grid.of_affine(turned_affine)))
        nifti = save_nifti(tmp_path / f"o{index}.nii", turned, turned_affine)
        same(only(folder).read(), read_volume(nifti))


@pytest.mark.slow
def test_the_label_map_is_that_of_the_nifti(folders, run, ct, tmp_path):
    inputs, outputs = folders
    chosen = ORIENTATIONS[::9]
    for index, orientation in enumerate(chosen):
        turned, affine = reoriented(ct[:, :, :7], RAS_AFFINE, orientation)
        slices = single_slices(turned.transpose(2, 1, 0), Grid.of_affine(affine), seed=index)
        write(inputs / f"o{index}", slices)
    assert run("--quiet", "--names", "folder") == 0
    niftis = tmp_path / "niftis"
    niftis.mkdir()
    save_nifti(niftis / "a_0000.nii.gz", ct[:, :, :7], RAS_AFFINE)
    assert run("--quiet", "--input", str(niftis)) == 0
    wanted = nibabel.as_closest_canonical(nibabel.load(outputs / "a.nii.gz"))
    assert len(np.unique(np.asanyarray(wanted.dataobj))) > 5
    for index in range(len(chosen)):
        found = nibabel.as_closest_canonical(nibabel.load(outputs / f"o{index}.nii.gz"))
        np.testing.assert_allclose(found.affine, wanted.affine, atol=1e-4)
        np.testing.assert_array_equal(
            np.asanyarray(found.dataobj), np.asanyarray(wanted.dataobj), str(index)
        )


def nifti_of(tmp_path, hu=HU):
    """The NIfTI file of slices on the default grid, which runs toward left, posterior, superior."""
    affine = np.diag([-1.5, -1.25, 4, 1])
    affine[:3, 3] = 30, 40, 100
    return read_volume(save_nifti(tmp_path / "of.nii", hu.transpose(2, 1, 0), affine))


def test_slices_are_sorted_by_position_alone(tmp_path):
    slices = single_slices(HU)
    for number, dataset in zip((4, 1, 6, 2, 5, 3), slices, strict=True):
        dataset.InstanceNumber = number
        dataset.SliceLocation = -number
    write(tmp_path / "s", slices[::-1])
    same(only(tmp_path / "s").read(), nifti_of(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        pytest.param(RLELossless, marks=pytest.mark.slow),
        JPEGLossless,
        JPEGLosslessSV1,
        JPEGLSLossless,
        JPEG2000Lossless,
    ],
    ids=lambda syntax: syntax.name.split(" (")[0],
)
def test_transfer_syntaxes(tmp_path, syntax):
    write(tmp_path / "s", [recoded(dataset, syntax, tmp_path) for dataset in single_slices(HU)])
    same(only(tmp_path / "s").read(), nifti_of(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("syntax", [None, RLELossless], ids=["native", "RLE"])
def test_a_file_of_many_frames(tmp_path, syntax):
    dataset = enhanced(HU, order=[3, 0, 5, 1, 4, 2])
    write(tmp_path / "s", [recoded(dataset, syntax, tmp_path) if syntax else dataset])
    same(only(tmp_path / "s").read(), nifti_of(tmp_path))


def test_a_file_without_preamble(tmp_path):
    for number, dataset in enumerate(single_slices(HU)):
        del dataset.file_meta
        pydicom.dcmwrite(tmp_path / f"{number}.ima", dataset, implicit_vr=True, little_endian=True)
    same(only(tmp_path).read(), nifti_of(tmp_path))


def test_one_slice_is_as_thick_as_its_header_says(tmp_path):
    write(tmp_path / "s", single_slices(HU[:1]))
    same(only(tmp_path / "s").read(), nifti_of(tmp_path, HU[:1]))
    dataset = single_slices(HU[:1])[0]
    del dataset.SliceThickness
    write(tmp_path / "t", [dataset])
    with pytest.raises(VolumeError, match="neither its thickness nor its spacing"):
        only(tmp_path / "t").read()


@pytest.mark.parametrize("slope", [2, 0.5])
def test_rescale_may_differ_from_slice_to_slice(tmp_path, slope):
    slices = single_slices(HU)
    wanted = HU.astype(float)
    for dataset, pixels in list(zip(slices, HU, strict=True))[::2]:
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, 7
        pixels = pixels.astype(float)
        wanted[dataset.InstanceNumber - 1] = slope * (pixels + 1024) + 7
    write(tmp_path / "s", slices)
    volume = only(tmp_path / "s").read()
    np.testing.assert_array_equal(in_hu(volume), wanted)
    assert (volume.slope, volume.intercept) == (1, 0)


def test_bits_that_are_not_stored_do_not_count(tmp_path):
    """Twelve of sixteen bits, an overlay in the other four, as old scanners left it."""
    slices = single_slices(HU)
    for dataset in slices:
        stored = np.frombuffer(dataset.PixelData, "<u2") | 0x9000
        dataset.PixelData = stored.tobytes()
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, 0
    write(tmp_path / "s", slices)
    same(only(tmp_path / "s").read(), nifti_of(tmp_path))


def test_a_tilted_gantry_is_sheared_and_not_bent(tmp_path):
    tilt = np.radians(18)
    grid = Grid(orientation=(1, 0, 0, 0, np.cos(tilt), -np.sin(tilt)))
    slices = single_slices(HU, grid)
    write(tmp_path / "s", slices)
    series = only(tmp_path / "s")
    volume = series.read()
    np.testing.assert_array_equal(in_hu(volume), HU)
    for place, dataset in enumerate(slices):
        left, posterior, superior = dataset.ImagePositionPatient
        found = nibabel.affines.apply_affine(volume.affine, (0, 0, place))
        np.testing.assert_allclose(found, (-left, -posterior, superior), atol=1e-4)
    voxel = abs(np.linalg.det(volume.affine[:3, :3]))
    assert np.prod(volume.spacing) == pytest.approx(voxel, rel=1e-6)
    assert volume.header["qform_code"] == 0 and volume.header["sform_code"] == 1
    assert "18.0 degrees" in series.notes[0] and "sheared" in series.notes[0]


def moved(index, by):
    def change(slices):
        position = np.array(slices[index].ImagePositionPatient, float) + by
        slices[index].ImagePositionPatient = list(map(float, position))

    return change


def set_in(index, **attributes):
    def change(slices):
        for keyword, value in attributes.items():
            if value is None:
                delattr(slices[index], keyword)
            else:
                setattr(slices[index], keyword, value)

    return change


def dropped(slices):
    del slices[2]


def doubled(slices):
    again = pydicom.dcmread(BytesIO(to_bytes(slices[3])))
    again.SOPInstanceUID = generate_uid()
    slices.append(again)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dropped, "1 of its slices are missing: 8.00 mm between instance 2 and instance 4"),
        (doubled, "lie where another does"),
        (moved(3, (0, 0, 1.5)), "2.50 to 5.50 mm apart"),
        (moved(5, (0, 0, 400)), "missing"),
        (moved(3, (0, 3, 0)), "do not lie in a line"),
        (moved(5, (0, 2, 0)), "do not lie in a line"),
        (set_in(2, ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), "differ in orientation: 5 of 1/0"),
        (set_in(2, PixelSpacing=[1.25, 1.6]), "differ in pixel spacing"),
        (set_in(2, PixelSpacing=[1.0, 1.5]), "differ in pixel spacing: 5 of 1.25"),
        (set_in(2, PixelSpacing=[0, 1.5]), "not more than 0"),
        (set_in(2, Rows=11), "differ in size: 5 of 10x12, 1 of 10x11"),
        (set_in(2, RescaleSlope=None), "instance 3: no rescale slope"),
        (set_in(2, RescaleSlope=0), "rescale slope 0"),
        *((set_in(2, RescaleType=value), "") for value in (
            *("US", "HU", "hu", "HOUNSFIELD", "Houndsfield Unit", "Hounsfield Units", "HU_MOD"),
        )),
        *((set_in(2, RescaleType=value), value) for value in ("MGML", "ED", "Z_EFF", "normalized")),
        (set_in(2, RescaleType="Doe"), "wrong"),
        (set_in(2, HighBit=14), "HighBit 14"),
        (set_in(2, PhotometricInterpretation="MONOCHROME1"), "not MONOCHROME2"),
        (set_in(2, SamplesPerPixel=3), "colours"),
        (set_in(2, PixelSpacing=None), "no pixel spacing"),
        (set_in(2, ImageOrientationPatient=None), "no orientation"),
        (set_in(2, NumberOfFrames=2), "several frames"),
        (set_in(2, BitsAllocated=12), "16 of 12 bits"),
        (set_in(2, PixelData=b"\0\0"), "the pixels of instance 3 cannot be read"),
        (set_in(2, PixelData=None), "the pixels of instance 3 cannot be read"),
    ],
)  # fmt: skip
def test_what_makes_no_volume_is_refused_in_a_line(tmp_path, change, words):
    slices = single_slices(HU)
    change(slices)
    write(tmp_path / "s", slices)
    series = only(tmp_path / "s")
    if not words:
        series.read()
        return
    with pytest.raises(VolumeError) as caught:
        series.read()
    assert words in str(caught.value) and "Doe" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_positions_rounded_by_a_scanner_are_read(tmp_path):
    grid = Grid(step=np.array([0, 0, 0.625]))
    slices = single_slices(HU, grid)
    for dataset in slices:
        dataset.ImagePositionPatient = [round(float(n), 1) for n in dataset.ImagePositionPatient]
    write(tmp_path / "s", slices)
    np.testing.assert_array_equal(in_hu(only(tmp_path / "s").read()), HU)


@pytest.mark.slow
def test_damaged_compressed_pixels_cost_their_series_alone(tmp_path):
    slices = [recoded(one, JPEGLosslessSV1, tmp_path) for one in single_slices(HU)]
    content = bytearray(slices[2].PixelData)
    content[40:60] = bytes(20)
    slices[2].PixelData = bytes(content)
    write(tmp_path / "bad", slices)
    write(tmp_path / "good", single_slices(HU, seed=1))
    bad, good = sorted(find_series(tmp_path, "folder").series, key=lambda one: one.name)
    with pytest.raises(VolumeError, match="the pixels of instance 3 cannot be read"):
        bad.read()
    same(good.read(), nifti_of(tmp_path))


@pytest.mark.slow
def test_a_decoder_that_crashes_is_started_anew():
    decoder = Decoder()
    options = {"rows": 2, "columns": 2, "transfer_syntax": JPEG2000Lossless}
    with pytest.raises(DecoderError):
        decoder.decode(b"", options)
    decoder._process.kill()
    decoder._process.wait()
    with pytest.raises(DecoderError, match="crashed"):
        decoder.decode(b"", options)
    with pytest.raises(DecoderError) as caught:
        decoder.decode(b"", options)
    assert "crashed" not in str(caught.value)
    decoder.close()

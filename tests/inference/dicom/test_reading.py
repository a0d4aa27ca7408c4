"""Series written by pydicom, read back as the NIfTI file of the same phantom is."""

import copy

import nibabel
import numpy as np
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
)

from inference.dicom.pixels import Decoder, DecoderError
from inference.volume import VolumeError, read_volume
from tests.inference.dicom.writing import HU, Grid, enhanced, found_in, recoded, single_slices


def read(folder, datasets):
    (series,) = found_in(folder, datasets)
    return series.read()


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


def assert_same(volume, nifti_volume):
    np.testing.assert_array_equal(in_hu(volume), in_hu(nifti_volume))
    np.testing.assert_allclose(positions(volume), positions(nifti_volume), atol=1e-4)
    np.testing.assert_allclose(volume.spacing, nifti_volume.spacing, rtol=1e-5)


def assert_is_phantom(volume, tmp_path, hu=HU):
    """Against the NIfTI file of slices on the default grid, toward left, posterior, superior."""
    affine = np.diag([-1.5, -1.25, 4, 1])
    affine[:3, 3] = 30, 40, 100
    assert_same(volume, read_volume(save_nifti(tmp_path / "of.nii", hu.transpose(2, 1, 0), affine)))


OBLIQUE = nibabel.affines.from_matvec(
    nibabel.eulerangles.euler2mat(0.1, 0.2, 0.3) @ RAS_AFFINE[:3, :3], RAS_AFFINE[:3, 3]
)


@pytest.mark.slow
@pytest.mark.parametrize(("affine", "every"), [(RAS_AFFINE, 1), (OBLIQUE, 5)])
def test_every_order_of_axes_is_read_as_its_nifti(tmp_path, ct, affine, every):
    for index, orientation in enumerate(ORIENTATIONS[::every]):
        turned, turned_affine = reoriented(ct[:9, :8, :7], affine, orientation)
        slices = single_slices(turned.transpose(2, 1, 0), Grid.of_affine(turned_affine))
        nifti = save_nifti(tmp_path / f"o{index}.nii", turned, turned_affine)
        assert_same(read(tmp_path / f"o{index}", slices), read_volume(nifti))


@pytest.mark.slow
def test_the_label_map_is_that_of_the_nifti(folders, run, ct, tmp_path):
    inputs, outputs = folders
    turned, affine = reoriented(ct[:, :, :7], OBLIQUE, ORIENTATIONS[9])
    found_in(inputs / "o", single_slices(turned.transpose(2, 1, 0), Grid.of_affine(affine)))
    (tmp_path / "niftis").mkdir()
    save_nifti(tmp_path / "niftis" / "a_0000.nii.gz", turned, affine)
    assert run("--quiet", "--names", "folder") == 0
    assert run("--quiet", "--input", str(tmp_path / "niftis")) == 0
    found, wanted = (
        nibabel.as_closest_canonical(nibabel.load(outputs / f"{name}.nii.gz")) for name in "oa"
    )
    assert len(np.unique(wanted.get_fdata())) > 5
    np.testing.assert_allclose(found.affine, wanted.affine, atol=1e-4)
    np.testing.assert_array_equal(found.get_fdata(), wanted.get_fdata())


def test_slices_are_sorted_by_position_alone(tmp_path):
    slices = single_slices(HU)
    for number, dataset in zip((4, 1, 6, 2, 5, 3), slices, strict=True):
        dataset.InstanceNumber, dataset.SliceLocation = number, -number
    assert_is_phantom(read(tmp_path / "s", slices[::-1]), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "syntax",
    [
        *(ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian),
        *(RLELossless, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless),
    ],
    ids=lambda syntax: syntax.name.split(" (")[0],
)
def test_transfer_syntaxes(tmp_path, syntax):
    slices = [recoded(dataset, syntax, tmp_path) for dataset in single_slices(HU)]
    assert_is_phantom(read(tmp_path / "s", slices), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, RLELossless], ids=["native", "RLE"])
def test_a_file_of_many_frames(tmp_path, syntax):
    dataset = recoded(enhanced(HU, order=[3, 0, 5, 1, 4, 2]), syntax, tmp_path)
    assert_is_phantom(read(tmp_path / "s", [dataset]), tmp_path)


def test_one_slice_is_as_thick_as_its_header_says(tmp_path):
    (dataset,) = single_slices(HU[:1])
    assert_is_phantom(read(tmp_path / "s", [dataset]), tmp_path, HU[:1])
    del dataset.SliceThickness
    with pytest.raises(VolumeError, match="SliceThickness"):
        read(tmp_path / "t", [dataset])


@pytest.mark.parametrize("slope", [2, 0.5])
def test_rescale_may_differ_from_slice_to_slice(tmp_path, slope):
    slices, wanted = single_slices(HU), HU.astype(float)
    for dataset, pixels in list(zip(slices, wanted, strict=True))[::2]:
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, 7
        pixels[:] = slope * (pixels + 1024) + 7
    assert_is_phantom(read(tmp_path / "s", slices), tmp_path, wanted)


def test_bits_that_are_not_stored_are_ignored(tmp_path):
    """Twelve of sixteen bits, an overlay in the other four, as old scanners left it."""
    slices = single_slices(HU, BitsStored=12, HighBit=11, PixelRepresentation=0)
    for dataset in slices:
        dataset.PixelData = (np.frombuffer(dataset.PixelData, "<u2") | 0x9000).tobytes()
    assert_is_phantom(read(tmp_path / "s", slices), tmp_path)


def test_positions_rounded_by_a_scanner_are_read(tmp_path):
    slices = single_slices(HU, Grid(step=np.array([0, 0, 0.625])))
    for dataset in slices:
        dataset.ImagePositionPatient = [round(float(n), 1) for n in dataset.ImagePositionPatient]
    np.testing.assert_array_equal(in_hu(read(tmp_path / "s", slices)), HU)


def test_a_tilted_gantry_is_sheared_and_not_resampled(tmp_path):
    tilt = np.radians(18)
    slices = single_slices(HU, Grid(orientation=(1, 0, 0, 0, np.cos(tilt), -np.sin(tilt))))
    (series,) = found_in(tmp_path / "s", slices)
    volume = series.read()
    np.testing.assert_array_equal(in_hu(volume), HU)
    for place, dataset in enumerate(slices):
        left, posterior, superior = dataset.ImagePositionPatient
        found = nibabel.affines.apply_affine(volume.affine, (0, 0, place))
        np.testing.assert_allclose(found, (-left, -posterior, superior), atol=1e-4)
    voxel = abs(np.linalg.det(volume.affine[:3, :3]))
    assert np.prod(volume.spacing) == pytest.approx(voxel, rel=1e-6)
    assert volume.header["qform_code"] == 0 and volume.header["sform_code"] == 1
    assert len(series.notes) == 1 and "18.0" in series.notes[0]


@pytest.mark.parametrize(
    "spelling", ["US", "HU", "hu", "HOUNSFIELD", "Houndsfield Unit", "Hounsfield Units", "HU_MOD"]
)
def test_spellings_of_hounsfield_units(tmp_path, spelling):
    slices = single_slices(HU, RescaleType=spelling)
    assert_is_phantom(read(tmp_path / "s", slices), tmp_path)


def moved(index, by):
    """Move a slice."""

    def change(slices):
        slices[index].ImagePositionPatient = [
            float(n) for n in np.add(slices[index].ImagePositionPatient, by)
        ]

    return change


def changed(**attributes):
    """Change attributes of the third slice; None removes one."""

    def change(slices):
        for keyword, value in attributes.items():
            if value is None:
                delattr(slices[2], keyword)
            else:
                setattr(slices[2], keyword, value)

    return change


def doubled(slices):
    slices.append(copy.deepcopy(slices[3]))
    slices[-1].SOPInstanceUID = "1.2.3"


REFUSED = {
    "missing": (lambda slices: slices.pop(2), "1 .* 8.00 .* 2 .* 4, 4.00"),
    "doubled": (doubled, "1 .* 4"),
    "uneven": (moved(3, (0, 0, 1.5)), "2.50 .* 5.50"),
    "far": (moved(5, (0, 0, 400)), "100 .* 404.00"),
    "aside": (moved(3, (0, 3, 0)), "3.0"),
    "last aside": (moved(5, (0, 2, 0)), "1.6"),
    **{
        f"{list(attributes.items())}": (changed(**attributes), words)
        for attributes, words in (
            ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "ImageOrientationPatient.* 5.* 1"),
            ({"ImageOrientationPatient": None}, "3: ImageOrientationPatient"),
            ({"PixelSpacing": [1.25, 1.6]}, "PixelSpacing.* 1.25/1.5 in 5, 1.25/1.6 in 1"),
            ({"PixelSpacing": [0, 1.5]}, "PixelSpacing"),
            ({"PixelSpacing": None}, "3: PixelSpacing"),
            ({"Rows": 11}, "Rows.* 10/12 in 5, 10/11 in 1"),
            ({"RescaleSlope": None}, "3: RescaleSlope"),
            ({"RescaleSlope": 0}, "3: RescaleSlope .* 0"),
            *(({"RescaleType": unit}, unit) for unit in ("MGML", "ED", "Z_EFF", "normalized")),
            ({"RescaleType": "Doe"}, "3"),
            ({"PhotometricInterpretation": "MONOCHROME1"}, "3: PhotometricInterpretation"),
            ({"SamplesPerPixel": 3}, "3: SamplesPerPixel"),
            ({"NumberOfFrames": 2}, "3: NumberOfFrames"),
            ({"BitsAllocated": 12}, "3: BitsAllocated 12"),
            ({"HighBit": 14}, "3: .*HighBit 14"),
            ({"PixelData": b"\0\0"}, "pixels .* 3"),
            ({"PixelData": None}, "pixels .* 3"),
        )
    },
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_volume_is_refused_in_a_line(tmp_path, change, words):
    slices = single_slices(HU)
    change(slices)
    with pytest.raises(VolumeError, match=words) as caught:
        read(tmp_path / "s", slices)
    assert "\n" not in str(caught.value) and "Doe" not in str(caught.value)


@pytest.mark.slow
def test_damaged_compressed_pixels_cost_their_series_alone(tmp_path):
    slices = [recoded(one, JPEGLosslessSV1, tmp_path) for one in single_slices(HU)]
    content = bytearray(slices[2].PixelData)
    content[40:60] = bytes(20)
    slices[2].PixelData = bytes(content)
    (bad,) = found_in(tmp_path / "bad", slices)
    with pytest.raises(VolumeError, match="3"):
        bad.read()
    assert_is_phantom(read(tmp_path / "good", single_slices(HU, seed=1)), tmp_path)


@pytest.mark.slow
def test_a_decoder_that_crashes_is_started_again(tmp_path):
    slices = [recoded(one, JPEG2000Lossless, tmp_path) for one in single_slices(HU)]
    (series,) = found_in(tmp_path / "s", slices)
    one, decoder = series.stack.slices[0], Decoder()
    assert [pixels.shape for pixels in decoder.decode([one])] == [(12, 10)]
    decoder._process.kill()
    decoder._process.wait()
    with pytest.raises(DecoderError):
        list(decoder.decode([one]))
    (pixels,) = decoder.decode([one])
    np.testing.assert_array_equal(pixels - 1024, HU[0])
    decoder.close()

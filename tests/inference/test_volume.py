"""NIfTI files in and out, against nibabel's own reading, writing and reorienting."""

import gzip

import nibabel
import numpy as np
import pytest
from conftest import ORIENTATIONS, RAS_AFFINE, reoriented, save_nifti

from inference.files import case_name, find_cases
from inference.label_map import write_label_map
from inference.volume import VolumeError, read_volume

OBLIQUE = RAS_AFFINE.copy()
OBLIQUE[:3, :3] = (
    nibabel.eulerangles.euler2mat(0.3, -0.2, 0.25)
    @ RAS_AFFINE[:3, :3]
    @ [[1, 0.2, 0], [0, 1, 0], [0, 0.1, 1]]
)


def spl(array, affine):
    """Slices, rows, columns toward superior, posterior, left, by nibabel."""
    lps = nibabel.orientations.axcodes2ornt("LPS")
    turned, _ = reoriented(array, affine, lps)
    return turned.transpose(2, 1, 0)


@pytest.mark.parametrize("affine", [RAS_AFFINE, OBLIQUE], ids=["straight", "sheared"])
@pytest.mark.parametrize("index", range(48))
def test_every_orientation(tmp_path, ct, affine, index):
    stored, stored_affine = reoriented(ct, affine, ORIENTATIONS[index])
    path = save_nifti(tmp_path / "a_0000.nii.gz", stored, stored_affine)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.voxels, spl(ct, affine))
    np.testing.assert_allclose(volume.affine, stored_affine, atol=1e-3)
    np.testing.assert_allclose(volume.spacing, nibabel.affines.voxel_sizes(affine)[::-1], rtol=1e-5)

    label_map = (np.abs(volume.voxels) % 15).astype(np.uint8)
    write_label_map(tmp_path / "a.nii.gz", label_map, volume)
    written = nibabel.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), np.abs(stored) % 15)


def test_grid_and_codes_are_the_inputs_own(tmp_path, ct):
    source = nibabel.Nifti1Image(ct, None)
    source.header.set_xyzt_units("mm", "sec")
    source.set_sform(OBLIQUE, 4)
    source.set_qform(RAS_AFFINE, 2)  # disagrees with the sform: both must survive
    source.header.set_slope_inter(2, -1024)
    source.header["cal_max"] = 1000
    nibabel.save(source, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    write_label_map(tmp_path / "out.nii.gz", np.ones(ct.T.shape, np.uint8), volume)

    before, after = (
        nibabel.Nifti1Header(content[:348])
        for content in (
            (tmp_path / "a.nii").read_bytes(),
            gzip.decompress((tmp_path / "out.nii.gz").read_bytes()),
        )
    )
    geometry = ["dim", "pixdim", "xyzt_units", "sform_code", "srow_x", "srow_y", "srow_z"]
    geometry += ["qform_code", "quatern_b", "quatern_c", "quatern_d"]
    geometry += ["qoffset_x", "qoffset_y", "qoffset_z"]
    for field in geometry:
        np.testing.assert_array_equal(before[field], after[field], err_msg=field)
    assert after.get_data_dtype() == np.uint8
    assert (after["scl_slope"], after["scl_inter"]) == (1, 0)
    assert after["cal_max"] == 0


@pytest.mark.parametrize(
    "dtype", ["uint8", "int16", ">i2", "uint16", "int32", "float32", "float64"]
)
@pytest.mark.parametrize("name", ["a_0000.nii.gz", "a.nii"])
def test_types_and_endings(tmp_path, ct, dtype, name):
    array = np.abs(ct).clip(0, 255).astype(dtype)
    path = save_nifti(tmp_path / name, array)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.voxels, spl(array, RAS_AFFINE))
    assert (volume.slope, volume.intercept) == (1, 0)


def test_scaling(tmp_path, ct):
    image = nibabel.Nifti1Image(ct, RAS_AFFINE)
    image.header.set_slope_inter(0.5, -100)
    nibabel.save(image, tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    hu = nibabel.load(tmp_path / "a.nii.gz").get_fdata()
    np.testing.assert_allclose(
        volume.slope * volume.voxels + volume.intercept, spl(hu, RAS_AFFINE), atol=1e-9
    )


def test_nifti2_and_axes_of_length_one(tmp_path, ct):
    nibabel.save(nibabel.Nifti2Image(ct[..., None], RAS_AFFINE), tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.voxels, spl(ct, RAS_AFFINE))
    label_map = np.full(volume.voxels.shape, 3, np.uint8)
    write_label_map(tmp_path / "out.nii.gz", label_map, volume)
    written = nibabel.load(tmp_path / "out.nii.gz")
    assert isinstance(written, nibabel.Nifti2Image)
    assert written.shape == (*ct.shape, 1)


def test_one_slice_without_a_third_axis(tmp_path, ct):
    path = save_nifti(tmp_path / "a.nii.gz", ct[:, :, 3])
    volume = read_volume(path)
    assert volume.voxels.shape == (1, 33, 40)
    write_label_map(tmp_path / "out.nii.gz", np.zeros((1, 33, 40), np.uint8), volume)
    assert nibabel.load(tmp_path / "out.nii.gz").shape == (40, 33)


def test_gzip_of_several_members_and_plain_data_under_a_gz_name(tmp_path, ct):
    path = save_nifti(tmp_path / "a.nii", ct)
    content = path.read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(
        gzip.compress(content[:9000]) + gzip.compress(content[9000:])
    )
    (tmp_path / "c.nii.gz").write_bytes(content)
    for name in ("b.nii.gz", "c.nii.gz"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).voxels, read_volume(path).voxels)


def damaged_files(folder, ct):
    whole = save_nifti(folder / "whole.nii.gz", ct).read_bytes()
    plain = gzip.decompress(whole)
    yield "cut.nii.gz", whole[: len(whole) // 2], "gzip"
    yield "flipped.nii.gz", whole[:400] + bytes(64) + whole[464:], "gzip|cut short|NIfTI"
    yield "short.nii", plain[:-1000], "cut short"
    yield "header.nii", plain[:200], "NIfTI"
    yield "text.nii.gz", b"this is no volume\n" * 40, "NIfTI"
    yield "empty.nii.gz", b"", "empty"


def test_damaged_files_are_refused_in_one_line(tmp_path, ct):
    for name, content, reason in damaged_files(tmp_path, ct):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VolumeError, match=reason) as caught:
            read_volume(tmp_path / name)
        assert "\n" not in str(caught.value), name


def test_volumes_of_the_wrong_kind_are_refused(tmp_path, ct):
    colour = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    singular = RAS_AFFINE.copy()
    singular[:, 2] = 0
    for array, affine, reason in [
        (np.stack([ct, ct], axis=3), RAS_AFFINE, "3D"),
        (ct.astype(np.complex64), RAS_AFFINE, "real"),
        (colour, RAS_AFFINE, "real"),
        (ct, singular, "singular"),
    ]:
        image = nibabel.Nifti1Image(array, None)
        image.header.set_sform(affine, 1)
        nibabel.save(image, tmp_path / "a.nii")
        with pytest.raises(VolumeError, match=reason):
            read_volume(tmp_path / "a.nii")


def test_label_map_of_another_shape_or_type_is_not_written(tmp_path, ct):
    volume = read_volume(save_nifti(tmp_path / "a.nii", ct))
    for label_map in (np.zeros(ct.shape, np.uint8), np.zeros(ct.T.shape, np.int16)):
        with pytest.raises(ValueError, match="needed"):
            write_label_map(tmp_path / "out.nii.gz", label_map, volume)
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii"]


def test_names(tmp_path):
    for name in ("b_0000.nii.gz", "a.nii", ".hidden_0000.nii.gz", "notes.txt", "c.d.nii.gz"):
        (tmp_path / name).touch()
    (tmp_path / "folder.nii.gz").mkdir()
    found = find_cases(tmp_path)
    assert [path.name for path in found] == ["a.nii", "b_0000.nii.gz", "c.d.nii.gz"]
    assert [case_name(path) for path in found] == ["a", "b", "c.d"]
    assert find_cases(tmp_path / "a.nii") == [tmp_path / "a.nii"]

"""NIfTI files in and out, against nibabel's own reading, writing and reorienting."""

import gzip
import io
import os

import nibabel
import numpy as np
import pytest
from conftest import ORIENTATIONS, RAS_AFFINE, reoriented, save_nifti, with_header

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
    i, j, k = affine[:3, :3].T  # toward left or right, anterior or posterior, superior or inferior
    area = np.linalg.norm(np.cross(i, j))
    row_mm, slice_mm = area / np.linalg.norm(i), abs(np.dot(np.cross(i, j), k)) / area
    np.testing.assert_allclose(volume.spacing, (slice_mm, row_mm, np.linalg.norm(i)), rtol=1e-5)

    label_map = (np.abs(volume.voxels) % 15).astype(np.uint8)
    write_label_map(tmp_path / "a.nii.gz", label_map, volume)
    written = nibabel.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), np.abs(stored) % 15)


def leaning(degrees):
    """A gantry tilt: slices 4 mm apart, each 4 mm·tan(tilt) further to the front."""
    affine = RAS_AFFINE.copy()
    affine[1, 2] = 4 * np.tan(np.radians(degrees))
    return affine


def in_unit(mm):
    affine = RAS_AFFINE.copy()
    affine[:3] /= mm
    return affine


QFORM, NIFTI2 = {"codes": (0, 1)}, {"kind": nibabel.Nifti2Image}


@pytest.mark.parametrize(
    ("affine", "unit_mm", "how", "notes"),
    [
        (RAS_AFFINE, 1, {}, 0),
        (RAS_AFFINE, 1, QFORM, 0),
        (RAS_AFFINE, 1, NIFTI2, 0),
        (leaning(18), 1, {}, 0),
        (leaning(30), 1, NIFTI2, 0),
        (RAS_AFFINE, 1, {"pixdim": [1, 1, 1, 1, 0, 0, 0, 0]}, 1),
        (leaning(18), 1, {"pixdim": [1, 0, 0, 0, 0, 0, 0, 0]}, 1),
        (RAS_AFFINE, 1, {"pixdim": [1, np.nan, 1.25, 4, 0, 0, 0, 0]}, 1),
        (RAS_AFFINE, 1, {"pixdim": [1, 1.5, 1.25, 3, 0, 0, 0, 0]}, 1),
        (RAS_AFFINE, 1, {"pixdim": [1, 1.51, 1.25, 4, 0, 0, 0, 0]}, 0),
        (in_unit(1000), 1000, {"xyzt_units": 1}, 0),
        (in_unit(0.001), 0.001, {"xyzt_units": 3 + 16}, 0),
        (RAS_AFFINE, 1, {"xyzt_units": 0}, 0),
        (RAS_AFFINE, 1, {"xyzt_units": 2 + 56}, 0),
        (RAS_AFFINE, 1, {"xyzt_units": 5}, 1),
        (RAS_AFFINE, 1, {"xyzt_units": 1}, 1),  # voxels would be 1.5 m wide
        (RAS_AFFINE, 1, {"xyzt_units": 3}, 1),
        (RAS_AFFINE, 1, {"codes": (0, 0)}, 1),
    ],
)
@pytest.mark.parametrize("slices", [21, 1, None], ids=["3D", "one slice", "2D"])
def test_spacing_is_the_affines(tmp_path, ct, affine, unit_mm, how, notes, slices):
    array = ct[:, :, 3] if slices is None else ct[:, :, :slices]
    volume = read_volume(with_header(tmp_path / "a.nii", array, affine, **{"codes": (1, 0)} | how))
    if slices is None and how.get("codes") == (0, 0):
        return  # NIfTI has no thickness for it
    np.testing.assert_allclose(volume.spacing, (4, 1.25, 1.5), rtol=1e-5)
    mm3 = abs(np.linalg.det(volume.affine)) * unit_mm**3
    assert np.prod(volume.spacing) == pytest.approx(mm3, rel=1e-5)
    assert volume.voxel_ml == pytest.approx(7.5e-3, rel=1e-5)
    assert len(volume.notes) == notes, volume.notes


@pytest.mark.parametrize("pixdim", [[1, 0, 0, 0, 0, 0, 0, 0], [1, 1.5, 1.25, 0, 0, 0, 0, 0]])
@pytest.mark.parametrize("codes", [(0, 1), (1, 0)])
def test_a_voxel_size_of_zero_is_noted(tmp_path, ct, codes, pixdim):
    """Where nibabel reads 1 mm, also for the qform's affine."""
    volume = read_volume(with_header(tmp_path / "a.nii", ct, codes=codes, pixdim=pixdim))
    ones = (1.0, 1.25 if pixdim[2] else 1.0, 1.5 if pixdim[1] else 1.0)
    np.testing.assert_allclose(volume.spacing, (4, 1.25, 1.5) if codes[0] else ones)
    assert len(volume.notes) == 1 and "0 mm" in volume.notes[0]


def test_a_qform_that_mirrors_the_sform_is_noted(tmp_path, ct):
    mirrored = nibabel.Nifti1Image(ct, None)
    mirrored.set_sform(RAS_AFFINE, 1)
    mirrored.set_qform(np.diag([-1.0, 1, 1, 1]) @ RAS_AFFINE, 1)
    nibabel.save(mirrored, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    np.testing.assert_array_equal(volume.voxels, spl(ct, RAS_AFFINE))
    assert len(volume.notes) == 1


@pytest.mark.parametrize("too_long", [0, 1e-7, 2e-7, 4e-7, 1e-6, 1e-5, 1e-4, 1e-3, 0.2])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_a_quaternion_that_rounding_made_too_long(tmp_path, ct, kind, too_long):
    turn = np.radians(1.0)
    quaternion = np.array([0, np.sin(turn), np.cos(turn)]) * (1 + too_long)
    fields = dict(zip(("quatern_b", "quatern_c", "quatern_d"), quaternion, strict=True))
    path = with_header(tmp_path / "a.nii", ct, kind=kind, codes=(0, 1), **fields)
    if too_long > 1e-4:
        with pytest.raises(VolumeError):
            read_volume(path)
        return
    volume = read_volume(path)
    rotation = nibabel.quaternions.quat2mat([0, *quaternion])
    np.testing.assert_allclose(volume.affine[:3, :3], rotation * [1.5, 1.25, 4], atol=1e-5)
    write_label_map(tmp_path / "out.nii", np.zeros(volume.voxels.shape, np.uint8), volume)
    size, dtype = volume.header.sizeof_hdr, volume.header.template_dtype
    before, after = (
        np.frombuffer(file.read_bytes()[:size], dtype) for file in (path, tmp_path / "out.nii")
    )
    for name in ("qform_code", "sform_code", "pixdim", *fields):
        assert before[name].tobytes() == after[name].tobytes()


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_texts_of_the_input_do_not_reach_the_label_map(tmp_path, ct, kind):
    texts = [
        name
        for name, (dtype, _) in kind.header_class.template_dtype.fields.items()
        if dtype.kind == "S" and dtype.itemsize >= 10
    ]
    path = with_header(tmp_path / "a.nii", ct, kind=kind, **dict.fromkeys(texts, b"MUSTER^MIA"))
    assert path.read_bytes().count(b"MUSTER^MIA") == len(texts) >= 3
    volume = read_volume(path)
    write_label_map(tmp_path / "out.nii", np.zeros(volume.voxels.shape, np.uint8), volume)
    assert b"MUSTER" not in (tmp_path / "out.nii").read_bytes()


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
    geometry = "dim pixdim xyzt_units sform_code srow_x srow_y srow_z qform_code"
    geometry += " quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z"
    for field in geometry.split():
        np.testing.assert_array_equal(before[field], after[field], err_msg=field)
    assert after.get_data_dtype() == np.uint8
    assert (after["scl_slope"], after["scl_inter"]) == (1, 0)
    assert after["cal_max"] == 0


@pytest.mark.parametrize(
    "dtype", ["uint8", "int16", ">i2", "uint16", "int32", "float32", "float64"]
)
@pytest.mark.parametrize(("name", "scaling"), [("a_0000.nii.gz", (1, 0)), ("a.nii", (0.5, -100))])
def test_types_endings_and_scaling(tmp_path, ct, dtype, name, scaling):
    array = np.abs(ct).clip(0, 255).astype(dtype)
    image = nibabel.Nifti1Image(array, RAS_AFFINE)
    image.header.set_slope_inter(*scaling)
    nibabel.save(image, tmp_path / name)
    volume = read_volume(tmp_path / name)
    np.testing.assert_array_equal(volume.voxels, spl(array, RAS_AFFINE))
    assert (volume.slope, volume.intercept) == scaling


def test_nifti2_and_axes_of_length_one(tmp_path, ct):
    nibabel.save(nibabel.Nifti2Image(ct[..., None], RAS_AFFINE), tmp_path / "a.nii.gz")
    zeros = with_header(tmp_path / "b.nii", ct, dim=[5, *ct.shape, 0, 0, 0, 0])
    np.testing.assert_array_equal(read_volume(zeros).voxels, spl(ct, RAS_AFFINE))
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.voxels, spl(ct, RAS_AFFINE))
    label_map = np.full(volume.voxels.shape, 3, np.uint8)
    write_label_map(tmp_path / "out.nii.gz", label_map, volume)
    written = nibabel.load(tmp_path / "out.nii.gz")
    assert isinstance(written, nibabel.Nifti2Image)
    assert written.shape == (*ct.shape, 1)
    flat = read_volume(save_nifti(tmp_path / "c.nii.gz", ct[:, :, 3]))
    assert flat.voxels.shape == (1, 33, 40)
    write_label_map(tmp_path / "out.nii.gz", np.zeros((1, 33, 40), np.uint8), flat)
    assert nibabel.load(tmp_path / "out.nii.gz").shape == (40, 33)


def test_plain_data_under_a_gz_name(tmp_path, ct):
    path = save_nifti(tmp_path / "a.nii", ct).rename(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_volume(path).voxels, spl(ct, RAS_AFFINE))


@pytest.mark.parametrize("block", [1000, 65280])
def test_many_gzip_members_are_unpacked_in_linear_time(tmp_path, ct, monkeypatch, block):
    """Each byte is handed to the decompressor about once."""
    content = save_nifti(tmp_path / "a.nii", np.tile(ct, (2, 2, 3))).read_bytes()
    blocks = [content[start : start + block] for start in range(0, len(content), block)]
    packed = b"".join(gzip.compress(part, 1) for part in (*blocks, b""))
    (tmp_path / "b.nii.gz").write_bytes(packed)
    handed = []

    class Counting(io.BytesIO):
        def read(self, *most):
            data = super().read(*most)
            handed.append(len(data))
            return data

        def readinto(self, buffer):
            handed.append(count := super().readinto(buffer))
            return count

    monkeypatch.setattr(io, "BytesIO", Counting)
    volume = read_volume(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(volume.voxels, read_volume(tmp_path / "a.nii").voxels)
    assert len(packed) <= sum(handed) <= len(packed) + (1 << 16)


def test_header_and_voxels_are_of_one_file(tmp_path, ct):
    """Another file takes its name, or other bytes its place, while it waits for memory."""
    path = save_nifti(tmp_path / "a.nii.gz", ct)
    turned, affine = reoriented(ct, RAS_AFFINE, ORIENTATIONS[5])
    other = save_nifti(tmp_path / "b.nii.gz", turned, affine @ np.diag([2, 2, 2, 1]))
    before, content = read_volume(path), other.read_bytes()
    volume = read_volume(path, lambda header, size: other.replace(path))
    np.testing.assert_array_equal(volume.voxels, before.voxels)
    assert (volume.spacing, volume.disk_flips) == (before.spacing, before.disk_flips)
    assert read_volume(path).spacing != volume.spacing

    for change in (lambda *_: path.write_bytes(content[:-9]), lambda *_: os.utime(path, ns=(1, 1))):
        path.write_bytes(content)
        with pytest.raises(VolumeError, match="changed while it was read"):
            read_volume(path, change)


def test_damaged_files_are_refused_in_one_line(tmp_path, ct):
    path = save_nifti(tmp_path / "a.nii.gz", ct)
    whole = path.read_bytes()
    plain = gzip.decompress(whole)
    for content, reason in [
        (whole[: len(whole) // 2], "gzip"),
        (whole[:400] + bytes(64) + whole[464:], "gzip|cut short|NIfTI"),
        (plain[:-1000], "cut short"),
        (plain[:200], "NIfTI"),
        (b"this is no volume\n" * 40, "NIfTI"),
        (b"", "empty"),
    ]:
        path.write_bytes(content)
        with pytest.raises(VolumeError, match=reason) as caught:
            read_volume(path)
        assert "\n" not in str(caught.value)


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

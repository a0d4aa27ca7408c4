import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from benchmark.__main__ import main
from inference.labels import LABEL_NAMES, ORGANS, TUMOR
from synthetic.phantom import draw_phantom
from synthetic.rendering import render
from synthetic.sampling import draw_anatomy
from synthetic.structures import CORES, NUMBERS, PHASES, STRUCTURES

SHAPE, SPACING = (84, 200, 200), (3.0, 2.0, 2.0)
SEEDS = (0, 1, 2, 3)

# mL, adults: what radiology reports as normal, widened for the part that the field of view holds.
VOLUMES = {
    "liver": (900, 2200), "right kidney": (80, 250), "spleen": (80, 400), "pancreas": (38, 140),
    "aorta": (40, 160), "inferior vena cava": (40, 160), "right adrenal gland": (2, 10),
    "left adrenal gland": (2, 10), "gallbladder": (10, 80), "esophagus": (8, 45),
    "stomach": (150, 800), "duodenum": (35, 130), "left kidney": (80, 250), "tumor": (0.2, 300),
}  # fmt: skip


def anatomy_of(seed, shape=SHAPE, spacing=SPACING):
    return draw_anatomy(shape, spacing, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def anatomies():
    return {seed: anatomy_of(seed) for seed in SEEDS}


def centroid(anatomy, name):
    return np.argwhere(anatomy == NUMBERS[name]).mean(0)


def test_first_numbers_are_the_challenges_labels():
    assert tuple(s.name for s in STRUCTURES[1:15]) == LABEL_NAMES[1:]
    assert len(NUMBERS) == len(STRUCTURES) <= 256


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_every_organ_is_present_in_one_piece_of_plausible_volume(anatomies, seed):
    anatomy = anatomies[seed]
    for number, name in enumerate(LABEL_NAMES[1:], start=1):
        mask = anatomy == number
        low, high = VOLUMES[name]
        assert low < mask.sum() * np.prod(SPACING) / 1000 < high, name
        if number in ORGANS:
            assert ndimage.label(mask)[1] == 1, name
        else:
            assert 1 <= ndimage.label(mask)[1] <= 4


@pytest.mark.slow
@pytest.mark.parametrize("spacing", [(5.0, 0.8, 0.8), (2.5, 1.6, 1.6)])
def test_organs_hold_together_at_other_spacings(spacing):
    shape = tuple(round(extent / d) for extent, d in zip((252, 400, 400), spacing, strict=True))
    anatomy = anatomy_of(11, shape, spacing)
    assert [ndimage.label(anatomy == organ)[1] for organ in ORGANS] == [1] * len(ORGANS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_organs_lie_where_they_lie_in_patients(anatomies, seed):
    at = {name: centroid(anatomies[seed], name) for name in LABEL_NAMES[1:-1]}
    vertebra = centroid(anatomies[seed], "vertebra")
    superior, posterior, left = range(3)
    for right_sided, left_sided in (
        ("right kidney", "left kidney"),
        ("right adrenal gland", "left adrenal gland"),
        ("inferior vena cava", "aorta"),
        ("liver", "spleen"),
        ("gallbladder", "stomach"),
    ):
        assert at[right_sided][left] < at[left_sided][left]
    assert at["liver"][left] < vertebra[left] < at["spleen"][left]
    for side in ("right", "left"):
        assert at[f"{side} kidney"][posterior] > at["stomach"][posterior]
        assert at[f"{side} kidney"][posterior] > at["pancreas"][posterior]
        assert at[f"{side} adrenal gland"][superior] > at[f"{side} kidney"][superior]
    assert at["aorta"][posterior] < vertebra[posterior]
    assert at["pancreas"][posterior] < at["aorta"][posterior]
    assert at["esophagus"][superior] > at["stomach"][superior] > at["duodenum"][superior]
    assert at["gallbladder"][superior] < at["liver"][superior]
    assert at["spleen"][posterior] > at["stomach"][posterior]


@pytest.mark.slow
def test_tumors_lie_within_liver_kidneys_or_pancreas(anatomies):
    hosts = [NUMBERS[name] for name in ("liver", "right kidney", "left kidney", "pancreas")]
    for anatomy in anatomies.values():
        lesions, count = ndimage.label(anatomy == TUMOR)
        for lesion in range(1, count + 1):
            around = ndimage.binary_dilation(lesions == lesion) & (lesions != lesion)
            assert np.isin(anatomy[around], hosts).any()


def test_lesions_differ_from_their_hosts_in_every_phase():
    for column in range(len(PHASES)):
        low, high = STRUCTURES[TUMOR].hu[column]
        hosts = [STRUCTURES[NUMBERS[n]].hu[column] for n in ("liver", "left kidney", "pancreas")]
        hosts.append(CORES["left kidney"][1][column])
        assert all(high < host[0] or low > host[1] for host in hosts)


@pytest.mark.slow
def test_same_seed_same_phantom_and_other_seed_another():
    small = {"shape": (12, 64, 64), "spacing": (8.0, 6.0, 6.0)}
    one, again, other = (draw_phantom(**small, seed=seed) for seed in (5, 5, 6))
    assert one.phase == again.phase
    np.testing.assert_array_equal(one.volume, again.volume)
    np.testing.assert_array_equal(one.label_map, again.label_map)
    assert (one.label_map != other.label_map).any()
    phases = {draw_phantom((1, 8, 8), (8.0, 40.0, 40.0), seed).phase for seed in range(8)}
    assert phases == set(PHASES)


@pytest.mark.slow
def test_one_seed_on_two_grids_is_one_patient():
    """A finer grid of the middle half: an odd number of voxels has its middle one there."""
    coarse = anatomy_of(2, (41, 81, 81), (6.0, 5.0, 5.0))[10:31, 20:61, 20:61]
    fine = anatomy_of(2, (41, 81, 81), (3.0, 2.5, 2.5))[::2, ::2, ::2]
    assert (coarse == fine).mean() > 0.9995  # crumbs apart, which each grid drops for itself


@pytest.mark.slow
def test_longer_volume_reaches_lungs_and_pelvis():
    anatomy = anatomy_of(3, (160, 60, 60), (8.0, 8.0, 8.0))
    lung, pelvis = (np.argwhere(anatomy == NUMBERS[name])[:, 0] for name in ("lung", "pelvis"))
    liver = np.argwhere(anatomy == 1)[:, 0]
    assert lung.max() * 8 > liver.max() * 8 + 80
    assert pelvis.min() < liver.min()
    assert ndimage.label(anatomy == 1)[1] == 1


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_mean_hu_of_each_label_lies_in_its_range(anatomies, phase):
    anatomy = anatomies[2]
    volume = render(anatomy, SPACING, np.random.default_rng(7), phase)
    column = PHASES.index(phase)
    for number, structure in enumerate(STRUCTURES[1:15], start=1):
        ranges = [structure.hu[column]]
        if structure.name in CORES:
            ranges.append(CORES[structure.name][1][column])
        # Away from the surface, where partial volume mixes neighbours, and without stomach gas.
        mask = anatomy == number
        inside = ndimage.binary_erosion(mask) if mask.sum() > 3000 else mask
        values = volume[inside]
        values = values[values > -300]
        low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
        slack = 6 if mask.sum() > 3000 else 45  # small organs lie within the blur of fat
        assert low - slack < values.mean() < high + slack, structure.name


@pytest.mark.slow
def test_air_is_air_and_hu_stay_in_the_range_of_ct(anatomies):
    volume = render(anatomies[0], SPACING, np.random.default_rng(0), "delayed")
    assert volume.dtype == np.int16
    assert volume.min() >= -1024
    assert volume.max() <= 3071
    assert volume[anatomies[0] == 0].mean() == pytest.approx(-999, abs=10)


def test_noise_has_short_range_correlation():
    water = np.full((4, 256, 256), NUMBERS["gallbladder"], np.uint8)
    noise = render(water, (2.5, 0.8, 0.8), np.random.default_rng(0), "delayed").astype(float)
    noise -= noise.mean()
    variance = (noise**2).mean()
    assert 5**2 < variance < 18**2
    assert 0.3 < (noise[:, :, 1:] * noise[:, :, :-1]).mean() / variance < 0.9
    assert abs((noise[1:] * noise[:-1]).mean()) / variance < 0.3


@pytest.mark.slow
def test_command_writes_lps_nifti_that_round_trips(tmp_path, capsys):
    command = ["--output", str(tmp_path), "--cases", "2", "--seed", "7", "--slices", "6"]
    command += ["--size", "40", "--spacing", "10", "9", "8", "--phase", "arterial"]
    assert main(["phantom", *command]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == [
        "images/phantom_0007_0000.nii.gz",
        "images/phantom_0008_0000.nii.gz",
        "labels/phantom_0007.nii.gz",
        "labels/phantom_0008.nii.gz",
    ]
    expected = draw_phantom((6, 40, 40), (8.0, 9.0, 10.0), 7, "arterial")
    for file, array in ((files[0], expected.volume), (files[2], expected.label_map)):
        image = nib.load(tmp_path / file)
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        assert image.header.get_zooms() == (10, 9, 8)
        assert image.get_data_dtype() == array.dtype
        assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
        middle = image.affine @ [*((np.array(image.shape) - 1) / 2), 1]
        np.testing.assert_allclose(middle[:3], 0, atol=1e-4)
        np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), array)


@pytest.mark.parametrize(
    "wrong", [["--cases", "0"], ["--spacing", "1", "nan", "1"], ["--seed", "-1"], ["--size", "x"]]
)
def test_wrong_usage_exits_with_2(tmp_path, wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["phantom", "--output", str(tmp_path / "out"), *wrong])
    assert stopped.value.code == 2
    assert "error: argument" in capsys.readouterr().err.splitlines()[-1]


def test_case_that_cannot_be_written_exits_with_1(tmp_path, capsys):
    (tmp_path / "images" / "phantom_0000_0000.nii.gz").mkdir(parents=True)
    command = ["--output", str(tmp_path), "--cases", "2", "--slices", "2", "--size", "8"]
    assert main(["phantom", *command, "--spacing", "40", "40", "40"]) == 1
    assert "phantom_0000" in capsys.readouterr().err
    assert (tmp_path / "labels" / "phantom_0001.nii.gz").is_file()

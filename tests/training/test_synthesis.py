import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import SHARED
from small_data import export, fit, write_phantoms

from inference.labels import ORGANS, TUMOR
from training import TrainingError, synthesis
from training.anatomies import (
    LABELS,
    LEFT_MEDULLA,
    RIGHT_MEDULLA,
    VOXEL_MM,
    load_anatomy_map,
    phantom_anatomy,
    read_anatomy,
)
from training.synthesis import _add_lesions, draw_slice, synthetic_cases

ATLAS = SHARED / "template" / "anatomy_spl.nii.gz"

# TotalSegmentator's number, ours, centre toward (R, A, S) in mm from the middle, radius in mm.
BALLS = (
    (5, 1, (45, 10, 0), 42.0),
    (2, 2, (40, -65, -10), 24.0),
    (1, 3, (-70, -30, 0), 27.0),
    (52, 5, (-5, -45, 0), 11.0),
    (4, 9, (20, 66, -5), 14.0),
)


def write_balls(path: Path, spacing: float = 3.0) -> None:
    """A patient of balls in TotalSegmentator's numbers, RAS, about 240 x 240 x 150 mm."""
    shape = np.array([80, 80, 50])
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = -(shape - 1) / 2 * spacing
    points = np.moveaxis(np.indices(shape), 0, -1) * spacing + affine[:3, 3]
    label_map = np.zeros(shape, np.uint8)
    for number, _, centre, radius in BALLS:
        label_map[np.linalg.norm(points - centre, axis=-1) < radius] = number
    nib.save(nib.Nifti1Image(label_map, affine), path)


@pytest.fixture(scope="module")
def balls(tmp_path_factory):
    path = tmp_path_factory.mktemp("anatomy") / "balls.nii.gz"
    write_balls(path)
    return read_anatomy(path, load_anatomy_map("totalsegmentator"))


@pytest.fixture(scope="module")
def patients():
    return [phantom_anatomy(number) for number in range(2)]


def test_organs_of_a_file_keep_their_place_and_size(balls):
    labels = LABELS[balls.structures]
    middle = (np.array(labels.shape) - 1) / 2
    for _, label, (right, anterior, superior), radius in BALLS:
        mask = labels == label
        volume = mask.sum() * VOXEL_MM**3
        assert volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.06)
        centre = (np.argwhere(mask).mean(axis=0) - middle) * VOXEL_MM
        assert centre == pytest.approx([superior, -anterior, -right], abs=1.5)
        assert set(balls.slices_with[label]) == set(np.flatnonzero(mask.any(axis=(1, 2))))


def test_a_slice_depends_on_its_generator_alone(balls):
    (hu, labels, window), again, other = (
        draw_slice(balls, np.random.default_rng(seed), 128, 3.2) for seed in (7, 7, 8)
    )
    assert (hu == again[0]).all() and (labels == again[1]).all() and window == again[2]
    assert (hu != other[0]).any()
    assert hu.shape == labels.shape == (128, 128)
    assert (hu.dtype, labels.dtype) == (np.int16, np.uint8)


@pytest.mark.slow
def test_slices_look_like_ct_and_show_every_label(patients):
    """Over many slices: attenuations of the kind that radiology's tables give, and no mirroring."""
    means = {label: [] for label in range(TUMOR + 1)}
    liver_is_right = []
    for seed in range(150):
        hu, labels, window = draw_slice(patients[seed % 2], np.random.default_rng(seed), 192, 2.2)
        assert labels.max() <= TUMOR
        assert window[0] < -900 < 100 < window[1]
        for label in np.unique(labels):
            mask = labels == label
            if mask.sum() >= 30:
                means[label].append(np.median(hu[mask]))
        if (labels == 1).sum() > 200 and (labels == 3).sum() > 100:
            columns = np.arange(192)[None, :].repeat(192, axis=0)
            liver_is_right.append(columns[labels == 1].mean() < columns[labels == 3].mean())
    assert all(means[label] for label in (*ORGANS, TUMOR))
    assert len(liver_is_right) > 10
    assert all(liver_is_right)
    for label, low, high in ((1, 20, 140), (3, 20, 150), (5, 20, 400), (9, -30, 60)):
        assert low < np.median(means[label]) < high
    # Contrast phases: the aorta's attenuation spreads far wider than the gallbladder's.
    assert np.std(means[5]) > 2 * np.std(means[9])


def test_lesions_grow_in_their_hosts(balls):
    """Of what is drawn alike but for its lesions, only voxels of hosts become tumor."""
    grown = 0
    for seed in range(40):
        structures = balls.structures[45:46].copy()
        before = structures.copy()
        hosts = _add_lesions(structures, np.random.default_rng(seed), 1.5)
        changed = structures != before
        assert set(np.unique(structures[changed])) <= set(hosts)
        for number, host in hosts.items():
            where = before[structures == number]
            allowed = {host, RIGHT_MEDULLA, LEFT_MEDULLA}
            assert set(np.unique(where)) <= allowed
        grown += bool(changed.any())
    assert 10 <= grown <= 30  # half of the slices


@pytest.mark.slow
def test_deformation_keeps_areas_on_average(balls):
    """Enlargements are as often shrinkings: the liver's mean area is near that of the anatomy."""
    label_map = LABELS[balls.structures]
    slices = balls.slices_with[1]
    expected = (label_map == 1).sum() / len(slices) * VOXEL_MM**2
    balls = replace(balls, slices_with={1: slices})  # its slices are as likely as one another
    areas = []
    for seed in range(120):
        _, labels, _ = draw_slice(balls, np.random.default_rng(seed), matrix=128, pixel_mm=2.4)
        area = np.isin(labels, (1, TUMOR)).sum() * 2.4**2
        if area:
            areas.append(area)
    assert np.mean(areas) == pytest.approx(expected, rel=0.2)


@pytest.mark.slow
def test_synthetic_cases_come_from_the_cache(tmp_path):
    write_balls(tmp_path / "balls.nii.gz")
    files = [str(tmp_path / "balls.nii.gz")]
    first = synthetic_cases(files, 2, tmp_path / "cache", 4)
    (folder,) = {case.files.image for case in first[:2]}
    written = (folder / "hu.npy").stat().st_mtime_ns
    again = synthetic_cases(files, 2, tmp_path / "cache", 4)
    assert (folder / "hu.npy").stat().st_mtime_ns == written
    assert len(first) == len(again) == 4  # two of the file, and one of each patient
    for one, other in zip(first, again, strict=True):
        assert one.cached.shape == (1, 512, 512)
        assert (one.cached.hu == other.cached.hu).all()
        assert one.annotated == tuple(range(1, 15))
    assert len({case.cached.window for case in first}) == 4
    images = [case.cached.hu for case in first]
    assert (images[0] != images[1]).any() and (images[2] != images[3]).any()


@pytest.mark.slow
def test_training_on_drawn_slices_scores_every_read_case(tmp_path, monkeypatch):
    """All real cases are held out, and the weights may begin with another run's."""
    data = write_phantoms(tmp_path / "data", 1, slices=4)
    write_balls(tmp_path / "balls.nii.gz")
    options = ("--anatomy", tmp_path / "balls.nii.gz", "--recipe", "slim", "--steps", 1)
    options += ("--batch-size", 2)
    monkeypatch.setattr(synthesis, "SLICES", 2)
    numbers = {"synthetic_fraction": 1, "synthetic_phantoms": 0, "slice_size": 64}
    numbers |= {"supervised_channels": 2, "attention": "relu-sigmoid"}

    def run(name: str, *more, **changes) -> tuple[int, Path]:
        folder = tmp_path / name
        return fit(data, folder, *options, *more, **{**numbers, **changes}), folder

    code, first = run("first")
    assert code == 0
    about = json.loads((first / "run.json").read_text())
    assert (about["training"], about["held_out"][0]["name"]) == ([], "p0")
    weights, others = tmp_path / "weights.safetensors", tmp_path / "others.safetensors"
    assert export(first, weights) == 0
    assert export(first, others, "--scores-of", first) == 0
    cards = [path.with_suffix(".md").read_text() for path in (weights, others)]
    assert ["**not with the weights here**" in card for card in cards] == [False, True]
    assert "100% of the slices" in cards[0] and "balls.nii.gz" in cards[0]
    assert run("next", "--start-from", weights)[0] == 0
    wider = {"base_channels": 8, "supervised_channels": 3}
    code, wide = run("wide", "--start-from", weights, **wider)
    assert code == 0
    assert export(wide, others) == 0
    arguments = "AttentionUNet(base_channels=8, supervised_channels=3)"
    assert arguments in others.with_suffix(".md").read_text()
    assert run("narrower", "--start-from", others)[0] == 1


@pytest.mark.slow
def test_a_map_says_what_a_file_s_numbers_are_and_which_labels_it_does_not_tell_apart(tmp_path):
    """The balls in numbers of their own, at half their size: the map puts both right."""
    path, mapping = tmp_path / "balls.nii.gz", tmp_path / "mine.json"
    write_balls(path)
    image = nib.load(path)
    numbers = np.asarray(image.dataobj).astype(np.int16) * 10
    nib.save(nib.Nifti1Image(numbers, image.affine @ np.diag([0.5, 0.5, 0.5, 1])), path)
    names = {"liver": [50], "right kidney": [20], "spleen": [10], "aorta": [520], "stomach": [40]}
    about = {"description": "tens", "scale": 2, "unknown_labels": [11, 12], "structures": names}
    mapping.write_text(json.dumps(about))
    anatomy = read_anatomy(path, load_anatomy_map(str(mapping)))
    labels = LABELS[anatomy.structures]
    for _, label, _, radius in BALLS:
        volume = (labels == {9: 11}.get(label, label)).sum() * VOXEL_MM**3
        assert volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.06)
    slices = [draw_slice(anatomy, np.random.default_rng(seed), 128, 2.4) for seed in range(30)]
    assert set(range(1, 15)) - set(anatomy.annotated) == {11, 12}
    shown = {label for _, labels, _ in slices for label in np.unique(labels).tolist()}
    assert {1, 2, 3, 5} <= shown
    assert not shown & {11, 12}
    mapping.write_text(json.dumps({**about, "structures": {"liver": [50]}}))
    with pytest.raises(TrainingError, match=r"tens: it holds \[10, 20, 40, 520\]"):
        read_anatomy(path, load_anatomy_map(str(mapping)))


@pytest.mark.parametrize(("number", "reason"), [(200, "TotalSegmentator"), (51, "organs")])
def test_what_is_no_anatomy_is_refused(tmp_path, number, reason):
    path = tmp_path / "map.nii.gz"
    nib.save(nib.Nifti1Image(np.full((8, 8, 8), number, np.uint8), np.eye(4)), path)
    with pytest.raises(TrainingError, match=reason):
        read_anatomy(path, load_anatomy_map("totalsegmentator"))
    path = tmp_path / "map.json"
    for content in ("{}", '{"description": "x", "structures": {"horn": [1]}}'):
        path.write_text(content)
        with pytest.raises(TrainingError, match=str(path)):
            load_anatomy_map(str(path))
    with pytest.raises(TrainingError, match="spl, totalsegmentator"):
        load_anatomy_map("unknown")


@pytest.mark.slow
@pytest.mark.skipif(not ATLAS.is_file(), reason="the shared atlas is not there")
def test_the_shared_atlas_is_a_patient_of_common_size():
    anatomy = read_anatomy(ATLAS, load_anatomy_map("spl"))
    labels = LABELS[anatomy.structures]
    assert set(anatomy.slices_with) == set(ORGANS) - {10, 12}
    # 240 mL of liver by the file's header.
    assert (labels == 1).sum() * VOXEL_MM**3 / 1000 == pytest.approx(240 * 1.6**3, rel=0.03)
    middle = {label: np.argwhere(labels == label).mean(axis=0) for label in (1, 2, 3, 13)}
    assert middle[1][2] < middle[3][2]  # columns run toward the left
    assert middle[2][2] < middle[13][2]

"""What happens to a batch before the network, against independent computations."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from inference.intensity import clipped_window, normalise
from inference.volume import read_volume
from training.augmentation import Intensities, _blur, _clip_tissue, draw_affine, prepare
from training.cases import annotated_mask
from training.loss import IGNORED
from training.recipe import Recipe, load_recipe
from training.slices import Slice, collate

CPU = torch.device("cpu")
HU_SCALE = Intensities(0.0, 1.0)  # leaves HU as they are


def blocks(size=96, seed=0, width=7):
    """A slice whose HU are 50 times its label, in regions some pixels wide."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(15, size, size)), (0, width, width))
    labels = smooth.argmax(axis=0).astype(np.uint8)
    return Slice(
        hu=50 * labels.astype(np.int16),
        labels=labels,
        annotated=annotated_mask(tuple(range(1, 15))),
        window=(-1000.0, 1000.0),
        pixel_mm=1.5,
    )


def batch_of(slices, multiple):
    """Stack slices of numpy arrays."""
    tensors = [
        part._replace(hu=torch.from_numpy(part.hu), labels=torch.from_numpy(part.labels))
        for part in slices
    ]
    return collate(tensors, multiple)


def prepared(slices, recipe, seed=0):
    batch = batch_of(slices, multiple=16 * recipe.matrix_reduction)
    rngs = [np.random.default_rng((seed, index)) for index in range(len(slices))]
    generator = torch.Generator().manual_seed(seed)
    return prepare(batch, CPU, recipe, HU_SCALE, rngs, generator)


def inside(labels, distance):
    """Pixels whose neighbourhood is of one label, which is known."""
    lowest = ndimage.minimum_filter(labels, size=(1, distance, distance))
    highest = ndimage.maximum_filter(labels, size=(1, distance, distance))
    return (lowest == highest) & (labels != IGNORED)


@pytest.mark.parametrize("clip_hu", [(0, 0), (-160, 240)])
def test_without_augmentation_it_is_what_inference_does(clip_hu):
    rng = np.random.default_rng(1)
    part = blocks()._replace(hu=rng.normal(0, 400, (96, 96)).astype(np.int16), window=(-300.5, 412))
    batch = batch_of([part], multiple=16)
    recipe = Recipe(clip_hu=clip_hu)
    images, labels = prepare(batch, CPU, recipe, Intensities(20, 150), [rng], torch.Generator())
    expected = normalise(
        torch.from_numpy(part.hu),
        window=clipped_window(part.window, recipe.clips, 1, 0),
        slope=1,
        intercept=0,
        mean=20,
        std=150,
    )
    assert images.shape == (1, 3, 96, 96)
    torch.testing.assert_close(images, expected.expand(1, 3, 96, 96))
    assert np.array_equal(labels[0], part.labels)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_images_and_labels_stay_aligned(reduction):
    recipe = Recipe(
        matrix_reduction=reduction,
        spatial_probability=1,
        rotation_degrees=30,
        scale=(0.7, 1.4),
        anisotropy=1.3,
        shear=0.2,
        shift=0.2,
        elastic_mm=4,
        elastic_grid_mm=40,
    )
    slices = [blocks(192, seed, width=14) for seed in range(4)]
    images, labels = (tensor.numpy() for tensor in prepared(slices, recipe))
    assert images.shape == (4, 3, 192 // reduction, 192 // reduction)
    checked = inside(labels, 3)
    assert checked.mean() > 0.15
    # Where a label's neighbourhood is of one label, the image shows that label's HU.
    assert (np.abs(images[:, 0] - 50.0 * labels.astype(float))[checked] < 1).mean() > 0.995
    assert not np.array_equal(labels[0], slices[0].labels[::reduction, ::reduction])


def test_a_slice_is_moved_as_scipy_moves_it():
    recipe = Recipe(
        spatial_probability=1, rotation_degrees=20, scale=(0.8, 1.2), shear=0.1, shift=0.1
    )
    part = blocks()
    smooth = ndimage.gaussian_filter(part.hu.astype(float), 3).round().astype(np.int16)
    images, _ = prepared([part._replace(hu=smooth)], recipe, seed=5)
    # The same generator gives the same matrix: (x, y) from the centre to (x, y) from the centre.
    matrix = draw_affine(recipe, 1.5, np.random.default_rng((5, 0)).spawn(5)[1])
    forward = matrix[::-1, 1::-1]  # in (row, column)
    centre = np.array([47.5, 47.5])
    offset = centre + 96 * matrix[::-1, 2] - forward @ centre
    oracle = ndimage.affine_transform(
        smooth.astype(float), forward, offset, order=1, mode="nearest"
    )
    np.testing.assert_allclose(images[0, 0].numpy(), oracle, atol=0.05)


def test_what_comes_from_outside_the_slice_is_ignored():
    recipe = Recipe(spatial_probability=1, scale=(0.5, 0.5))
    _, labels = prepared([blocks()], recipe)
    known = labels[0].numpy() != IGNORED
    assert known[24:72, 24:72].all()
    assert not known[:24].any()
    assert not known[:, 72:].any()


def test_the_pixel_size_drawn_sets_the_scale():
    rows, columns = np.mgrid[:128, :128] - 63.5
    disc = (np.hypot(rows, columns) < 20).astype(np.uint8)
    part = blocks()._replace(hu=100 * disc.astype(np.int16), labels=disc, pixel_mm=1.5)
    recipe = Recipe(spatial_probability=1, pixel_mm=(0.75, 0.75))
    _, labels = prepared([part], recipe)
    assert (labels == 1).sum().item() == pytest.approx(4 * disc.sum(), rel=0.02)


def test_slices_are_cropped_and_padded_about_their_centre():
    part = blocks(96)
    _, smaller = prepared([part], Recipe(slice_size=64))
    assert np.array_equal(smaller[0], part.labels[16:80, 16:80])
    _, larger = prepared([part], Recipe(slice_size=128))
    assert np.array_equal(larger[0, 16:112, 16:112], part.labels)
    assert (larger[0, :16] == IGNORED).all()


def test_no_recipe_ever_mirrors_a_patient():
    recipe = load_recipe("best")
    for seed in range(200):
        matrix = draw_affine(recipe, 0.8, np.random.default_rng(seed))
        assert np.linalg.det(matrix[:, :2]) > 0


def test_blur_is_gaussian():
    image = np.random.default_rng(0).normal(size=(2, 1, 40, 40)).astype(np.float32)
    found = _blur(torch.from_numpy(image), torch.tensor([1.3, 0.0]), 1.3).numpy()
    oracle = ndimage.gaussian_filter(image[0, 0], 1.3, mode="nearest", truncate=4 / 1.3)
    np.testing.assert_allclose(found[0, 0], oracle, atol=2e-3)
    np.testing.assert_allclose(found[1], image[1], atol=1e-6)


def test_an_organ_is_shifted_as_a_whole_smoothly_and_the_background_is_not():
    recipe = Recipe(intensity_probability=1, organ_shift_hu=40)
    part = blocks()
    images, labels = prepared([part], recipe)
    change = images[0, 0].numpy() - part.hu
    within = inside(labels.numpy(), 5)[0]
    for label in np.unique(labels[0].numpy()[within]):
        values = change[(labels[0].numpy() == label) & within]
        assert np.ptp(values) < 1e-2
        assert (abs(values).max() > 1e-3) == (label != 0)
    steps = np.abs(np.diff(change, axis=1))
    assert steps.max() < 0.5 * np.ptp(change)


def body_in_air():
    """A slice of air at -1000 HU with a body of fat and organs in the middle."""
    part = blocks()
    rows, columns = np.mgrid[:96, :96] - 47.5
    body = np.hypot(rows, columns) < 30
    return part._replace(hu=np.where(body, part.hu // 2 - 100, -1000).astype(np.int16)), body


def test_air_stays_at_the_low_end_whatever_the_intensities_do():
    part, body = body_in_air()
    recipe = Recipe(
        clip_hu=(-400, 240),
        intensity_probability=1,
        brightness_hu=30,
        contrast=(0.6, 1.5),
        noise_hu=30,
    )
    for seed in range(5):
        images, _ = prepared([part], recipe, seed)
        values = images[0, 0].numpy()
        assert (values[~body] == -400).all()
        assert values.min() >= -400
        assert values.max() <= 240


def test_contrast_turns_around_the_mean_of_the_body():
    part, body = body_in_air()
    recipe = Recipe(intensity_probability=1, contrast=(1.4, 1.4))
    images, _ = prepared([part._replace(window=(-2000.0, 2000.0))], recipe)
    values = images[0, 0].numpy()
    assert values[body].mean() == pytest.approx(part.hu[body].mean(), abs=0.1)
    assert values[body].std() == pytest.approx(1.4 * part.hu[body].std(), rel=1e-3)


def test_one_number_of_the_augmentation_leaves_the_other_draws():
    slices = [blocks(seed=seed) for seed in range(2)]
    recipe = Recipe(matrix_reduction=2, slice_size=64, intensity_probability=1, contrast=(0.5, 2))
    plain, _ = prepared(slices, recipe)
    again, _ = prepared(slices, dataclasses.replace(recipe, window_probability=1e-9, scale=(1, 1)))
    assert torch.equal(plain, again)


def test_a_soft_tissue_window_looks_like_a_data_set_that_lost_the_rest():
    """Against a real slice, to whose own window nothing is left to clip."""
    folder = Path(__file__).parents[3] / "shared" / "volumes" / "btcv"
    if not folder.is_dir():
        pytest.skip("the shared volumes are not here")
    volume = read_volume(folder / "images" / "btcvvol_006_0000.nii.gz")
    hu = torch.from_numpy(volume.voxels[::6].astype(np.float32))[:, None]
    window = torch.tensor([[-130.0, 275.0]]).expand(len(hu), 2)
    assert torch.equal(_clip_tissue(hu, window), hu)

"""Recipes as files and flags."""

import pytest

from training import TrainingError
from training.recipe import load_recipe, to_toml


def test_recipes_are_files_and_settings(tmp_path):
    paper = load_recipe("paper")
    assert (paper.batch_size, paper.learning_rate, paper.weight_decay) == (2, 1e-5, 0)
    assert (paper.cross_entropy, paper.spatial_probability, paper.ema_decay) == ("plain", 0, 0)
    best = load_recipe("best", ("attention=none", "contrast=0.7,1.4", "shift=1"), steps=7)
    assert (best.steps, best.attention, best.contrast, best.shift) == (7, "none", (0.7, 1.4), 1.0)
    assert (best.cross_entropy, best.seed) == ("marginal", 0)
    path = tmp_path / "again.toml"
    path.write_text(to_toml(best))
    assert load_recipe(str(path)) == best
    slim = load_recipe("slim")
    assert 0 < slim.synthetic_fraction < 1


@pytest.mark.parametrize(
    "text",
    [
        *("stepz = 1", "steps = 1.5", "steps = ", "steps = -1", "scale = 2", "clip_hu = [1, 0]"),
        *("matrix_reduction = 3", "attention = 3", "fold = 1", "folds = 1", "folds = 3\nfold = 3"),
        *(
            "batch_size = 0",
            "synthetic_fraction = 2",
            'scale = ["a", "b"]',
            "held_out_fraction = 1",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(TrainingError):
        load_recipe(str(path))
    with pytest.raises(TrainingError):
        load_recipe("paper", text.split("\n"))
    with pytest.raises(TrainingError):
        load_recipe("unknown")

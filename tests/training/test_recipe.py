"""Recipes as files and flags."""

import pytest

from training import TrainingError
from training.recipe import Recipe, load_recipe, to_toml


def test_recipes_are_files_and_flags(tmp_path):
    paper = load_recipe("paper")
    assert (paper.batch_size, paper.learning_rate, paper.weight_decay) == (2, 1e-5, 0)
    assert (paper.cross_entropy, paper.spatial_probability, paper.ema_decay) == ("plain", 0, 0)
    best = load_recipe("best", {"steps": 7})
    assert (best.steps, best.cross_entropy) == (7, "marginal")
    path = tmp_path / "again.toml"
    path.write_text(to_toml(best))
    assert load_recipe(str(path)) == best
    for text, reason in (
        ("stepz = 1", "no stepz"),
        ("steps = 1.5", "must be int"),
        ("scale = 2", "two numbers"),
        ("steps = ", "not TOML"),
        ("matrix_reduction = 3", "one of"),
    ):
        path.write_text(text)
        with pytest.raises(TrainingError, match=reason):
            load_recipe(str(path))
    with pytest.raises(TrainingError, match="best, paper"):
        load_recipe("unknown")
    assert Recipe().steps > 0

"""Pictures of scores: which cases are drawn, of what, and curves of a run that has just begun."""

import json

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from training import pictures
from training.__main__ import main
from training.cases import CachedVolume, Case


@pytest.fixture
def case(tmp_path):
    """A body of tissue in the middle of much air, with a liver in it."""
    hu = np.full((3, 80, 100), -1000, np.int16)
    hu[:, 30:60, 40:80] = 50
    labels = np.zeros(hu.shape, np.uint8)
    labels[:, 35:45, 45:60] = 1
    np.save(tmp_path / "hu.npy", hu)
    np.save(tmp_path / "labels.npy", labels)
    known = CachedVolume(
        image=tmp_path / "hu.npy",
        labels=tmp_path / "labels.npy",
        shape=hu.shape,
        spacing=(5.0, 1.0, 1.0),
        window=(-1000.0, 50.0),
        count=1,
        total=0.0,
        total_of_squares=0.0,
        slice_labels=(3, 3, 3),
        remark="",
    )
    return Case("a", tmp_path / "a", tmp_path / "b", "a", annotated=(1,), cached=known)


def test_best_median_and_worst_are_drawn(tmp_path, case, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        pictures,
        "draw_overlay",
        lambda path, of, label_map, title: drawn.update({path.name: (title, label_map)}),
    )
    rng = np.random.default_rng(0)
    maps = [rng.integers(0, 2, case.cached.shape).astype(np.uint8) for _ in range(5)]
    dsc = [0.3, 0.9, 0.1, 0.5, 0.7]
    scored = [
        (value, case, pictures.packed(label_map))
        for value, label_map in zip(dsc, maps, strict=True)
    ]
    paths = pictures.draw_best_median_worst(tmp_path, "set", scored)
    assert [path.name for path in paths] == ["set-best.png", "set-median.png", "set-worst.png"]
    for name, value in (("best", 0.9), ("median", 0.5), ("worst", 0.1)):
        title, label_map = drawn[f"set-{name}.png"]
        assert title == f"set, {name} of 5: a, mean DSC {value:.3f}"
        assert np.array_equal(label_map, maps[dsc.index(value)])
    assert len(pictures.draw_best_median_worst(tmp_path, "set", scored[:2])) == 2
    assert len(pictures.draw_best_median_worst(tmp_path, "set", scored[:1])) == 1
    assert pictures.draw_best_median_worst(tmp_path, "set", []) == []


def test_an_overlay_is_cropped_to_the_body_and_names_sides_and_labels(tmp_path, case, monkeypatch):
    shown, texts = [], []
    monkeypatch.setattr(
        Axes, "imshow", lambda axes, image, *_, **__: shown.append(np.asarray(image).shape)
    )
    monkeypatch.setattr(Axes, "text", lambda axes, x, y, text, **_: texts.append((x < 0.5, text)))
    path = tmp_path / "overlay.png"
    pictures.draw_overlay(path, case, np.load(case.cached.labels), "title")
    assert set(shown) == {(38, 48, 3)}  # 30 x 40 pixels of body, and 4 around it
    assert set(texts) == {(True, "R"), (False, "L")}  # columns run toward the patient's left
    assert Image.open(path).width > 200


@pytest.mark.slow
def test_curves_of_one_scoring_are_not_empty(tmp_path):
    """A single point drawn as a line leaves the picture white."""
    (tmp_path / "metrics.csv").write_text("step,loss,learning_rate\n50,1.5,0.001\n")
    (tmp_path / "held_out.csv").write_text("step,case,label,name,dsc,nsd\n50,a,1,liver,0.5,0.5\n")
    pictures.draw_curves(tmp_path)
    picture = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    colourful = picture.max(axis=2) - picture.min(axis=2) > 20  # axes and text are grey
    third = picture.shape[1] // 3
    for start in (0, third, 2 * third):
        assert colourful[:, start : start + third].sum() > 20


def test_runs_that_cannot_be_compared_say_why(tmp_path, capsys):
    for name, steps in (("a", (10,)), ("b", (20,)), ("c", ())):
        run = tmp_path / name
        run.mkdir()
        (run / "run.json").write_text(json.dumps({"recipe": {"seed": 1}}))
        (run / "metrics.csv").write_text("step,loss\n10,2.0\n")
        if steps:
            rows = "".join(f"{step},x,1,liver,0.5,0\n" for step in steps)
            (run / "held_out.csv").write_text(f"step,case,label,name,dsc,nsd\n{rows}")
    for runs, reason in ((("a", "b"), "at no step that all"), (("a", "c"), "c: never scored")):
        options = ["--by", "seed", "--picture", str(tmp_path / "x.png")]
        assert main(["compare", *(str(tmp_path / name) for name in runs), *options]) == 1
        assert reason in capsys.readouterr().err

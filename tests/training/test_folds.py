"""Folds by patient, and the table over them against numbers worked out by hand."""

import itertools
import json
from pathlib import Path

import pytest

from training import TrainingError
from training.__main__ import main
from training.cases import Case, split_patients
from training.recipe import Recipe


def cases(patients):
    return [
        Case(f"{patient}-{visit}", Path("a"), Path("b"), patient)
        for patient in patients
        for visit in range(2)
    ]


def test_folds_hold_every_patient_out_once_with_all_their_cases():
    everything = cases([f"p{number}" for number in range(13)])
    parts = [split_patients(everything, 0.1, 7, fold=(number, 5)) for number in range(5)]
    held_out = [sorted(case.name for case in out) for _, out in parts]
    assert sorted(itertools.chain(*held_out)) == sorted(case.name for case in everything)
    assert sorted(len(names) for names in held_out) == [4, 4, 6, 6, 6]  # 2 or 3 patients
    for kept, out in parts:
        assert not {case.patient for case in kept} & {case.patient for case in out}
        assert len(kept) + len(out) == len(everything)
    again = split_patients(everything[::-1], 0.9, 7, fold=(3, 5))[1]
    assert sorted(case.name for case in again) == held_out[3]
    other = split_patients(everything, 0.1, 8, fold=(3, 5))[1]
    assert sorted(case.name for case in other) != held_out[3]


def test_more_folds_than_patients_are_refused():
    with pytest.raises(TrainingError, match="5 folds of 3 patients"):
        split_patients(cases("abc"), 0.1, 0, fold=(0, 5))


@pytest.mark.parametrize("numbers", [{"folds": 1}, {"fold": 1}, {"folds": 3, "fold": 3}])
def test_folds_that_are_none_are_refused(numbers):
    with pytest.raises(TrainingError, match="fold"):
        Recipe(**numbers)


def run(folder, fold, rows, **recipe):
    folder.mkdir()
    about = {"recipe": {"folds": 3, "fold": fold, "seed": 0, **recipe}}
    (folder / "run.json").write_text(json.dumps(about))
    if rows:
        table = "".join(f"{step},{case},{label},x,{dsc},0\n" for step, case, label, dsc in rows)
        (folder / "held_out.csv").write_text(f"step,case,label,name,dsc,nsd\n{table}")
    return str(folder)


def test_the_table_over_folds(tmp_path, capsys):
    """The last step of each fold; every case counts once in the mean of organs."""
    rows = [(10, "a", 1, 0.1), (20, "a", 1, 0.8), (20, "a", 3, 0.6), (20, "b", 1, 0.4)]
    one = run(tmp_path / "one", 2, rows)
    two = run(tmp_path / "two", 0, [(20, "c", 1, 0.9), (20, "c", 14, 0.0)])
    assert main(["folds", one, two]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| label | fold 0, step 20 | fold 2, step 20 | all | sd | n |",
        "|---|---|---|---|---|---|",
        "| liver | 0.900 | 0.600 | 0.700 | 0.265 | 3 |",  # of 0.9, 0.8 and 0.4
        "| spleen | – | 0.600 | 0.600 | – | 1 |",
        "| tumor | 0.000 | – | 0.000 | – | 1 |",
        "| **mean of organs** | 0.900 | 0.550 | 0.667 | 0.252 | 3 |",  # of 0.9, 0.7 and 0.4
        "",
        "Missing: fold 1 of 3.",
    ]


def test_runs_that_are_not_folds_of_one_recipe_are_told(tmp_path, capsys):
    rows = [(20, "a", 1, 0.8)]
    one = run(tmp_path / "one", 0, rows)
    for name, fold, scored, recipe, reason in (
        ("twice", 0, rows, {}, "fold 0 is there twice"),
        ("other", 1, rows, {"seed": 1}, "another recipe than"),
        ("none", 0, rows, {"folds": 0}, "trained without --folds"),
        ("unscored", 1, [], {}, "never scored"),
    ):
        assert main(["folds", one, run(tmp_path / name, fold, scored, **recipe)]) == 1
        assert reason in capsys.readouterr().err


def test_held_out_names_and_folds_together_are_wrong_usage(tmp_path, capsys):
    options = ["--data", str(tmp_path), "--output", str(tmp_path / "run"), "--folds", "3"]
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *options, "--held-out", "a"])
    assert "--held-out and --folds" in capsys.readouterr().err.splitlines()[-1]

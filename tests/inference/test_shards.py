"""Shards: every case in exactly one, the same for everybody, none much larger than another."""

import random
from pathlib import Path

import pytest
from conftest import save_nifti

from inference.shards import parse_shard, shard_file, shard_of
from inference.sources import NiftiFile


def folder_of(tmp_path, sizes):
    paths = []
    for number, size in enumerate(sizes):
        path = tmp_path / f"c{number:03}_0000.nii.gz"
        path.write_bytes(b"")
        with path.open("r+b") as file:
            file.truncate(size)
        paths.append(path)
    return [*map(NiftiFile, paths)]


@pytest.mark.parametrize("seed", range(8))
def test_every_case_is_in_exactly_one_balanced_shard(tmp_path, seed):
    rng = random.Random(seed)
    sizes = [rng.choice([0, 1, 1000, rng.randrange(10**6)]) for _ in range(rng.randrange(1, 60))]
    files, count = folder_of(tmp_path, sizes), rng.randrange(1, 12)
    shards = [shard_of(files, index, count) for index in range(count)]
    assert sorted((file for shard in shards for file in shard), key=str) == files
    loads = [sum(file.path.stat().st_size for file in shard) for shard in shards]
    # The bound of list scheduling: nobody is ahead of another by more than one case.
    assert max(loads) - min(loads) <= max(sizes) + len(sizes)
    for index, shard in enumerate(shards):
        assert shard == sorted(shard, key=str)
        shuffled = rng.sample(files, len(files))
        assert set(shard_of(shuffled, index, count)) == set(shard)  # whatever the folder's order


def test_equal_files_are_dealt_evenly_and_empty_ones_too(tmp_path):
    for size in (0, 5000):
        paths = folder_of(tmp_path, [size] * 20)
        assert [len(shard_of(paths, index, 4)) for index in range(4)] == [5] * 4


def test_inputs_of_one_label_map_stay_together(tmp_path):
    for name in ("x_0000.nii.gz", "x.nii.gz", "y.nii.gz", "x.nii"):
        (tmp_path / name).write_bytes(bytes(100))
    files = [*map(NiftiFile, [*sorted(tmp_path.iterdir()), tmp_path / "odd.NII.GZ"])]
    (first,) = (shard for i in range(9) if len(shard := shard_of(files, i, 9)) > 1)
    assert [file.path.name for file in first] == ["x.nii", "x.nii.gz", "x_0000.nii.gz"]


SLURM = "SLURM_ARRAY_TASK_"


@pytest.mark.parametrize(
    ("text", "environment", "shard"),
    [
        ("0/1", {}, (0, 1)),
        ("3/8", {f"{SLURM}ID": "5"}, (3, 8)),
        ("auto", {f"{SLURM}ID": "2", f"{SLURM}COUNT": "4", f"{SLURM}MIN": "0"}, (2, 4)),
        ("auto", {f"{SLURM}ID": "1", f"{SLURM}COUNT": "4", f"{SLURM}MIN": "1"}, (0, 4)),
        ("auto", {f"{SLURM}ID": "4", f"{SLURM}COUNT": "4", f"{SLURM}MIN": "1"}, (3, 4)),
        (
            "auto",
            {f"{SLURM}ID": "14", f"{SLURM}COUNT": "4", f"{SLURM}MIN": "10", f"{SLURM}STEP": "2"},
            (2, 4),
        ),
        ("auto/8", {f"{SLURM}ID": "5", f"{SLURM}COUNT": "1", f"{SLURM}MIN": "5"}, (5, 8)),
        ("auto/8", {"JOB_COMPLETION_INDEX": "7"}, (7, 8)),
    ],
)
def test_which_shard(text, environment, shard):
    assert parse_shard(text, environment) == shard


@pytest.mark.parametrize(
    ("text", "environment", "words"),
    [
        ("4/4", {}, "count from 0"),
        ("0/0", {}, "does not exist"),
        ("-1/4", {}, "give I/N"),
        ("3", {}, "give I/N"),
        ("auto", {}, "neither"),
        ("auto", {"JOB_COMPLETION_INDEX": "1"}, "auto/N"),
        ("auto/4", {"JOB_COMPLETION_INDEX": "4"}, "does not exist"),
        ("auto", {f"{SLURM}ID": "7", f"{SLURM}COUNT": "3", f"{SLURM}MIN": "1"}, "gaps"),
        ("auto", {f"{SLURM}ID": "7", f"{SLURM}MIN": "1"}, "COUNT"),
    ],
)
def test_no_shard(text, environment, words):
    with pytest.raises(ValueError, match=words):
        parse_shard(text, environment)


@pytest.mark.slow
def test_the_command_line_takes_its_part_and_an_empty_one_is_done(folders, run, ct, tmp_path):
    inputs, outputs = folders
    for name in "ab":
        save_nifti(inputs / f"{name}_0000.nii.gz", ct)
    table = tmp_path / "table.csv"
    assert run("--shard", "2/3", "--statistics", str(table)) == 0
    assert not list(outputs.iterdir())
    assert run("--shard", "0/3", "--quiet", "--statistics", str(table)) == 0
    assert len(list(outputs.iterdir())) == 1
    assert run("--shard", "1/3", "--quiet", "--statistics", str(table)) == 0
    assert sorted(path.name for path in outputs.iterdir()) == ["a.nii.gz", "b.nii.gz"]
    # A table each: one would replace the other.
    rows = [len((tmp_path / f"table.{i}-of-3.csv").read_text().splitlines()) for i in range(3)]
    assert rows == [15, 15, 1]


def test_names_of_a_shards_files():
    assert shard_file(Path("a/m.jsonl"), 3, 8) == Path("a/m.3-of-8.jsonl")

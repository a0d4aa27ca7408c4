"""Shards: every case in exactly one, the same for everybody, none much larger than another."""

import os
import random

import pytest
from conftest import names_in

from inference.shards import parse_shard, shard_of
from inference.sources import NiftiFile


def folder_of(tmp_path, sizes):
    paths = []
    for number, size in enumerate(sizes):
        paths.append(tmp_path / f"c{number:03}_0000.nii.gz")
        paths[-1].touch()
        os.truncate(paths[-1], size)
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


def slurm(number, **others):
    """The environment of a task of a Slurm array."""
    return {f"SLURM_ARRAY_TASK_{name}": str(n) for name, n in {"ID": number, **others}.items()}


KUBERNETES = "JOB_COMPLETION_INDEX"


@pytest.mark.parametrize(
    ("text", "environment", "shard"),
    [
        ("0/1", {}, (0, 1)),
        ("3/8", slurm(5), (3, 8)),
        ("auto", slurm(2, COUNT=4, MIN=0), (2, 4)),
        ("auto", slurm(4, COUNT=4, MIN=1), (3, 4)),
        ("auto", slurm(14, COUNT=4, MIN=10, STEP=2), (2, 4)),
        ("auto/8", slurm(5, COUNT=1, MIN=5), (5, 8)),
        ("auto/8", {KUBERNETES: "7"}, (7, 8)),
    ],
)
def test_which_shard(text, environment, shard):
    assert parse_shard(text, environment) == shard


@pytest.mark.parametrize(
    ("text", "environment"),
    [
        ("4/4", {}),
        ("0/0", {}),
        ("-1/4", {}),
        ("3", {}),
        ("auto", {}),
        ("auto", {KUBERNETES: "1"}),
        ("auto/4", {KUBERNETES: "4"}),
        ("auto/4", {KUBERNETES: "x"}),
        ("auto", slurm(7, COUNT=3, MIN=1)),
        ("auto", slurm(7, MIN=1)),
    ],
)
def test_no_shard(text, environment):
    with pytest.raises(ValueError):
        parse_shard(text, environment)


@pytest.mark.slow
def test_the_command_line_takes_its_part_and_an_empty_one_is_done(folders, run, cts, tmp_path):
    cts("a", "b")
    table = tmp_path / "table.csv"
    for shard, written in (("2/3", []), ("0/3", ["a.nii.gz"]), ("1/3", ["a.nii.gz", "b.nii.gz"])):
        assert run("--shard", shard, "--quiet", "--statistics", table) == 0
        assert names_in(folders[1]) == written
    # A table each: one would replace the other.
    rows = [len((tmp_path / f"table.{i}-of-3.csv").read_text().splitlines()) for i in range(3)]
    assert rows == [15, 15, 1]

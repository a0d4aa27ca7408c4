"""A whole challenge: teams that break, a disk that is full, a run that is stopped, odd files."""

import gzip
import io
import json
import os
import signal
import tarfile

import numpy as np
import pytest
from harness import (
    StandInEngine,
    make_inputs,
    page_data,
    read,
    run_benchmark,
    save,
    start,
    wait_for,
)

from benchmark.challenge import team
from benchmark.challenge.team import EndedAs, inspect_archive

LABEL = (
    "for f in inputs/*_0000.nii.gz; do n=$(basename $f _0000.nii.gz); cp {} outputs/$n.nii.gz; done"
)
GOOD, EMPTY = LABEL.format("REFERENCE/$n.nii.gz"), LABEL.format("$f")


def save_archive(path, predict, tags=None, layers=()):
    """A `docker save` file as the stand-in engine loads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tags = tags or [path.name.partition(".")[0].lower() + ":latest"]
    members = {f"{n}/layer.tar": layer for n, layer in enumerate(layers)}
    members["predict.sh"] = predict.encode()
    members["manifest.json"] = json.dumps([{"RepoTags": tags, "Layers": []}]).encode()
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


class Hall:
    """Teams, two cases with a liver each, and a stand-in engine."""

    def __init__(self, folder):
        self.folder, self.report = folder, folder / "out"
        self.engine = StandInEngine(folder / "engine")
        make_inputs(folder / "cts", "x", "y")
        labels = np.zeros((6, 5, 4), np.uint8)
        labels[1:4, 1:4, 1:3] = 1
        for case in "xy":
            save(folder / f"labels/{case}.nii.gz", labels)

    def enter(self, name, predict=GOOD, **more):
        predict = predict.replace("REFERENCE", str(self.folder / "labels"))
        return save_archive(self.folder / "archives" / name, predict, **more)

    def words(self, *more):
        names = {"archives": "archives", "inputs": "cts", "reference": "labels", "report": "out"}
        options = [w for name, at in names.items() for w in (f"--{name}", self.folder / at)]
        return ["challenge", "--no-check", *options, *more]

    def call(self, *more, **environment):
        return run_benchmark(*self.words(*more), **self.engine.environment, **environment).code

    def images(self):
        folder = self.engine.folder / "images"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def states(self):
        files = self.report.glob("teams/*/fate.json")
        return {file.parent.name: read(file)["state"] for file in files}

    def ranking(self):
        rows = read(self.report / "ranking/ranking.json")["ranking"]
        return {row["team"]: row for row in rows}

    def page(self):
        return page_data(self.report / "challenge.html")["challenge"]


@pytest.fixture
def hall(tmp_path):
    return Hall(tmp_path)


@pytest.mark.slow
def test_a_team_that_breaks_costs_itself_only(hall):
    hall.enter("Best.tar.gz")
    hall.enter("blind.tar.gz", EMPTY)
    hall.enter("crash.tar.gz", "echo no luck; exit 4")
    hall.enter("misnamed.tar.gz", tags=["our-best:v2"])
    torn = hall.enter("torn.tar.gz")
    torn.write_bytes(torn.read_bytes()[:-30])
    assert hall.call() == 1
    assert hall.images() == hall.engine.containers("best") == []
    states = {"Best": "done", "blind": "done", "crash": "done", "misnamed": "failed"}
    states |= {"torn": "failed"}
    assert hall.states() == states

    ranking = hall.ranking()
    assert (ranking["Best"]["rank"], ranking["Best"]["dsc_mean"]) == (1, 1)
    assert ranking["blind"]["dsc_mean"] == pytest.approx(12 / 13, abs=1e-4)  # all but the liver
    for name in ("crash", "misnamed", "torn"):
        row = ranking[name]
        assert (row["rank"], row["time_mean"], row["dsc_mean"]) == (3, 3600, 0)
    page = hall.page()
    counts = ["2 of 2"] * 2 + ["0 of 2"] * 3
    rows = [row[:3] for row in page["fates"]["rows"]]
    assert rows == [[*item, n] for item, n in zip(states.items(), counts, strict=True)]
    assert page["ranking"]["rows"][0][:2] == ["1", "Best"]
    assert (hall.report / "teams/Best/labels/x.nii.gz").is_file()

    # Again: nobody is loaded or run again, but for the team that has sent another archive.
    loads, runs = (len(hall.engine.orders(*w)) for w in (["load"], ["container", "run"]))
    assert hall.call() == 1
    assert len(hall.engine.orders("load")) == loads
    assert len(hall.engine.orders("container", "run")) == runs
    for name in ("crash", "misnamed", "torn"):
        hall.enter(f"{name}.tar.gz")
    assert hall.call() == 0
    assert len(hall.engine.orders("load")) == loads + 3
    assert hall.ranking()["torn"]["dsc_mean"] == 1
    assert hall.call("--timeout", "9") == 2  # one report has one set of conditions


@pytest.mark.slow
def test_a_challenge_continues_where_it_was_stopped(hall):
    hall.enter("first.tar.gz")
    free, reached = hall.folder / "free", hall.folder / "reached"
    # Its second case waits until it is set free.
    wait = f"if [ -e inputs/y_0000.nii.gz ] && [ ! -e {free} ]; then touch {reached}; sleep 600; fi"
    hall.enter("second.tar.gz", f"{wait}\n{GOOD}")
    process = start(*hall.words(), **hall.engine.environment)
    wait_for(reached.exists)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert hall.images() == hall.engine.containers("second") == []
    assert list(hall.ranking()) == ["first"]  # what is there is ranked already

    free.touch()
    before = len(hall.engine.orders("container", "run"))
    assert hall.call() == 0
    loaded = [order[2].rpartition("/")[2] for order in hall.engine.orders("load")]
    assert loaded == ["first.tar.gz", "second.tar.gz", "second.tar.gz"]
    assert len(hall.engine.orders("container", "run")) == before + 1  # y of the second
    assert list(hall.ranking()) == ["first", "second"]


@pytest.mark.slow
def test_what_is_not_the_teams_fault_is_tried_again(hall, monkeypatch):
    hall.enter("small.tar.gz")
    hall.enter("large.tar.gz", layers=[bytes(3 << 20)])
    (hall.folder / "archives/unfetched.tar.gz").symlink_to("../annex/object")
    hall.engine.make_image("here", "exit 1")
    hall.enter("here.tar.gz")
    monkeypatch.setattr(team.engine, "free_image_bytes", lambda: (2 << 30) + (4 << 20))
    assert hall.call() == 1
    waiting = dict.fromkeys(("large", "unfetched", "here"), "not run")
    assert hall.states() == {"small": "done", **waiting}
    assert list(hall.ranking()) == ["small"]
    assert all(name in hall.page()["notes"][0] for name in waiting)
    assert hall.images() == ["here"]  # never replaced
    assert len(hall.engine.orders("load")) == 1
    monkeypatch.undo()
    (hall.folder / "archives/unfetched.tar.gz").unlink()
    hall.enter("unfetched.tar.gz")
    (hall.folder / "archives/here.tar.gz").unlink()
    assert hall.call() == 0
    assert sorted(hall.ranking()) == ["large", "small", "unfetched"]


@pytest.mark.slow
def test_what_an_engine_refuses_is_the_teams_if_the_engine_is_well(hall):
    hall.enter("odd.tar.gz", tags=["odd:latest", "odd2:latest"])
    stub = hall.engine.script
    whole = stub.read_text()
    for message, state in (("no space left on device", "not run"), ("invalid header", "failed")):
        refusal = f'case "$1" in load) echo "{message}" >&2; exit 1;; esac\nexec'
        stub.write_text(whole.replace("exec", refusal))
        assert hall.call() == 1
        assert hall.states() == {"odd": state}
    assert hall.ranking()["odd"]["time_mean"] == 3600
    stub.write_text("#!/bin/sh\necho Cannot connect to the Docker daemon >&2; exit 1\n")
    hall.enter("odd.tar.gz")
    assert hall.call() == 2


@pytest.mark.slow
def test_cases_that_are_no_files_are_skipped_for_every_team_and_reported(hall):
    hall.enter("team.tar.gz")
    (hall.folder / "cts/gone_0000.nii.gz").symlink_to("../annex/object")
    save(hall.folder / "labels/gone.nii.gz", np.ones((6, 5, 4), np.uint8))
    make_inputs(hall.folder / "cts", "loud")
    (hall.folder / "labels/loud.NII.GZ").write_bytes(b"")
    assert hall.call() == 1
    names = ("gone_0000.nii.gz", "loud.NII.GZ")
    assert all(any(name in note for note in hall.page()["notes"]) for name in names)
    assert hall.ranking()["team"]["dsc_mean"] == 1  # of x and y


def test_wrong_usage_is_reported_before_anything_is_run(hall):
    (hall.folder / "archives").mkdir()
    assert hall.call() == 2
    hall.enter("Team.tar.gz")
    hall.enter("team.tar.gz")
    assert hall.call() == 2
    (hall.folder / "archives/team.tar.gz").unlink()
    (hall.folder / "labels/y.nii.gz").rename(hall.folder / "labels/z.nii.gz")
    assert hall.call() == 2
    assert not hall.report.exists()


def test_an_archive_is_measured_and_nothing_of_it_is_stored(tmp_path):
    layer = bytes(5 << 20)
    zipped = gzip.compress(layer)
    path = save_archive(tmp_path / "a.tar.gz", "", ["a:latest", "b:1"], [layer, zipped])
    images, load_bytes = inspect_archive(path)
    assert images == ["a:latest", "b:1"]
    # The archive unpacked, and each layer unpacked; a gzipped one is estimated.
    least = 2 * len(layer) + 2 * len(zipped)
    assert least <= load_bytes < least + 2 * len(zipped) + 1000
    plain = tmp_path / "plain.tar"
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    assert inspect_archive(plain) == (images, load_bytes)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no archive",
        lambda data: data[:50_000],
        lambda data: data[:40_000] + bytes(1000) + data[41_000:],
        lambda data: gzip.compress(tarfile.TarInfo("x").tobuf() + bytes(1024)),
    ],
)
def test_a_damaged_archive_is_one_line(tmp_path, damage):
    path = save_archive(tmp_path / "a.tar.gz", "", layers=[os.urandom(100_000)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(EndedAs) as error:
        inspect_archive(path)
    assert len(str(error.value).splitlines()) == 1

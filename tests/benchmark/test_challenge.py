"""An organiser's evening: teams that break, a disk that is full, an evening that is stopped."""

import contextlib
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from io import StringIO
from unittest import mock

import numpy as np
import pytest
from harness import ROOT, StandInEngine, make_inputs, save, wait_for

from benchmark.__main__ import main
from benchmark.challenge.archive import ArchiveError, inspect_archive

CASES = ("x", "y")
GOOD = "for f in inputs/*_0000.nii.gz; do n=$(basename $f _0000.nii.gz); cp REFERENCE/$n.nii.gz " \
    "outputs/$n.nii.gz; done"  # fmt: skip
EMPTY = "for f in inputs/*_0000.nii.gz; do cp $f outputs/$(basename $f _0000.nii.gz).nii.gz; done"


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
        self.folder = folder
        self.engine = StandInEngine(folder / "engine")
        make_inputs(folder / "cts", *CASES)
        labels = np.zeros((6, 5, 4), np.uint8)
        labels[1:4, 1:4, 1:3] = 1
        for case in CASES:
            save(folder / f"labels/{case}.nii.gz", labels)
        self.report = folder / "evening"

    def enter(self, name, predict=GOOD, **more):
        predict = predict.replace("REFERENCE", str(self.folder / "labels"))
        return save_archive(self.folder / "archives" / name, predict, **more)

    def words(self, *more):
        return [
            *("challenge", "--archives", str(self.folder / "archives"), "--no-check"),
            *("--inputs", str(self.folder / "cts"), "--reference", str(self.folder / "labels")),
            *("--report", str(self.report), *more),
        ]

    def call(self, *more):
        """`python -m benchmark challenge` in this process: its exit code and what it said."""
        said = StringIO()
        with (
            mock.patch.dict(os.environ, self.engine.environment),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            return main(self.words(*more)), said.getvalue()

    def orders(self, *start):
        lines = (self.engine.folder / "orders").read_text().splitlines()
        return [order for line in lines if (order := json.loads(line))[: len(start)] == [*start]]

    def images(self):
        folder = self.engine.folder / "images"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def fate(self, team):
        return json.loads((self.report / f"teams/{team}/fate.json").read_text())

    def ranking(self):
        rows = json.loads((self.report / "ranking/ranking.json").read_text())["ranking"]
        return {row["team"]: row for row in rows}

    def page(self):
        text = (self.report / "challenge.html").read_text()
        return json.loads(text.split('id="data">')[1].split("</script>")[0])


@pytest.fixture
def hall(tmp_path):
    return Hall(tmp_path)


@pytest.mark.slow
def test_a_team_that_breaks_costs_itself_only(hall):
    hall.enter("Best.tar.gz")
    hall.enter("blind.tar.gz", EMPTY)
    hall.enter("crash.tar.gz", "echo no luck; exit 4")
    hall.enter("misnamed.tar.gz", tags=["our-best:v2"])
    (hall.folder / "archives/torn.tar.gz").write_bytes(hall.enter("torn.tar.gz").read_bytes()[:-30])
    code, said = hall.call()
    assert code == 1, said
    assert hall.images() == []
    assert hall.engine.containers("best") == []
    states = {name: hall.fate(name)["state"] for name in ("Best", "blind", "crash")}
    assert states == {"Best": "done", "blind": "done", "crash": "done"}
    assert hall.fate("misnamed")["state"] == hall.fate("torn")["state"] == "failed"
    assert "holds our-best:v2, but the organisers run misnamed:latest" in said
    assert hall.fate("torn")["reason"].startswith("archive: damaged")

    ranking = hall.ranking()
    assert ranking["Best"]["rank"] == 1
    assert ranking["Best"]["dsc_mean"] == 1
    assert ranking["blind"]["dsc_mean"] == pytest.approx(12 / 13, abs=1e-4)  # all but the liver
    for team in ("crash", "misnamed", "torn"):
        assert ranking[team]["rank"] == 3
        assert (ranking[team]["time_mean"], ranking[team]["dsc_mean"]) == (3600, 0)
    page = hall.page()
    assert [row[:3] for row in page["challenge"]["fates"]["rows"]] == [
        ["Best", "done", "2 of 2"],
        ["blind", "done", "2 of 2"],
        ["crash", "done", "0 of 2"],
        ["misnamed", "failed", "0 of 2"],
        ["torn", "failed", "0 of 2"],
    ]
    assert page["challenge"]["ranking"]["rows"][0][:2] == ["1", "Best"]
    assert (hall.report / "teams/Best/labels/x.nii.gz").is_file()

    # Again: nobody is loaded or run anew, but for the team that has sent another archive.
    before = len(hall.orders("load")), len(hall.orders("container", "run"))
    assert hall.call()[0] == 1
    assert (len(hall.orders("load")), len(hall.orders("container", "run"))) == before
    for team in ("crash", "misnamed", "torn"):
        hall.enter(f"{team}.tar.gz")
    code, said = hall.call()
    assert code == 0, said
    assert "crash.tar.gz has changed: the team starts anew" in said
    assert len(hall.orders("load")) == before[0] + 3
    assert hall.ranking()["torn"]["dsc_mean"] == 1
    assert hall.images() == []


@pytest.mark.slow
def test_an_evening_goes_on_where_it_was_stopped(hall):
    hall.enter("first.tar.gz")
    free, reached = hall.folder / "free", hall.folder / "reached"
    # Its second case waits until it is set free.
    wait = f"if [ -e inputs/y_0000.nii.gz ] && [ ! -e {free} ]; then touch {reached}; sleep 600; fi"
    hall.enter("second.tar.gz", f"{wait}\n{GOOD}")
    hall.enter("third.tar.gz")
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmark", *hall.words()],
        cwd=ROOT,
        env=os.environ | hall.engine.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(reached.exists)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in said
    assert hall.images() == []
    assert hall.engine.containers("second") == []
    assert list(hall.ranking()) == ["first"]  # what is there is ranked already

    free.touch()
    before = len(hall.orders("container", "run"))
    code, said = hall.call()
    assert code == 0, said
    assert [order[2] for order in hall.orders("load")[1:]] == [
        *(str(hall.folder / f"archives/{name}.tar.gz") for name in ("second", "second", "third"))
    ]
    assert len(hall.orders("container", "run")) == before + 3  # y of the second, x and y
    assert "x (6×5×4)" in said
    assert list(hall.ranking()) == ["first", "second", "third"]
    assert hall.images() == []


@pytest.mark.slow
def test_a_full_disk_is_not_the_teams_fault(hall, monkeypatch):
    hall.enter("small.tar.gz")
    hall.enter("large.tar.gz", layers=[bytes(3 << 20)])
    monkeypatch.setattr("benchmark.challenge.team.free_image_bytes", lambda: (2 << 30) + (4 << 20))
    code, said = hall.call()
    assert code == 1
    assert "disk: loading takes more than the 0.0 GB that may be used" in said
    assert hall.fate("large")["state"] == "not run"
    assert list(hall.ranking()) == ["small"]
    assert "large not run" in hall.page()["challenge"]["notes"][0]
    assert not any("large" in order[2] for order in hall.orders("load"))
    monkeypatch.undo()
    assert hall.call()[0] == 0
    assert sorted(hall.ranking()) == ["large", "small"]


def test_images_that_are_here_are_never_replaced(hall):
    hall.engine.make_image("team", "exit 1")
    hall.enter("team.tar.gz")
    code, said = hall.call()
    assert code == 1
    assert "an image team:latest is here already" in said
    assert hall.images() == ["team"]
    assert not hall.orders("load")


@pytest.mark.slow
def test_what_an_engine_refuses_is_the_teams_if_the_engine_is_well(hall):
    hall.enter("odd.tar.gz", tags=["odd:latest", "odd2:latest"])
    stub = hall.engine.folder / "bin/docker"
    refusal = 'case "$1" in load) echo "invalid tar header" >&2; exit 1;; esac\nexec'
    stub.write_text(stub.read_text().replace("exec", refusal))
    code, said = hall.call()
    assert code == 1
    assert "failed: load: docker does not load" in said
    assert hall.ranking()["odd"]["time_mean"] == 3600
    stub.write_text("#!/bin/sh\necho Cannot connect to the Docker daemon >&2; exit 1\n")
    hall.enter("odd.tar.gz")
    code, said = hall.call()
    assert code == 2
    assert "engine does not answer" in said


def test_wrong_usage_is_said_before_the_evening(hall):
    hall.folder.joinpath("archives").mkdir()
    assert "holds no TEAM.tar.gz" in hall.call()[1]
    hall.enter("Team.tar.gz")
    hall.enter("team.tar.gz")
    code, said = hall.call()
    assert code == 2
    assert "Team.tar.gz and team.tar.gz are both the image team:latest" in said
    (hall.folder / "archives/team.tar.gz").unlink()
    (hall.folder / "labels/y.nii.gz").rename(hall.folder / "labels/z.nii.gz")
    code, said = hall.call()
    assert code == 2
    assert "no reference for y" in said
    assert not hall.report.exists()


@pytest.mark.slow
def test_one_report_holds_one_set_of_conditions(hall):
    hall.enter("team.tar.gz")
    assert hall.call()[0] == 0
    code, said = hall.call("--timeout", "9")
    assert code == 2
    assert "another timeout" in said


def test_an_archive_is_measured_without_being_kept(tmp_path):
    layer = bytes(5 << 20)
    zipped = gzip.compress(layer)
    path = save_archive(tmp_path / "a.tar.gz", "", ["a:latest", "b:1"], [layer, zipped])
    content = inspect_archive(path)
    assert content.images == ("a:latest", "b:1")
    # The archive unpacked, and each layer unpacked.
    beside = len(zipped) + len(json.dumps([{"RepoTags": ["a:latest", "b:1"], "Layers": []}]))
    assert content.load_bytes == 3 * len(layer) + beside
    assert (1 << 20) < inspect_archive(path, 1 << 20).load_bytes < content.load_bytes
    plain = tmp_path / "plain.tar"
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    assert inspect_archive(plain) == content


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "no manifest"])
def test_a_damaged_archive_is_one_line(tmp_path, damage):
    path = save_archive(tmp_path / "a.tar.gz", "", layers=[os.urandom(100_000)])
    data = path.read_bytes()
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("no archive")
        case "cut":
            path.write_bytes(data[:50_000])
        case "flipped":
            path.write_bytes(data[:40_000] + bytes(1000) + data[41_000:])
        case "no manifest":
            with tarfile.open(path, "w:gz") as tar:
                tar.addfile(tarfile.TarInfo("x"))
    with pytest.raises(ArchiveError) as error:
        inspect_archive(path)
    assert re.fullmatch(r"[^\n]+", str(error.value))

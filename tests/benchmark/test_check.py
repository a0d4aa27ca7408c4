"""The dry run of a submission: its runs by a stand-in engine, and its pages."""

import json
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from harness import StandInEngine, run_benchmark, save

from benchmark.__main__ import main
from benchmark.checking import volumes
from benchmark.checking.findings import LOST
from benchmark.checking.pages import html_section, markdown_page
from benchmark.checking.trials import (
    HARDENED,
    MODES,
    NO_NETWORK,
    ORGANISERS,
    SMALL_SHARED_MEMORY,
)
from benchmark.containers.runner import Container, Folders

BROKEN = Path(__file__).parents[1] / "container/broken/broken.py"

NAME = "FLARE23Ts_0001"


def run_check(*arguments, **environment):
    """`python -m benchmark check` in this process: exit code, what it printed, what it said."""
    done = run_benchmark("check", *arguments, **environment)
    return done.returncode, done.stdout, done.stderr


def findings_of(report):
    findings = json.loads((report / "check.json").read_text())["findings"]
    return {(finding["level"], finding["check"]): finding for finding in findings}


def names(findings, level):
    return {name for found, name in findings if found == level}


@pytest.fixture
def engine(tmp_path):
    return StandInEngine(tmp_path / "engine")


@pytest.fixture
def inputs(tmp_path):
    volume = np.random.default_rng(5).integers(-1000, 1000, (12, 10, 8), np.int16)
    save(tmp_path / "in" / f"{NAME}_0000.nii.gz", volume)
    return tmp_path / "in"


def make_broken(engine, defect, team="team"):
    engine.make_image(team, f"exec {sys.executable} -I {BROKEN} {defect}\n")


def check_broken(engine, inputs, tmp_path, defect, *options):
    make_broken(engine, defect)
    code, _, _ = run_check(
        *("--image", "team", "--inputs", inputs, "--report", tmp_path / "report", *options),
        **engine.environment,
    )
    return code, findings_of(tmp_path / "report")


@pytest.mark.slow
def test_a_sound_image_passes(engine, inputs, tmp_path):
    make_broken(engine, "none")
    report = tmp_path / "report"
    code, printed, said = run_check(
        *("--image", "team", "--inputs", inputs, "--report", report), **engine.environment
    )
    findings = findings_of(report)
    assert code == 0
    assert names(findings, "failed") == set()
    assert {name.split(",")[0] for name in names(findings, "warned")} == {"GPU memory"}
    assert ("passed", "weights") not in findings  # the image is not of this project
    assert printed.splitlines()[-1] == f"0 failed, 1 warned, 19 passed: {report / 'check.md'}"
    assert [line.split()[0] for line in said.splitlines()[1:]] == [f"[{n}/6]" for n in range(1, 7)]
    assert sorted(path.name for path in report.iterdir()) == ["check", "check.json", "check.md"]
    orders = [json.loads(line) for line in (engine.folder / "orders").read_text().splitlines()]
    runs = [order for order in orders if "/bin/bash" in order]
    exact = "container run --shm-size=28gb -m 28G --label abdoseg.benchmark="
    assert [" ".join(run).startswith(exact) for run in runs] == [True, True, *3 * [False], True]
    assert engine.containers("team") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defect", "failing", "words"),
    [
        ("misnamed", "output names", f"found {NAME}_0000.nii.gz instead"),
        ("crashes", "starts with the organisers' command", "crashed: exit code 3"),
        ("downloads", "starts with the organisers' command", "urlopen error"),
        ("hangs", "starts with the organisers' command", "timeout: ended after 0.5 s"),
    ],
)
def test_a_first_run_without_a_label_map_ends_the_check(
    engine, inputs, tmp_path, defect, failing, words
):
    options = ("--timeout", 0.5) if defect == "hangs" else ()
    code, findings = check_broken(engine, inputs, tmp_path, defect, *options)
    assert code == 1
    assert names(findings, "failed") == {failing}
    assert words in findings["failed", failing]["found"]
    assert LOST in findings["failed", failing]["cost"]
    assert "not run" in findings["warned", "everything else"]["found"]
    if defect == "downloads":
        assert "asks for the network" in findings["failed", failing]["advice"]


@pytest.mark.slow
def test_another_label_map_each_time_fails(engine, inputs, tmp_path):
    code, findings = check_broken(engine, inputs, tmp_path, "random")
    assert code == 1
    assert names(findings, "failed") == {"twice the same"}
    assert "labelled voxels differ" in findings["failed", "twice the same"]["found"]
    assert names(findings, "warned") >= {NO_NETWORK, HARDENED, SMALL_SHARED_MEMORY}


@pytest.mark.slow
def test_what_only_fails_without_network_or_rights_is_said_so(engine, inputs, tmp_path):
    engine.make_image(
        "team",
        f"""case "$CONTAINER_OPTIONS" in
        *read-only*) echo "Read-only file system: '/workspace/cache'"; exit 1 ;;
        *'--network none'*) echo 'Could not resolve host: weights'; exit 1 ;;
        *shm-size*) ;;
        *) echo 'Bus error'; exit 135 ;;
        esac
        touch outputs/notes.txt
        exec {sys.executable} -I {BROKEN} litters""",
    )
    code, _, _ = run_check(
        *("--image", "team", "--inputs", inputs, "--report", tmp_path / "report"),
        **engine.environment,
    )
    findings = findings_of(tmp_path / "report")
    assert code == 1
    assert names(findings, "failed") == {NO_NETWORK, "files left behind"}
    assert "notes.txt" in findings["failed", "files left behind"]["found"]
    assert "asks for the network" in findings["failed", NO_NETWORK]["advice"]
    assert "nothing in the challenge" in findings["warned", HARDENED]["cost"]
    assert "outputs/ and /tmp" in findings["warned", HARDENED]["advice"]
    assert "num_workers=0" in findings["warned", SMALL_SHARED_MEMORY]["advice"]


@pytest.mark.slow
def test_an_archive_is_run_under_its_own_name_and_another_fails(engine, inputs, tmp_path):
    make_broken(engine, "crashes")
    make_broken(engine, "crashes", "other")
    for name, holds in (("Team.tar.gz", "team:latest"), ("wrong.tar.gz", "other:latest")):
        (tmp_path / name).write_text(holds)
    where = ("--inputs", inputs, "--report", tmp_path / "report")
    run_check("--archive", tmp_path / "Team.tar.gz", *where, **engine.environment)
    findings = findings_of(tmp_path / "report")
    assert findings["passed", "image's name"]["found"] == "team:latest"
    assert ("passed", "archive's size") in findings
    # An image of the right name that is here from before is not the archive's.
    make_broken(engine, "none", "wrong")
    code, _, _ = run_check("--archive", tmp_path / "wrong.tar.gz", *where, **engine.environment)
    findings = findings_of(tmp_path / "report")
    assert code == 1
    assert "the archive holds other:latest" in findings["failed", "image's name"]["found"]
    assert "docker tag" in findings["failed", "image's name"]["advice"]


def test_wrong_usage_exits_with_2_and_one_line(engine, inputs, tmp_path):
    make_broken(engine, "none")
    for options in (
        ("--image", "nobody"),
        ("--archive", tmp_path / "none.tar.gz"),
        ("--image", "team", "--inputs", tmp_path / "none"),
    ):
        code, _, said = run_check(*options, "--report", tmp_path / "r", **engine.environment)
        assert code == 2
        assert said.splitlines()[-1].startswith("benchmark check: ")
    assert run_check("--image", "team", "--large-slices", "-1")[0] == 2
    assert run_check()[0] == 2


def test_each_way_changes_what_it_says_and_nothing_else():
    folders = Folders(Path("/i"), Path("/o"), Path())
    lines = {
        mode: Container("a:latest", "28g", **MODES[mode]).command_line("n", folders)
        for mode in (ORGANISERS, NO_NETWORK, HARDENED, SMALL_SHARED_MEMORY)
    }
    official = (
        "docker container run --shm-size=28gb -m 28G --name n --rm -v /i/:/workspace/inputs/ "
        "-v /o/:/workspace/outputs/ a:latest /bin/bash -c"
    )
    assert lines[ORGANISERS] == [*official.split(), "sh predict.sh"]
    without = [word for word in lines[ORGANISERS] if word != "--shm-size=28gb"]
    assert lines[SMALL_SHARED_MEMORY] == without
    assert lines[NO_NETWORK] == [
        *["docker", "container", "run", "--network", "none"],
        *lines[ORGANISERS][3:],
    ]
    assert "/i/:/workspace/inputs/:ro" in lines[HARDENED]
    assert {"--read-only", "--cap-drop", "no-new-privileges"} <= set(lines[HARDENED])


@pytest.mark.slow
def test_the_phantoms_are_what_they_are_called(tmp_path, monkeypatch):
    small = {
        "typical": ((10, 48, 64), (5.0, 6.0, 6.0)),
        "turned": ((8, 32, 48), (8.0, 8.0, 7.0)),
    }
    monkeypatch.setattr(volumes, "_PHANTOMS", small)
    typical, turned, large = volumes.draw_subjects(tmp_path, 25, lambda line: None)
    assert [subject.label for subject in (typical, turned, large)] == [*small, "very large"]
    assert typical.case.size == (64, 48, 10)
    assert large.case.size == (64, 48, 25)
    assert turned.case.size == (8, 48, 32)  # superior, left, anterior
    image = nibabel.load(turned.case.image)
    assert nibabel.aff2axcodes(image.affine) == ("S", "L", "A")
    np.testing.assert_allclose(image.header.get_zooms(), (8.0, 7.0, 8.0))
    upright = nibabel.as_closest_canonical(image)
    expected = volumes._draw(*small["turned"])[:, ::-1, ::-1].transpose(2, 1, 0)
    np.testing.assert_array_equal(np.asanyarray(upright.dataobj), expected)
    damaged = volumes.damaged_subject(tmp_path, typical)
    with pytest.raises(EOFError):
        np.asanyarray(nibabel.load(damaged.case.image).dataobj)


def test_pages_hold_what_a_team_calls_its_files_as_text(tmp_path):
    evil = "</td><script>alert(1)</script>|x"
    finding = {"level": "failed", "check": "a", "found": evil, "cost": "b", "advice": "c"}
    check = {
        "team": evil, "image": "a", "image_digest": "b", "command": "c", "findings": [finding],
        "environment": {"cpu": "", "cores": 2, "memory_gb": 4, "gpu": None, "date": ""},
        "limits": {"timeout_s": 600.0}, "runs": [],
    }  # fmt: skip
    (tmp_path / "check.json").write_text(json.dumps(check))
    section = html_section(tmp_path, evil)
    assert "1 failed, 0 warned, 0 passed" in section
    assert "&lt;script&gt;" in section
    assert "<script>" not in section + markdown_page(check)
    assert r"\|x" in markdown_page(check)
    (tmp_path / "check.json").write_text("[1")
    assert html_section(tmp_path, "a") == ""


def test_the_report_page_shows_a_check(tmp_path):
    finding = {"level": "warned", "check": "time", "found": "slow", "cost": "b", "advice": "c"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "check.json").write_text(json.dumps({"findings": [finding]}))
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "run"), "--output", str(page)]) == 0
    assert "Check of run: 0 failed, 1 warned, 0 passed" in page.read_text()

"""The dry run of a submission: its runs by a stand-in engine, and each rule of its list."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from harness import AFFINE, StandInEngine, run_benchmark, save

from benchmark.__main__ import main
from benchmark.checking import findings as judge
from benchmark.checking import symptoms, volumes
from benchmark.checking.findings import LOST, Limits
from benchmark.checking.pages import html_section, markdown_page
from benchmark.checking.trials import (
    HARDENED,
    NO_NETWORK,
    ORGANISERS,
    SMALL_SHARED_MEMORY,
    Trial,
    VariedContainer,
)
from benchmark.containers.output_check import OutputCheck, check_output
from benchmark.containers.runner import Outcome
from benchmark.containers.targets import Folders, MemoryLimit

BROKEN = Path(__file__).parents[1] / "container/broken/broken.py"
LIMITS = Limits(seconds=15.0, gpu_mb=4096.0, memory="28g", memory_mb=28672.0)
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
        mode: VariedContainer("a:latest", MemoryLimit.parse("28g"), None, False, mode).command_line(
            "n", folders
        )
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


def trial(status="ok", reason=None, seconds=5.0, output=None, **fields):
    output = output or OutputCheck(found=status == "ok", scorable=status == "ok")
    outcome = Outcome(status, reason, 0 if status == "ok" else 1, seconds)
    fields = {"label": "typical", "mode": ORGANISERS, "image_size": (5, 4, 3), **fields}
    return Trial(outcome=outcome, output=output, **fields)


@pytest.mark.parametrize(
    ("array", "affine", "failing"),
    [
        (np.ones((6, 5, 4), np.uint8), AFFINE, set()),
        (np.ones((6, 5, 3), np.uint8), AFFINE, {"output shapes"}),
        (np.ones((5, 6, 4), np.uint8), AFFINE, {"output shapes"}),
        (np.ones((6, 5, 4), np.uint8), np.eye(4), {"output affines"}),
        (np.ones((6, 5, 4), np.float32), AFFINE, {"output types"}),
        (np.full((6, 5, 4), 15, np.uint8), AFFINE, {"output labels"}),
        (np.full((6, 5, 4), 0.5, np.float32), AFFINE, {"output labels", "output types"}),
    ],
)
def test_each_aspect_of_a_label_map_is_a_line_of_its_own(tmp_path, array, affine, failing):
    image = save(tmp_path / "a_0000.nii.gz", np.zeros((6, 5, 4), np.int16))
    output = check_output(save(tmp_path / "a.nii.gz", array, affine), image)
    found = judge.judge_outputs([trial(), trial(label="thin", output=output)])
    assert {line.check for line in found if line.level == "failed"} == failing
    assert all(line.found.startswith("thin: ") for line in found if line.level == "failed")
    assert {line.check for line in found if line.level == "passed"} == {
        f"output {word}" for word in ("names", "files", "shapes", "affines", "types", "labels")
    } - failing


def test_what_could_not_be_looked_at_is_not_called_good(tmp_path):
    image = save(tmp_path / "a_0000.nii.gz", np.zeros((6, 5, 4), np.int16))
    (tmp_path / "a.nii.gz").write_bytes(b"nothing")
    output = check_output(tmp_path / "a.nii.gz", image)
    found = judge.judge_outputs([trial(output=output)])
    assert [(line.level, line.check) for line in found] == [
        ("passed", "output names"), ("failed", "output files")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "level"), [(0, "warned"), (1, "warned"), (50, "failed"), (2000, "failed")]
)
def test_labels_of_a_second_run_are_compared(tmp_path, changed, level):
    labels = np.ones((20, 10, 10), np.uint8)
    trials = []
    for name, count in (("first", 0), ("again", changed)):
        labels.flat[:count] = 2
        path = save(tmp_path / f"{name}.nii.gz", labels)
        trials.append(trial(label_map=path, digest=name))
    line = judge.judge_determinism(*trials)
    assert line.level == level
    assert (f"{changed:,} of 2,000 labelled" in line.found) == (changed > 0)
    assert judge.judge_determinism(trials[0], replace(trials[1], digest="first")).level == "passed"
    # Against another way to run it only the labels count, not the time in a gzip header.
    line = judge.judge_mode(replace(trials[1], mode=NO_NETWORK), trials[0])
    assert line.level == ("warned" if changed else "passed")


def test_time_and_memory_are_held_against_tolerances_and_limits():
    slow = trial(seconds=20.5, label="thin", peak_gpu_mb=5000.0, auc_tolerated_mb_s=904.0)
    quick = trial(peak_gpu_mb=4096.0, auc_tolerated_mb_s=0.0, max_ram_mb=27000.0)
    assert judge.judge_time([quick], LIMITS).level == "passed"
    assert "thin 20.5 s, 5.5 s above" in judge.judge_time([quick, slow], LIMITS).found
    assert judge.judge_gpu_memory([quick], LIMITS).level == "passed"
    found = judge.judge_gpu_memory([quick, slow], LIMITS).found
    assert found == "thin 5,000 MB, 904 MB·s above"
    assert judge.judge_gpu_memory([trial()], LIMITS).level == "warned"
    assert judge.judge_memory([slow], LIMITS).level == "passed"
    assert judge.judge_memory([slow, quick], LIMITS).level == "warned"


def test_files_left_behind_fail_only_where_they_may_be_taken_for_label_maps():
    assert [line.level for line in judge.judge_leftovers([trial()])] == ["passed"]
    (line,) = judge.judge_leftovers([trial(left=["tmp (a folder)", "tmp/log.txt"])])
    assert line.level == "warned"
    (line,) = judge.judge_leftovers([trial(left=["other.nii.gz"])])
    assert line.level == "failed"
    assert judge.judge_leftovers([trial(inputs_touched=True)])[1].check == "inputs left alone"


@pytest.mark.parametrize(
    ("damaged", "level"),
    [
        (trial("crashed", "exit code 1"), "passed"),
        (trial("timeout", "ended after 600 s"), "warned"),
        (trial(), "warned"),
        (trial(output=OutputCheck(False, False, ["no a.nii.gz"], ["name"])), "warned"),
    ],
)
def test_a_damaged_input_is_to_be_refused_by_an_exit_code(damaged, level):
    assert judge.judge_damaged(damaged).level == level


@pytest.mark.parametrize(
    ("printed", "word"),
    [
        ("requests.exceptions.ConnectionError: HTTPSConnectionPool", "network"),
        ("OSError: [Errno 30] Read-only file system: '/root/.cache'", "outputs/ and /tmp"),
        ("RuntimeError: unable to open shared memory object </torch_1>", "shared memory"),
        ("standard_init_linux.go:228: exec user process caused: exec format error", "linux/amd64"),
        ("sh: 0: cannot open predict.sh: No such file", "WORKDIR /workspace"),
        ("RuntimeError: No CUDA GPUs are available", "needs a GPU"),
    ],
)
def test_what_a_log_says_becomes_advice(printed, word):
    assert word in symptoms.advice(trial("crashed", "exit code 1", printed=printed))
    assert symptoms.advice(trial("crashed", "exit code 1", printed="Killed by a bear")) is None


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

"""The dry run of a submission: its runs by a stand-in engine, each finding, its pages."""

import sys
from dataclasses import asdict, replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from harness import StandInEngine, page_data, read, run_benchmark, save

from benchmark.checking import findings as judge
from benchmark.checking import volumes
from benchmark.checking.pages import markdown_page
from benchmark.checking.trials import (
    HARDENED,
    MODES,
    NO_NETWORK,
    ORGANISERS,
    SMALL_SHARED_MEMORY,
    Trial,
)
from benchmark.containers.outputs import OutputCheck
from benchmark.containers.runner import Container, Folders

BROKEN = Path(__file__).parents[1] / "container/broken/broken.py"
ASPECTS = ("name", "file", "shape", "affine", "type", "labels")
START = judge.START


def names(findings, level):
    return {name for found, name in findings if found == level}


@pytest.fixture
def engine(tmp_path):
    return StandInEngine(tmp_path / "engine")


@pytest.fixture
def check(engine, tmp_path):
    """Runs `python -m benchmark check`: exit code and findings by level and name."""
    volume = np.random.default_rng(5).integers(-1000, 1000, (12, 10, 8), np.int16)
    save(tmp_path / "in/FLARE23Ts_0001_0000.nii.gz", volume)

    def check(*options):
        report = tmp_path / "report"
        places = ("--inputs", tmp_path / "in", "--report", report)
        done = run_benchmark("check", *options, *places, **engine.environment)
        findings = read(report / "check.json")["findings"]
        return done.code, {(finding["level"], finding["check"]): finding for finding in findings}

    return check


def broken(defect):
    return f"exec {sys.executable} -I {BROKEN} {defect}\n"


@pytest.mark.slow
def test_a_sound_image_passes(check, engine, tmp_path):
    engine.make_image("team", broken("none"))
    code, findings = check("--image", "team")
    assert code == 0
    levels = {level: len(names(findings, level)) for level in ("failed", "warned", "passed")}
    assert levels == {"failed": 0, "warned": 1, "passed": 19}  # no GPU memory can be read
    assert ("passed", "weights") not in findings  # the image is not of this project
    report = tmp_path / "report"
    assert sorted(path.name for path in report.iterdir()) == ["check", "check.json", "check.md"]
    runs = [order for order in engine.orders() if "/bin/bash" in order]
    exact = "container run --shm-size=28gb -m 28G --label abdoseg.benchmark="
    assert [" ".join(run).startswith(exact) for run in runs] == [True, True, *3 * [False], True]
    assert engine.containers("team") == []
    run_benchmark("report", report, "--output", tmp_path / "page.html")
    (team,) = page_data(tmp_path / "page.html")["teams"]
    assert len(team["check"]) == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defect", "failing"),
    [("misnamed", "output names"), ("crashes", START), ("downloads", START), ("hangs", START)],
)
def test_a_first_run_without_a_label_map_ends_the_check(check, engine, defect, failing):
    engine.make_image("team", broken(defect))
    code, findings = check("--image", "team", *(["--timeout", 0.5] if defect == "hangs" else []))
    assert code == 1
    assert names(findings, "failed") == {failing}
    assert ("warned", "everything else") in findings
    advice = findings["failed", failing]["advice"]
    assert ("network" in advice) == (defect == "downloads")


@pytest.mark.slow
def test_another_label_map_each_time_fails(check, engine):
    engine.make_image("team", broken("random"))
    code, findings = check("--image", "team")
    assert code == 1
    assert names(findings, "failed") == {"twice the same"}
    assert names(findings, "warned") >= {NO_NETWORK, HARDENED, SMALL_SHARED_MEMORY}


@pytest.mark.slow
def test_what_only_fails_without_network_or_rights_is_found(check, engine):
    script = """case "$CONTAINER_OPTIONS" in
        *read-only*) echo "Read-only file system: '/workspace/cache'"; exit 1 ;;
        *'--network none'*) echo 'Could not resolve host: weights'; exit 1 ;;
        *shm-size*) ;;
        *) echo 'Bus error'; exit 135 ;;
        esac
        touch outputs/notes.txt
        """
    engine.make_image("team", script + broken("litters"))
    code, findings = check("--image", "team")
    assert code == 1
    assert names(findings, "failed") == {NO_NETWORK, "extra files"}
    assert "notes.txt" in findings["failed", "extra files"]["found"]
    for level, mode, word in (
        ("failed", NO_NETWORK, "network"),
        ("warned", HARDENED, "/tmp"),
        ("warned", SMALL_SHARED_MEMORY, "num_workers=0"),
    ):
        assert word in findings[level, mode]["advice"]


@pytest.mark.slow
def test_an_archive_is_run_under_its_own_name_and_another_fails(check, engine, tmp_path):
    for image in ("team", "other", "wrong"):  # an image `wrong` from before is not the archive's
        engine.make_image(image, broken("crashes"))
    for name, holds in (("Team.tar.gz", "team:latest"), ("wrong.tar.gz", "other:latest")):
        (tmp_path / name).write_text(holds)
    _, findings = check("--archive", tmp_path / "Team.tar.gz")
    assert {"image's name", "archive's size"} <= names(findings, "passed")
    code, findings = check("--archive", tmp_path / "wrong.tar.gz")
    assert code == 1
    assert "image's name" in names(findings, "failed")


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--image", "nobody"),
        ("--archive", "none.tar.gz"),
        ("--image", "team", "--inputs", "none"),
        ("--image", "team", "--inputs", "odd"),
        ("--image", "team", "--large-slices", "-1"),
    ],
)
def test_wrong_usage_is_refused(engine, tmp_path, monkeypatch, options):
    engine.make_image("team", broken("none"))
    (tmp_path / "odd/a_0000.nii.gz").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    done = run_benchmark("check", *options, "--report", "r", **engine.environment)
    assert (done.code, "Traceback" in done.err) == (2, False)
    assert not (tmp_path / "r").exists()


def test_each_way_changes_what_it_says_and_nothing_else():
    folders = Folders(Path("/i"), Path("/o"), Path())
    lines = {m: Container("a", "28g", **MODES[m]).command_line("n", folders) for m in MODES}
    line = lines[ORGANISERS]
    assert line == Container("a", "28g").command_line("n", folders)
    assert lines[SMALL_SHARED_MEMORY] == [word for word in line if word != "--shm-size=28gb"]
    assert lines[NO_NETWORK] == [*line[:3], "--network", "none", *line[3:]]
    assert "/i/:/workspace/inputs/:ro" in lines[HARDENED]
    assert {"--read-only", "--cap-drop", "no-new-privileges"} <= set(lines[HARDENED])


def test_longer_volumes_have_no_step():
    ramp = np.arange(4)[:, None, None] * np.ones((4, 2, 3), int)
    assert volumes.lengthened(ramp, 10)[:, 1, 2].tolist() == [0, 1, 2, 3, 3, 2, 1, 0, 0, 1]


@pytest.mark.slow
def test_the_phantoms_are_what_they_are_called(tmp_path, monkeypatch):
    small = {
        "typical": ((10, 48, 64), (5.0, 6.0, 6.0)),
        "turned": ((8, 32, 48), (8.0, 8.0, 7.0)),
    }
    monkeypatch.setattr(volumes, "_PHANTOMS", small)
    typical, turned, large = volumes.make_subjects(tmp_path, 25)
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


def test_pages_show_what_a_team_calls_its_files_as_text():
    evil = "</td><script>alert(1)</script>|x"
    finding = {"level": "failed", "check": "a", "found": evil, "cost": "b", "advice": "c"}
    page = markdown_page(
        {
            "team": evil, "image": "a", "image_digest": "b", "command": "c", "findings": [finding],
            "environment": {"cpu": "", "cores": 2, "memory_gb": 4, "gpu": None, "date": ""},
            "limits": {"timeout_s": 600.0}, "runs": [],
        }
    )  # fmt: skip
    assert "<script>" not in page
    assert r"\|x" in page


# ---------------------------------------------------------------- single findings, made-up runs


def trial(status="ok", output=None, result=None, label_map=Path("none"), **fields):
    ok = status == "ok"
    output = output or OutputCheck(found=ok, scorable=ok)
    about = {"status": status, "reason": None if ok else "why", "exit_code": 0 if ok else 1}
    about |= {"seconds": 5.0, "image_size": [5, 4, 3], "output": asdict(output)}
    about |= {"peak_gpu_mb": None, "max_ram_mb": None, "sampler": {"gpu_error": None}}
    usual = {"label": "typical", "mode": ORGANISERS, "label_map": label_map}
    return Trial(**usual | fields, result=about | (result or {}))


@pytest.mark.parametrize("failing", [(), *((aspect,) for aspect in ASPECTS[1:]), ASPECTS[-2:]])
def test_each_aspect_of_a_label_map_is_a_line_of_its_own(failing):
    scorable = not {"file", "shape"} & set(failing)
    output = OutputCheck(True, scorable, ["wrong"] * len(failing), list(failing))
    of = {aspect: f"output {aspect.removesuffix('s')}s" for aspect in ASPECTS}
    found = judge.judge_outputs([trial(), trial(label="thin", output=output)])
    levels = {line.check: line.level for line in found}
    assert levels == {of[a]: "failed" if a in failing else "passed" for a in ASPECTS}
    assert all(("thin" in line.found) for line in found if line.level == "failed")
    # What could not be checked is not called good.
    alone = {line.check for line in judge.judge_outputs([trial(output=output)])}
    assert (alone == set(levels)) == scorable


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
    assert (f"{changed:,} of 2,000 " in line.found) == (changed > 0)
    assert judge.judge_determinism(trials[0], replace(trials[1], digest="first")).level == "passed"
    # Against another way to run it only the labels count, not the time in a gzip header.
    line = judge.judge_mode(replace(trials[1], mode=NO_NETWORK), trials[0])
    assert line.level == ("warned" if changed else "passed")


def test_time_and_memory_are_judged_by_tolerances_and_limits():
    figures = {"seconds": 20.5, "peak_gpu_mb": 5000.0, "auc_flare_tolerated_mb_s": 904.0}
    slow = trial(label="thin", result=figures)
    quick = trial(result={"peak_gpu_mb": 4096.0, "max_ram_mb": 27000.0})
    broken_off = trial(result={"sampler": {"gpu_error": "GPU is lost"}})
    assert judge.judge_time([quick]).level == "passed"
    assert judge.judge_time([quick, slow]).found == "thin 20.5 s, 5.5 s above"
    assert judge.judge_gpu_memory([quick]).level == "passed"
    assert judge.judge_gpu_memory([quick, slow]).found == "thin 5,000 MB, 904 MB·s above"
    assert judge.judge_gpu_memory([trial()]).level == "warned"
    assert "GPU is lost" in judge.judge_gpu_memory([trial(), broken_off]).found
    assert judge.judge_memory([slow], "28g").level == "passed"
    assert judge.judge_memory([slow, quick], "28g").level == "warned"


@pytest.mark.parametrize(
    ("files", "level"),
    [([], "passed"), (["tmp (a folder)", "tmp/log.txt"], "warned"), (["b.nii.gz"], "failed")],
)
def test_extra_files_fail_only_where_they_may_be_taken_for_label_maps(files, level):
    assert judge.judge_extra_files([trial(extra_files=files)]).level == level


@pytest.mark.parametrize(
    ("damaged", "level"),
    [
        (trial("crashed"), "passed"),
        (trial("timeout"), "warned"),
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
        ("OSError: [Errno 30] Read-only file system: '/root/.cache'", "/tmp"),
        ("RuntimeError: unable to open shared memory object </torch_1>", "num_workers"),
        ("standard_init_linux.go:228: exec user process caused: exec format error", "linux/amd64"),
        ("sh: 0: cannot open predict.sh: No such file", "WORKDIR"),
        ("RuntimeError: No CUDA GPUs are available", "GPU"),
        ("predict.sh: line 2: $'\\r': command not found", "Windows"),
        ("Killed by a bear", None),
    ],
)
def test_what_a_log_prints_becomes_advice(printed, word):
    found = judge.advice(trial("crashed", printed=printed))
    assert word in found if word else found is None

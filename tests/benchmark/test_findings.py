"""What single runs of a check amount to: each finding, from runs that are made up."""

from dataclasses import replace

import numpy as np
import pytest
from harness import AFFINE, save

from benchmark.checking import findings as judge
from benchmark.checking.trials import (
    NO_NETWORK,
    ORGANISERS,
    Trial,
)
from benchmark.containers.outputs import OutputCheck, check_output
from benchmark.containers.runner import Outcome


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
    slow = trial(
        seconds=20.5,
        label="thin",
        figures={"peak_gpu_mb": 5000.0, "auc_flare_tolerated_mb_s": 904.0},
    )
    quick = trial(figures={"peak_gpu_mb": 4096.0, "max_ram_mb": 27000.0})
    assert judge.judge_time([quick]).level == "passed"
    assert "thin 20.5 s, 5.5 s above" in judge.judge_time([quick, slow]).found
    assert judge.judge_gpu_memory([quick]).level == "passed"
    found = judge.judge_gpu_memory([quick, slow]).found
    assert found == "thin 5,000 MB, 904 MB·s above"
    assert judge.judge_gpu_memory([trial()]).level == "warned"
    assert judge.judge_memory([slow], "28g").level == "passed"
    assert judge.judge_memory([slow, quick], "28g").level == "warned"


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
    assert word in judge.advice(trial("crashed", "exit code 1", printed=printed))
    assert judge.advice(trial("crashed", "exit code 1", printed="Killed by a bear")) is None

"""The GPU sweep: a rehearsal of it, its arithmetic, and what is left of a stage that breaks."""

import json
import re
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import metadata_of, trained_looking_network
from test_sampler import nvml_stub  # noqa: F401  (a fixture)

from benchmark.__main__ import main
from benchmark.containers.results import flare_area, true_area
from benchmark.speed import gpu_stages, gpu_sweep
from benchmark.speed.gpu_page import SECTIONS, markdown
from inference.network.model import AttentionUNet
from inference.network.weights import save_weights
from synthetic.phantom import write_nifti


def empty_result():
    return {name: [] for name in (*SECTIONS, "runs", "seconds")}


@pytest.fixture
def sweep(tmp_path):
    options = Namespace(rehearse=True, report=tmp_path, peer=None)
    return gpu_sweep.Sweep(options, tmp_path, time.monotonic() + 60, empty_result())


def test_what_the_time_did_not_allow_is_named(tmp_path):
    assert main(["gpu-sweep", "--rehearse", "--minutes", "0", "--report", str(tmp_path)]) == 1
    result = json.loads((tmp_path / "gpu-rehearsal.json").read_text())
    stages = ["volumes", "one process", "cold cases", "warm folder"]
    assert [line["what"] for line in result["not measured"]] == stages
    assert all(stage in (tmp_path / "gpu-rehearsal.md").read_text() for stage in stages)


def test_a_stage_that_breaks_costs_itself_alone(sweep):
    def fail():
        raise ZeroDivisionError("by nothing")

    written = []
    stages = {"a": fail, "b": lambda: sweep.result["rates"].append({"what": "r", "rate": 1.5})}
    sweep.run(stages, lambda: written.append(len(sweep.result["not measured"])))
    assert sweep.result["not measured"] == [{"what": "a", "why": "ZeroDivisionError: by nothing"}]
    assert sweep.result["rates"] == [{"what": "r", "rate": 1.5}]
    assert written == [1, 1]
    sweep.deadline = 0
    sweep.run({"c": fail}, written.clear)
    assert sweep.result["not measured"][1]["what"] == "c"


def test_what_one_process_measured_before_it_was_ended_counts(sweep, monkeypatch):
    lines = [
        {"stage": "rates", "what": "copy", "rate": 3.0},
        {"stage": "seconds", "what": "rates", "seconds": 1.0},
        {"stage": "labels", "what": "a", "voxels unlike": 7},
    ]

    def follow(*command, seconds, out):
        out.write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": "lab')
        return "the time was over"

    monkeypatch.setattr(sweep, "follow", follow)
    sweep.one_process()
    assert sweep.result["rates"] == [{"what": "copy", "rate": 3.0}]
    assert sweep.result["labels"] == [{"what": "a", "voxels unlike": 7}]
    missed = [line["what"].split(",")[0] for line in sweep.result["not measured"]]
    assert missed == ["labels", "network", "choices"]


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["json.tool", "--help"], ""),
        (["json.tool", "/nowhere"], "exit code 2: "),
        (["http.server", "0"], "the time was over"),
    ],
)
@pytest.mark.slow
def test_a_module_that_is_followed(sweep, command, why):
    found = sweep.follow(*command, seconds=1 if command[0] == "http.server" else 60)
    assert found.startswith(why)
    assert bool(found) == bool(why)


@pytest.mark.slow
def test_cold_cases(sweep, nvml_stub, tmp_path, weights_file, monkeypatch):  # noqa: F811
    """With the stand-in for NVML, whose device has 3 MB more in use at each reading."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(nvml_stub))
    monkeypatch.setenv("NVML_STUB_CURVE", "steps")
    monkeypatch.setenv("NVML_STUB_LOG", str(tmp_path / "readings"))
    rng = np.random.default_rng(0)
    write_nifti(tmp_path / "middle.nii.gz", rng.normal(0, 300, (3, 48, 48)).astype("i2"), (4, 2, 2))
    service = sweep.case("service", weights_file)
    wrong = ("wrong", service[1], service[2].replace("--device", "--devices"))
    sweep.cold([service, ("peer, its own", "middle", "false {inputs} {outputs}"), wrong], 60)
    (case,) = sweep.result["cold cases"]
    assert case["slices"] == 3
    assert case["voxels unlike the first"] == 0
    run = sweep.result["runs"][0]
    assert run["phases"] == []
    idle, used, times = run["idle_gpu_mb"], *(run["samples"][n] for n in ("gpu_used_mb", "time_s"))
    assert case["peak (MB)"] == max(used) > 200
    assert case["peak, less idle (MB)"] == pytest.approx(max(used) - idle)
    area = flare_area(used, 0.1, idle)
    assert case["official area, less idle (MB·s)"] == pytest.approx(area, abs=0.5)
    area = true_area(times, used, idle)
    assert case["true area, less idle (MB·s)"] == pytest.approx(area)
    missed = [line["what"] for line in sweep.result["not measured"]]
    assert missed == ["peer, its own", wrong[0]]


def test_a_curve_that_was_not_read_costs_its_cells_alone():
    run = {"samples": {"time_s": [0.0, 0.1]}, "idle_gpu_mb": None, "interval_s": 0.1}
    run |= dict.fromkeys(("peak_gpu_mb", "auc_flare_mb_s", "auc_true_mb_s"))
    assert set(gpu_sweep.memory_of(run).values()) == {None}


def test_page():
    result = empty_result()
    result["machine"] = {
        "gpu": "A Card", "gpu_memory_mb": 80000.0, "driver": "1.2", "cpu": "a CPU", "cores": 16,
        "memory_gb": 128, "date": "today", "versions": {"python": "3"},
    }  # fmt: skip
    result["labels"] = [
        {"what": "a", "DSC": {"liver": 1.0, "spleen": 0.9949}},
        {"what": "b", "DSC": {"liver": 0.996}},
    ]
    result["choices"] = [
        {"what": "dense_borders", "as it is (s)": [1.5, 12.25], "changed (s)": [2.0]}
    ]
    result["cold cases"] = [{"what": "x|y", "slices": 1000, "peak (MB)": None}]
    rows = re.findall(r"^\| (.*) \|$", markdown(result), re.MULTILINE)
    assert "a | **spleen 0.9949**" in rows
    assert "dense_borders | 1.500, 12.2 | 2.000" in rows
    assert r"x\|y | 1,000 | " in rows
    assert "b | 1 organs well" in rows
    assert markdown(result).count("\n## ") == 3


def test_tiled_volumes_have_no_step():
    ramp = np.arange(4)[:, None, None] * np.ones((4, 2, 3), int)
    assert gpu_sweep.tiled(ramp, 10)[:, 1, 2].tolist() == [0, 1, 2, 3, 3, 2, 1, 0, 0, 1]


def test_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_sweep, "open_gpu", lambda index: (None, "no driver"))
    assert main(["gpu-sweep", "--report", str(tmp_path / "r")]) == 2
    assert not (tmp_path / "r").exists()


# The stages of one process.


@torch.no_grad()
def test_a_wider_network_is_the_same_function():
    slim = trained_looking_network(8, supervised_channels=3)
    full = AttentionUNet(base_channels=20, supervised_channels=5).eval()
    full.load_state_dict(gpu_stages.widened(slim.state_dict(), full))
    slices = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(full(slices), slim(slices), rtol=1e-4, atol=1e-4)


def test_label_maps_compared():
    expected = np.zeros((2, 4), np.uint8)
    expected[0] = 1
    found = expected.copy()
    found[0, 0], found[1, 0] = 0, 3
    assert gpu_stages.compared(found, expected) == {
        "voxels unlike": 2,
        "of all": 8,
        "DSC": {"liver": 2 * 3 / 7, "spleen": 0.0},
    }


@pytest.mark.slow
def test_stages_on_fake_cuda(tmp_path, cuda_device, monkeypatch, capsys, weights_file):
    """Each runs on the device, its labels are the CPU's, and an error costs one measurement."""
    cuda_device(total_mb=24000, context_mb=700)
    network = trained_looking_network(4)
    for name, reduction in ((gpu_sweep.FULL_SIZE, 2), (gpu_sweep.PAPER_SIZE, 1)):
        metadata = metadata_of(network, matrix_reduction=reduction)
        save_weights(tmp_path / name, network.state_dict(), metadata)
    for name in ("short", "middle", "long"):
        noise = np.random.default_rng(0).normal(0, 200, (1, 32, 32)).astype("i2")
        write_nifti(tmp_path / f"{name}.nii.gz", noise, (4, 2, 2))
    monkeypatch.setattr(gpu_stages, "BATCH_SIZES", (1,))
    monkeypatch.setattr(gpu_stages, "CHOICES", ("dense_borders",))
    monkeypatch.setattr(gpu_stages, "WEIGHTS", tmp_path)
    stages = gpu_stages.Stages(tmp_path, "cuda")
    stages.rate = 2.0
    for stage in ("labels", "network", "choices"):
        stages.emit("seconds", stage, stages.run, stage)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    missed = [line["what"] for line in lines if line["stage"] == "not measured"]
    assert missed[0] == "labels: phantom-slim, middle.nii.gz"  # which is not in this folder
    assert [line["stage"] for line in lines].count("network") == 2 * 2
    assert [line["stage"] for line in lines].count("choices") == 1
    for line in lines:
        if line["stage"] == "network":
            assert line["share"] == line["TFLOP/s"] / 2
            assert line["peak (MB)"] == 100
        if line["stage"] == "labels":
            assert min(line["DSC"].values()) > 0.9
        if line["stage"] == "choices":
            assert len(line["as it is (s)"]) == len(line["changed (s)"]) == 4

"""The GPU sweep: a rehearsal of it, its arithmetic, and what is left of a stage that breaks."""

import json
import time

import numpy as np
import pytest
import torch
from conftest import metadata_of, trained_looking_network
from harness import read, run_benchmark, tables_of
from test_nvml import nvml  # noqa: F401  (a fixture)
from test_sampler import nvml_stub  # noqa: F401  (a fixture)

from benchmark.containers.machine import NO_GPU, open_gpu
from benchmark.containers.results import flare_area, true_area
from benchmark.speed import gpu_stages, gpu_sweep
from benchmark.speed.gpu_sweep import ColdCase, markdown
from inference.network.model import AttentionUNet
from inference.network.weights import save_weights
from synthetic.phantom import write_nifti


def make_sweep(folder, gpu=NO_GPU):
    return gpu_sweep.Sweep(gpu, folder, folder, time.monotonic() + 60, "")


def missed(sweep):
    return [line["what"] for line in sweep.result["not measured"]]


def test_what_the_time_did_not_allow_is_named(tmp_path):
    assert run_benchmark("gpu-sweep", "--rehearse", "--minutes", 0, "--report", tmp_path).code == 1
    result = read(tmp_path / "gpu-rehearsal.json")
    stages = ["volumes", "one process", "cold cases", "warm folder"]
    assert [line["what"] for line in result["not measured"]] == stages
    assert all(stage in (tmp_path / "gpu-rehearsal.md").read_text() for stage in stages)


def test_a_stage_that_breaks_costs_itself_alone(tmp_path):
    sweep, written = make_sweep(tmp_path), []

    def breaks():
        raise ZeroDivisionError

    def works():
        sweep.result["rates"].append({"what": "r", "rate": 1.5})

    sweep.run((breaks, works), lambda: written.append(missed(sweep)))
    assert sweep.result["rates"] == [{"what": "r", "rate": 1.5}]
    assert written == [["breaks"], ["breaks"]]
    sweep.deadline = 0
    sweep.run([works], written.clear)
    assert missed(sweep) == ["breaks", "works"]


def test_what_one_process_measured_before_it_was_ended_counts(tmp_path, monkeypatch):
    lines = [
        {"stage": "rates", "what": "copy", "rate": 3.0},
        {"stage": "seconds", "what": "rates", "seconds": 1.0},
        {"stage": "labels", "what": "a", "voxels unlike": 7},
    ]

    def run_command(command, seconds, folders):
        folders.log.write_text("a warning\n" + "\n".join(map(json.dumps, lines)) + '\n{"stage": "l')
        return gpu_sweep.OUT_OF_TIME

    sweep = make_sweep(tmp_path)
    monkeypatch.setattr(sweep, "run_command", run_command)
    sweep.one_process()
    assert sweep.result["rates"] == [{"what": "copy", "rate": 3.0}]
    assert sweep.result["labels"] == [{"what": "a", "voxels unlike": 7}]
    assert [name.split(",")[0] for name in missed(sweep)] == ["labels", "network", "choices"]


@pytest.mark.slow
def test_cold_cases(nvml, tmp_path, weights_file):  # noqa: F811
    """With the stand-in for NVML, whose device has 3 MB more in use at each reading."""
    rng = np.random.default_rng(0)
    write_nifti(tmp_path / "middle.nii.gz", rng.normal(0, 300, (3, 48, 48)).astype("i2"), (4, 2, 2))
    with open_gpu(None) as gpu:
        sweep = make_sweep(tmp_path, gpu)
        sweep.device = "cpu"
        gpu.read_idle()
        service = sweep.case("service", weights_file)
        sweep.cold([service, ColdCase("peer", "its own", "middle", "false")], 60)
        sweep.cold([ColdCase("late", "w", "middle", "true")], 0)
    (case,) = sweep.result["cold cases"]
    assert case["what"] == "service, random"
    assert (case["slices"], case["voxels unlike the first"]) == (3, 0)
    run = sweep.result["runs"][0]
    idle, used, times = run["idle_gpu_mb"], *(run["samples"][n] for n in ("gpu_used_mb", "time_s"))
    assert case["peak (MB)"] == max(used) > 200
    assert case["peak, less idle (MB)"] == pytest.approx(max(used) - idle)
    area = flare_area(used, idle)
    assert case["official area, less idle (MB·s)"] == pytest.approx(area, abs=1)  # both rounded
    area = true_area(times, used, idle)
    assert case["true area, less idle (MB·s)"] == pytest.approx(area)
    assert missed(sweep) == ["peer, its own", "late, w"]


def test_a_curve_that_was_not_read_costs_its_cells_alone():
    run = {"samples": {"time_s": [0.0, 0.1]}, "idle_gpu_mb": None, "interval_s": 0.1}
    run |= dict.fromkeys(("peak_gpu_mb", "auc_flare_mb_s", "auc_true_mb_s"))
    assert set(gpu_sweep.memory_of(run).values()) == {None}


def test_page(tmp_path):
    result = make_sweep(tmp_path).result
    machine = {
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
    result["cold cases"] = [{"what": "x", "slices": 1000, "peak (MB)": None}]
    rows = {row[0]: row[1:] for row in tables_of(markdown(machine, result))}
    assert rows["a"] == ["**spleen 0.9949**"]
    assert rows["b"] == ["1 organs well"]
    assert rows["dense_borders"] == ["1.500, 12.2", "2.000"]
    assert rows["x"] == ["1,000", ""]


def test_without_a_gpu(tmp_path):
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    assert run_benchmark("gpu-sweep", "--report", tmp_path / "r", **hidden).code == 2
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
    dsc = {"liver": 2 * 3 / 7, "spleen": 0.0}
    assert gpu_stages.compared(found, expected) == {"voxels unlike": 2, "of all": 8, "DSC": dsc}


@pytest.mark.slow
def test_stages_on_fake_cuda(tmp_path, cuda_device, monkeypatch, capsys):
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
        getattr(stages, stage)()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    of = {name: [line for line in lines if line["stage"] == name] for name in gpu_stages.STAGES}
    # The demonstration's weights are not in this folder.
    assert any(line["stage"] == "not measured" for line in lines)
    assert (len(of["network"]), len(of["choices"])) == (2 * 2, 1)
    for line in of["network"]:
        assert (line["share"], line["peak (MB)"]) == (line["TFLOP/s"] / 2, 100)
    assert all(min(line["DSC"].values()) > 0.9 for line in of["labels"])
    (line,) = of["choices"]
    assert len(line["as it is (s)"]) == len(line["changed (s)"]) == 4

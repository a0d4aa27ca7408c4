"""The GPU sweep's arithmetic and page on known numbers, and its stages on a CPU."""

import json
import time

import numpy as np
import pytest
import torch
from conftest import metadata_of, trained_looking_network
from test_sampler import nvml_stub  # noqa: F401  (a fixture)

from benchmark.__main__ import main
from benchmark.speed import gpu_page, gpu_sweep, network_speed
from inference.choices import CudaChoices
from inference.prediction import choose_device
from inference.weights import load_weights


def cold_run(seconds, peak, area, *, idle=100.0, end=2.0):
    """Device memory: idle, `peak` up to `end`, then 300 MB above idle for one second."""
    return {
        "seconds": seconds,
        "peak_gpu_mb": peak,
        "auc_flare_mb_s": area,
        "auc_true_mb_s": area,
        "max_ram_mb": 1234.0,
        "idle_gpu_mb": idle,
        "interval_s": 0.5,
        "phases": [
            {"phase": "predict", "case": "a", "start_s": 1.0, "end_s": end},
            {"phase": "write", "case": "a", "start_s": end, "end_s": end + 1},
        ],
        "samples": {
            "time_s": [0.0, 1.0, end, end + 0.5, end + 1],
            "gpu_used_mb": [idle, peak, idle + 300, idle + 300, idle + 300],
        },
    }


def network_run(dtype, ms, tflops, *, merged=True):
    return {
        "dtype": dtype,
        "merges_upsampling": merged,
        "fused": merged,
        "padded_head": False,
        "searches": False,
        "batch_size": 8,
        "ms": ms,
        "tflops": tflops,
        "peak_mb": 1500.0,
        "widths": 4.25,
    }


@pytest.fixture
def result():
    return {
        "machine": {
            "gpu": "Card", "gpu_memory_mb": 80000.0, "driver": "1.2", "cpu": "a CPU", "cores": 16,
            "memory_gb": 128, "date": "today", "versions": {"python": "3"},
        },
        "torch": "torch 9",
        "weights": "seeded random, full size",
        "service": {"200": [cold_run(s, 2000.0, 2500.0) for s in (9.0, 4.0, 1.0)]},
        "plain": {"200": [cold_run(44.0, 3000.0, 45000.0)]},
        "peers": {"nnunet": [cold_run(40.0, 5000.0, 90000.0) | {"phases": []}]},
        "choices": {"overlap": [cold_run(4.2, 2000.0, 2600.0)]},
        "batches": {"4": [cold_run(5.0, 1500.0, 2400.0)]},
        "folder": {"volumes": 8, "volumes_per_s": 0.8, "network_share": 0.75},
        "network": {
            "matrix_tflops": {"float16": 600.0, "bfloat16": 700.0},
            "context_mb": 480.0,
            "default_batch_size": 9,
            "failed": {"bfloat16, apart, batch of 32": "out of memory"},
            "gflop": {"plain": 564.25, "apart": 563.6, "merged": 462.1},
            "runs": [
                network_run("float16", 1.5, 330.0),
                network_run("bfloat16", 1.6, 600.0, merged=False),
            ],
        },
        "speed": "| step |",
        "left_out": {"plain, 500 slices": "17 s were left"},
    }  # fmt: skip


def test_page(result):
    page = gpu_page.markdown(result)
    # The run of median time, 4 s, is the case's.
    assert "| cold, 200 slices: time, plain / service | ≥ 10 | 11.0 | yes |" in page
    assert "| the same, GPU area | ≥ 20 | 18.0 | **no** |" in page
    assert "| < 3,000 on an H100 | 2,500 | yes |" in page
    assert "| < 2,048 | 2,000 | yes |" in page
    assert "| ≥ 1 | 0.80 | **no** |" in page
    assert "| ≥ 50 % | 55 % | yes |" in page  # of fp16: bfloat16's share is higher
    # Above idle: 1,900 + 3 x 300 at 0.5 s. Held: 300 from 2 s to the end at 4 s.
    row = "| service, 200 slices | 4.00 | 2,000 | 1,900 | 2,500 | 1,400 | 2,500 | 600 | 1,234 |"
    assert row in page
    assert "| bfloat16, upsampling apart, batch of 8 | 1.60 | 600 | 86 % | 1,500 | 4.2 |" in page
    assert "| float16, upsampling merged, fused, batch of 8 | 1.50 |" in page
    assert "| nnunet, 200 slices | 40.00 | 5,000 | 4,900 | 90,000 |" in page
    assert "| as it is | 4.00 | 2,000 |" in page
    assert "| overlap off | 4.20 | 2,000 | 1,900 | 2,600 |" in page
    assert "after a first pass: 480 MB" in page
    assert "**Failed**: bfloat16, apart, batch of 32: out of memory" in page
    assert gpu_page.TF32_NOTE in page
    assert "Card, 80,000 MB, driver 1.2; a CPU, 16 cores" in page
    assert "**Left out**: plain, 500 slices: 17 s were left" in page
    assert "0.80 volumes a second" in page


def test_page_of_what_there_is(result):
    for name in ("service", "plain", "peers", "batches", "choices", "folder", "network"):
        result[name] = {}
    page = gpu_page.markdown(result | {"speed": ""})
    assert "**Left out**" in page
    assert "##" not in page


def test_what_is_held_after_the_network():
    """Whatever the samples miss at both ends is there: the level is 300 MB from 1.27 to 1.73 s."""
    run = {
        "seconds": 1.73,
        "idle_gpu_mb": 500.0,
        "phases": [{"phase": "predict", "end_s": 1.27}, {"phase": "predict", "end_s": 0.4}],
        "samples": {"time_s": [1.2, 1.4, 1.6], "gpu_used_mb": [800.0, 800.0, 800.0]},
    }
    assert gpu_page.held_after_network(run) == pytest.approx(300 * 0.46)  # 138, not 60
    # Between two readings the level is on the line between them: 1,500 MB at 1.27, less idle.
    run["samples"]["gpu_used_mb"] = [1500.0 + 1200 * 0.07 / 0.13 * 0.65, 800.0, 800.0]
    level = np.interp(1.27, run["samples"]["time_s"], run["samples"]["gpu_used_mb"]) - 500
    expected = (level + 300) / 2 * 0.13 + 300 * 0.33
    assert gpu_page.held_after_network(run) == pytest.approx(expected)
    # No reading after the network at all.
    run["samples"] = {"time_s": [0.1, 0.2], "gpu_used_mb": [600.0, 700.0]}
    assert gpu_page.held_after_network(run) == pytest.approx(200 * 0.46)


def test_above_idle():
    run = {"idle_gpu_mb": 500.0, "interval_s": 0.1, "samples": {"gpu_used_mb": [510, 1500, 400]}}
    assert gpu_page.without_idle(run) == (1000, round((10 + 1000) * 0.1))


def test_a_curve_that_nvml_dropped_costs_its_cells_alone(result):
    (run,) = result["batches"]["4"]
    run["samples"]["gpu_used_mb"] = None
    run["peak_gpu_mb"] = run["auc_flare_mb_s"] = run["auc_true_mb_s"] = None
    result["plain"]["200"] = [run]
    page = gpu_page.markdown(result)
    assert "| 4 | 5.00 |  |  |  |  |" in page
    assert "| plain, 200 slices | 5.00 |  |  |  |  |  |  | 1,234 |" in page
    assert "time, plain / service" in page
    assert "the same, GPU area" not in page


class BrokenSweep:
    """Of its stages only `speed` works."""

    def left(self):
        return 1000.0

    def service_command(self, *options, choices=""):
        return choices

    def plain_command(self):
        return "plain"

    def speed(self):
        return "| a table |"

    def network(self, result):
        result["network"] = {"runs": []}
        raise gpu_sweep.StageError("network-speed: killed")

    def cold(self, command, slices, repeat):
        if command == "overlap=0":
            return ["measured"]
        raise ZeroDivisionError("by nothing")

    def run(self, *command):
        raise gpu_sweep.StageError("killed")

    draw = warm = run


def test_every_stage_stands_on_its_own():
    names = ("service", "plain", "peers", "batches", "choices", "folder", "network", "left_out")
    result, written = {name: {} for name in names}, []

    def write(result):
        written.append(dict(result))

    gpu_sweep._measure(BrokenSweep(), result, 1, write, {"nnunet": "predict {inputs} {outputs}"})
    assert result["left_out"]["peer nnunet"] == "ZeroDivisionError: by nothing"
    assert result["speed"] == "| a table |"
    assert result["network"] == {"runs": []}
    assert result["choices"] == {"overlap": ["measured"]}
    assert result["left_out"]["network alone"] == "network-speed: killed"
    assert result["left_out"]["service, 200 slices"] == "ZeroDivisionError: by nothing"
    choices = [name for name in result["left_out"] if name.endswith((" on", " off"))]
    assert len(choices) == len(CudaChoices.__dataclass_fields__) - 1
    assert len(written) == len(result["left_out"]) + 2


def test_what_was_measured_before_a_stage_ended_counts(tmp_path, monkeypatch):
    sweep = gpu_sweep._Sweep(0, tmp_path, tmp_path / "w", time.monotonic() + 60)

    def run(*command, printed):
        printed.write_text('{"runs": [1]}\n{"runs": [1, 2]}\n{"runs": [1, 2, 3')
        raise gpu_sweep.StageError("killed")

    monkeypatch.setattr(sweep, "run", run)
    result = {}
    with pytest.raises(gpu_sweep.StageError):
        sweep.network(result)
    assert result == {"network": {"runs": [1, 2]}}


def test_page_and_raw_results_are_there_from_the_first_stage_on(tmp_path, monkeypatch, capsys):
    class Device:
        def __init__(self, index):
            pass

        def close(self):
            pass

    machine = {
        "gpu": "A Card 9", "gpu_memory_mb": 1.0, "driver": "1", "cpu": "a CPU", "cores": 1,
        "memory_gb": 1, "date": "today", "versions": {"python": "3"},
    }  # fmt: skip
    monkeypatch.setattr(gpu_sweep, "Gpu", Device)
    monkeypatch.setattr(gpu_sweep, "describe_machine", lambda gpu, engine: machine)
    weights = tmp_path / "w.safetensors"
    weights.touch()
    options = ["--weights", str(weights), "--report", str(tmp_path / "r"), "--minutes", "0"]
    assert main(["gpu-sweep", *options]) == 1
    page = (tmp_path / "r/gpu-a-card-9.md").read_text()
    assert "**Left out**: volumes: 0 s were left" in page
    assert json.loads((tmp_path / "r/gpu-a-card-9.json").read_text())["machine"] == machine
    assert capsys.readouterr().out.startswith("# A Card 9")


@pytest.mark.parametrize("peer", ["nnunet", "=x {inputs} {outputs}", "nnunet=x {inputs}"])
def test_a_peer_has_a_name_and_both_folders(peer, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["gpu-sweep", "--peer", peer])
    assert ended.value.code == 2
    assert "not NAME=COMMAND" in capsys.readouterr().err


def test_warm_rate_from_the_first_label_map_on():
    phases = []
    for number in range(5):  # a volume every 2 s, of which the network takes 1.5 s
        start = 10 + 2 * number
        phases.append({"phase": "predict", "start": start, "end": start + 1.5})
        phases.append({"phase": "write", "start": start + 1.5, "end": start + 2})
    rate = gpu_page.warm_rate(phases)
    assert rate["volumes_per_s"] == pytest.approx(0.5)
    assert rate["network_share"] == pytest.approx(0.75)


def test_tiled_volumes_have_no_step():
    ramp = np.arange(4)[:, None, None] * np.ones((4, 2, 3), int)
    assert gpu_sweep.tiled(ramp, 10)[:, 1, 2].tolist() == [0, 1, 2, 3, 3, 2, 1, 0, 0, 1]


def test_without_a_gpu(capsys, monkeypatch):
    def none(index):
        raise gpu_sweep.GpuUnavailable("no driver")

    monkeypatch.setattr(gpu_sweep, "Gpu", none)
    assert main(["gpu-sweep"]) == 2
    assert capsys.readouterr().err == "benchmark gpu-sweep: it needs a GPU: no driver\n"


def test_random_weights_are_the_full_network(tmp_path):
    gpu_sweep.save_random_weights(tmp_path / "a", base_channels=8)
    gpu_sweep.save_random_weights(tmp_path / "b", base_channels=8)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert load_weights(tmp_path / "a")[1].base_channels == 8


@pytest.mark.slow
def test_operations_of_the_full_network():
    """284.39 GMAC are with the classifiers of training, 4·16·15·9·512² = 2.265 GMAC of them."""
    metadata = metadata_of(trained_looking_network(), base_channels=64)
    gflop = network_speed.gflop_a_slice(metadata, (512, 512))
    assert gflop["plain"] == pytest.approx(2 * (284.39 - 2.265), abs=0.02)
    # Two of the first convolution's three channels go; see issue 5 for what merging saves.
    assert gflop["plain"] - gflop["apart"] == pytest.approx(2e-9 * 2 * 9 * 64 * 512**2)
    assert gflop["apart"] - gflop["merged"] == pytest.approx(2 * 51, rel=0.01)


@pytest.mark.slow
def test_network_sweep_on_a_cpu(weights_file):
    printed = []
    swept = network_speed.sweep(
        weights_file, torch.device("cpu"), (32, 32), batch_sizes=(1, 2), matrix=64, repeats=1,
        on_result=lambda found: printed.append(len(found["runs"])),
    )  # fmt: skip
    assert printed == [0, 1, 2, 3, 4]
    assert swept["failed"] == {}
    forms = [(run["merges_upsampling"], run["batch_size"]) for run in swept["runs"]]
    assert forms == [(True, 1), (True, 2), (False, 1), (False, 2)]
    for run in swept["runs"]:
        form = "merged" if run["merges_upsampling"] else "apart"
        assert run["tflops"] * run["ms"] == pytest.approx(swept["gflop"][form])
    assert set(swept["matrix_tflops"]) == {run["dtype"] for run in swept["runs"]}


@pytest.mark.slow
def test_network_forms_on_cuda(weights_file, cuda_device, monkeypatch):
    """Every form runs, one that fails costs itself alone, and the context is read after a pass."""
    device = cuda_device(total_mb=24000, context_mb=700)

    def fail_in_bfloat16(operator, channels):
        if torch.bfloat16 in device.types:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return True

    device.fused = fail_in_bfloat16
    swept = network_speed.sweep(
        weights_file, choose_device("cuda"), (32, 32), batch_sizes=(1, 2), matrix=16, repeats=1
    )
    forms = [
        (run["dtype"], run["merges_upsampling"], run["fused"], run["padded_head"], run["searches"])
        for run in swept["runs"]
    ]
    assert forms[:4] == [("float16", merges, True, False, False) for merges in (1, 1, 0, 0)]
    for changed in ((False, False, False), (True, True, False), (True, False, True)):
        assert ("float16", True, *changed) in forms
    assert set(swept["failed"]) == {"bfloat16, merged, batch of 1", "bfloat16, apart, batch of 1"}
    assert swept["context_mb"] == 700 - 100  # of which the allocator has reserved 100
    assert set(swept["matrix_tflops"]) == {"float16", "bfloat16"}
    assert all(index == 0 for _, index in device.traffic.fractions)


@pytest.mark.slow
def test_steps_on_cuda(weights_file, cuda_device):
    cuda_device()
    slices = torch.randn(3, 1, 32, 32)
    steps = network_speed.measure_steps(weights_file, choose_device("cuda"), slices, 1)
    assert [name for name, _ in steps][3:5] == [
        "precision float16",
        "bias, ReLU and sum in the convolutions",
    ]
    assert len(steps) == 8


@pytest.mark.slow
def test_cold_and_warm_stages(tmp_path, monkeypatch, nvml_stub, weights_file):  # noqa: F811
    """With the stand-in for NVML, whose device has 3 MB more in use at each reading."""
    for name, value in {"_DEVICE": "cpu", "SHORT": 3, "MIDDLE": 4, "LONG": 7, "SIZE": 48}.items():
        monkeypatch.setattr(gpu_sweep, name, value)
    monkeypatch.setattr(gpu_sweep, "_FOLDER", 3)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(nvml_stub))
    monkeypatch.setenv("NVML_STUB_CURVE", "steps")
    monkeypatch.setenv("NVML_STUB_LOG", str(tmp_path / "readings"))
    sweep = gpu_sweep._Sweep(0, tmp_path, weights_file, time.monotonic() + 60)
    sweep.draw()
    (run,) = sweep.cold(sweep.service_command("--batch-size", "2"), 7, 1)
    assert run["image_size"] == [48, 48, 7]
    assert run["peak_gpu_mb"] > 200
    assert 0 <= gpu_page.held_after_network(run) < run["auc_true_mb_s"]
    warm = sweep.warm()
    assert warm["volumes"] == 3
    assert 0 < warm["network_share"] <= 1
    command = sweep.service_command("--batch-size", "2", choices="overlaps=0")
    with pytest.raises(gpu_sweep.StageError, match="ABDOSEG_CUDA: overlaps=0"):
        sweep.cold(command, 3, 1)
    with pytest.raises(gpu_sweep.StageError, match="crashed"):
        sweep.cold("false", 3, 1)

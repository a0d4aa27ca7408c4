"""The GPU sweep: its stages on a CPU, and what is left of a stage that breaks."""

import json
import time

import numpy as np
import pytest
from test_sampler import nvml_stub  # noqa: F401  (a fixture)

from benchmark.__main__ import main
from benchmark.speed import gpu_page, gpu_sweep
from inference.choices import CudaChoices
from inference.weights import load_weights


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

"""GPU memory by a stand-in for NVML: figures, drivers that know less, GPUs that are lost."""

import ctypes
import math
import shutil

import numpy as np
import pynvml
import pytest
from harness import (
    COPY,
    measure,
    page_data,
    read,
    read_case,
    read_table,
    run_benchmark,
    write_run,
)
from test_challenge import Hall
from test_sampler import nvml_stub  # noqa: F401  (a fixture)

from benchmark.containers import machine
from benchmark.containers.results import Tolerances, peaks_and_areas
from benchmark.containers.sampler import Samples

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def nvml(nvml_stub, tmp_path, monkeypatch):  # noqa: F811
    """A new copy of the stand-in as the library that nvidia-ml-py calls."""
    copy = shutil.copy(nvml_stub / "libnvidia-ml.so.1", tmp_path)
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(copy)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(machine, "_IDLE_SAMPLES", 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def arithmetic_sum(first: float, last: float, step: float) -> float:
    return 0.0 if last < first else (first + last) / 2 * (round((last - first) / step) + 1)


def test_readings_peak_and_area_have_closed_forms(tmp_path):
    log = tmp_path / "readings"
    done = measure(tmp_path, "x", command=f"sleep 0.6; {COPY}", NVML_STUB_LOG=str(log))
    assert done.code == 0, done.err
    result, readings = read_case(tmp_path, "x"), [float(line) for line in log.open()]
    samples, sampler = result["samples"]["gpu_used_mb"], result["sampler"]
    count = len(samples)
    first, last = readings[-count], 200 + 3 * (len(readings) - 1)
    assert samples == readings[-count:] == [first + 3 * n for n in range(count)]
    assert count == sampler["samples"] >= 2
    assert result["peak_gpu_mb"] == last
    assert result["auc_flare_mb_s"] == round(0.1 * arithmetic_sum(first, last, 3))
    tolerated = peaks_and_areas(Samples(**result["samples"]), 9.0, Tolerances(0.5, 241))
    above = first + 3 * max(0, math.ceil((241 - first) / 3))
    over = round(0.1 * arithmetic_sum(above - 241, last - 241, 3))
    assert (tolerated["auc_flare_tolerated_mb_s"], tolerated["seconds_tolerated"]) == (over, 8.5)
    # The three readings just before the case are the idle device.
    assert result["idle_gpu_mb"] == pytest.approx(first - 3 * 2)
    assert set(result["samples"]["gpu_reserved_mb"]) == {150.0}
    assert set(result["samples"]["gpu_process_mb"]) == {300.0}  # process 4242 was there before
    # Samples lie on the tenths of a second.
    ticks = [math.floor(moment / 0.1 + 1e-4) for moment in result["samples"]["time_s"]]
    late = math.ceil(sampler["max_late_ms"] / 100)
    assert sorted(set(ticks)) == ticks
    assert ticks[-1] - late <= len(ticks) - 1 + sampler["missed_ticks"]

    environment = read(tmp_path / "run/environment.json")
    assert (environment["gpu"], environment["driver"]) == ("Stub GPU 0", "1.2.3")
    assert environment["idle_gpu_processes"] == [4242]
    row = read_table(tmp_path)["x"]
    assert float(row["MaxGPU_Mem"]) == last
    assert float(row["AUC_GPU_Time"]) == result["auc_flare_mb_s"]


def test_true_area_of_a_ramp_is_within_the_sampling_error(tmp_path):
    measure(tmp_path, "x", command=f"sleep 0.6; {COPY}", NVML_STUB_CURVE="ramp")
    result = read_case(tmp_path, "x")
    times, samples = result["samples"]["time_s"], result["samples"]["gpu_used_mb"]
    slope, duration = 500, times[-1] - times[0]
    # Each value was read within its reading's duration after its time stamp.
    stamp_error = result["sampler"]["max_reading_ms"] / 1000 + 1e-5
    assert samples[-1] - samples[0] == pytest.approx(slope * duration, abs=slope * stamp_error)
    closed_form = (samples[0] + slope * duration / 2) * duration
    assert result["auc_true_mb_s"] == pytest.approx(closed_form, abs=slope * stamp_error * duration)


NO_PERMISSION, NOT_SUPPORTED, NOT_FOUND, MISMATCH, UNKNOWN = "4", "3", "13", "18", "999"
NO_DRIVER = {"NVML_STUB_INIT": "9"}
THREE = {"NVML_STUB_DEVICES": "3"}
SHOW = f"echo seen $CUDA_VISIBLE_DEVICES; {COPY}"


@pytest.mark.parametrize("code", [NOT_FOUND, NOT_SUPPORTED, UNKNOWN])
def test_the_first_memory_call_does_where_the_second_fails(tmp_path, code):
    done = measure(tmp_path, "x", "--gpu", 0, NVML_STUB_V2=code)
    assert done.code == 0, done.err
    result = read_case(tmp_path, "x")
    assert result["samples"]["gpu_reserved_mb"] is None
    assert result["peak_gpu_mb"] == result["samples"]["gpu_used_mb"][-1] > 200


@pytest.mark.parametrize(
    "fault",
    [
        {"NVML_STUB_V1": NO_PERMISSION, "NVML_STUB_V2": NO_PERMISSION},
        {"NVML_STUB_V1": NOT_SUPPORTED, "NVML_STUB_V2": NOT_FOUND},
        {"NVML_STUB_INIT": MISMATCH},
    ],
)
def test_a_gpu_whose_memory_cannot_be_read_is_used_all_the_same(tmp_path, fault):
    done = measure(tmp_path, "x", command=SHOW, **fault)
    assert done.code == 0, done.err
    assert (tmp_path / "run/efficiency/x.log").read_text() == "seen 0\n"
    row, note = read_table(tmp_path)["x"], read(tmp_path / "run/environment.json")["gpu_note"]
    assert row["MaxGPU_Mem"] == row["AUC_GPU_Time"] == ""
    assert note in (tmp_path / "run/efficiency.md").read_text()
    assert measure(tmp_path / "2", "x", "--gpu", 0, **fault).code == 2


@pytest.mark.parametrize(
    ("options", "environment", "device"),
    [
        ((), {"NVML_STUB_DEVICES": "0"}, None),
        ((), NO_DRIVER, None),
        ((), {"CUDA_VISIBLE_DEVICES": ""}, None),
        ((), {"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ((), THREE | {"CUDA_VISIBLE_DEVICES": "2,0"}, 2),
        ((), THREE | {"CUDA_VISIBLE_DEVICES": "GPU-stub-1"}, 1),
        (("--gpu", 1), THREE | {"CUDA_VISIBLE_DEVICES": "2"}, 1),
        (("--gpu", 3), {}, "refused"),
        (("--gpu", 0), NO_DRIVER, "refused"),
    ],
)
def test_the_gpu_that_is_measured_is_the_one_that_is_used(tmp_path, options, environment, device):
    done = measure(tmp_path, "x", *options, command=SHOW, **environment)
    if device == "refused":
        assert (done.code, (tmp_path / "run").exists()) == (2, False)
        return
    assert done.code == 0
    described = read(tmp_path / "run/environment.json")
    assert described["gpu"] == (None if device is None else f"Stub GPU {device}")
    assert (described["gpu_note"] is None) == (device is not None)
    if device is not None:
        assert (tmp_path / "run/efficiency/x.log").read_text() == f"seen {device}\n"


def test_a_gpu_that_stops_answering_costs_its_case_until_it_is_measured(tmp_path):
    lost = {"NVML_STUB_LOST": str(tmp_path / "lost")}
    command = f"[ ! -e {{inputs}}/b_0000.nii.gz ] || touch {tmp_path}/$LOSE; sleep 0.3; {COPY}"
    assert measure(tmp_path, "a b", command=command, **lost, LOSE="lost").code == 1
    assert [read_case(tmp_path, name)["status"] for name in "ab"] == ["ok", "not measured"]
    assert {*read_table(tmp_path)["b"].values()} == {"b_0000.nii.gz", ""}

    # Nobody is penalised for b, with the samples or by the table alone.
    other = write_run(
        tmp_path / "other", "other", samples={n: [(0.5, [400.0] * 5)] for n in "ab"},
        environment={"gpu": "Stub GPU 0"},
    )  # fmt: skip
    table_alone = tmp_path / "table"
    shutil.copytree(tmp_path / "run", table_alone, ignore=shutil.ignore_patterns("*.json"))
    shutil.copy(tmp_path / "run/environment.json", table_alone)
    for folder, tolerance in ((tmp_path / "run", 4096), (table_alone, 0)):
        ranked = run_benchmark("rank", folder, other, "--report", tmp_path / "r")
        assert ranked.code == 0, ranked.err
        content = read(tmp_path / "r/ranking.json")
        assert content["rules"]["memory_tolerance_mb"] == tolerance
        assert content["cases"] == ["a"]
        assert any("b" in remark.split() for remark in content["remarks"])
    assert run_benchmark("compare", tmp_path / "run", other).code == 0
    run_benchmark("report", tmp_path / "run", "--output", tmp_path / "page.html")
    assert any("b (GPU 0" in note for note in page_data(tmp_path / "page.html")["notes"])

    (tmp_path / "lost").unlink()
    first = read_case(tmp_path, "a")
    assert measure(tmp_path, "", "--resume", command=command, **lost, LOSE="elsewhere").code == 0
    assert read_case(tmp_path, "a") == first
    assert read_case(tmp_path, "b")["status"] == "ok"

    (tmp_path / "lost").touch()  # before the first case
    assert measure(tmp_path / "none", "x", **lost).code == 2
    assert not (tmp_path / "none/run").exists()


def test_a_challenge_continues_after_a_lost_gpu(tmp_path):
    hall, lost = Hall(tmp_path), tmp_path / "lost"
    copy = "cp inputs/* outputs/$(basename inputs/* _0000.nii.gz).nii.gz; sleep 0.3"
    for name, before in (("first", ""), ("second", f"touch {tmp_path}/$LOSE; "), ("third", "")):
        hall.enter(f"{name}.tar.gz", before + copy)
    here = {"NVML_STUB_LOST": str(lost)}
    assert hall.call(**here, LOSE="lost") == 1
    assert list(dict(sorted(hall.states().items())).values()) == ["done", "not run", "not run"]
    assert hall.call(**here, LOSE="lost") == 2
    lost.unlink()
    assert hall.call(**here, LOSE="elsewhere") == 0
    assert set(hall.states().values()) == {"done"}
    values = read(hall.report / "ranking/ranking.json")["values"]
    assert np.array(values["gpu"]).shape == (3, 2)
    assert values["time"] == [[0, 0]] * 3

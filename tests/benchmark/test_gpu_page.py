"""The page of GPU figures, on numbers that are known."""

import numpy as np
import pytest
from test_sampler import nvml_stub  # noqa: F401  (a fixture)

from benchmark.speed import gpu_page


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


def network_run(dtype, ms, tflops, *, fused=True):
    return {
        "dtype": dtype,
        "fused": fused,
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
            "failed": {"bfloat16, batch of 32": "out of memory"},
            "gflop": {"plain": 564.25, "folded": 462.1},
            "runs": [
                network_run("float16", 1.5, 330.0),
                network_run("bfloat16", 1.6, 600.0, fused=False),
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
    assert "| bfloat16, batch of 8 | 1.60 | 600 | 86 % | 1,500 | 4.2 |" in page
    assert "| float16, fused, batch of 8 | 1.50 |" in page
    assert "| nnunet, 200 slices | 40.00 | 5,000 | 4,900 | 90,000 |" in page
    assert "| as it is | 4.00 | 2,000 |" in page
    assert "| overlap off | 4.20 | 2,000 | 1,900 | 2,600 |" in page
    assert "after a first pass: 480 MB" in page
    assert "**Failed**: bfloat16, batch of 32: out of memory" in page
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


def test_warm_rate_from_the_first_label_map_on():
    phases = []
    for number in range(5):  # a volume every 2 s, of which the network takes 1.5 s
        start = 10 + 2 * number
        phases.append({"phase": "predict", "start": start, "end": start + 1.5})
        phases.append({"phase": "write", "start": start + 1.5, "end": start + 2})
    rate = gpu_page.warm_rate(phases)
    assert rate["volumes_per_s"] == pytest.approx(0.5)
    assert rate["network_share"] == pytest.approx(0.75)

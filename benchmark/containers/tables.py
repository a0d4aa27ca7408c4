"""The tables of an efficiency run: the organisers' CSV, and Markdown shaped as the paper's Table 4.

`results` maps each case to its runs, one for each repetition, as `efficiency/CASE.json` holds them.
"""

import csv
import io
import statistics
from collections.abc import Sequence

import numpy as np

from benchmark.markdown import cell

OFFICIAL_INTERVAL = 0.1
"""Seconds between the organisers' samples, and the width by which their sums become areas."""

PENALTY = {"seconds": 3600.0, "auc_gpu_mb_s": 29_491_200.0, "auc_cpu_percent_s": 360_000.0}
"""What a failed case counts as (FLARE 2022): an hour of 8192 MB and of every core busy."""

CSV_COLUMNS = (
    "Name",
    "Time",
    "MaxGPU_Mem",
    "AUC_GPU_Time",
    "MaxCPU_Utilization",
    "AUC_CPU_Time",
    "MaxRAM",
    "AUC_RAM_Time",
)


def _median_run(runs: list[dict]) -> dict:
    """The run of median time; a failed one counts an hour. Of an even number, the faster middle."""
    ranked = sorted(runs, key=lambda run: (run["penalty"] or run)["seconds"])
    return ranked[(len(ranked) - 1) // 2]


def csv_table(results: dict[str, list[dict]]) -> str:
    """The organisers' `TEAM_Efficiency.csv`."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(_csv_row(_median_run(runs)) for runs in results.values() if runs)
    return table.getvalue()


def _csv_row(result: dict) -> list[str | float | None]:
    """A row of the official table, rounded as the organisers round; empty where not measured."""
    penalty = result["penalty"]
    peak_gpu = result["peak_gpu_mb"]
    return [
        result["file"],
        round((penalty or result)["seconds"], 2),
        None if peak_gpu is None else float(np.round(peak_gpu)),
        penalty["auc_gpu_mb_s"] if penalty else result["auc_flare_mb_s"],
        result["max_cpu_percent"],
        (penalty or result)["auc_cpu_percent_s"],
        round(result["max_ram_mb"], 2),
        result["auc_ram_mb_s"],
    ]


def markdown_page(results: dict[str, list[dict]], environment: dict) -> str:
    """The page `efficiency.md`.

    Args:
        results: every case's runs.
        environment: the content of `environment.json`.
    """
    runs = [run for case in results.values() for run in case]
    machine = f"{environment['cpu']}, {environment['cores']} cores, {environment['memory_gb']} GB"
    device = (
        f"{environment['gpu']}, driver {environment['driver']}, "
        f"{environment['idle_gpu_mb']:,.0f} MB taken before the first case"
        if environment["gpu"]
        else f"none: {environment['gpu_note']}"
    )
    interval, tolerances = environment["interval_s"], environment["tolerances"]
    missed = sum(run["sampler"]["missed_ticks"] for run in runs)
    ticks = missed + sum(run["sampler"]["samples"] for run in runs)
    image = f"{environment['image']} ({environment['image_digest']})"
    notes = [
        f"Command: `{environment['command']}`",
        *([f"Image: {image}, Docker {environment['docker']}"] if environment["image"] else []),
        f"Machine: {machine}",
        f"GPU: {device}",
        "Running time is the wall clock around the start and end of the container or command. "
        "GPU memory is the whole device's total − free, as the challenge reads it; the total is "
        f"the sum of the samples × {interval:g} s, as the challenge computes it, and the "
        "true area the trapezoid over the samples' own times. Nothing is subtracted from either.",
        "CPU (in the CSV) is in percent of the whole machine. CPU and RAM are those of the "
        "container or command alone, where the challenge reads the whole machine's.",
        f"With tolerances: time − {tolerances['seconds']:g} s, memory − {tolerances['mb']:g} MB, "
        "never below 0.",
        f"Sampling took {_sampling_share(runs):.2f} % of one core and missed {missed} of {ticks} "
        "ticks.",
    ]
    if environment["repeat"] > 1:
        notes.append(
            f"Each case ran {environment['repeat']} times; the run of median time is shown."
        )
    if interval != OFFICIAL_INTERVAL:
        notes.append(
            f"The samples are {interval:g} s apart, the challenge's 0.1 s: the totals are areas "
            "all the same, but not to the digit what the challenge would have found."
        )
    if any(run["penalty"] for run in runs):
        notes.append(
            "Failed cases count in the CSV as 3600 s, 29,491,200 MB·s and 360,000 %·s, DSC 0 and "
            "NSD 0 (FLARE 2022 rules); here they show what was measured, and are left out of the "
            "mean."
        )
    notes.append(
        "The paper's own Table 4 (NVIDIA RTX 2080 Ti): 36 s to 351 s, at most 2,218 MB, "
        "75,269 MB·s to 762,258 MB·s, without tolerance."
    )
    lines = "\n".join(f"- {note}" for note in notes)
    return f"# Efficiency of {cell(environment['team'])}\n\n{markdown_table(results)}\n\n{lines}\n"


def markdown_table(results: dict[str, list[dict]]) -> str:
    """The paper's Table 4, with the true area, the tolerated numbers and the status added."""
    header = (
        "Case ID | Image size | Running time (s) | Max GPU (MB) | Total GPU (MB·s) "
        "| True area (MB·s) | Time, tolerated (s) | Total GPU, tolerated (MB·s) | Status"
    )
    shown = [_median_run(runs) for runs in results.values() if runs]
    rows = [
        [cell(run["case"]), by(run["image_size"]), *_numbers(run), _status(run)] for run in shown
    ]
    counted = [run for run in shown if not run["penalty"]]
    if len(counted) > 1:
        mean = {name: _mean([run[name] for run in counted]) for name, _ in _TABLE_NUMBERS}
        rows.append([f"mean of {len(counted)}", "", *_numbers(mean), ""])
    return "\n".join(
        [
            f"| {header} |",
            "|---|---|---:|---:|---:|---:|---:|---:|---|",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
    )


_TABLE_NUMBERS = (
    ("seconds", ".2f"),
    ("peak_gpu_mb", ",.0f"),
    ("auc_flare_mb_s", ",.0f"),
    ("auc_true_mb_s", ",.0f"),
    ("seconds_tolerated", ".2f"),
    ("auc_flare_tolerated_mb_s", ",.0f"),
)


def _numbers(run: dict) -> list[str]:
    return ["" if run[name] is None else f"{run[name]:{shape}}" for name, shape in _TABLE_NUMBERS]


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else statistics.fmean(values)


def _status(run: dict) -> str:
    if run["status"] == "ok":
        return "ok"
    return f"**{run['status']}**: {cell(run['reason'])}"


def _sampling_share(runs: list[dict]) -> float:
    """Percent of one core that the sampler took."""
    seconds = sum(run["seconds"] for run in runs)
    return 100 * sum(run["sampler"]["cpu_seconds"] for run in runs) / seconds


def by(size: Sequence[int]) -> str:
    """An image's size as it is written: 512×512×100."""
    return "×".join(map(str, size))

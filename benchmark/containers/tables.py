"""The page `efficiency.md`: Markdown shaped as the paper's Table 4, and how it was measured.

`results` maps each case to its runs, one for each repetition. Which run is shown, and what a failed
one counts, is in `results.py`.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmark.containers import results as rules
from benchmark.containers.results import Result, figure, median_run
from benchmark.text import bullets, by, cell, number_or_dash, table

_PAPER = (
    "The paper's own Table 4 (NVIDIA RTX 2080 Ti): 36 s to 351 s, at most 2,218 MB, "
    "75,269 MB·s to 762,258 MB·s, without tolerance."
)
_GPU = (
    "Its memory is the whole device's total − free, as the challenge reads it; the total is the "
    "sum of the samples × 0.1 s, as the challenge computes it, and the true area the trapezoid "
    "over the samples' own times. Nothing is subtracted from either."
)
_CLOCK = (
    "Running time is the wall clock from the start to the end of the container or command. CPU is "
    "in percent of the whole machine. CPU and RAM are those of the container or command alone, "
    "where the challenge reads the whole machine's."
)


def efficiency_table(results: Mapping[str, Sequence[Result]]) -> str:
    """Return the paper's Table 4, with more columns; without a GPU what was measured instead."""
    groups = [runs for runs in results.values() if runs]
    shown = [median_run(runs) for runs in groups]
    columns = _columns(shown)
    repeated = any(len(runs) > 1 for runs in groups)
    rows = []
    for runs, run in zip(groups, shown, strict=True):
        numbers = [number_or_dash(figure(run, key), form) for key, _, form in columns]
        if repeated:
            ends = rules.least_and_most(runs)
            numbers.insert(1, "{:.2f}–{:.2f}".format(*ends) if ends else "–")
        rows.append([run["case"], by(run["image_size"]), *numbers, _status(run)])
    if len(shown) > 1:
        means = [number_or_dash(_mean(shown, key), form) for key, _, form in columns]
        means[1:1] = [""] * repeated
        failed = sum(run["penalty"] is not None for run in shown)
        rows.append([f"mean of {len(shown)}", "", *means, f"{failed} failed" if failed else ""])
    titles = [title for _, title, _ in columns]
    titles[1:1] = ["Least–most (s)"] * repeated
    align = "ll" + "r" * len(titles) + "l"
    return table(["Case ID", "Image size", *titles, "Status"], align, rows)


def _columns(shown: list[Result]) -> list[tuple[str, str, str]]:
    """Return key of a result, title and format of each column of numbers."""
    measures = rules.ram_measures(shown)
    ram = f"Max RAM, {measures[0]} (MB)" if len(measures) == 1 else "Max RAM (MB)"
    time = ("seconds", "Running time (s)", ".2f")
    tolerated = ("seconds_tolerated", "Time, tolerated (s)", ".2f")
    most_ram = ("max_ram_mb", ram, ",.0f")
    if any(run["peak_gpu_mb"] is not None for run in shown):
        return [
            time,
            ("peak_gpu_mb", "Max GPU (MB)", ",.0f"),
            ("auc_flare_mb_s", "Total GPU (MB·s)", ",.0f"),
            ("auc_true_mb_s", "True area (MB·s)", ",.0f"),
            tolerated,
            ("auc_flare_tolerated_mb_s", "Total GPU, tolerated (MB·s)", ",.0f"),
            most_ram,
        ]
    return [
        *(time, tolerated, most_ram),
        ("auc_ram_mb_s", "Total RAM (MB·s)", ",.0f"),
        ("max_cpu_percent", "Max CPU (%)", ".1f"),
        ("auc_cpu_percent_s", "Total CPU (%·s)", ",.0f"),
    ]


def _mean(shown: list[Result], key: str) -> float | None:
    """Return the mean of the values that there are: failed cases have no peak."""
    values = [value for run in shown if (value := figure(run, key)) is not None]
    return statistics.fmean(values) if values else None


def _status(run: Result) -> str:
    if run["status"] == "ok":
        return "ok"
    after = f" after {run['seconds']:.2f} s" if run["penalty"] else ""
    return f"**{run['status']}**{after}: {run['reason']}"


def markdown_page(results: Mapping[str, Sequence[Result]], environment: dict[str, Any]) -> str:
    """Return the page `efficiency.md`; `environment` is the content of `environment.json`."""
    of = environment.__getitem__
    runs = [run for case in results.values() for run in case]
    tolerances, measures = of("tolerances"), rules.ram_measures(runs)
    missed = sum(run["sampler"]["missed_ticks"] for run in runs)
    ticks = missed + sum(run["sampler"]["samples"] for run in runs)
    seconds = sum(run["seconds"] for run in runs) or 1.0
    share = 100 * sum(run["sampler"]["cpu_seconds"] for run in runs) / seconds
    gpu = f"{of('gpu') or 'none'}: {of('gpu_note')}"
    if of("idle_gpu_mb") is not None:
        gpu = f"{of('gpu')}, driver {of('driver')}, {of('idle_gpu_mb'):,.0f} MB in use before the "
        gpu += f"first case. {_GPU}"
    repeats = {len(of_case) for of_case in results.values() if of_case}
    notes = [
        f"Command: `{of('command')}`",
        f"Machine: {of('cpu')}, {of('cores')} cores, {of('memory_gb')} GB",
        f"GPU: {gpu}",
        _CLOCK,
        *(f"RAM ({measure}) is {rules.RAM_MEASURES[measure]}." for measure in measures),
        f"With tolerances: time − {tolerances['seconds']:g} s, memory − {tolerances['mb']:g} MB, "
        "never below 0; failed cases have none.",
        f"Sampling took {share:.2f} % of one core and missed {missed} of {ticks} ticks.",
    ]
    if of("image"):
        notes[1:1] = [f"Image: {of('image')} ({of('image_digest')}), Docker {of('docker')}"]
    if len(measures) > 1:
        notes.append("**RAM was not read in the same way in every run: do not compare it.**")
    if repeats - {1}:
        notes.append(
            f"Each case ran {' or '.join(map(str, sorted(repeats)))} times; the run of median time "
            "is shown whole, the least and most time of all beside it."
        )
    if of("warm_up"):
        notes.append(
            "A first run was discarded (--warm-up): no run shown had to read the image and its "
            "libraries from the disk, which a first start of the day has to."
        )
    elif first := [cell(run["case"]) for run in runs if run.get("first")]:
        notes.append(
            f"There was no warm-up: a run of {', '.join(dict.fromkeys(first))} was the first here, "
            "and may have read from the disk what later runs found in memory, in time and RAM "
            "(--warm-up discards such a run)."
        )
    if any(run["penalty"] for run in runs):
        notes.append(rules.PENALTY_SENTENCE)
    for name, reason in of("not_measured").items():
        notes.append(f"**Not measured**: {cell(name)}: {cell(reason)}")
    title = f"# Efficiency of {cell(of('team'))}"
    return f"{title}\n\n{efficiency_table(results)}\n\n{bullets([*notes, _PAPER])}\n"

"""The tables of an efficiency run: the organisers' CSV, and Markdown shaped as the paper's Table 4.

`results` maps each case to its runs, one for each repetition, as `efficiency/CASE.json` holds them.
Which run is shown, and what a failed one counts as, says `repeats.py`.
"""

import csv
import io
import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from benchmark.containers.repeats import (
    PENALTY,
    PENALTY_SENTENCE,
    RAM_MEASURES,
    figure,
    least_and_most,
    median_run,
    ram_measure,
)
from benchmark.markdown import cell

OFFICIAL_INTERVAL = 0.1
"""Seconds between the organisers' samples, and the width by which their sums become areas."""

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


def csv_table(results: dict[str, list[dict]]) -> str:
    """The organisers' `TEAM_Efficiency.csv`."""
    return _csv(_csv_row(median_run(runs)) for runs in results.values() if runs)


def failed_csv_table(files: Iterable[str], *, gpu: bool) -> str:
    """`TEAM_Efficiency.csv` of a team none of whose cases could be started.

    Args:
        files: the input files' names.
        gpu: whether the other teams' device memory is measured.
    """
    area = PENALTY["auc_gpu_mb_s"] if gpu else None
    numbers = (PENALTY["seconds"], None, area, None, PENALTY["auc_cpu_percent_s"], None, None)
    return _csv([file, *numbers] for file in files)


def _csv(rows: Iterable[list]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(rows)
    return table.getvalue()


def _csv_row(result: dict) -> list[str | float | None]:
    """A row of the official table, rounded as the organisers round; empty where not measured."""
    peak_gpu, max_ram = figure(result, "peak_gpu_mb"), figure(result, "max_ram_mb")
    return [
        result["file"],
        round(figure(result, "seconds"), 2),
        None if peak_gpu is None else float(np.round(peak_gpu)),
        figure(result, "auc_flare_mb_s"),
        figure(result, "max_cpu_percent"),
        figure(result, "auc_cpu_percent_s"),
        None if max_ram is None else round(max_ram, 2),
        figure(result, "auc_ram_mb_s"),
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
    gpu_sentence = (
        " GPU memory is the whole device's total − free, as the challenge reads it; the total is "
        f"the sum of the samples × {interval:g} s, as the challenge computes it, and the "
        "true area the trapezoid over the samples' own times. Nothing is subtracted from either."
    )
    notes = [
        f"Command: `{environment['command']}`",
        *([f"Image: {image}, Docker {environment['docker']}"] if environment["image"] else []),
        f"Machine: {machine}",
        f"GPU: {device}",
        "Running time is the wall clock around the start and end of the container or command."
        + gpu_sentence * (environment["gpu"] is not None),
        "CPU is in percent of the whole machine. CPU and RAM are those of the container or command "
        "alone, where the challenge reads the whole machine's.",
        *ram_notes(runs),
        f"With tolerances: time − {tolerances['seconds']:g} s, memory − {tolerances['mb']:g} MB, "
        "never below 0; failed cases have none.",
        f"Sampling took {_sampling_share(runs):.2f} % of one core and missed {missed} of {ticks} "
        "ticks.",
        *_repeat_notes(results, environment),
    ]
    if interval != OFFICIAL_INTERVAL:
        notes.append(
            f"The samples are {interval:g} s apart, the challenge's 0.1 s: the totals are areas "
            "all the same, but not to the digit what the challenge would have found."
        )
    if any(run["penalty"] for run in runs):
        notes.append(PENALTY_SENTENCE)
    notes.append(
        "The paper's own Table 4 (NVIDIA RTX 2080 Ti): 36 s to 351 s, at most 2,218 MB, "
        "75,269 MB·s to 762,258 MB·s, without tolerance."
    )
    lines = "\n".join(f"- {note}" for note in notes)
    return f"# Efficiency of {cell(environment['team'])}\n\n{markdown_table(results)}\n\n{lines}\n"


def ram_notes(runs: Iterable[dict]) -> list[str]:
    """What RAM is in these runs, a sentence for each way in which it was read."""
    measures = sorted({measure for run in runs if (measure := ram_measure(run))})
    notes = [f"RAM ({measure}) is {RAM_MEASURES[measure]}." for measure in measures]
    if len(measures) > 1:
        notes.append("**RAM was not read in the same way in every run: do not compare it.**")
    return notes


def _repeat_notes(results: dict[str, list[dict]], environment: dict) -> list[str]:
    """Which of several runs are shown, and which may have started cold."""
    notes = []
    counts = {len(runs) for runs in results.values() if runs}
    if counts - {1}:
        times = " or ".join(map(str, sorted(counts)))
        notes.append(
            f"Each case ran {times} times; the run of median time is shown whole, the least and "
            "most time of all beside it."
        )
    if any(count % 2 == 0 for count in counts):
        notes.append("Of an even number of runs the faster of the two in the middle is shown.")
    if environment.get("warm_up"):
        notes.append(
            "A first run was discarded (--warm-up): no run shown had to read the image and its "
            "libraries from the disk, which a first start of the day has to."
        )
    else:
        first = [cell(run["case"]) for runs in results.values() for run in runs if run.get("first")]
        if first:
            notes.append(
                f"There was no warm-up: a run of {', '.join(dict.fromkeys(first))} was the first "
                "here, and may have read from the disk what later runs found in memory, in time "
                "and RAM (--warm-up discards such a run)."
            )
    return notes


def markdown_table(results: dict[str, list[dict]]) -> str:
    """The paper's Table 4, with more columns; without a GPU what was measured in its place."""
    groups = [runs for runs in results.values() if runs]
    shown = [median_run(runs) for runs in groups]
    columns = _columns(shown, repeated=any(len(runs) > 1 for runs in groups))
    rows = []
    for runs, run in zip(groups, shown, strict=True):
        numbers = [_number(figure(run, name), form) for name, _, form in columns]
        if ranged := least_and_most(runs):
            numbers = [
                "{:.2f}–{:.2f}".format(*ranged) if name == "range" else number
                for (name, _, _), number in zip(columns, numbers, strict=True)
            ]
        rows.append([cell(run["case"]), by(run["image_size"]), *numbers, _status(run)])
    if len(shown) > 1:
        means = [
            _number(_mean([figure(run, name) for run in shown]), form) for name, _, form in columns
        ]
        failed = sum(run["penalty"] is not None for run in shown)
        rows.append([f"mean of {len(shown)}", "", *means, f"{failed} failed" if failed else ""])
    titles = ["Case ID", "Image size", *(title for _, title, _ in columns), "Status"]
    return "\n".join(
        [
            f"| {' | '.join(titles)} |",
            "|---|---|" + "---:|" * len(columns) + "---|",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
    )


def _columns(shown: list[dict], *, repeated: bool) -> list[tuple[str, str, str]]:
    """Key of a result, title and format of each column of numbers; "range" is least and most."""
    measures = {ram_measure(run) for run in shown} - {None}
    ram = f"Max RAM, {measures.pop()} (MB)" if len(measures) == 1 else "Max RAM (MB)"
    first = [("seconds", "Running time (s)", ".2f")]
    if repeated:
        first.append(("range", "Least–most (s)", ""))
    if any(run["peak_gpu_mb"] is not None for run in shown):
        return [
            *first,
            ("peak_gpu_mb", "Max GPU (MB)", ",.0f"),
            ("auc_flare_mb_s", "Total GPU (MB·s)", ",.0f"),
            ("auc_true_mb_s", "True area (MB·s)", ",.0f"),
            ("seconds_tolerated", "Time, tolerated (s)", ".2f"),
            ("auc_flare_tolerated_mb_s", "Total GPU, tolerated (MB·s)", ",.0f"),
            ("max_ram_mb", ram, ",.0f"),
        ]
    return [
        *first,
        ("seconds_tolerated", "Time, tolerated (s)", ".2f"),
        ("max_ram_mb", ram, ",.0f"),
        ("auc_ram_mb_s", "Total RAM (MB·s)", ",.0f"),
        ("max_cpu_percent", "Max CPU (%)", ".1f"),
        ("auc_cpu_percent_s", "Total CPU (%·s)", ",.0f"),
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _mean(values: list[float | None]) -> float | None:
    """Of the values that there are: failed cases have no peak."""
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None


def _status(run: dict) -> str:
    if run["status"] == "ok":
        return "ok"
    after = f" after {run['seconds']:.2f} s" if run["penalty"] else ""
    return f"**{run['status']}**{after}: {cell(run['reason'])}"


def _sampling_share(runs: list[dict]) -> float:
    """Percent of one core that the sampler took."""
    seconds = sum(run["seconds"] for run in runs)
    return 100 * sum(run["sampler"]["cpu_seconds"] for run in runs) / seconds


def by(size: Sequence[int]) -> str:
    """An image's size as it is written: 512×512×100."""
    return "×".join(map(str, size))

"""The page `efficiency.md`: Markdown shaped as the paper's Table 4, and how it was measured.

`results` maps each case to its runs, one for each repetition. Which run is shown, and what a failed
one counts, is in `results.py`.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmark.containers.results import (
    OFFICIAL_INTERVAL,
    PENALTY_SENTENCE,
    RAM_MEASURES,
    figure,
    least_and_most,
    median_run,
    ram_measures,
)
from benchmark.text import bullets, by, cell, number_or_dash, table

_PAPER = (
    "The paper's own Table 4 (NVIDIA RTX 2080 Ti): 36 s to 351 s, at most 2,218 MB, "
    "75,269 MB·s to 762,258 MB·s, without tolerance."
)


def efficiency_table(results: Mapping[str, Sequence[dict]]) -> str:
    """Return the paper's Table 4, with more columns; without a GPU what was measured instead."""
    groups = [runs for runs in results.values() if runs]
    shown = [median_run(runs) for runs in groups]
    columns = _columns(shown)
    repeated = any(len(runs) > 1 for runs in groups)
    rows = []
    for runs, run in zip(groups, shown, strict=True):
        numbers = [number_or_dash(figure(run, key), form) for key, _, form in columns]
        if repeated:
            ends = least_and_most(runs)
            numbers.insert(1, "{:.2f}–{:.2f}".format(*ends) if ends else "–")
        rows.append([run["case"], by(run["image_size"]), *numbers, _status(run)])
    if len(shown) > 1:
        means = [number_or_dash(_mean(shown, key), form) for key, _, form in columns]
        failed = sum(run["penalty"] is not None for run in shown)
        means += [f"{failed} failed" if failed else ""]
        rows.append([f"mean of {len(shown)}", "", *means[:1], *[""] * repeated, *means[1:]])
    titles = [title for _, title, _ in columns]
    titles[1:1] = ["Least–most (s)"] * repeated
    align = "ll" + "r" * len(titles) + "l"
    return table(["Case ID", "Image size", *titles, "Status"], align, rows)


def _columns(shown: list[dict]) -> list[tuple[str, str, str]]:
    """Return key of a result, title and format of each column of numbers."""
    measures = ram_measures(shown)
    ram = f"Max RAM, {measures[0]} (MB)" if len(measures) == 1 else "Max RAM (MB)"
    time, tolerated = ("Running time (s)", ".2f"), ("Time, tolerated (s)", ".2f")
    if any(run["peak_gpu_mb"] is not None for run in shown):
        return [
            ("seconds", *time),
            ("peak_gpu_mb", "Max GPU (MB)", ",.0f"),
            ("auc_flare_mb_s", "Total GPU (MB·s)", ",.0f"),
            ("auc_true_mb_s", "True area (MB·s)", ",.0f"),
            ("seconds_tolerated", *tolerated),
            ("auc_flare_tolerated_mb_s", "Total GPU, tolerated (MB·s)", ",.0f"),
            ("max_ram_mb", ram, ",.0f"),
        ]
    return [
        ("seconds", *time),
        ("seconds_tolerated", *tolerated),
        ("max_ram_mb", ram, ",.0f"),
        ("auc_ram_mb_s", "Total RAM (MB·s)", ",.0f"),
        ("max_cpu_percent", "Max CPU (%)", ".1f"),
        ("auc_cpu_percent_s", "Total CPU (%·s)", ",.0f"),
    ]


def _mean(shown: list[dict], key: str) -> float | None:
    """Return the mean of the values that there are: failed cases have no peak."""
    values = [value for run in shown if (value := figure(run, key)) is not None]
    return statistics.fmean(values) if values else None


def _status(run: dict) -> str:
    if run["status"] == "ok":
        return "ok"
    after = f" after {run['seconds']:.2f} s" if run["penalty"] else ""
    return f"**{run['status']}**{after}: {run['reason']}"


def markdown_page(results: Mapping[str, Sequence[dict]], environment: dict) -> str:
    """Return the page `efficiency.md`.

    Args:
        results: every case's runs.
        environment: the content of `environment.json`.
    """
    runs = [run for case in results.values() for run in case]
    machine = f"{environment['cpu']}, {environment['cores']} cores, {environment['memory_gb']} GB"
    interval, tolerances = environment["interval_s"], environment["tolerances"]
    missed = sum(run["sampler"]["missed_ticks"] for run in runs)
    ticks = missed + sum(run["sampler"]["samples"] for run in runs)
    seconds = sum(run["seconds"] for run in runs)
    share = 100 * sum(run["sampler"]["cpu_seconds"] for run in runs) / seconds if seconds else 0.0
    notes = [f"Command: `{environment['command']}`"]
    if environment["image"]:
        digest = environment["image_digest"]
        notes.append(f"Image: {environment['image']} ({digest}), Docker {environment['docker']}")
    notes += [f"Machine: {machine}", f"GPU: {_gpu(environment)}"]
    notes.append(
        "Running time is the wall clock from the start to the end of the container or command."
    )
    if environment["idle_gpu_mb"] is not None:
        notes.append(
            "GPU memory is the whole device's total − free, as the challenge reads it; the total "
            f"is the sum of the samples × {interval:g} s, as the challenge computes it, and the "
            "true area the trapezoid over the samples' own times. Nothing is subtracted from "
            "either."
        )
    notes += [
        "CPU is in percent of the whole machine. CPU and RAM are those of the container or command "
        "alone, where the challenge reads the whole machine's.",
        *ram_notes(runs),
        f"With tolerances: time − {tolerances['seconds']:g} s, memory − {tolerances['mb']:g} MB, "
        "never below 0; failed cases have none.",
        f"Sampling took {share:.2f} % of one core and missed {missed} of {ticks} ticks.",
        *_repeat_notes(results, environment),
    ]
    if interval != OFFICIAL_INTERVAL:
        notes.append(
            f"The samples are {interval:g} s apart, the challenge's 0.1 s: the totals are areas "
            "all the same, but not to the digit what the challenge would have found."
        )
    if any(run["penalty"] for run in runs):
        notes.append(PENALTY_SENTENCE)
    notes += [
        f"**Not measured**: {cell(name)}: {cell(reason)}"
        for name, reason in environment.get("not_measured", {}).items()
    ]
    title = f"# Efficiency of {cell(environment['team'])}"
    return f"{title}\n\n{efficiency_table(results)}\n\n{bullets([*notes, _PAPER])}\n"


def _gpu(environment: dict) -> str:
    if environment["gpu_note"]:
        return f"{environment['gpu'] or 'none'}: {environment['gpu_note']}"
    return (
        f"{environment['gpu']}, driver {environment['driver']}, "
        f"{environment['idle_gpu_mb']:,.0f} MB taken before the first case"
    )


def ram_notes(runs: Iterable[dict]) -> list[str]:
    """Return what RAM is in these runs, a sentence for each way in which it was read."""
    measures = ram_measures(runs)
    notes = [f"RAM ({measure}) is {RAM_MEASURES[measure]}." for measure in measures]
    if len(measures) > 1:
        notes.append("**RAM was not read in the same way in every run: do not compare it.**")
    return notes


def _repeat_notes(results: Mapping[str, Sequence[dict]], environment: dict) -> list[str]:
    """Return which of several runs are shown, and which may have started cold."""
    notes = []
    counts = {len(runs) for runs in results.values() if runs}
    if counts - {1}:
        times = " or ".join(map(str, sorted(counts)))
        notes.append(
            f"Each case ran {times} times; the run of median time is shown whole, the least and "
            "most time of all beside it."
        )
    first = [cell(run["case"]) for runs in results.values() for run in runs if run.get("first")]
    if environment.get("warm_up"):
        notes.append(
            "A first run was discarded (--warm-up): no run shown had to read the image and its "
            "libraries from the disk, which a first start of the day has to."
        )
    elif first:
        notes.append(
            f"There was no warm-up: a run of {', '.join(dict.fromkeys(first))} was the first here, "
            "and may have read from the disk what later runs found in memory, in time and RAM "
            "(--warm-up discards such a run)."
        )
    return notes

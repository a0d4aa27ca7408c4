"""The result of one run of a case, and what of it counts: one rule for every table, plot and page.

A result is the content of an `efficiency/CASE.json`, or a row of the organisers' table in the same
words. Of several runs of a case the run of median time counts, whole; least and most time stand
beside it. A run that failed counts an hour (FLARE 2022), so that a case counts as failed where most
of its runs failed. Of an even number of runs, which `efficiency` refuses and older reports may
have, it is the faster of the two in the middle. A case whose GPU stopped answering is not measured:
it counts nothing until it is measured again.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmark.containers.machine import INTERVAL
from benchmark.containers.sampler import Samples
from benchmark.files import csv_text
from benchmark.text import by

Result = dict[str, Any]
"""Of one run, as in its JSON file."""

NOT_MEASURED = "not measured"
"""The status of a run during which the GPU stopped answering."""

PENALTY = {"seconds": 3600.0, "auc_gpu_mb_s": 29_491_200.0, "auc_cpu_percent_s": 360_000.0}
"""What a failed case counts (FLARE 2022): an hour of 8192 MB and of every core busy."""

PENALTY_SENTENCE = (
    "Failed cases count 3600 s, a GPU area of 29,491,200 MB·s where there is a GPU, a CPU area of "
    "360,000 %·s, DSC 0 and NSD 0 (FLARE 2022 rules), in means as well; no rule gives them a peak."
)

_PENALISED = (
    dict.fromkeys(("seconds", "seconds_tolerated"), "seconds")
    | {f"auc_{rule}_mb_s": "auc_gpu_mb_s" for rule in ("flare", "true", "flare_tolerated")}
    | {"auc_cpu_percent_s": "auc_cpu_percent_s"}
)
"""Of each figure of a result, the penalty that stands for it where the run failed."""


class Figure(NamedTuple):
    """A column of the organisers' table: its key in a result, its title, and its rounding."""

    key: str
    title: str
    digits: int | None = None

    @property
    def penalty(self) -> float | None:
        """What a failed case counts in it; None where there is no rule."""
        return PENALTY.get(_PENALISED.get(self.key, ""))


FIGURES = {
    "Time": Figure("seconds", "time (s)", 2),
    "MaxGPU_Mem": Figure("peak_gpu_mb", "max GPU memory (MB)", 0),
    "AUC_GPU_Time": Figure("auc_flare_mb_s", "GPU area (MB·s)"),
    "MaxCPU_Utilization": Figure("max_cpu_percent", "max CPU (%)"),
    "AUC_CPU_Time": Figure("auc_cpu_percent_s", "CPU area (%·s)"),
    "MaxRAM": Figure("max_ram_mb", "max RAM (MB)", 2),
    "AUC_RAM_Time": Figure("auc_ram_mb_s", "RAM area (MB·s)"),
}
"""The columns of `TEAM_Efficiency.csv` after `Name`."""

EFFICIENCY_SUFFIX = "_Efficiency.csv"
"""After the team's name: the organisers' table."""


class Tolerances(NamedTuple):
    """Seconds, and MB of GPU memory, that cost nothing."""

    seconds: float
    mb: float


TOLERANCES = {"flare23": Tolerances(15.0, 4096.0), "flare22": Tolerances(0.0, 2048.0)}
"""Of each year's ranking."""

RAM_MEASURES = {
    "cgroup": "the container's cgroup: its own memory, its shared memory and the files it has "
    "mapped, without the pages that an earlier container had mapped and that are still charged to "
    "that one",
    "process tree": "the sum of the RSS of the command's processes and what /dev/shm grew by: "
    "pages that they share are counted once for each, and pages in the page cache count as soon as "
    "they are mapped",
}
"""What "RAM" is, by where it was read; the two are not to be compared."""


def flare_area(
    samples: Sequence[float], tolerance: float = 0.0, interval: float = INTERVAL
) -> float:
    """Return the area under a curve by the organisers' rule, MB·s: round(sum(samples) * interval).

    Nothing is subtracted but the tolerance, no time stamp is used, and each sample stands for one
    interval. With a tolerance each sample counts as max(0, sample − tolerance).
    """
    return float(np.round(np.maximum(np.asarray(samples) - tolerance, 0).sum() * interval))


def true_area(times: Sequence[float], samples: Sequence[float], tolerance: float = 0.0) -> float:
    """Return the area under a curve, MB·s, by the trapezoidal rule over the samples' times, s."""
    return float(np.trapezoid(np.maximum(np.asarray(samples) - tolerance, 0), times))


def peaks_and_areas(samples: Samples, seconds: float, tolerances: Tolerances) -> Result:
    """Return the figures of a run's samples, with and without tolerances; None if not read."""
    times, gpu, ram, cpu = samples.time_s, samples.gpu_used_mb, samples.ram_mb, samples.cpu_percent
    seen = any(ram)  # a run that ended before its first reading has used something, not 0
    return {
        "interval_s": INTERVAL,
        "peak_gpu_mb": max(gpu) if gpu else None,
        "auc_flare_mb_s": flare_area(gpu) if gpu else None,
        "auc_true_mb_s": true_area(times, gpu) if gpu else None,
        "auc_flare_tolerated_mb_s": flare_area(gpu, tolerances.mb) if gpu else None,
        "seconds_tolerated": max(0.0, seconds - tolerances.seconds),
        "tolerances": tolerances._asdict(),
        "max_cpu_percent": max(cpu) if seen else None,
        "auc_cpu_percent_s": round(sum(cpu) * INTERVAL, 2) if seen else None,
        "max_ram_mb": max(ram) if seen else None,
        "auc_ram_mb_s": flare_area(ram) if seen else None,
    }


def figure(result: Result, key: str) -> float | None:
    """Return a figure of one run, such as "max_ram_mb", as it counts in tables.

    Of a failed run it is the penalty, or None where there is none. None also where it was not
    measured; without a GPU there is no penalty for its memory either.
    """
    if result.get("status") == NOT_MEASURED:
        return None
    if not result["penalty"]:
        return result.get(key)
    penalty = _PENALISED.get(key, "")
    if penalty == "auc_gpu_mb_s" and result.get("peak_gpu_mb") is None:
        return None
    return PENALTY.get(penalty)


def median_run(runs: Sequence[Result]) -> Result:
    """Return the run that counts among a case's runs (this module's head says which)."""
    for run in runs:
        if run.get("status") == NOT_MEASURED:
            return run
    ranked = sorted(runs, key=lambda run: figure(run, "seconds") or 0.0)
    return ranked[(len(ranked) - 1) // 2]


def least_and_most(runs: Sequence[Result]) -> tuple[float, float] | None:
    """Return the range of the time over the runs that have one; None where none has."""
    values = [value for run in runs if (value := figure(run, "seconds")) is not None]
    return (min(values), max(values)) if values else None


def ram_measures(runs: Iterable[Result]) -> list[str]:
    """Return where RAM was read in some runs: keys of `RAM_MEASURES`."""
    sources = {(run.get("sampler") or {}).get("source") or "" for run in runs} - {""}
    return sorted({"cgroup" if source.startswith("cgroup") else source for source in sources})


def efficiency_csv(results: Mapping[str, Sequence[Result]]) -> str:
    """Return the organisers' `TEAM_Efficiency.csv`, rounded as they round; empty if not measured.

    Cases without any run have no row.
    """
    rows = []
    for result in (median_run(runs) for runs in results.values() if runs):
        row = [result["file"]]
        for key, _, digits in FIGURES.values():
            value = figure(result, key)
            row.append(value if value is None or digits is None else round(value, digits))
        rows.append(row)
    return csv_text(["Name", *FIGURES], rows)


def progress_line(name: str, result: Result) -> str:
    """Return what a terminal shows of a run: size, time, memory, and how it ended."""
    parts = [f"{name} ({by(result['image_size'])}): {result['seconds']:.2f} s"]
    if result["peak_gpu_mb"] is not None:
        peak, area = result["peak_gpu_mb"], result["auc_flare_mb_s"]
        parts.append(f"GPU {peak:,.0f} MB, {area:,.0f} MB·s")
    if result["max_ram_mb"] is not None:
        parts.append(f"RAM {result['max_ram_mb']:,.0f} MB")
    parts.append(result["status"] + (f" ({result['reason']})" if result["reason"] else ""))
    return ", ".join(parts)

"""Of a case's several runs the one that counts, by one rule for every table, plot and page.

It is the run of median time among an odd number of runs; least and most stand beside it. A run that
failed counts an hour (FLARE 2022), so that a case counts as failed where most of its runs failed.
Of an even number, which `efficiency` refuses and older reports may hold, it is the faster of the
two in the middle, and the tables say so.
"""

from collections.abc import Sequence

PENALTY = {"seconds": 3600.0, "auc_gpu_mb_s": 29_491_200.0, "auc_cpu_percent_s": 360_000.0}
"""What a failed case counts as (FLARE 2022): an hour of 8192 MB and of every core busy."""

PENALTY_SENTENCE = (
    "Failed cases count 3600 s, a GPU area of 29,491,200 MB·s where there is a GPU, a CPU area of "
    "360,000 %·s, DSC 0 and NSD 0 (FLARE 2022 rules), in means as well; no rule gives them a peak."
)

_PENALISED = {
    "seconds": "seconds",
    "seconds_tolerated": "seconds",
    "auc_flare_mb_s": "auc_gpu_mb_s",
    "auc_true_mb_s": "auc_gpu_mb_s",
    "auc_flare_tolerated_mb_s": "auc_gpu_mb_s",
    "auc_true_tolerated_mb_s": "auc_gpu_mb_s",
    "auc_cpu_percent_s": "auc_cpu_percent_s",
}
"""Of each figure of a result, the penalty that stands for it where the run failed."""

RAM_MEASURES = {
    "cgroup": "the container's cgroup: its own memory and the files it has mapped, without the "
    "pages that an earlier container had mapped and that are still charged to that one",
    "process tree": "the sum of the RSS of the command's processes: pages that they share are "
    "counted once for each, and pages in the page cache count as soon as they are mapped",
}
"""What "RAM" is, by where it was read; the two are not to be set against each other."""


def figure(run: dict, name: str) -> float | None:
    """A figure of one run as it counts in tables.

    Args:
        run: the content of an `efficiency/CASE.json`.
        name: a key of it, such as "seconds" or "max_ram_mb".

    Returns:
        The figure; of a failed run the penalty, or None where there is none. None also where it
        was not measured; without a device there is no penalty for its memory either.
    """
    if not run["penalty"]:
        return run.get(name)
    if name not in _PENALISED or (name.endswith("mb_s") and run.get("peak_gpu_mb") is None):
        return None
    return PENALTY[_PENALISED[name]]


def median_run(runs: Sequence[dict]) -> dict:
    """The run that counts among a case's runs (this module's head says which)."""
    ranked = sorted(runs, key=lambda run: figure(run, "seconds"))
    return ranked[(len(ranked) - 1) // 2]


def least_and_most(runs: Sequence[dict], name: str = "seconds") -> tuple[float, float] | None:
    """The range of a figure over the runs that have it; None where none has."""
    values = [value for run in runs if (value := figure(run, name)) is not None]
    return (min(values), max(values)) if values else None


def ram_measure(run: dict) -> str | None:
    """Where a run's RAM was read: a key of `RAM_MEASURES`, or None if nowhere."""
    source = (run.get("sampler") or {}).get("source")
    return None if source is None else "cgroup" if source.startswith("cgroup") else source

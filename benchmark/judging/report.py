"""One self-contained HTML page about one run or several: it needs no network and no server.

It holds a summary, the memory, RAM and CPU curves of every case on one axis, the scores of every
structure, a sortable table of cases, and the machines. The page is `report.html` beside this file
with the data put in; its script draws everything in the reader's browser.
"""

import argparse
import html
import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median

import numpy as np

from benchmark.checking.pages import html_section
from benchmark.judging.runs import Run, RunError, read_runs
from benchmark.scoring.protocol import COLUMNS
from inference.files import write_atomically
from inference.labels import LABEL_NAMES

TEMPLATE = Path(__file__).with_name("report.html")

CURVE_BUCKETS = 250
"""Longer curves keep the least and the greatest sample of so many stretches of time."""

SCORES = {"dsc": "dsc", "nsd": "nsd", "tumorDsc": "tumor-dsc", "tumorNsd": "tumor-nsd"}
"""The page's name of each score, and that of `Run.score`."""

FIGURES = {
    "time": "Time",
    "maxGpu": "MaxGPU_Mem",
    "gpuArea": "AUC_GPU_Time",
    "maxCpu": "MaxCPU_Utilization",
    "cpuArea": "AUC_CPU_Time",
    "maxRam": "MaxRAM",
}
"""The page's name of each efficiency figure, and the official column."""

ENVIRONMENT = {
    "gpu": "GPU",
    "gpu_note": "GPU not measured",
    "driver": "Driver",
    "cpu": "CPU",
    "cores": "Cores",
    "memory_gb": "Memory (GB)",
    "system": "System",
    "image": "Image",
    "image_digest": "Image digest",
    "docker": "Docker",
    "command": "Command",
    "date": "Date",
}
"""The entries of `environment.json` that the page shows, `versions` after them."""


def thin(times: list[float], values: list[float]) -> list[list[float]]:
    """Shorten a curve for drawing; its ends, peaks and dips stay.

    Args:
        times: seconds, ascending.
        values: one for each.

    Returns:
        The times and the values kept.
    """
    buckets = np.array_split(np.arange(len(times)), min(CURVE_BUCKETS, len(times)))
    if len(times) > 2 * CURVE_BUCKETS:
        series = np.asarray(values)
        kept = {0, len(times) - 1}
        for bucket in buckets:
            kept |= {int(bucket[series[bucket].argmin()]), int(bucket[series[bucket].argmax()])}
        chosen = sorted(kept)
    else:
        chosen = range(len(times))
    return [[round(times[i], 2) for i in chosen], [round(values[i], 1) for i in chosen]]


def case_row(run: Run, index: int, case: str) -> dict:
    """One row of the page's table of cases."""
    row = {"team": index, "case": case, "size": None, "voxels": None, "status": None}
    row |= {"reason": None, "trueArea": None, "toleratedArea": None}
    row |= {name: run.measured(case, column) for name, column in FIGURES.items()}
    for name, metric in SCORES.items():
        score = run.score(case, metric)
        row[name] = None if score is None else 100 * score
    if case in run.efficiency:
        row["status"] = "failed" if run.failed(case) else "ok"
    if measurements := run.measurements.get(case):
        shown = representative(measurements)
        row |= {"status": shown["status"], "reason": shown["reason"]}
        row["size"] = "×".join(map(str, shown["image_size"]))
        row["voxels"] = int(np.prod(shown["image_size"]))
        if not run.failed(case):
            for name, key in (
                ("trueArea", "auc_true_mb_s"),
                ("toleratedArea", "auc_flare_tolerated_mb_s"),
            ):
                areas = [one[key] for one in run.completed(case) if one[key] is not None]
                row[name] = median(areas) if areas else None
    return row


def representative(measurements: list[dict]) -> dict:
    """Of a case's repeats the one of median time, of an even number the faster middle."""
    return sorted(measurements, key=lambda one: one["seconds"])[(len(measurements) - 1) // 2]


def summary(rows: list[dict]) -> dict:
    """One team's line of the summary, from its rows; None where nothing was measured."""

    def over(key: str, reduce: object) -> float | None:
        values = [row[key] for row in rows if row[key] is not None]
        return reduce(values) if values else None

    return {
        "cases": len(rows),
        "ok": sum(row["status"] in (None, "ok") for row in rows),
        **{name: over(name, median) for name in ("time", "gpuArea")},
        **{name: over(name, max) for name in ("maxGpu", "maxRam")},
        **{name: over(name, mean) for name in SCORES},
    }


def environment_rows(environment: dict) -> list[list[str]]:
    """The page's lines about a machine."""
    rows = [
        [title, str(environment[key])]
        for key, title in ENVIRONMENT.items()
        if environment.get(key) is not None
    ]
    if versions := environment.get("versions"):
        rows.append(["Versions", ", ".join(f"{name} {what}" for name, what in versions.items())])
    return rows


def page_data(runs: list[Run]) -> dict:
    """Everything that the page shows."""
    rows = [[case_row(run, index, case) for case in run.cases] for index, run in enumerate(runs)]
    curves, tolerances = [], set()
    for index, run in enumerate(runs):
        for case, measurements in sorted(run.measurements.items()):
            shown = representative(measurements)
            samples = shown["samples"]
            series = {"gpu": "gpu_used_mb", "ram": "ram_mb", "cpu": "cpu_percent"}
            curve = {"team": index, "case": case, "phases": shown["phases"]}
            for name, key in series.items():
                curve[name] = thin(samples["time_s"], samples[key]) if samples[key] else None
            curves.append(curve)
            tolerances.add(shown.get("tolerances", {}).get("mb"))
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "teams": [
            {
                "name": run.team,
                "summary": summary(team_rows),
                "environment": environment_rows(run.environment),
            }
            for run, team_rows in zip(runs, rows, strict=True)
        ],
        "rows": [row for team_rows in rows for row in team_rows],
        "curves": curves,
        "tolerance_mb": tolerances.pop() if len(tolerances) == 1 else None,
        "structures": [name.capitalize() for name in LABEL_NAMES[1:]],
        "scores": [
            {
                "team": index,
                "case": case,
                **{
                    kind: [scores.get(f"{column}_{kind.upper()}") for column in COLUMNS]
                    for kind in ("dsc", "nsd")
                },
            }
            for index, run in enumerate(runs)
            for case, scores in run.accuracy.items()
        ],
    }


def render(runs: list[Run], title: str) -> str:
    """The whole page.

    Args:
        runs: at least one.
        title: its heading; names and titles are escaped.
    """
    # A "<" inside a script element could end it, whatever is around it.
    data = json.dumps(page_data(runs), separators=(",", ":")).replace("<", "\\u003c")
    checks = "".join(html_section(run.folder, run.team) for run in runs)
    parts = {"title": html.escape(title), "data": data, "checks": checks}
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(title|data|checks)\}\}", lambda place: parts[place[1]], template)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmark report`."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="report folder: TEAM_Efficiency.csv, accuracy_per_case.csv or both",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the page to write"
    )
    parser.add_argument("--title", default="Segmentation benchmark", help="the page's heading")


def run(arguments: argparse.Namespace) -> int:
    """Write the page.

    Returns:
        0 done; 2 a folder is no run.
    """
    try:
        page = render(read_runs(arguments.runs), arguments.title)
    except RunError as error:
        print(f"benchmark report: {error}", file=sys.stderr)
        return 2
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.output, page.encode())
    print(f"{arguments.output}: {len(page) / 1e6:.1f} MB, opens in any browser, no network needed")
    return 0

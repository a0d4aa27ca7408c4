"""One self-contained HTML page about one run or several: it needs no network and no server.

It holds a summary, the memory, RAM and CPU curves of every case on one axis, the scores of every
structure, a sortable table of cases, and the machines. The page is `report.html` beside this file
with the data put in; its script draws everything in the reader's browser, and of large reports only
what is asked for.
"""

import argparse
import html
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median

import numpy as np

from benchmark.checking.pages import html_section
from benchmark.containers.results import (
    PENALTY_SENTENCE,
    RAM_MEASURES,
    figure,
    least_and_most,
)
from benchmark.judging.runs import FEW_CASES, Run, read_runs
from benchmark.scoring.protocol import COLUMNS
from benchmark.text import by, show
from inference.files import write_atomically
from inference.labels import LABEL_NAMES, TUMOR

TEMPLATE = Path(__file__).with_name("report.html")

CURVE_BUCKETS = 250
"""Longer curves keep the least and the greatest sample of so many stretches of time."""

SCORES = {"dsc": "dsc", "nsd": "nsd", "tumorDsc": "tumor-dsc", "tumorNsd": "tumor-nsd"}
"""The page's name of each score, and that of `Run.score`."""

EFFICIENCY = {
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
        The times and the values that stay.
    """
    chosen = range(len(times))
    if len(times) > 2 * CURVE_BUCKETS:
        series, ends = np.asarray(values), {0, len(times) - 1}
        for bucket in np.array_split(np.arange(len(times)), CURVE_BUCKETS):
            ends |= {int(bucket[series[bucket].argmin()]), int(bucket[series[bucket].argmax()])}
        chosen = sorted(ends)
    return [[round(times[i], 2) for i in chosen], [round(values[i], 1) for i in chosen]]


def curves_of(run: Run) -> list[dict]:
    """Return the curves of a run's cases: `case`, `phases`, and of gpu, ram and cpu the curve."""
    curves = []
    for case in sorted(run.results):
        shown = run.shown(case)
        if samples := shown.get("samples"):
            curve = {"case": case, "phases": shown["phases"]}
            for name, key in (("gpu", "gpu_used_mb"), ("ram", "ram_mb"), ("cpu", "cpu_percent")):
                curve[name] = thin(samples["time_s"], samples[key]) if samples[key] else None
            curves.append(curve)
    return curves


def case_row(run: Run, index: int, case: str) -> dict:
    """Return one row of the page's table of cases."""
    shown = run.shown(case) or {}
    row = {"team": index, "case": case, "size": None, "voxels": None, "timeRange": None}
    row |= {"status": shown.get("status"), "reason": shown.get("reason")}
    row |= {name: run.measured(case, column) for name, column in EFFICIENCY.items()}
    for name, metric in SCORES.items():
        score = run.score(case, metric)
        row[name] = None if score is None else 100 * score
    for name, key in (("trueArea", "auc_true_mb_s"), ("toleratedArea", "auc_flare_tolerated_mb_s")):
        row[name] = figure(shown, key) if shown else None
    if size := shown.get("image_size"):
        row |= {"size": by(size), "voxels": int(np.prod(size))}
    if len(runs := run.results.get(case, ())) > 1:
        row["timeRange"] = least_and_most(runs)
    return row


def summary(run: Run, rows: list[dict]) -> dict:
    """Return one team's line of the summary, from its rows; None where nothing was measured."""

    def over(key: str, reduce: object) -> float | None:
        values = [row[key] for row in rows if row[key] is not None]
        return reduce(values) if values else None

    return {
        "cases": len(rows),
        "ok": sum(row["status"] in (None, "ok") for row in rows),
        **{name: over(name, median) for name in ("time", "gpuArea")},
        **{name: over(name, max) for name in ("maxGpu", "maxRam")},
        **{name: over(name, mean) for name in SCORES},
        "scored": sum(row["dsc"] is not None for row in rows),
        "tumors": run.with_structure(TUMOR),
    }


def notes(runs: list[Run]) -> list[str]:
    """Return what a reader must know of these runs' figures."""
    found = []
    for run in runs:
        skipped = dict.fromkeys(run.unmeasured, "the GPU was not read")
        skipped |= run.environment.get("not_measured", {})
        if skipped:
            each = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
            found.append(f"Caution: not measured of {run.team}: {each}.")
    failures = [f"{run.team} {n}" for run in runs if (n := sum(map(run.failed, run.cases)))]
    if failures:
        found.append(f"Cases failed: {', '.join(failures)}. {PENALTY_SENTENCE}")
    measures = {measure for run in runs for measure in run.ram_measures}
    for measure in sorted(measures):
        teams = ", ".join(run.team for run in runs if measure in run.ram_measures)
        found.append(f"RAM of {teams} ({measure}) is {RAM_MEASURES[measure]}.")
    if len(measures) > 1:
        found.append("Caution: RAM was not read in the same way of all. Do not compare it.")
    if any(len(of_case) > 1 for run in runs for of_case in run.results.values()):
        found.append(
            "Of several runs of a case the one of median time is shown, in tables and curves."
        )
    if len({bool(run.environment.get("warm_up")) for run in runs if run.environment}) > 1:
        warm = ", ".join(run.team for run in runs if run.environment.get("warm_up"))
        found.append(f"Caution: only {warm} had a warm-up run before it was timed.")
    if partial := [run.team for run in runs if run.partial]:
        found.append(
            f"Scores of {', '.join(partial)} are of annotated labels only: not the official rule."
        )
    cases = {case for run in runs for case in run.cases}
    if len(runs) > 1 and len(cases) < FEW_CASES:
        found.append(f"Caution: {len(cases)} cases are few to tell teams apart by.")
    return found


def environment_rows(environment: dict) -> list[list[str]]:
    """Return the page's lines about a machine."""
    rows = [
        [title, str(environment[key])]
        for key, title in ENVIRONMENT.items()
        if environment.get(key) is not None
    ]
    if versions := environment.get("versions"):
        rows.append(["Versions", ", ".join(f"{name} {what}" for name, what in versions.items())])
    return rows


def page_data(runs: list[Run], challenge: dict | None = None) -> dict:
    """Return everything that the page shows but the curves; see `render`."""
    rows = [[case_row(run, index, case) for case in run.cases] for index, run in enumerate(runs)]
    shown = [run.shown(case) for run in runs for case in run.results]
    tolerances = {result.get("tolerances", {}).get("mb") for result in shown if "samples" in result}
    series = {key for result in shown for key, v in (result.get("samples") or {}).items() if v}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "teams": [
            {
                "name": run.team,
                "summary": summary(run, team_rows),
                "present": [run.with_structure(label) for label in range(1, len(LABEL_NAMES))],
                "environment": environment_rows(run.environment),
                "curves": [case for case in run.results if "samples" in run.shown(case)],
            }
            for run, team_rows in zip(runs, rows, strict=True)
        ],
        "notes": notes(runs),
        "rows": [row for team_rows in rows for row in team_rows],
        "challenge": challenge,
        "metrics": [
            name
            for name, key in (("gpu", "gpu_used_mb"), ("ram", "ram_mb"), ("cpu", "cpu_percent"))
            if key in series
        ],
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
            for case, scores in run.scores.items()
        ],
    }


def _script(name: str, content: object) -> str:
    # A "<" inside a script element could end it, whatever is around it.
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def render(runs: list[Run], title: str, challenge: dict | None = None) -> str:
    """Return the whole page.

    Args:
        runs: at least one.
        title: its heading; names and titles are escaped.
        challenge: what became of every team, and the ranking: `notes` (list of text), `ranking`
            and `teams` (each `columns`, titles, and `rows`, lists of text).
    """
    scripts = [_script("data", page_data(runs, challenge))]
    # The curves of a team are in an element of their own, which is read when they are asked for.
    scripts += [_script(f"curves-{index}", curves_of(run)) for index, run in enumerate(runs)]
    checks = "".join(html_section(run.folder, run.team) for run in runs)
    parts = {"title": html.escape(title), "data": "\n".join(scripts), "checks": checks}
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(title|data|checks)\}\}", lambda place: parts[place[1]], template)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmark report`."""
    add = parser.add_argument
    text = "report folder: TEAM_Efficiency.csv, accuracy_per_case.csv or both"
    add("runs", nargs="+", type=Path, metavar="RUN", help=text)
    add("--output", type=Path, required=True, metavar="FILE", help="the page to write")
    add("--title", default="Segmentation benchmark", help="the page's heading")


def run(arguments: argparse.Namespace) -> int:
    """Write the page; 0 done."""
    page = render(read_runs(arguments.runs), arguments.title)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.output, page.encode())
    show(f"{arguments.output}: {len(page) / 1e6:.1f} MB, opens in any browser, no network needed")
    return 0

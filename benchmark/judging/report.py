"""Write one HTML page about one run or several, which needs no network and no server.

It has a summary, the memory, RAM and CPU curves of every case on one axis, the scores of every
structure, a sortable table of cases, and the machines. The page is `report.html` beside this file
with the data inserted; its script plots everything in the reader's browser, and of large reports
only what is asked for.
"""

import argparse
import html
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.checking.pages import CHECK_JSON
from benchmark.containers.results import RAM_MEASURES, figure, least_and_most
from benchmark.files import read_json
from benchmark.judging.runs import FEW_CASES, Run, read_runs, remarks
from benchmark.scoring.protocol import COLUMNS
from benchmark.text import by, show
from inference.files import write_atomically
from inference.labels import LABEL_NAMES, TUMOR

TEMPLATE = Path(__file__).with_name("report.html")
CURVE_BUCKETS = 250
"""Longer curves keep the least and the greatest sample of so many stretches of time."""

_SERIES = {"gpu": "gpu_used_mb", "ram": "ram_mb", "cpu": "cpu_percent"}
_SCORES = {"dsc": "dsc", "nsd": "nsd", "tumorDsc": "tumor-dsc", "tumorNsd": "tumor-nsd"}

_FIGURES = {
    "time": "seconds",
    "maxGpu": "peak_gpu_mb",
    "gpuArea": "auc_flare_mb_s",
    "trueArea": "auc_true_mb_s",
    "toleratedArea": "auc_flare_tolerated_mb_s",
    "maxCpu": "max_cpu_percent",
    "cpuArea": "auc_cpu_percent_s",
    "maxRam": "max_ram_mb",
}
"""The page's name of each efficiency figure, and the result's."""


def thin(times: list[float], values: list[float]) -> list[list[float]]:
    """Return the times, s, and values of a curve that stay for plotting: ends, peaks and dips."""
    x, y = np.asarray(times), np.asarray(values)
    if len(x) > 2 * CURVE_BUCKETS:
        chosen = {0, len(x) - 1}
        for bucket in np.array_split(np.arange(len(x)), CURVE_BUCKETS):
            chosen |= {int(bucket[y[bucket].argmin()]), int(bucket[y[bucket].argmax()])}
        x, y = x[sorted(chosen)], y[sorted(chosen)]
    return [x.round(2).tolist(), (y.round(1) if y.max() < 1000 else y.astype(int)).tolist()]


def curves_of(run: Run) -> list[dict[str, Any]]:
    """Return the curves of a run's cases: `case`, `phases`, and of gpu, ram and cpu the curve."""
    curves = []
    for case in _cases_with_curves(run):
        samples = run.shown[case]["samples"]
        curve = {"case": case, "phases": run.shown[case]["phases"]}
        for name, key in _SERIES.items():
            curve[name] = thin(samples["time_s"], samples[key]) if samples[key] else None
        curves.append(curve)
    return curves


def _cases_with_curves(run: Run) -> list[str]:
    return sorted(case for case, shown in run.shown.items() if "samples" in shown)


def case_row(run: Run, index: int, case: str) -> dict[str, Any]:
    """Return one row of the page's table of cases."""
    shown, runs = run.shown.get(case, {}), run.results.get(case, ())
    size = shown.get("image_size")
    scores = {name: run.score(case, metric) for name, metric in _SCORES.items()}
    return {
        "team": index,
        "case": case,
        "size": by(size) if size else None,
        "voxels": int(np.prod(size)) if size else None,
        "status": shown.get("status"),
        "reason": shown.get("reason"),
        "timeRange": least_and_most(runs) if len(runs) > 1 else None,
        **{name: figure(shown, key) if shown else None for name, key in _FIGURES.items()},
        **{name: None if score is None else 100 * score for name, score in scores.items()},
    }


def notes(runs: list[Run]) -> list[str]:
    """Return what a reader must know of these runs' figures."""
    found = remarks(runs)
    for measure in sorted({measure for run in runs for measure in run.ram_measures}):
        teams = ", ".join(run.team for run in runs if measure in run.ram_measures)
        found.append(f"RAM of {teams} ({measure}) is {RAM_MEASURES[measure]}.")
    if any(len(repeats) > 1 for run in runs for repeats in run.results.values()):
        found.append("Of several runs of a case the one of median time is shown.")
    cases = {case for run in runs for case in run.cases}
    if len(runs) > 1 and len(cases) < FEW_CASES:
        found.append(f"Caution: {len(cases)} cases are few to rank teams by.")
    return found


def _environment_rows(environment: dict[str, Any]) -> list[list[str]]:
    plain = {k: v for k, v in environment.items() if isinstance(v, str | int | float)}
    versions = [f"{name} {version}" for name, version in environment.get("versions", {}).items()]
    plain |= {"versions": ", ".join(versions)} if versions else {}
    return [[key.replace("_", " "), str(value)] for key, value in plain.items()]


def page_data(runs: list[Run], challenge: dict | None = None) -> dict[str, Any]:
    """Return everything that the page shows but the curves; see `render`."""
    shown = [result for run in runs for result in run.shown.values()]
    tolerances = {result.get("tolerances", {}).get("mb") for result in shown if "samples" in result}
    read = {key for result in shown for key, values in result.get("samples", {}).items() if values}
    kinds = ("dsc", "nsd")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "teams": [
            {
                "name": run.team,
                "tumors": run.with_structure(TUMOR),
                "present": [run.with_structure(label) for label in range(1, len(LABEL_NAMES))],
                "environment": _environment_rows(run.environment),
                "curves": _cases_with_curves(run),
                "check": (read_json(run.folder / CHECK_JSON) or {}).get("findings"),
            }
            for run in runs
        ],
        "notes": notes(runs),
        "rows": [case_row(run, i, case) for i, run in enumerate(runs) for case in run.cases],
        "challenge": challenge,
        "metrics": [name for name, key in _SERIES.items() if key in read],
        "tolerance_mb": tolerances.pop() if len(tolerances) == 1 else None,
        "structures": [name.capitalize() for name in LABEL_NAMES[1:]],
        "scores": [
            {"team": i, "case": case}
            | {kind: [row.get(f"{name}_{kind.upper()}") for name in COLUMNS] for kind in kinds}
            for i, run in enumerate(runs)
            for case, row in run.scores.items()
        ],
    }


def render(runs: list[Run], title: str, challenge: dict | None = None) -> str:
    """Return the whole page; names and titles are escaped.

    `challenge` has the state of every team, and the ranking: `notes` (list of text), `ranking` and
    `fates` (each `columns`, titles, and `rows`, lists of text).
    """
    scripts: dict[str, Any] = {"data": page_data(runs, challenge)}
    # The curves of a team are in an element of their own, which is read when they are asked for.
    scripts |= {f"curves-{index}": curves_of(run) for index, run in enumerate(runs)}
    elements = []
    for name, content in scripts.items():
        # A "<" inside a script element could end it, whatever is around it.
        text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
        elements.append(f'<script type="application/json" id="{name}">{text}</script>')
    head, _, tail = TEMPLATE.read_text(encoding="utf-8").partition("{{data}}")
    return head.replace("{{title}}", html.escape(title)) + "\n".join(elements) + tail


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmark report`."""
    add = parser.add_argument
    text = "report folder: TEAM_Efficiency.csv, accuracy_per_case.csv or both"
    add("runs", nargs="+", type=Path, metavar="RUN", help=text)
    add("--output", type=Path, required=True, metavar="FILE", help="the page to write")


def run(arguments: argparse.Namespace) -> int:
    """Write the page; 0 done."""
    page = render(read_runs(arguments.runs), "Segmentation benchmark")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.output, page)
    show(f"{arguments.output}: {len(page) / 1e6:.1f} MB, opens in any browser, no network needed")
    return 0

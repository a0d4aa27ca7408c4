"""A check as a list in the terminal, as `check.md`, and as a section of the report page."""

import html
import json
from collections import Counter
from pathlib import Path

from benchmark.checking.findings import FAILED, PASSED, WARNED
from benchmark.containers.tables import by
from benchmark.markdown import cell
from inference.files import printable

CHECK_JSON = "check.json"

_RUN_COLUMNS = ("Volume", "Way", "Size", "Seconds", "RAM (MB)", "GPU (MB)", "Ended", "Label map")


def headline(check: dict) -> str:
    """How many of each, worst first: "2 failed, 1 warned, 14 passed"."""
    levels = Counter(finding["level"] for finding in check["findings"])
    return ", ".join(f"{levels[level]} {level}" for level in (FAILED, WARNED, PASSED))


def terminal_list(check: dict) -> str:
    """Every finding, a line each, with cost and advice below what did not pass.

    Args:
        check: the content of `check.json`.
    """
    width = max(len(finding["check"]) for finding in check["findings"])
    lines = []
    for finding in check["findings"]:
        lines.append(f"{finding['level']:<6}  {finding['check']:<{width}}  {finding['found']}")
        if finding["level"] != PASSED:
            lines.append(f"{'':<8}costs: {finding['cost']}")
            lines.append(f"{'':<8}to do: {finding['advice']}")
    return "\n".join(printable(line) for line in lines)


def markdown_page(check: dict) -> str:
    """The page `check.md`.

    Args:
        check: the content of `check.json`.
    """
    machine = check["environment"]
    findings = [
        [_marked(finding["level"]), *(finding[key] for key in ("check", "found", "cost", "advice"))]
        for finding in check["findings"]
    ]
    return "\n".join(
        [
            f"# Check of {cell(check['team'])}: {headline(check)}",
            "",
            *_table(("", "Check", "Found", "Costs in the challenge", "What to do"), findings),
            "",
            "## Runs",
            "",
            *_table(_RUN_COLUMNS, [_run_row(run) for run in check["runs"]]),
            "",
            f"- Image: {cell(check['image'])} ({cell(check['image_digest'])})",
            f"- Command: `{check['command']}`",
            f"- Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; "
            f"GPU: {machine['gpu'] or 'none'}; {machine['date']}",
            f"- A run is ended after {check['limits']['timeout_s']:g} s. Sizes are warned of by "
            "limits of this check, not of the challenge.",
            "",
        ]
    )


def html_section(folder: Path, team: str) -> str:
    """One run's section of the report page; empty where the run was not checked.

    Args:
        folder: the run's.
        team: its name on the page.
    """
    try:
        check = json.loads((folder / CHECK_JSON).read_text(encoding="utf-8"))
        head = "".join(
            f'<th class="text" style="padding:9px 10px">{word}</th>'  # the page's have buttons
            for word in ("", "Check", "Found", "Costs in the challenge", "What to do")
        )
        rows = "".join(f"<tr>{_html_cells(finding)}</tr>" for finding in check["findings"])
        title = html.escape(f"Check of {team}: {headline(check)}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return (
        f'<section class="check"><h2>{title}</h2><div class="card scroll"><table><thead><tr>{head}'
        f"</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _html_cells(finding: dict) -> str:
    level = "failed" if finding["level"] == FAILED else ""
    kinds = {"level": level, "check": "", "found": "wrap", "cost": "wrap", "advice": "wrap"}
    return "".join(
        f'<td class="text {kind}">{html.escape(str(finding[key]))}</td>'
        for key, kind in kinds.items()
    )


def _marked(level: str) -> str:
    return level if level == PASSED else f"**{level}**"


def _run_row(run: dict) -> list[str]:
    gpu = run["peak_gpu_mb"]
    return [
        run["volume"],
        run["mode"],
        by(run["image_size"]),
        f"{run['seconds']:.2f}",
        f"{run['max_ram_mb']:,.0f}",
        "" if gpu is None else f"{gpu:,.0f}",
        run["status"],
        "; ".join(run["output"]["problems"]) or "valid",
    ]


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
        *(f"| {' | '.join(map(cell, row))} |" for row in rows),
    ]

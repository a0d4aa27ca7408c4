"""A check as a list in the terminal, as `check.md`, and as a section of the report page."""

import html
import json
from collections import Counter
from pathlib import Path

from benchmark.checking.findings import FAILED, PASSED, WARNED
from benchmark.text import bullets, by, cell, number_or_dash, table

CHECK_JSON = "check.json"

_COLUMNS = ("", "Check", "Found", "Costs in the challenge", "What to do")

_KEYS = ("check", "found", "cost", "advice")


def headline(check: dict) -> str:
    """Return how many of each, worst first: "2 failed, 1 warned, 14 passed"."""
    levels = Counter(finding["level"] for finding in check["findings"])
    return ", ".join(f"{levels[level]} {level}" for level in (FAILED, WARNED, PASSED))


def terminal_list(check: dict) -> list[str]:
    """Return a line for every finding, with cost and advice below what did not pass.

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
    return lines


def markdown_page(check: dict) -> str:
    """Return the page `check.md`.

    Args:
        check: the content of `check.json`.
    """
    machine = check["environment"]
    findings = []
    for finding in check["findings"]:
        level = finding["level"]
        marked = level if level == PASSED else f"**{level}**"
        findings.append([marked, *(finding[key] for key in _KEYS)])
    runs = [
        [
            *(run["volume"], run["mode"], by(run["image_size"]), f"{run['seconds']:.2f}"),
            *(f"{run['max_ram_mb']:,.0f}", number_or_dash(run["peak_gpu_mb"], ",.0f")),
            *(run["status"], "; ".join(run["output"]["problems"]) or "valid"),
        ]
        for run in check["runs"]
    ]
    titles = ("Volume", "Way", "Size", "Seconds", "RAM (MB)", "GPU (MB)", "Ended", "Label map")
    notes = [
        f"Image: {cell(check['image'])} ({cell(check['image_digest'])})",
        f"Command: `{check['command']}`",
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; "
        f"GPU: {machine['gpu'] or 'none'}; {machine['date']}",
        f"A run is ended after {check['limits']['timeout_s']:g} s. Sizes are warned of by limits "
        "of this check, not of the challenge.",
    ]
    parts = [
        f"# Check of {cell(check['team'])}: {headline(check)}",
        table(_COLUMNS, "lllll", findings),
        "## Runs",
        table(titles, "llllllll", runs),
        bullets(notes),
    ]
    return "\n\n".join(parts) + "\n"


def html_section(folder: Path, team: str) -> str:
    """Return one run's section of the report page; "" where the run was not checked.

    Args:
        folder: the run's.
        team: its name on the page.
    """
    try:
        check = json.loads((folder / CHECK_JSON).read_text(encoding="utf-8"))
        head = "".join(
            f'<th class="text" style="padding:9px 10px">{word}</th>'  # the page's have buttons
            for word in _COLUMNS
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
    kinds = {"level": "failed" * (finding["level"] == FAILED), "check": ""}
    kinds |= dict.fromkeys(("found", "cost", "advice"), "wrap")
    return "".join(
        f'<td class="text {kind}">{html.escape(str(finding[key]))}</td>'
        for key, kind in kinds.items()
    )

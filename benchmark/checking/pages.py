"""A check as a list in the terminal and as `check.md`."""

from collections import Counter

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
    """Return a line for every finding, with cost and advice below what did not pass."""
    width = max(len(finding["check"]) for finding in check["findings"])
    lines = []
    for finding in check["findings"]:
        lines.append(f"{finding['level']:<6}  {finding['check']:<{width}}  {finding['found']}")
        if finding["level"] != PASSED:
            lines.append(f"{'':<8}costs: {finding['cost']}")
            lines.append(f"{'':<8}to do: {finding['advice']}")
    return lines


def markdown_page(check: dict) -> str:
    """Return the page `check.md` of the content of `check.json`."""
    machine = check["environment"]
    findings = []
    for finding in check["findings"]:
        level = finding["level"]
        marked = level if level == PASSED else f"**{level}**"
        findings.append([marked, *(finding[key] for key in _KEYS)])
    runs = [
        [
            *(run["volume"], run["mode"], by(run["image_size"]), f"{run['seconds']:.2f}"),
            *(number_or_dash(run[key], ",.0f") for key in ("max_ram_mb", "peak_gpu_mb")),
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

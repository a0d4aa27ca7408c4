"""The page of `gpu-sweep`: the measurements as tables."""

from typing import Any

from benchmark.text import bullets, table

LEAST_DSC = 0.995
"""Of each organ: labels on the device against those of a CPU in fp32."""

SECTIONS = {
    "rates": "Measured, not from a data sheet; of half precision.",
    "labels": f"Against those of a CPU in fp32. An organ's DSC is to be at least {LEAST_DSC}.",
    "network": "Alone, in half precision; the memory is what its allocator has beside weights.",
    "choices": "Whole predictions in one process, in the order A B B A.",
    "cold cases": "A process each. Labels are compared with the first run of the same network.",
    "warm folder": "In one process, from the first label map on.",
    "not measured": "And why.",
}
"""Lists of the result, with a line for each."""


def _cell(value: object) -> object:
    if isinstance(value, dict):  # DSC by organ
        low = [f"{organ} {dsc:.4f}" for organ, dsc in value.items() if dsc < LEAST_DSC]
        return f"**{', '.join(low)}**" if low else f"{len(value)} organs well"
    if isinstance(value, list):
        return ", ".join(map(str, map(_cell, value)))
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else value


def markdown(machine: dict[str, Any], result: dict[str, list[dict[str, Any]]]) -> str:
    """Return the page of the lists of `SECTIONS` and of `seconds`.

    Args:
        machine: as `describe_machine` returns it.
        result: the lists; each of their entries is a row, its keys are the heads of columns.
    """
    seconds = ", ".join(f"{line['what']} {line['seconds']:.0f}" for line in result["seconds"])
    about = [
        f"{machine['gpu']}, {machine['gpu_memory_mb'] or 0:,.0f} MB, driver {machine['driver']}; "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, Python "
        f"{machine['versions']['python']}; {machine['date']}.",
        "Made by `python -m benchmark gpu-sweep`. Volumes are synthetic; longer ones repeat their "
        "first slices back and forth. `paper` is the paper's network (its labels mean little), "
        "`full-size` has 64 channels at reduction 2. The plain pipeline is fp32 as torch computes "
        "it by default, with TF32 where a device has it.",
        f"Seconds: {seconds}.",
    ]
    parts = [f"# {machine['gpu'] or 'No GPU: a rehearsal'}", bullets(about)]
    for name, line in SECTIONS.items():
        if rows := result[name]:
            head = list(dict.fromkeys(key for row in rows for key in row))
            cells = [[_cell(row.get(key)) for key in head] for row in rows]
            parts += [f"## {name.capitalize()}", line]
            parts.append(table(head, "l" + "r" * (len(head) - 1), cells))
    return "\n\n".join(parts) + "\n"

"""A case's GPU memory, RAM and CPU against time, as one image."""

from typing import Any

from benchmark.containers.results import Result, ram_measures
from benchmark.text import by

# Okabe and Ito's colours, which are distinct with any kind of colour blindness; with a
# hatching, for where bands overlap or are printed, colour alone is not enough.
_INK, _RED, _BLUE, _GREEN = "#000000", "#D55E00", "#0072B2", "#009E73"
_PHASES = {
    "imports": ("#999999", ""),
    "context": ("#CC79A7", ".."),
    "read": ("#56B4E9", "//"),
    "predict": ("#E69F00", ""),
    "components": ("#009E73", "\\\\"),
    "write": ("#0072B2", "xx"),
}


def draw_curves(result: Result, gpu_note: str | None, runs: int = 1) -> Any:  # noqa: ANN401
    """Return a figure of one of a case's runs: GPU memory, RAM and CPU over time, phases shaded.

    `gpu_note` is why there is no curve of GPU memory, if there is none.
    """
    from matplotlib.figure import Figure  # here: the harness runs where it cannot be imported

    samples, area = result["samples"], ""
    times, gpu = samples["time_s"], samples["gpu_used_mb"]
    panels: dict[str, list[tuple[list[float], str, str, str | None]]] = {
        "RAM (MB)": [(samples["ram_mb"], _BLUE, "-", None)],
        "CPU (%)": [(samples["cpu_percent"], _GREEN, "-", None)],
    }
    if gpu:
        idle = ([result["idle_gpu_mb"]] * len(times), "gray", ":", "before the run")
        used = (gpu, _INK, "-", "total − free (challenge)")
        panels = {"GPU memory (MB)": [used, idle], **panels}
        if own := samples["gpu_process_mb"]:
            panels["GPU memory (MB)"].append((own, _RED, "--", "own processes"))
        area = f", {result['auc_flare_mb_s']:,.0f} MB·s, peak {result['peak_gpu_mb']:,.0f} MB"
    figure = Figure(figsize=(9, 1.5 + 2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True)
    for panel, (title, lines) in zip(axes, panels.items(), strict=True):
        for values, color, style, label in lines:
            panel.plot(times, values, color=color, linestyle=style, label=label)
        if len(lines) > 1:
            panel.legend(loc="best", fontsize=8)
        panel.set(ylabel=title, ylim=(0, None))
        panel.grid(alpha=0.3)
        for phase in result["phases"]:
            color, hatch = _PHASES.get(phase["phase"], ("#F0E442", "--"))
            shade = {"facecolor": color, "edgecolor": color, "hatch": hatch, "alpha": 0.25}
            ends = (phase["start_s"], phase["end_s"])
            panel.axvspan(*ends, linewidth=0, label=phase["phase"], **shade)
    source = "".join(f" · RAM and CPU: {measure}" for measure in ram_measures([result]))
    end = max(result["seconds"], times[-1])
    axes[-1].set(xlabel=f"time since the container's start (s){source}", xlim=(0, end))
    status = "" if result["status"] == "ok" else f" [{result['status']}]"
    which = f", run {result['repeat'] + 1} of {runs}" if runs > 1 else ""
    title = f"{result['case']} ({by(result['image_size'])}{which}): {result['seconds']:.2f} s"
    axes[0].set_title(f"{title}{area}{status}", parse_math=False)
    if not gpu:
        note = f"GPU memory not measured: {result['sampler']['gpu_error'] or gpu_note}"
        figure.suptitle(note, fontsize=8, color="0.35", x=0.01, ha="left", wrap=True)
    if result["phases"]:
        handles, names = axes[-1].get_legend_handles_labels()
        named = dict(zip(names, handles, strict=True))
        figure.legend(named.values(), named, loc="outside lower center", ncols=6, fontsize=8)
    return figure

"""A case's GPU memory, RAM and CPU against time, as one picture."""

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmark.containers.repeats import ram_measure

# Okabe and Ito's colours, which readers with any kind of colour blindness tell apart.
_INK, _RED, _BLUE, _GREEN = "#000000", "#D55E00", "#0072B2", "#009E73"
_PHASES = {  # colour and hatching: where bands overlap or are printed, colour alone is not enough
    "imports": ("#999999", ""),
    "context": ("#CC79A7", ".."),
    "read": ("#56B4E9", "//"),
    "predict": ("#E69F00", ""),
    "components": ("#009E73", "\\\\"),
    "write": ("#0072B2", "xx"),
}


def draw_curves(result: dict, gpu_note: str | None, runs: list[dict] | None = None) -> bytes:
    """Draw one case.

    Args:
        result: the content of its `CASE.json`, areas included.
        gpu_note: why there is no curve of GPU memory, if there is none.
        runs: all of the case's runs, `result` among them.

    Returns:
        A PNG file: a panel each of GPU memory, where it was measured, RAM and CPU over one time
        axis, with the phases shaded.
    """
    samples = result["samples"]
    times = samples["time_s"]
    labels = ["RAM (MB)", "CPU (%)"]
    heights = [1.0, 1.0]
    area, note = "", None
    if samples["gpu_used_mb"]:
        labels, heights = ["GPU memory (MB)", *labels], [1.8, *heights]
        area = f", {result['auc_flare_mb_s']:,.0f} MB·s, peak {result['peak_gpu_mb']:,.0f} MB"
    else:
        note = f"GPU memory not measured: {result['sampler']['gpu_error'] or gpu_note}"
    figure = Figure(figsize=(9, 1.0 + 1.7 * sum(heights)), layout="constrained")
    axes = list(figure.subplots(len(labels), 1, sharex=True, height_ratios=heights))
    *gpu, ram, cpu = axes
    for panel in gpu:
        panel.plot(times, samples["gpu_used_mb"], color=_INK, label="total − free (challenge)")
        if samples["gpu_process_mb"]:
            panel.plot(
                times, samples["gpu_process_mb"], color=_RED, linestyle="--", label="own processes"
            )
        panel.axhline(result["idle_gpu_mb"], color="gray", linestyle=":", label="before the run")
        panel.legend(loc="best", fontsize=8)
    ram.plot(times, samples["ram_mb"], color=_BLUE)
    cpu.plot(times, samples["cpu_percent"], color=_GREEN)
    for panel, label in zip(axes, labels, strict=True):
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        _shade_phases(panel, result["phases"])
    source = f" · RAM and CPU: {measure}" if (measure := ram_measure(result)) else ""
    cpu.set_xlabel(f"time since the container's start (s){source}")
    cpu.set_xlim(0, max(result["seconds"], times[-1]))
    size = "×".join(map(str, result["image_size"]))
    status = "" if result["status"] == "ok" else f" [{result['status']}]"
    which = f", run {result['repeat'] + 1} of {len(runs)}" if runs and len(runs) > 1 else ""
    axes[0].set_title(
        f"{result['case']} ({size}{which}): {result['seconds']:.2f} s{area}{status}",
        parse_math=False,
    )
    if note:
        figure.suptitle(note, fontsize=8, color="0.35", x=0.01, ha="left", wrap=True)
    if result["phases"]:
        handles, names = cpu.get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside lower center", ncols=min(6, len(names)), fontsize=8
        )
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def _shade_phases(panel: Axes, phases: list[dict]) -> None:
    named = set()
    for phase in phases:
        name = phase["phase"]
        color, hatch = _PHASES.get(name, ("#F0E442", "--"))
        panel.axvspan(
            phase["start_s"],
            phase["end_s"],
            facecolor=color,
            edgecolor=color,
            hatch=hatch,
            alpha=0.25,
            linewidth=0,
            label=None if name in named else name,
        )
        named.add(name)

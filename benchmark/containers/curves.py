"""A case's GPU memory, RAM and CPU against time, as one picture."""

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_PHASE_COLORS = {
    "imports": "tab:gray",
    "context": "tab:brown",
    "read": "tab:blue",
    "predict": "tab:orange",
    "components": "tab:green",
    "write": "tab:purple",
}


def draw_curves(result: dict, gpu_note: str | None) -> bytes:
    """Draw one case.

    Args:
        result: the content of its `CASE.json`, areas included.
        gpu_note: why there is no curve of GPU memory, if there is none.

    Returns:
        A PNG file: three panels over one time axis, with the phases shaded.
    """
    samples = result["samples"]
    times = samples["time_s"]
    heights = (2, 1, 1) if samples["gpu_used_mb"] else (0.4, 1, 1)
    figure = Figure(figsize=(9, 1.75 * sum(heights)))
    axes = figure.subplots(3, 1, sharex=True, height_ratios=heights)
    gpu, ram, cpu = axes
    if samples["gpu_used_mb"]:
        gpu.plot(times, samples["gpu_used_mb"], color="black", label="total − free (challenge)")
        if samples["gpu_process_mb"]:
            gpu.plot(times, samples["gpu_process_mb"], color="tab:red", label="own processes")
        gpu.axhline(result["idle_gpu_mb"], color="gray", linestyle=":", label="before the run")
        gpu.legend(loc="best", fontsize=8)
        area = f", {result['auc_flare_mb_s']:,.0f} MB·s, peak {result['peak_gpu_mb']:,.0f} MB"
    else:
        note = result["sampler"]["gpu_error"] or gpu_note
        gpu.text(
            0.5,
            0.5,
            f"not measured:\n{note}",
            ha="center",
            va="center",
            wrap=True,
            transform=gpu.transAxes,
        )
        gpu.set_yticks([])
        area = ""
    ram.plot(times, samples["ram_mb"], color="tab:blue")
    cpu.plot(times, samples["cpu_percent"], color="tab:green")
    for panel, label in zip(
        axes, ("GPU memory (MB)", "RAM (MB)", "CPU (% of machine)"), strict=True
    ):
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        _shade_phases(panel, result["phases"])
    cpu.set_xlabel("time since the container's start (s)")
    cpu.set_xlim(0, max(result["seconds"], times[-1]))
    size = "×".join(map(str, result["image_size"]))
    status = "" if result["status"] == "ok" else f" [{result['status']}]"
    gpu.set_title(
        f"{result['case']} ({size}): {result['seconds']:.2f} s{area}{status}", parse_math=False
    )
    if result["phases"]:
        handles, labels = cpu.get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8)
        figure.tight_layout(rect=(0, 0.04, 1, 1))
    else:
        figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def _shade_phases(panel: Axes, phases: list[dict]) -> None:
    named = set()
    for phase in phases:
        name = phase["phase"]
        panel.axvspan(
            phase["start_s"],
            phase["end_s"],
            color=_PHASE_COLORS.get(name, "tab:cyan"),
            alpha=0.2,
            linewidth=0,
            label=None if name in named else name,
        )
        named.add(name)

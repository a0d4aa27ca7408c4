"""The page of `gpu-sweep`: figures beside their aims, from the raw results of its stages."""

import numpy as np

from benchmark.containers.results import flare_area, true_area
from inference.choices import CudaChoices

SHORT, MIDDLE, LONG = 100, 200, 500
"""Slices of the volumes, 512x512 each."""

BATCH_SIZES = (1, 2, 4, 8, 16)
"""Tried in whole cold cases."""

SIZE = 512

TF32_NOTE = (
    "The plain pipeline is fp32 as torch computes it by default: on devices that have TF32 its "
    "convolutions use it, and its ratio is to that."
)


def held_after_network(run: dict) -> float | None:
    """Area under the device memory that a process holds when its network has ended, MB·s.

    What a short-lived GPU process could save at most. The idle device's own memory is taken away;
    the last level that was read is held to the end of the run.

    Args:
        run: one result of `benchmark efficiency`; None where no curve was read or no phases, which
            peers do not log.
    """
    samples = run["samples"]
    ends = [phase["end_s"] for phase in run["phases"] or () if phase["phase"] == "predict"]
    if not samples["gpu_used_mb"] or not ends:
        return None
    end = max(ends)
    inside = [second for second in samples["time_s"] if end < second < run["seconds"]]
    times = [end, *inside, max(end, run["seconds"])]
    levels = np.interp(times, samples["time_s"], samples["gpu_used_mb"])
    return true_area(times, levels - run["idle_gpu_mb"])


def without_idle(run: dict) -> tuple[float | None, float | None]:
    """Peak (MB) and official area (MB·s) above what the idle device has in use; None unread.

    The driver's own part, some 500 MB on large cards, is in every team's figures alike.
    """
    used, idle = run["samples"]["gpu_used_mb"], run["idle_gpu_mb"]
    if not used:
        return None, None
    return max(0.0, max(used) - idle), flare_area(used, run["interval_s"], idle)


def warm_rate(phases: list[dict]) -> dict[str, float]:
    """Throughput of a folder from its first label map on.

    Args:
        phases: of the service's phase log, of two cases or more.

    Returns:
        `volumes_per_s`, and `network_share`: of that time, how much the network ran.
    """
    written = sorted(phase["end"] for phase in phases if phase["phase"] == "write")
    first, last = written[0], written[-1]
    network = sum(
        max(0.0, min(phase["end"], last) - max(phase["start"], first))
        for phase in phases
        if phase["phase"] == "predict"
    )
    return {
        "volumes_per_s": (len(written) - 1) / (last - first),
        "network_share": network / (last - first),
    }


def _median(runs: list[dict]) -> dict:
    return sorted(runs, key=lambda run: run["seconds"])[(len(runs) - 1) // 2]


def _cell(value: float | None, form: str = "{:,.0f}") -> str:
    return "" if value is None else form.format(value)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|" + "---|" + "---:|" * (len(head) - 1),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def _aims(result: dict) -> list[tuple[str, str, str, str]]:
    """Rows (figure, aim, reached, met or not) for what has been measured."""
    rows = []

    def add(figure: str, aim: str, value: float, form: str, met: bool) -> None:
        rows.append((figure, aim, form.format(value), "yes" if met else "**no**"))

    def measured(*runs: dict | None) -> bool:
        return all(run and run["auc_flare_mb_s"] is not None for run in runs)

    service, plain = (
        result[name].get(str(MIDDLE)) and _median(result[name][str(MIDDLE)])
        for name in ("service", "plain")
    )
    if service and plain:
        ratio = plain["seconds"] / service["seconds"]
        add("cold, 200 slices: time, plain / service", "≥ 10", ratio, "{:.1f}", ratio >= 10)
    if measured(service, plain):
        ratio = plain["auc_flare_mb_s"] / service["auc_flare_mb_s"]
        add("the same, GPU area", "≥ 20", ratio, "{:.1f}", ratio >= 20)
    if measured(service):
        area, peak = service["auc_flare_mb_s"], service["peak_gpu_mb"]
        add("GPU area of the service (MB·s)", "< 3,000 on an H100", area, "{:,.0f}", area < 3000)
        add("peak GPU memory of the service (MB)", "< 2,048", peak, "{:,.0f}", peak < 2048)
    if result["folder"]:
        rate = result["folder"]["volumes_per_s"]
        add("warm folder, volumes of 200 slices a second", "≥ 1", rate, "{:.2f}", rate >= 1)
    if shares := result["network"] and _shares(result["network"]).get("float16"):
        share = 100 * max(shares)
        aim = "≥ 50 %"
        add("network, best share of the fp16 matrix rate", aim, share, "{:.0f} %", share >= 50)
    return rows


def _shares(network: dict) -> dict[str, list[float]]:
    """By type, each form's and batch size's share of the type's matrix rate."""
    shares = {}
    for run in network["runs"]:
        if run["dtype"] not in network["matrix_tflops"]:
            continue
        share = run["tflops"] / network["matrix_tflops"][run["dtype"]]
        shares.setdefault(run["dtype"], []).append(share)
    return shares


def _memory_cells(run: dict) -> tuple[str, ...]:
    """Peak, area, and both above the idle device."""
    peak, area = without_idle(run)
    return (
        _cell(run["peak_gpu_mb"]),
        _cell(peak),
        _cell(run["auc_flare_mb_s"]),
        _cell(area),
    )


_MEMORY_HEAD = (
    "peak GPU (MB)", "above idle", "GPU area, official (MB·s)", "above idle",
)  # fmt: skip


def _cold_row(name: str, slices: str, run: dict) -> tuple[str, ...]:
    return (
        f"{name}, {slices} slices",
        f"{run['seconds']:.2f}",
        *_memory_cells(run),
        _cell(run["auc_true_mb_s"]),
        _cell(held_after_network(run)),
        _cell(run["max_ram_mb"]),
    )


def _choice_lines(result: dict) -> list[str]:
    """Both sides of each choice: the default's cold case, and with that choice alone changed."""
    default = _median(result["service"][str(MIDDLE)])
    rows = [("as it is", f"{default['seconds']:.2f}", *_memory_cells(default))]
    rows += [
        (
            f"{name} {'off' if getattr(CudaChoices(), name) else 'on'}",
            f"{_median(runs)['seconds']:.2f}",
            *_memory_cells(_median(runs)),
        )
        for name, runs in result["choices"].items()
    ]
    return [
        "## Choices, each changed alone",
        "",
        f"One cold case of {MIDDLE} slices; `inference/choices.py` says what each is.",
        "",
        *_table(("choice", "time (s)", *_MEMORY_HEAD), rows),
    ]


def markdown(result: dict) -> str:
    """The page.

    Args:
        result: `machine` (of `describe_machine`), `torch`, `weights`, `service` and `plain` (slices
            as text: results of `benchmark efficiency`), `peers` (name: the same, of 200 slices),
            `batches` (batch size as text: the same), `choices` (name of a choice: the same, with
            that one changed), `folder` (of `warm_rate`, and `volumes`), `network` (of
            `network-speed --sweep`), `speed` (Markdown), `left_out` (stage: why). Empty where not
            measured.
    """
    machine = result["machine"]
    lines = [
        f"# {machine['gpu']}",
        "",
        f"- {machine['gpu']}, {machine['gpu_memory_mb']:,.0f} MB, driver {machine['driver']}; "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; {machine['date']}",
        f"- Python {machine['versions']['python']}, {result['torch']}; weights: "
        f"{result['weights']}",
        "- Made by `python -m benchmark gpu-sweep`. Volumes are synthetic, 512×512; longer ones "
        "repeat the first 100 slices back and forth. Every run is a process of its own.",
        "- Random weights give every voxel nearly the same label: components and writing then cost "
        "both pipelines less than with trained ones.",
        *(f"- **Left out**: {stage}: {why}" for stage, why in result["left_out"].items()),
        "",
    ]
    aims = _aims(result)
    if aims:
        lines += ["## Aims", "", *_table(("figure", "aim", "reached", "met"), aims)]
        lines += [TF32_NOTE, ""]

    cold = [
        _cold_row(name, slices, _median(runs))
        for name in ("service", "plain")
        for slices, runs in result[name].items()
    ] + [_cold_row(name, str(MIDDLE), _median(runs)) for name, runs in result["peers"].items()]
    if cold:
        head = (
            "one cold case", "time (s)", *_MEMORY_HEAD,
            "true area (MB·s)", "of it held after the network (MB·s)", "RAM (MB)",
        )  # fmt: skip
        lines += ["## Cold cases", "", *_table(head, cold)]
    if result["batches"]:
        rows = [
            (batch, f"{run['seconds']:.2f}", *_memory_cells(run))
            for batch, (run, *_) in result["batches"].items()
        ]
        head = ("batch size", "time (s)", *_MEMORY_HEAD)
        lines += ["## Batch size, one cold case of 200 slices", "", *_table(head, rows)]
    if result["choices"] and str(MIDDLE) in result["service"]:
        lines += _choice_lines(result)
    if result["folder"]:
        folder = result["folder"]
        lines += [
            "## Warm folder",
            "",
            f"{folder['volumes']} volumes of 200 slices in one process: "
            f"{folder['volumes_per_s']:.2f} volumes a second once the first is written; the "
            f"network runs {100 * folder['network_share']:.0f} % of that time.",
            "",
        ]
    if result["network"]:
        lines += _network_lines(result["network"])
    if result["speed"]:
        lines += ["## Service against plain pipeline by stage", "", result["speed"]]
    return "\n".join(lines).rstrip() + "\n"


def _form(run: dict) -> str:
    marks = {
        "fused": "fused",
        "searches": "cuDNN search",
    }
    parts = [mark for name, mark in marks.items() if run[name]]
    return ", ".join([run["dtype"], *parts, f"batch of {run['batch_size']}"])


def _network_lines(network: dict) -> list[str]:
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in network["matrix_tflops"].items())
    rows = [
        (
            _form(run),
            f"{run['ms']:.2f}",
            f"{run['tflops']:.0f}",
            f"{100 * run['tflops'] / network['matrix_tflops'][run['dtype']]:.0f} %"
            if run["dtype"] in network["matrix_tflops"]
            else "",
            _cell(run["peak_mb"]),
            _cell(run["widths"], "{:.1f}"),
        )
        for run in network["runs"]
    ]
    return [
        "## The network alone",
        "",
        f"- Matrix products of 8192×8192, TFLOP/s: {rates}.",
        f"- In use beside the allocator after a first pass: {_cell(network['context_mb'])} MB "
        "(context, cuDNN, kernels, and what the idle device has).",
        f"- A batch for 2,000 MB is {network['default_batch_size']} slices.",
        *(f"- **Failed**: {form}: {why}" for form, why in network["failed"].items()),
        f"- GFLOP a slice: {network['gflop']['plain']:.1f} plain, "
        f"{network['gflop']['folded']:.1f} folded, which TFLOP/s count.",
        "",
        *_table(
            ("form", "ms a slice", "TFLOP/s", "of the matrix rate", "peak (MB)", "widths a pixel"),
            rows,
        ),
    ]

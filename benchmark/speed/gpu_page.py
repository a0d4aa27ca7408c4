"""The page of `gpu-sweep`: figures beside their aims, from the raw results of its stages."""

from benchmark.containers.areas import true_area

SHORT, MIDDLE, LONG = 100, 200, 500
"""Slices of the volumes, 512x512 each."""

BATCH_SIZES = (1, 2, 4, 8, 16)
"""Tried in whole cold cases."""

SIZE = 512


def held_after_network(run: dict) -> float:
    """Area under the device memory that a process holds when its network has ended, MB·s.

    What a short-lived GPU process could save at most. The idle device's own memory is taken away.

    Args:
        run: one result of `benchmark efficiency`, with phases.
    """
    end = max(phase["end_s"] for phase in run["phases"] if phase["phase"] == "predict")
    samples = run["samples"]
    later = [
        (second, used - run["idle_gpu_mb"])
        for second, used in zip(samples["time_s"], samples["gpu_used_mb"], strict=True)
        if second >= end
    ]
    return true_area(*map(list, zip(*later, strict=True))) if len(later) > 1 else 0.0


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

    service, plain = (
        result[name].get(str(MIDDLE)) and _median(result[name][str(MIDDLE)])
        for name in ("service", "plain")
    )
    if service and plain:
        ratio = plain["seconds"] / service["seconds"]
        add("cold, 200 slices: time, plain / service", "≥ 10", ratio, "{:.1f}", ratio >= 10)
        ratio = plain["auc_flare_mb_s"] / service["auc_flare_mb_s"]
        add("the same, GPU area", "≥ 20", ratio, "{:.1f}", ratio >= 20)
    if service:
        area, peak = service["auc_flare_mb_s"], service["peak_gpu_mb"]
        add("GPU area of the service (MB·s)", "< 3,000 on an H100", area, "{:,.0f}", area < 3000)
        add("peak GPU memory of the service (MB)", "< 2,048", peak, "{:,.0f}", peak < 2048)
    if result["folder"]:
        rate = result["folder"]["volumes_per_s"]
        add("warm folder, volumes of 200 slices a second", "≥ 1", rate, "{:.2f}", rate >= 1)
    if result["network"]:
        share = 100 * max(_shares(result["network"])["float16"])
        aim = "≥ 50 %"
        add("network, best share of the fp16 matrix rate", aim, share, "{:.0f} %", share >= 50)
    return rows


def _shares(network: dict) -> dict[str, list[float]]:
    """By type, each form's and batch size's share of the type's matrix rate."""
    shares = {}
    for run in network["runs"]:
        share = run["tflops"] / network["matrix_tflops"][run["dtype"]]
        shares.setdefault(run["dtype"], []).append(share)
    return shares


def _cold_row(name: str, slices: str, run: dict) -> tuple[str, ...]:
    return (
        f"{name}, {slices} slices",
        f"{run['seconds']:.2f}",
        f"{run['peak_gpu_mb']:,.0f}",
        f"{run['auc_flare_mb_s']:,.0f}",
        f"{run['auc_true_mb_s']:,.0f}",
        f"{held_after_network(run):,.0f}",
        "" if run["max_ram_mb"] is None else f"{run['max_ram_mb']:,.0f}",
    )


def markdown(result: dict) -> str:
    """The page.

    Args:
        result: `machine` (of `describe_machine`), `torch`, `weights`, `service` and `plain` (slices
            as text: results of `benchmark efficiency`), `batches` (batch size as text: the same),
            `folder` (of `warm_rate`, and `volumes`), `network` (of `network-speed --sweep`),
            `speed` (Markdown), `left_out` (stage: why). Empty where not measured.
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

    cold = [
        _cold_row(name, slices, _median(runs))
        for name in ("service", "plain")
        for slices, runs in result[name].items()
    ]
    if cold:
        head = (
            "one cold case", "time (s)", "peak GPU (MB)", "GPU area, official (MB·s)",
            "true area (MB·s)", "of it held after the network (MB·s)", "RAM (MB)",
        )  # fmt: skip
        lines += ["## Cold cases", "", *_table(head, cold)]
    if result["batches"]:
        rows = [
            (batch, f"{run['seconds']:.2f}", f"{run['peak_gpu_mb']:,.0f}",
             f"{run['auc_flare_mb_s']:,.0f}")
            for batch, (run, *_) in result["batches"].items()
        ]  # fmt: skip
        head = ("batch size", "time (s)", "peak GPU (MB)", "GPU area, official (MB·s)")
        lines += ["## Batch size, one cold case of 200 slices", "", *_table(head, rows)]
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


def _network_lines(network: dict) -> list[str]:
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in network["matrix_tflops"].items())
    rows = [
        (
            f"{run['dtype']}, upsampling {'merged' if run['merges_upsampling'] else 'apart'}, "
            f"batch of {run['batch_size']}{', cuDNN search' if run['searches'] else ''}",
            f"{run['ms']:.2f}",
            f"{run['tflops']:.0f}",
            f"{100 * run['tflops'] / network['matrix_tflops'][run['dtype']]:.0f} %",
            f"{run['peak_mb']:,.0f}" if run["peak_mb"] is not None else "",
            f"{run['widths']:.1f}" if run["widths"] is not None else "",
        )
        for run in network["runs"]
    ]
    context = network["context_mb"]
    return [
        "## The network alone",
        "",
        f"- Matrix products of 8192×8192, TFLOP/s: {rates}.",
        f"- The CUDA context with its first kernel takes {context or 0:,.0f} MB; a batch for "
        f"2,000 MB is {network['default_batch_size']} slices.",
        f"- GFLOP a slice: {network['gflop']['plain']:.1f} plain, "
        f"{network['gflop']['apart']:.1f} folded, {network['gflop']['merged']:.1f} with merged "
        "upsampling. TFLOP/s count what a form itself does.",
        "",
        *_table(
            ("form", "ms a slice", "TFLOP/s", "of the matrix rate", "peak (MB)", "widths a pixel"),
            rows,
        ),
    ]

"""Run folders of made-up measurements and scores, as `efficiency` and `accuracy` write them."""

import csv
import json

from benchmark.scoring.protocol import COLUMNS

HEADER = "Name,Time,MaxGPU_Mem,AUC_GPU_Time,MaxCPU_Utilization,AUC_CPU_Time,MaxRAM,AUC_RAM_Time"


def result_of(case, seconds, used=None, number=0, **changes):
    """A result with a GPU sample every 0.1 s."""
    count = len(used or range(5))
    return {
        "case": case,
        "status": "ok",
        "reason": None,
        "penalty": None,
        "repeat": number,
        "seconds": seconds,
        "interval_s": 0.1,
        "image_size": [512, 512, 10 * count],
        "tolerances": {"seconds": 15.0, "mb": 2048.0},
        "samples": {
            "time_s": [0.1 * n for n in range(count)],
            "gpu_used_mb": used,
            "ram_mb": [200.0 * n for n in range(count)],
            "cpu_percent": [50.0] * count,
        },
        "phases": [],
        "sampler": {"source": None, "gpu_error": None},
        "peak_gpu_mb": used and max(used),
        "auc_flare_mb_s": used and round(sum(used) * 0.1),
        "max_cpu_percent": 50.0,
        "auc_cpu_percent_s": 10.0,
        "max_ram_mb": 1000.0,
        "auc_ram_mb_s": 100 * seconds,
        **changes,
    }


def write_run(folder, team=None, efficiency=None, scores=None, samples=None, environment=None):
    """A run's folder.

    efficiency: case to (time, max GPU, GPU area, CPU area), None is an empty cell.
    scores: case to (organ DSC, organ NSD, tumor DSC, tumor NSD), the organs all alike.
    samples: case to a list of repeats, each (seconds, GPU samples) and changes of the result.
    """
    folder.mkdir(parents=True)
    if efficiency is not None:
        with (folder / f"{team}_Efficiency.csv").open("w", newline="") as file:
            file.write(HEADER + "\n")
            for case, (seconds, peak, area, cpu) in efficiency.items():
                cells = (f"{case}_0000.nii.gz", seconds, peak, area, 50, cpu, 1000, 100 * seconds)
                csv.writer(file).writerow(cells)
    if scores is not None:
        with (folder / "accuracy_per_case.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["Name", *(f"{c}_{m}" for m in ("DSC", "NSD") for c in COLUMNS)])
            for case, (dsc, nsd, tumor_dsc, tumor_nsd) in scores.items():
                table.writerow([f"{case}.nii.gz", *[dsc] * 13, tumor_dsc, *[nsd] * 13, tumor_nsd])
    (folder / "efficiency").mkdir()
    for case, repeats in (samples or {}).items():
        for number, (seconds, used, *changes) in enumerate(repeats):
            content = result_of(case, seconds, used, number, **(changes[0] if changes else {}))
            name = "".join(c if c.isalnum() else "_" for c in f"{case}.repeat{number}")
            (folder / "efficiency" / f"{name}.json").write_text(json.dumps(content))
    if environment:
        (folder / "environment.json").write_text(json.dumps(environment))
    return folder

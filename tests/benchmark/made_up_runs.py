"""Run folders of made-up measurements and scores, as `efficiency` and `accuracy` write them."""

import csv
import json

from benchmark.scoring.protocol import COLUMNS

HEADER = "Name,Time,MaxGPU_Mem,AUC_GPU_Time,MaxCPU_Utilization,AUC_CPU_Time,MaxRAM,AUC_RAM_Time"


def write_run(folder, team=None, efficiency=None, scores=None, samples=None, environment=None):
    """A run's folder.

    efficiency: case to (time, max GPU, GPU area, CPU area), None is an empty cell.
    scores: case to (organ DSC, organ NSD, tumor DSC, tumor NSD), the organs all alike.
    samples: case to a list of repeats, each (seconds, GPU samples).
    """
    folder.mkdir(parents=True)
    if efficiency is not None:
        lines = [HEADER]
        for case, (seconds, peak, area, cpu) in efficiency.items():
            cells = (f"{case}_0000.nii.gz", seconds, peak, area, 50, cpu, 1000, 100 * seconds)
            lines.append(",".join("" if cell is None else str(cell) for cell in cells))
        (folder / f"{team}_Efficiency.csv").write_text("\n".join(lines) + "\n")
    if scores is not None:
        with (folder / "accuracy_per_case.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["Name", *(f"{c}_{m}" for m in ("DSC", "NSD") for c in COLUMNS)])
            for case, (dsc, nsd, tumor_dsc, tumor_nsd) in scores.items():
                table.writerow([f"{case}.nii.gz", *[dsc] * 13, tumor_dsc, *[nsd] * 13, tumor_nsd])
    for case, repeats in (samples or {}).items():
        (folder / "efficiency").mkdir(exist_ok=True)
        for number, (seconds, used) in enumerate(repeats):
            content = {
                "case": case,
                "status": "ok",
                "penalty": None,
                "repeat": number,
                "seconds": seconds,
                "interval_s": 0.1,
                "samples": {"gpu_used_mb": used},
                "peak_gpu_mb": used and max(used),
                "auc_flare_mb_s": used and round(sum(used) * 0.1),
                "max_cpu_percent": 50.0,
                "auc_cpu_percent_s": 10.0,
                "max_ram_mb": 1000.0,
                "auc_ram_mb_s": 100 * seconds,
            }
            name = f"{case}.repeat{number}.json" if number else f"{case}.json"
            (folder / "efficiency" / name).write_text(json.dumps(content))
    if environment:
        (folder / "environment.json").write_text(json.dumps(environment))
    return folder

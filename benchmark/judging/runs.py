"""Read back the folder of one run: what `efficiency` and `accuracy` wrote of one team.

`rank`, `compare` and `report` all start here. A folder holds one or both of
`TEAM_Efficiency.csv` (with `efficiency/CASE.json` for the samples) and `accuracy_per_case.csv`; the
organisers' own tables do as well.
"""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, nan
from pathlib import Path

from benchmark.checking.pages import CHECK_JSON
from benchmark.containers.areas import flare_area
from benchmark.containers.repeats import PENALTY, figure, median_run, ram_measure
from benchmark.containers.run_folder import EFFICIENCY_SUFFIX
from benchmark.scoring.protocol import COLUMNS
from benchmark.scoring.tables import PER_CASE_CSV
from inference.files import SUFFIXES
from inference.labels import ORGANS, TUMOR

JSON_KEYS = {
    "Time": "seconds",
    "MaxGPU_Mem": "peak_gpu_mb",
    "AUC_GPU_Time": "auc_flare_mb_s",
    "MaxCPU_Utilization": "max_cpu_percent",
    "AUC_CPU_Time": "auc_cpu_percent_s",
    "MaxRAM": "max_ram_mb",
    "AUC_RAM_Time": "auc_ram_mb_s",
}
"""The official efficiency columns (s, MB, MB·s, %, %·s), and their keys in `efficiency/CASE.json`.
"""


FEW_CASES = 20
"""Below which pages say that the cases are few."""

FAILED = {
    "Time": PENALTY["seconds"],
    "AUC_GPU_Time": PENALTY["auc_gpu_mb_s"],
    "AUC_CPU_Time": PENALTY["auc_cpu_percent_s"],
}
"""What a failed case counts in each official column; the others have no rule."""


class RunError(ValueError):
    """A folder that is no run, or runs that cannot be set side by side; one line says why."""


@dataclass(frozen=True)
class Run:
    """One team's results.

    Attributes:
        team: the part of the CSV's name before `_Efficiency.csv`, or else the folder's name.
        folder: where it was read.
        efficiency: case to official column to value, None where it was not measured (no GPU); of
            a case of several rows the row of median time.
        measurements: case to the content of its `efficiency/*.json`, a dict for each repeat.
        accuracy: case to official column (`Liver_DSC`) to score, None where it was not scored.
        environment: the content of `environment.json`; empty where there is none.
        in_reference: case to the official names of the structures that its reference has; empty
            where the scores do not say so, as the organisers' own do not.
        partial: whether only annotated labels were scored.
    """

    team: str
    folder: Path
    efficiency: dict[str, dict[str, float | None]]
    measurements: dict[str, list[dict]]
    accuracy: dict[str, dict[str, float]]
    environment: dict
    in_reference: dict[str, list[str]] = field(default_factory=dict)
    partial: bool = False

    @property
    def cases(self) -> list[str]:
        """Every case that the run has something of, sorted."""
        return sorted({*self.efficiency, *self.measurements, *self.accuracy})

    def failed(self, case: str) -> bool:
        """Whether the case counts as failed: its median run, or its row in the official table."""
        if runs := self.measurements.get(case):
            return bool(median_run(runs)["penalty"])
        return (self.efficiency.get(case, {}).get("Time") or 0.0) >= PENALTY["seconds"]

    @property
    def failed_everywhere(self) -> bool:
        """Whether no case that was run was done."""
        return bool(self.efficiency) and all(map(self.failed, self.efficiency))

    def measured(self, case: str, column: str) -> float | None:
        """An efficiency figure as the tables have it: of the median run, failures with penalties.

        Args:
            case: its name.
            column: of the official table.

        Returns:
            None where it was not measured, or the case failed and no rule says what it counts.
        """
        if runs := self.measurements.get(case):
            return figure(median_run(runs), JSON_KEYS[column])
        if self.failed(case) and (column != "AUC_GPU_Time" or self.has_gpu):
            return FAILED.get(column)
        return None if self.failed(case) else self.efficiency.get(case, {}).get(column)

    @property
    def has_gpu(self) -> bool:
        """Whether GPU memory was measured; a failed case's penalty is no measurement."""
        return bool(self.environment.get("gpu")) or any(
            row["MaxGPU_Mem"] is not None
            for case, row in self.efficiency.items()
            if not self.failed(case)
        )

    @property
    def ram_measures(self) -> set[str]:
        """How RAM was read, keys of `RAM_MEASURES`; empty where nothing says it."""
        found = {ram_measure(run) for runs in self.measurements.values() for run in runs} - {None}
        if found or "image" not in self.environment:
            return found
        # A table without its samples: a container's cgroup is read wherever it can be seen.
        return {"cgroup" if self.environment["image"] else "process tree"}

    def with_structure(self, label: int) -> int | None:
        """How many scored cases have a label in their reference; None where nothing says it."""
        if not self.in_reference:
            return None
        column = COLUMNS[label - 1]
        return sum(column in names for names in self.in_reference.values())

    def score(self, case: str, metric: str) -> float | None:
        """DSC or NSD of a case, mean of the 13 organs (of those scored, if partial); or of tumor.

        Args:
            case: its name.
            metric: "dsc", "nsd", "tumor-dsc" or "tumor-nsd".

        Returns:
            0 to 1; None where the run has no such score.
        """
        kind = metric.removeprefix("tumor-").upper()
        labels = [TUMOR] if metric.startswith("tumor-") else ORGANS
        row = self.accuracy.get(case, {})
        scores = [row.get(f"{COLUMNS[label - 1]}_{kind}") for label in labels]
        if self.partial:
            scores = [score for score in scores if score is not None]
        return None if None in scores or not scores else sum(scores) / len(scores)


def tolerated_area(measurement: dict, tolerance_mb: float) -> float:
    """GPU memory area by the official rule, of the memory above a tolerance.

    Args:
        measurement: the content of one `efficiency/CASE.json`, with GPU samples.
        tolerance_mb: 4096 in FLARE 2023, 2048 in 2022.

    Returns:
        MB·s.
    """
    samples, interval = measurement["samples"]["gpu_used_mb"], measurement["interval_s"]
    return flare_area(samples, interval, tolerance_mb)


def case_of(name: str, *, is_input: bool) -> str:
    """The case's name, from a file's name as the tables have it.

    Args:
        name: NAME_0000.nii.gz of an input, NAME.nii.gz of a label map; either with `.nii`, or bare.
        is_input: an efficiency table names inputs, whose `_0000` is no part of the case's name; a
            label map's may be.
    """
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name.removesuffix("_0000") if is_input else name


def read_run(folder: Path) -> Run:
    """Read one run's folder.

    Raises:
        RunError: there is nothing of a run in it, or a file is not what its name says.
    """
    tables = sorted(folder.glob("*" + EFFICIENCY_SUFFIX))
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise RunError(f"{folder}: a run has one team, and this folder has {names}")
    environment = folder / "environment.json"
    try:
        run = Run(
            team=tables[0].name.removesuffix(EFFICIENCY_SUFFIX)
            if tables
            else folder.resolve().name,
            folder=folder,
            efficiency={
                case: {column: _middle(rows)[column] for column in JSON_KEYS}
                for table in tables
                for case, rows in _read_csv(table, of_inputs=True).items()
            },
            measurements=_read_measurements(folder / "efficiency"),
            accuracy={
                case: rows[-1]
                for table in folder.glob(PER_CASE_CSV)
                for case, rows in _read_csv(table, of_inputs=False).items()
            },
            environment=_read_object(environment) if environment.is_file() else {},
            **_read_scoring(folder / "accuracy.json"),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise RunError(f"{folder}: a table or JSON cannot be read ({error!r})") from error
    if not run.cases and not (folder / CHECK_JSON).is_file():
        raise RunError(f"{folder}: neither TEAM{EFFICIENCY_SUFFIX} nor {PER_CASE_CSV} is there")
    return run


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs; those of one team get their folder's name or path beside the team's.

    Raises:
        RunError: as `read_run`.
    """
    runs = [read_run(folder) for folder in folders]
    for describe in (lambda run: run.folder.resolve().name, lambda run: str(run.folder)):
        counts = Counter(run.team for run in runs)
        runs = [
            replace(run, team=f"{run.team} ({describe(run)})") if counts[run.team] > 1 else run
            for run in runs
        ]
    return runs


def _read_csv(path: Path, *, of_inputs: bool) -> dict[str, list[dict[str, float | None]]]:
    rows = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            case = case_of(row.pop("Name"), is_input=of_inputs)
            values = {column: _number(text) for column, text in row.items()}
            rows.setdefault(case, []).append(values)
    return rows


def _read_measurements(folder: Path) -> dict[str, list[dict]]:
    measurements = {}
    for path in sorted(folder.glob("*.json")):
        content = _read_object(path)
        _insist_on_a_measurement(content)
        measurements.setdefault(content["case"], []).append(content)
    return measurements


def _read_scoring(path: Path) -> dict[str, object]:
    """What a scoring says beside its numbers: `in_reference` and `partial` of a `Run`."""
    content = _read_object(path) if path.is_file() else {}
    in_reference = {
        case_of(case["name"], is_input=False): case["in_reference"]
        for case in content.get("cases", [])
        if "in_reference" in case
    }
    return {"in_reference": in_reference, "partial": bool(content.get("annotated_only"))}


def _middle(rows: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Of a case's rows that of median time, of an even number the faster of the middle two."""
    ranked = sorted(rows, key=lambda row: row["Time"] or 0.0)
    return ranked[(len(ranked) - 1) // 2]


def _read_object(path: Path) -> dict:
    """A file that is one JSON object; ValueError where it is none, or holds NaN or infinity."""
    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _insist_on_a_measurement(content: dict) -> None:
    """ValueError, or what else a wrong type raises, where it is none that can be shown."""
    series = [values for values in content["samples"].values() if values]
    numbers = [content["seconds"], *(number for values in series for number in values)]
    if not all(isinstance(number, int | float) for number in numbers):
        raise ValueError(f"{content['case']} has samples that are no numbers")
    if len({len(values) for values in series}) > 1 or not set(JSON_KEYS.values()) <= set(content):
        raise ValueError(f"{content['case']} is incomplete")


def _number(text: str | None) -> float | None:
    """A cell of a table; None where it is empty, NaN or infinite, as of what was not measured."""
    value = float(text) if text else nan
    return value if isfinite(value) else None

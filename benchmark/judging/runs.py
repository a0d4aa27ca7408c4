"""Read back the folder of one run: what `efficiency` and `accuracy` wrote of one team.

`rank`, `compare` and `report` all start here. A folder has one or both of
`TEAM_Efficiency.csv` (with `efficiency/CASE.json` for the samples) and `accuracy_per_case.csv`; the
organisers' own tables do as well. A number that cannot be right is refused, with team and case.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf, isfinite, isnan
from pathlib import Path
from typing import Any

from benchmark.checking.pages import CHECK_JSON
from benchmark.containers import results as rules
from benchmark.containers.results import EFFICIENCY_SUFFIX, FIGURES, NOT_MEASURED, Result
from benchmark.options import HarnessError
from benchmark.scoring.protocol import COLUMNS
from benchmark.scoring.tables import PER_CASE_CSV
from benchmark.text import listed
from inference.files import SUFFIXES
from inference.labels import ORGANS, TUMOR

FEW_CASES = 20
"""Number of cases below which pages caution that they are few."""

_SUMMARY_ROW = re.compile(r"(average|avg|mean|median|std|sd|sum|total|overall|min|max)\b", re.I)


class RunError(HarnessError):
    """A folder that is no run, or runs that cannot be compared; one line says why."""


Row = dict[str, float | None]
"""Official column (`Time`, `Liver_DSC`) to number."""


@dataclass(frozen=True)
class Run:
    """One team's results."""

    team: str  # the CSV's name before `_Efficiency.csv`, or else the folder's
    folder: Path
    results: dict[str, list[Result]]  # of each case
    scores: dict[str, Row]  # of each case
    environment: dict[str, Any]  # the content of `environment.json`; empty where there is none
    has_gpu: bool = False  # GPU memory was measured; a failed case's penalty is no measurement
    in_reference: dict[str, list[str]] = field(default_factory=dict)  # official names; {} unknown
    partial: bool = False  # only annotated labels were scored

    @property
    def cases(self) -> list[str]:
        """Every case that the run has something of, sorted."""
        return sorted({*self.results, *self.scores})

    @cached_property
    def shown(self) -> dict[str, Result]:
        """Of each case that was run the result that counts."""
        return {case: rules.median_run(runs) for case, runs in self.results.items()}

    def failed(self, case: str) -> bool:
        """Return whether the case counts as failed."""
        return bool(self.shown.get(case, {}).get("penalty"))

    @property
    def failed_everywhere(self) -> bool:
        """Return whether no case that was run was done."""
        return bool(self.results) and all(map(self.failed, self.results))

    @property
    def unmeasured(self) -> list[str]:
        """The cases whose GPU was not read."""
        return [case for case, shown in self.shown.items() if shown.get("status") == NOT_MEASURED]

    def measured(self, case: str, column: str) -> float | None:
        """Return an official column's figure, failures with penalties; None if not measured."""
        shown = self.shown.get(case)
        return rules.figure(shown, FIGURES[column].key) if shown else None

    @property
    def ram_measures(self) -> set[str]:
        """Return how RAM was read, keys of `RAM_MEASURES`; empty where it is unknown."""
        found = {key for runs in self.results.values() for key in rules.ram_measures(runs)}
        if found or "image" not in self.environment:
            return found
        # A table without its samples: a container's cgroup is read wherever it can be seen.
        return {"cgroup" if self.environment["image"] else "process tree"}

    def with_structure(self, label: int) -> int | None:
        """Return how many scored cases have a label in their reference; None if unknown."""
        if not self.in_reference:
            return None
        return sum(COLUMNS[label - 1] in names for names in self.in_reference.values())

    @property
    def has_samples(self) -> bool:
        """Return whether the samples of every case that was done are there."""
        return all("samples" in one for case, one in self.shown.items() if not self.failed(case))

    def score(self, case: str, metric: str) -> float | None:
        """Return a score of a case, 0 to 1; None where the run has none.

        Args:
            case: its name.
            metric: "dsc", "nsd" (mean of the 13 organs; if partial, of those scored), "tumor-dsc"
                or "tumor-nsd".
        """
        kind = metric.removeprefix("tumor-").upper()
        labels = [TUMOR] if metric.startswith("tumor-") else list(ORGANS)
        row = self.scores.get(case, {})
        found = [row.get(f"{COLUMNS[label - 1]}_{kind}") for label in labels]
        scores = [score for score in found if score is not None]
        complete = scores and (self.partial or len(scores) == len(found))
        return sum(scores) / len(scores) if complete else None


def remarks(runs: Sequence[Run]) -> list[str]:
    """Return what to know of the runs' figures, on every page that compares them."""
    found = []
    for run in runs:
        reasons = dict(run.environment.get("not_measured", {}))
        for case in run.unmeasured:
            reasons[case] = run.shown[case].get("reason") or "the GPU was not read"
        if each := [f"{name} ({reason})" for name, reason in reasons.items()]:
            found.append(f"Caution: not measured of {run.team}: {listed(each)}")
        if failed := list(filter(run.failed, run.cases)):
            found.append(f"failed of {run.team}: {listed(failed)}")
    if any(run.failed(case) for run in runs for case in run.cases):
        found.append(rules.PENALTY_SENTENCE)
    measures = {run.team: " and ".join(sorted(run.ram_measures)) for run in runs if run.results}
    if len(set(measures.values()) - {""}) > 1:
        how = "; ".join(f"{team}: {measure or 'unknown'}" for team, measure in measures.items())
        found.append(
            f"Caution: RAM was not read in the same way ({how}): do not compare it, and times "
            "only if a container's start is in all or in none"
        )
    warm = [run.team for run in runs if run.environment.get("warm_up")]
    if 0 < len(warm) < len(runs):
        found.append(f"Caution: only {', '.join(warm)} had a warm-up run before being timed")
    if partial := [run.team for run in runs if run.partial]:
        names = ", ".join(partial)
        found.append(f"scores of {names} are of annotated labels only, not the official rule")
    return found


def case_of(name: str, *, is_input: bool) -> str:
    """Return the case's name of a file's name as tables have it, with its ending or bare.

    An efficiency table names inputs, whose `_0000` is no part of the case's name; a label map's
    may be.
    """
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name.removesuffix("_0000") if is_input else name


def read_run(folder: Path) -> Run:
    """Read one run's folder.

    Raises:
        RunError: it has no table of a run, a file has another form than its name implies, or a
            number in it cannot be right.
    """
    tables = sorted(folder.glob("*" + EFFICIENCY_SUFFIX))
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise RunError(f"{folder}: a run has one team, and this folder has {names}")
    team, rows, scores = folder.resolve().name, {}, {}
    try:
        environment = _read_object(folder / "environment.json")
        for table in tables:
            team = table.name.removesuffix(EFFICIENCY_SUFFIX)
            rows = _read_csv(table, team, list(FIGURES), inf, is_input=True)
        if (table := folder / PER_CASE_CSV).is_file():
            columns = [f"{name}_{kind}" for kind in ("DSC", "NSD") for name in COLUMNS]
            every = _read_csv(table, team, columns, 1.0, is_input=False)
            for case, repeats in every.items():
                if len(repeats) > 1:
                    raise RunError(f"{table}: team {team}, case {case}: {len(repeats)} rows")
                scores[case] = repeats[0]
        results = {case: list(map(_result_of_row, repeats)) for case, repeats in rows.items()}
        results |= _read_measurements(folder / "efficiency")
        flat = [result for repeats in results.values() for result in repeats]
        has_gpu = bool(environment.get("gpu")) and not environment.get("gpu_note")
        has_gpu |= any(one["peak_gpu_mb"] is not None for one in flat if not one["penalty"])
        for result in flat:
            unread = has_gpu and result["peak_gpu_mb"] is None
            broken = (result.get("sampler") or {}).get("gpu_error")
            if broken or result["seconds"] is None or (unread and not result["penalty"]):
                result |= {"status": NOT_MEASURED, "penalty": None}
            elif unread:
                result["peak_gpu_mb"] = 0.0  # so that the area's penalty counts
        scoring = _read_object(folder / "accuracy.json")
        in_reference = {
            case_of(_as_in_tables(case["name"]), is_input=False): case["in_reference"]
            for case in scoring.get("cases", [])
            if "in_reference" in case
        }
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise RunError(f"{folder}: a table or JSON cannot be read ({error!r})") from error
    partial = bool(scoring.get("annotated_only"))
    run = Run(team, folder, results, scores, environment, has_gpu, in_reference, partial)
    if not run.cases and not (folder / CHECK_JSON).is_file():
        raise RunError(f"{folder}: neither TEAM{EFFICIENCY_SUFFIX} nor {PER_CASE_CSV} is there")
    return run


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs; those of one team get their folder beside the team's.

    Raises:
        RunError: as `read_run`.
    """
    runs = [read_run(folder) for folder in folders]
    counts = Counter(run.team for run in runs)
    return [
        replace(run, team=f"{run.team} ({run.folder})") if counts[run.team] > 1 else run
        for run in runs
    ]


def _read_csv(
    path: Path, team: str, columns: Sequence[str], most: float, *, is_input: bool
) -> dict[str, list[Row]]:
    """Read a table of numbers from 0 to `most`, case by case; empty cells and NaN are None."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path}: not comma-separated text in UTF-8 ({error})") from error
    header = table[0] if table else []
    rows: dict[str, list[Row]] = {}
    for name in ["Name", *columns] if is_input else ["Name"]:
        if name not in header:
            found = ",".join(header)[:60]
            raise RunError(f"{path}: no column {name!r}, separated by commas, in {found!r}")
    for cells in filter(None, table[1:]):
        row = dict(zip(header, cells, strict=False))
        name = row["Name"]
        where = f"{path}: team {team}, case {name}"
        if len(cells) != len(header):
            raise RunError(f"{where}: {len(cells)} cells in {len(header)} columns")
        if _SUMMARY_ROW.match(name) and not name.endswith(SUFFIXES):
            raise RunError(f"{where}: a row that sums up others is no case; remove it")
        numbers: Row = {}
        for column in filter(columns.__contains__, header):
            try:
                value = float(row[column] or "nan")
            except ValueError:
                raise RunError(f"{where}, {column}: {row[column]!r} is no number") from None
            if value == inf or not (isnan(value) or 0 <= value <= most):
                bound = f"from 0 to {most:g}" if isfinite(most) else "0 or more"
                raise RunError(f"{where}, {column}: {value:g} is not {bound}")
            numbers[column] = None if isnan(value) else value
        rows.setdefault(case_of(name, is_input=is_input), []).append(numbers)
    return rows


def _result_of_row(row: Row) -> Result:
    if (row["Time"] or 0.0) >= rules.PENALTY["seconds"]:
        figures = {"seconds": row["Time"], "peak_gpu_mb": None}
        return figures | {"status": "failed", "penalty": rules.PENALTY}
    figures = {figure.key: row[name] for name, figure in FIGURES.items()}
    return figures | {"status": "ok", "penalty": None}


def _read_measurements(folder: Path) -> dict[str, list[Result]]:
    measurements: dict[str, list[Result]] = {}
    keys = {figure.key for figure in FIGURES.values()}
    for path in sorted(folder.glob("*.json")):
        content = _read_object(path)
        series = [values for values in content["samples"].values() if values]
        numbers = [content["seconds"], *(number for values in series for number in values)]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"{content['case']} has samples that are no numbers")
        if len({len(values) for values in series}) > 1 or not keys <= set(content):
            raise ValueError(f"{content['case']} is incomplete")
        measurements.setdefault(_as_in_tables(content["case"]), []).append(content)
    return measurements


def _as_in_tables(name: str) -> str:
    """Return a name from JSON as `write_atomically` writes it into a table."""
    return name.encode(errors="backslashreplace").decode()


def _read_object(path: Path) -> dict[str, Any]:
    """Return a file's JSON object, {} without a file; ValueError if it has NaN or infinity."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number")

    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return content

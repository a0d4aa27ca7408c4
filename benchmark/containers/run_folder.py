"""The run folder: what is written there, and what `--resume` keeps of it."""

import argparse
import json
from pathlib import Path

from benchmark.containers.cases import Case
from benchmark.containers.measurement import file_stem
from benchmark.containers.tables import csv_table, markdown_page
from benchmark.messages import UsageError, say
from inference.files import write_atomically

EFFICIENCY_SUFFIX = "_Efficiency.csv"
"""After the team's name: the organisers' table."""

EFFICIENCY_MD = "efficiency.md"

SCORE_FILES = (
    *("accuracy_per_case.csv", "accuracy.json", "accuracy.md", "accuracy_official.txt"),
    *("accuracy_dsc.png", "accuracy_nsd.png"),
)
"""What `python -m benchmark accuracy` writes: scores of label maps that a new run replaces."""

RESULT_FIELDS = {"case", "status", "seconds", "repeat", "interval_s", "image_size", "output"}
"""Without which a file is no result of a case."""


def earlier_results(
    arguments: argparse.Namespace, cases: list[Case], environment: dict
) -> dict[tuple[str, int], dict]:
    """What --resume keeps; anything else of an earlier run is removed.

    Raises:
        UsageError: the run to resume is another one, or a label map is in the way that no earlier
            run of this report wrote. Nothing is removed then.
    """
    folder = arguments.report / "efficiency"
    described = _read_json(arguments.report / "environment.json")
    earlier = {path.name: _read_result(path) for path in folder.glob("*.json")}
    differences = _differences(described, environment)
    kept = {}
    if earlier and not arguments.resume:
        say(f"replacing the earlier run in {arguments.report}, its scores with it")
    elif earlier and differences:
        raise UsageError(
            f"--resume: the run in {arguments.report} has another {', '.join(differences)}: name "
            "another --report, or leave --resume out to replace it"
        )
    elif arguments.resume:
        for case in cases:
            for repeat in range(arguments.repeat):
                result = earlier.get(f"{file_stem(case.name, repeat)}.json")
                written = (arguments.outputs / f"{case.name}.nii.gz").is_file()
                scored = result and result["status"] in ("ok", "invalid output") and repeat == 0
                if result and (written or not scored):
                    kept[case.name, repeat] = result
    for case in cases:
        output = arguments.outputs / f"{case.name}.nii.gz"
        if (case.name, 0) not in kept and output.exists():
            if f"{case.name}.json" not in earlier:
                raise UsageError(f"{output} is in the way: name an empty folder for --outputs")
            output.unlink()
    keep = {file_stem(*key) for key in kept}
    for path in folder.iterdir():
        if path.suffix in (".json", ".png", ".log") and path.stem not in keep:
            path.unlink()
    if earlier and not arguments.resume:
        _remove_tables(arguments.report, (described or {}).get("team"))
    return kept


def _remove_tables(report: Path, team: object) -> None:
    """Remove what an earlier run's team left in a report: its table, its page and its scores."""
    names = [EFFICIENCY_MD, f"{team}{EFFICIENCY_SUFFIX}", *SCORE_FILES]
    for name in names:
        if Path(name).name == name:  # a name that was read, not one that may lead elsewhere
            (report / name).unlink(missing_ok=True)


def _differences(earlier: dict | None, environment: dict) -> list[str]:
    names = ("team", "image_digest", "command", "gpu", "interval_s", "memory_limit", "timeout_s")
    earlier = {"warm_up": False} | (earlier or {})  # which older reports do not say
    return [name for name in (*names, "warm_up") if earlier.get(name) != environment[name]]


def write_tables(report: Path, results: dict[str, list[dict]], environment: dict) -> None:
    """Write the official table and the page, anew after each case."""
    name = f"{environment['team']}{EFFICIENCY_SUFFIX}"
    write_atomically(report / name, csv_table(results).encode())
    write_atomically(report / EFFICIENCY_MD, markdown_page(results, environment).encode())


def write_json(path: Path, content: dict) -> None:
    """Write a file that is one JSON value, whole or not at all."""
    write_atomically(path, (json.dumps(content) + "\n").encode())


def _read_json(path: Path) -> dict | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _read_result(path: Path) -> dict | None:
    """A case's earlier result; None where the file is damaged, so that it is measured again."""
    result = _read_json(path)
    if result is None or not isinstance(result.get("samples"), dict):
        return None
    return result if set(result) >= RESULT_FIELDS else None

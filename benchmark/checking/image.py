"""A team's archive and image: names, sizes, what it is built for, and which weights ours uses."""

import json
import math
from pathlib import Path

from benchmark.checking.findings import FAILED, PASSED, WARNED, Finding, finding
from benchmark.containers import engine
from benchmark.containers.runner import Container, Folders, run_case
from benchmark.containers.sampler import Sampler

# GB (10**9 bytes), of an image unpacked, above which it is warned of; no rule of the challenge.
_WARN_GB = {"archive's size": 10.0, "image's size": 20.0}

_QUESTION_SECONDS = 60.0
_MOST_ANSWER_BYTES = 1 << 16
_ASK_WEIGHTS = """
import json
from inference.network.weights import default_weights
print(json.dumps({on: [w[0].name, w[1]] for on, w in
    {"CPU": default_weights(on_cuda=False), "CUDA": default_weights(on_cuda=True)}.items()}))
"""


def load(archive: Path) -> tuple[str | None, list[Finding]]:
    """Load an archive as the organisers do.

    Returns:
        The image to run, None if nothing can be; and what was found. Where the archive has an
        image of another name than the organisers run, that one is run.

    Raises:
        HarnessError: there is no such file.
    """
    wanted = engine.archive_image(archive)
    loaded = []
    try:
        loaded = engine.load_images(archive)
        names = ", ".join(loaded) or "no image"
        loads = finding(PASSED, "archive loads", names)
    except engine.EngineError as error:
        engine.image_id(wanted)  # raises where it is the engine that is at fault
        loads = finding(FAILED, "archive loads", str(error))
    named = archive.name == archive.name.partition(".")[0] + ".tar.gz" != ".tar.gz"
    findings = [
        finding(PASSED if named else WARNED, "archive's name", archive.name),
        _judge_size("archive's size", archive.stat().st_size),
        loads,
    ]
    if loads.level == FAILED:
        return None, findings
    check = "image's name"
    if wanted in loaded:
        return wanted, [*findings, finding(PASSED, check, wanted)]
    found = f"the organisers run {wanted}, the archive has {names}"
    return next(iter(loaded), None), [*findings, finding(FAILED, check, found)]


def find(image: str) -> tuple[str, list[Finding]]:
    """Return NAME:TAG of an image that is here already, and what was found of its name.

    Raises:
        HarnessError: there is none.
    """
    name = engine.find_image(image)
    team, _, tag = name.rpartition("/")[2].partition(":")
    plain, check = team.partition(".")[0], "image's name"
    if "/" not in name and tag == "latest" and team == plain:
        return name, [finding(PASSED, check, f"{name}: save it as {team}.tar.gz")]
    found = f"{name}; the organisers run {plain}:latest from {plain}.tar.gz"
    return name, [finding(WARNED, check, found)]


def judge_image(image: str) -> list[Finding]:
    """Judge size, processor and entry point of an image."""
    answer = engine.docker("image", "inspect", "--format", "{{json .}}", image)
    if answer.returncode != 0:
        raise engine.EngineError(f"the container engine does not answer: {answer.stderr.strip()}")
    details = json.loads(answer.stdout)
    built_for = f"{details.get('Os')}/{details.get('Architecture')}"
    level = PASSED if built_for == "linux/amd64" else FAILED
    findings = [
        _judge_size("image's size", details.get("VirtualSize") or details.get("Size") or 0),
        finding(level, "built for linux/amd64", built_for),
    ]
    if entry := (details.get("Config") or {}).get("Entrypoint"):
        findings.append(finding(WARNED, "no entry point", f"ENTRYPOINT {json.dumps(entry)}"))
    return findings


def judge_weights(image: str, memory_limit: str, log: Path) -> list[Finding]:
    """Report which weights an image of this project uses by default; of another's nothing.

    It is asked itself, without folders, network and rights; `log` gets the answer.
    """
    rights = ("--network", "none", "--read-only", "--cap-drop", "ALL", "--entrypoint", "python3")
    question = Container(image, memory_limit, extra=rights, command=("-c", _ASK_WEIGHTS))
    run_case(question, "weights", Folders(Path(), Path(), log), _QUESTION_SECONDS, Sampler())
    try:
        with log.open("rb") as file:
            chosen = json.loads(file.read(_MOST_ANSWER_BYTES))
        shown = "; ".join(f"on {on} {chosen[on][0]} ({chosen[on][1]})" for on in ("CPU", "CUDA"))
    except (ValueError, KeyError, TypeError, IndexError):
        return []
    return [finding(PASSED, "weights", shown)]


def _judge_size(check: str, size: int) -> Finding:
    limit = _WARN_GB[check]
    shown = f"{math.ceil(size / 1e7) / 100:g} GB, warned of above {limit:g} GB"
    return finding(PASSED if size <= limit * 1e9 else WARNED, check, shown)

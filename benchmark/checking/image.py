"""A team's archive and image: names, sizes, what it is built for, and which weights ours uses."""

import json
import math
from pathlib import Path

from benchmark.checking.findings import FAILED, PASSED, WARNED, Finding
from benchmark.containers.engine import (
    EngineError,
    archive_image,
    docker,
    find_image,
    image_id,
    load_images,
)
from benchmark.containers.results import OFFICIAL_INTERVAL
from benchmark.containers.runner import Container, Folders, run_case
from benchmark.containers.sampler import Sampler

_WARN_GB = {"archive's size": 10.0, "image's size": 20.0}
"""GB (10**9 bytes) of an archive, and of an image unpacked, above which it is warned of. Not a rule
of the challenge."""

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
        The image to run, None if nothing can be; and what was found. Where the archive holds an
        image of another name than the organisers run, that one is run.

    Raises:
        UsageError: there is no such file.
    """
    lost = "every case: the organisers' `docker load` and `docker run` find nothing"
    wanted, stem = archive_image(archive), archive.name.partition(".")[0]
    save = f"docker save {wanted} | gzip > {archive.name}"
    check = "archive loads"
    loaded, failure = [], None
    try:
        loaded = load_images(archive)
        failure = Finding(PASSED, check, f"it holds {', '.join(loaded) or 'no image'}")
    except EngineError as error:
        image_id(wanted)  # raises where it is the engine that is at fault
        act = f"{save}, and compare its size after copying"
        failure = Finding(FAILED, check, str(error), lost, act)
    if archive.name == f"{stem}.tar.gz" and stem:
        name = Finding(PASSED, "archive's name", archive.name)
    else:
        found, act = f"{archive.name} is not TEAM.tar.gz", f"name it {stem or 'team'}.tar.gz"
        cost = "every case, if it is not found: the image's name is the file's up to its first dot"
        name = Finding(WARNED, "archive's name", found, cost, act)
    findings = [name, _judge_size("archive's size", archive.stat().st_size), failure]
    if failure.level == FAILED:
        return None, findings
    check = "image's name"
    if wanted in loaded:
        return wanted, [*findings, Finding(PASSED, check, wanted)]
    found = f"the organisers run {wanted}, the archive holds {', '.join(loaded) or 'no image'}"
    findings.append(Finding(FAILED, check, found, lost, f"docker tag YOURS {wanted}, {save}"))
    return next(iter(loaded), None), findings


def find(image: str) -> tuple[str, list[Finding]]:
    """Return NAME:TAG of an image that is here already, and what was found of its name.

    Raises:
        UsageError: there is none.
    """
    name = find_image(image)
    team, _, tag = name.rpartition("/")[2].partition(":")
    check = "image's name"
    if "/" not in name and tag == "latest" and "." not in team:
        return name, [Finding(PASSED, check, f"{name}: save it as {team}.tar.gz")]
    plain = team.partition(".")[0]
    found = f"{name}; the organisers run {plain}:latest from {plain}.tar.gz"
    act = f"docker tag {name} {plain}:latest, docker save {plain}:latest | gzip > {plain}.tar.gz"
    return name, [Finding(WARNED, check, found, "every case, if it is saved under this name", act)]


def judge_image(image: str) -> list[Finding]:
    """Judge size, processor and entry point of an image.

    Raises:
        EngineError: the engine does not answer.
    """
    answer = docker("image", "inspect", "--format", "{{json .}}", image)
    if answer.returncode != 0:
        raise EngineError(f"the container engine does not answer: {answer.stderr.strip()}")
    details = json.loads(answer.stdout)
    findings = [_judge_size("image's size", details.get("VirtualSize") or details.get("Size") or 0)]
    built_for, check = f"{details.get('Os')}/{details.get('Architecture')}", "built for linux/amd64"
    if built_for == "linux/amd64":
        findings.append(Finding(PASSED, check, built_for))
    else:
        act = "docker build --platform linux/amd64"
        findings.append(Finding(FAILED, check, built_for, "every case: it does not start", act))
    if entry := (details.get("Config") or {}).get("Entrypoint"):
        cost = 'every case, unless it passes /bin/bash -c "sh predict.sh" on'
        found, act = f"ENTRYPOINT {json.dumps(entry)}", "ENTRYPOINT [] in the Dockerfile"
        findings.append(Finding(WARNED, "no entry point", found, cost, act))
    return findings


def judge_weights(image: str, memory_limit: str, log: Path) -> list[Finding]:
    """Report which weights an image of this project uses by default, asked of itself.

    Args:
        image: NAME:TAG.
        memory_limit: for the container, which gets no folders, no network and no rights.
        log: gets the answer.

    Returns:
        One finding; none for an image that is not of this project.
    """
    rights = ("--network", "none", "--read-only", "--cap-drop", "ALL", "--entrypoint", "python3")
    question = Container(image, memory_limit, extra=rights, command=("-c", _ASK_WEIGHTS))
    sampler = Sampler(None, OFFICIAL_INTERVAL)
    run_case(question, "weights", Folders(Path(), Path(), log), _QUESTION_SECONDS, sampler)
    try:
        with log.open("rb") as file:
            chosen = json.loads(file.read(_MOST_ANSWER_BYTES))
        shown = "; ".join(f"on {on} {chosen[on][0]} ({chosen[on][1]})" for on in ("CPU", "CUDA"))
    except (ValueError, KeyError, TypeError, IndexError):
        return []
    return [Finding(PASSED, "weights", shown)]


def _judge_size(check: str, size: int) -> Finding:
    limit = _WARN_GB[check]
    shown = f"{math.ceil(size / 1e7) / 100:g} GB, warned of above {limit:g} GB"
    if size <= limit * 1e9:
        return Finding(PASSED, check, shown)
    cost = "nothing by the rules; uploads break off, and disks fill"
    act = "a slim base, pip --no-cache-dir, a .dockerignore, and no data sets or training code"
    return Finding(WARNED, check, shown, cost, act)

"""A team's archive and image: names, sizes, what it is built for, and which weights ours uses."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from benchmark.checking.findings import FAILED, PASSED, WARNED, Finding
from benchmark.containers.engine import (
    EngineError,
    archive_image,
    docker,
    image_id,
    load_images,
)
from benchmark.containers.runner import run_case
from benchmark.containers.sampler import Sampler
from benchmark.containers.tables import OFFICIAL_INTERVAL
from benchmark.containers.targets import Container, Folders, MemoryLimit
from benchmark.messages import UsageError

WARN_ARCHIVE_GB = 10.0
"""GB (10**9 bytes) of an archive above which it is warned of. Not a rule of the challenge."""

WARN_IMAGE_GB = 20.0
"""GB of an unpacked image above which it is warned of. Not a rule of the challenge."""

_QUESTION_SECONDS = 60.0

_MOST_ANSWER_BYTES = 1 << 16

_ASK_WEIGHTS = """
import json
from inference.weights import default_weights
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
    if not archive.is_file():
        raise UsageError(f"--archive {archive} is not a file")
    lost = "every case: the organisers' `docker load` and `docker run` find nothing"
    wanted = archive_image(archive)
    findings = [_judge_archive_name(archive), _judge_size("archive's size", archive.stat().st_size)]
    check = "archive loads"
    try:
        loaded = load_images(archive)
    except EngineError as error:
        image_id(wanted)  # raises where it is the engine that is at fault
        advice = f"docker save {wanted} | gzip > {archive.name}, and compare its size after copying"
        return None, [*findings, Finding(FAILED, check, str(error), lost, advice)]
    findings.append(Finding(PASSED, check, f"it holds {', '.join(loaded) or 'no image'}"))
    check = "image's name"
    if wanted in loaded:
        return wanted, [*findings, Finding(PASSED, check, wanted)]
    found = f"the organisers run {wanted}, the archive holds {', '.join(loaded) or 'no image'}"
    advice = f"docker tag YOURS {wanted}, docker save {wanted} | gzip > {archive.name}"
    findings.append(Finding(FAILED, check, found, lost, advice))
    return next(iter(loaded), None), findings


def find(image: str) -> tuple[str, list[Finding]]:
    """An image that is here already.

    Returns:
        NAME:TAG, and what was found of its name.

    Raises:
        UsageError: there is none.
    """
    name = image if ":" in image.rpartition("/")[2] else f"{image}:latest"
    if image_id(name) is None:
        raise UsageError(f"there is no image {name} here: `docker pull` it, or use --archive")
    team, _, tag = name.rpartition("/")[2].partition(":")
    check = "image's name"
    if "/" in name or tag != "latest" or "." in team:
        plain = team.partition(".")[0]
        found = f"{name}; the organisers run {plain}:latest from {plain}.tar.gz"
        advice = (
            f"docker tag {name} {plain}:latest, docker save {plain}:latest | gzip > {plain}.tar.gz"
        )
        cost = "every case, if it is saved under this name"
        return name, [Finding(WARNED, check, found, cost, advice)]
    return name, [Finding(PASSED, check, f"{name}: save it as {team}.tar.gz")]


def judge_image(image: str) -> list[Finding]:
    """Size, processor and entry point of an image.

    Raises:
        EngineError: the engine does not answer.
    """
    answer = docker("image", "inspect", "--format", "{{json .}}", image)
    if answer.returncode != 0:
        raise EngineError(f"the container engine does not answer: {answer.stderr.strip()}")
    details = json.loads(answer.stdout)
    size = details.get("VirtualSize") or details.get("Size") or 0
    findings = [_judge_size("image's size", size)]
    built_for = f"{details.get('Os')}/{details.get('Architecture')}"
    check = "built for linux/amd64"
    if built_for == "linux/amd64":
        findings.append(Finding(PASSED, check, built_for))
    else:
        advice = "docker build --platform linux/amd64"
        findings.append(Finding(FAILED, check, built_for, "every case: it does not start", advice))
    if entry := (details.get("Config") or {}).get("Entrypoint"):
        findings.append(
            Finding(
                WARNED, "no entry point", f"ENTRYPOINT {json.dumps(entry)}",
                "every case, unless it passes /bin/bash -c \"sh predict.sh\" on",
                "ENTRYPOINT [] in the Dockerfile",
            )
        )  # fmt: skip
    return findings


@dataclass(frozen=True)
class _WeightsQuestion(Container):
    """An image, asked which weights it takes; it gets no folders, no network and no rights."""

    def command_line(self, name: str, folders: Folders) -> list[str]:
        return [
            *("docker", "container", "run", "-m", str(self.memory_limit), "--name", name, "--rm"),
            *("--network", "none", "--read-only", "--cap-drop", "ALL"),
            *("--entrypoint", "python3", self.image, "-c", _ASK_WEIGHTS),
        ]


def judge_weights(image: str, memory_limit: MemoryLimit, log: Path) -> list[Finding]:
    """Which weights an image of this project uses by default, asked of itself.

    Args:
        image: NAME:TAG.
        memory_limit: for the container.
        log: gets the answer.

    Returns:
        One finding; none for an image that is not of this project.
    """
    question = _WeightsQuestion(image, memory_limit, gpu=None, phases=False)
    sampler = Sampler(None, OFFICIAL_INTERVAL)
    run_case(question, "weights", Folders(Path(), Path(), log), _QUESTION_SECONDS, sampler)
    try:
        with log.open("rb") as file:
            chosen = json.loads(file.read(_MOST_ANSWER_BYTES))
        shown = "; ".join(f"on {on} {chosen[on][0]} ({chosen[on][1]})" for on in ("CPU", "CUDA"))
    except (ValueError, KeyError, TypeError, IndexError):
        return []
    return [Finding(PASSED, "weights", shown)]


def _judge_archive_name(archive: Path) -> Finding:
    check, stem = "archive's name", archive.name.partition(".")[0]
    if archive.name == f"{stem}.tar.gz" and stem:
        return Finding(PASSED, check, archive.name)
    return Finding(
        WARNED, check, f"{archive.name} is not TEAM.tar.gz",
        "every case, if it is not found: the image's name is the file's up to its first dot",
        f"name it {stem or 'team'}.tar.gz",
    )  # fmt: skip


def _judge_size(check: str, size: int) -> Finding:
    limit = WARN_ARCHIVE_GB if "archive" in check else WARN_IMAGE_GB
    shown = f"{math.ceil(size / 1e7) / 100:g} GB, warned of above {limit:g} GB"
    if size <= limit * 1e9:
        return Finding(PASSED, check, shown)
    return Finding(
        WARNED, check, shown, "nothing by the rules; uploads break off, and disks fill",
        "a slim base, pip --no-cache-dir, a .dockerignore, and no data sets or training code",
    )  # fmt: skip

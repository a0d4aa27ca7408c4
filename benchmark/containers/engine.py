"""The container engine, through its command line: images, archives, containers to remove."""

import contextlib
import platform
import re
import secrets
import shutil
import subprocess
import time
from pathlib import Path

import psutil

from benchmark.options import HarnessError
from benchmark.text import log

_LABEL = "abdoseg.benchmark"
_ENGINE_SECONDS = 60.0  # for the engine's answer to a question


class EngineError(HarnessError):
    """The container engine cannot do what is asked."""


def docker(*arguments: str, seconds: float | None = _ENGINE_SECONDS) -> subprocess.CompletedProcess:
    """Ask the engine through its command line.

    Raises:
        EngineError: there is no `docker` command, or no answer within `seconds`.
    """
    try:
        return subprocess.run(
            ["docker", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise EngineError("there is no docker command here; use --command instead") from error
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"docker {arguments[0]} has not answered for {seconds:g} s") from error


def engine_version() -> str:
    """Return the engine's version; "" where it does not answer."""
    answer = docker("version", "--format", "{{.Server.Version}}")
    return answer.stdout.strip() if answer.returncode == 0 else ""


def container_name(image: str, case: str) -> str:
    """Return a name of its own for the container of one run of one case."""
    return re.sub(r"[^a-zA-Z0-9_.-]", "_", f"{team_of(image)}-{case}-{secrets.token_hex(4)}")


def owner_label(process: psutil.Process | None = None) -> str:
    """Return the label of a process's containers; this one's if None."""
    process = process or psutil.Process()
    return f"{_LABEL}={platform.node()}/{process.pid}/{process.create_time():.2f}"


def remove_abandoned() -> None:
    """Remove the containers of a harness on this machine that was killed before it could."""
    shape = f'{{{{.Names}}}}\t{_LABEL}={{{{.Label "{_LABEL}"}}}}'
    listed = docker("container", "ls", "-a", "--filter", f"label={_LABEL}", "--format", shape)
    for line in listed.stdout.splitlines():
        name, _, label = line.partition("\t")
        owner = re.fullmatch(rf"{_LABEL}={re.escape(platform.node())}/(\d+)/.*", label)
        alive = False
        with contextlib.suppress(psutil.Error):
            alive = owner is None or owner_label(psutil.Process(int(owner[1]))) == label
        if not alive:
            log(f"removing {name}, left by a run that was killed")
            remove_container(name)


def remove_container(name: str) -> None:
    """Remove a container by name, also one that the engine is still about to create."""
    absent = 0
    for _ in range(20):
        try:
            docker("container", "rm", "-f", name)
            listed = docker("container", "ls", "-aq", "--filter", f"name=^/{name}$")
        except EngineError as error:
            log(f"container {name} may still be there: {error}")
            return
        absent = absent + 1 if listed.returncode == 0 and not listed.stdout.strip() else 0
        if absent == 2:
            return
        time.sleep(0.25)
    log(f"container {name} is still there: remove it with `docker rm -f {name}`")


def team_of(image: str) -> str:
    """Return the team's name in an image's: "a/team:latest" is of "team"."""
    return image.rpartition("/")[2].partition(":")[0]


def image_id(image: str) -> str | None:
    """Return the digest of an image's content, None where the engine (EngineError) has none."""
    answer = docker("image", "inspect", "--format", "{{.Id}}", image)
    if answer.returncode == 0:
        return answer.stdout.strip()
    if "No such image" in answer.stderr:
        return None
    raise EngineError(f"the container engine does not answer: {answer.stderr.strip()}")


def find_image(name: str) -> str:
    """Return NAME:TAG of an image that is here; HarnessError if there is none."""
    image = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
    if image_id(image) is None:
        raise HarnessError(f"there is no image {image} here: `docker pull` it, or use --archive")
    return image


def archive_image(archive: Path) -> str:
    """Return the image that the organisers run: the file's name up to the first dot, lower case."""
    return archive.name.partition(".")[0].lower() + ":latest"


def load_images(archive: Path) -> list[str]:
    """Load a `docker save` file; return its images' names, or ids where they have none."""
    if not archive.is_file():
        raise HarnessError(f"--archive {archive} is not a file")
    answer = docker("load", "-i", str(archive), seconds=None)
    if answer.returncode != 0:
        raise EngineError(f"docker does not load {archive}: {answer.stderr.strip()}")
    return re.sub(r"Loaded image( ID)?: ", "", answer.stdout).split()


def load_archive(archive: Path) -> str:
    """Load a `docker save` file and return the image that the organisers run.

    Raises:
        HarnessError: there is no such file, it does not load, or has no image of that name.
    """
    loaded, image = load_images(archive), archive_image(archive)
    if image not in loaded:  # an image of that name may be here from before
        raise EngineError(
            f"{archive.name} has {', '.join(loaded) or 'no image'}, but the organisers run "
            f"{image}: name the image so before `docker save`"
        )
    return image


def remove_image(image: str) -> str | None:
    """Remove an image by name; return None if it is gone, else the engine's reason."""
    answer = docker("image", "rm", "-f", image, seconds=None)
    if answer.returncode == 0 or "No such image" in answer.stderr:
        return None
    return answer.stderr.strip()


def free_image_bytes() -> int | None:
    """Return the free space where the engine stores images; None where it cannot be seen."""
    root = docker("info", "--format", "{{.DockerRootDir}}").stdout.strip()
    try:
        return shutil.disk_usage(root).free if root else None
    except OSError:
        return None

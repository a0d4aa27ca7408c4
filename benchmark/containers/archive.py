"""A team's `docker save` file looked at before it is loaded, and its images removed afterwards."""

import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from isal import igzip, isal_zlib

from benchmark.containers.engine import docker

_GZIP = b"\x1f\x8b"

_MOST_MANIFEST_BYTES = 16 << 20

_CHUNK = 1 << 20


class ArchiveError(ValueError):
    """A file that is no archive of images; one line says why."""


@dataclass(frozen=True)
class ArchiveContent:
    """What an archive holds.

    Attributes:
        images: names with tags, as `docker load` will give them.
        load_bytes: what loading takes on the engine's disk at its height: the archive unpacked,
            and the layers unpacked from it.
    """

    images: tuple[str, ...]
    load_bytes: int


def inspect_archive(archive: Path, most_bytes: int | None = None) -> ArchiveContent:
    """Read an archive through once, without keeping anything of it.

    Args:
        archive: `docker save`'s file, gzipped or not.
        most_bytes: to stop at, as soon as it is known to take more; `images` may then lack some.

    Raises:
        ArchiveError: it is damaged, or no `docker save` file.
    """
    need, images = 0, None
    try:
        with _unzipped(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                need += member.size
                if most_bytes is not None and need > most_bytes:
                    return ArchiveContent(images or (), need)
                content = tar.extractfile(member)
                if member.name == "manifest.json":
                    images = _names(content.read(_MOST_MANIFEST_BYTES))
                    continue
                for size in _unpacked(content):
                    need += size
                    if most_bytes is not None and need > most_bytes:
                        return ArchiveContent(images or (), need)
    except (tarfile.TarError, EOFError, OSError, isal_zlib.error) as error:
        raise ArchiveError(f"damaged, or no `docker save` file ({error})") from error
    if images is None:
        raise ArchiveError("no `docker save` file: it has no manifest.json")
    return ArchiveContent(images, need)


def _unzipped(archive: Path) -> BinaryIO:
    with archive.open("rb") as file:
        zipped = file.read(2) == _GZIP
    return igzip.open(archive, "rb") if zipped else archive.open("rb")


def _unpacked(content: BinaryIO) -> Iterator[int]:
    """The bytes of a layer, part by part, unpacked where it is gzipped itself."""
    part = content.read(_CHUNK)
    unzip = isal_zlib.decompressobj(31) if part.startswith(_GZIP) else None
    while part:
        if unzip is None:
            yield len(part)
        else:
            yield len(unzip.decompress(part, _CHUNK))
            while unzip.unconsumed_tail:
                yield len(unzip.decompress(unzip.unconsumed_tail, _CHUNK))
        part = content.read(_CHUNK)


def _names(manifest: bytes) -> tuple[str, ...]:
    try:
        entries = json.loads(manifest)
        return tuple(str(tag) for entry in entries for tag in entry["RepoTags"] or ())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArchiveError(f"its manifest.json cannot be read ({error!r})") from error


def free_image_bytes() -> int | None:
    """Free space where the engine keeps its images; None where that cannot be seen from here.

    Raises:
        EngineError: the engine does not answer.
    """
    root = docker("info", "--format", "{{.DockerRootDir}}").stdout.strip()
    try:
        return shutil.disk_usage(root).free if root else None
    except OSError:
        return None


def remove_image(image: str) -> str | None:
    """Remove an image by name; None if it is gone, else the engine's reason."""
    answer = docker("image", "rm", "-f", image, seconds=None)
    if answer.returncode == 0 or "No such image" in answer.stderr:
        return None
    return answer.stderr.strip()

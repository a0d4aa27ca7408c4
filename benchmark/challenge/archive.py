"""A team's `docker save` file, read through before it is loaded: its images and what they take."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from isal import igzip, isal_zlib

_GZIP = b"\x1f\x8b"
_MOST_MANIFEST_BYTES = 16 << 20
_CHUNK = 1 << 20


class ArchiveError(ValueError):
    """A file that is no archive of images; one line says why."""


@dataclass(frozen=True)
class ArchiveContent:
    """What an archive holds: image names with tags, as `docker load` will give them.

    `load_bytes` is what loading takes on the engine's disk at its height: the archive unpacked, and
    the layers unpacked from it.
    """

    images: tuple[str, ...]
    load_bytes: int


def inspect_archive(archive: Path, most_bytes: int | None = None) -> ArchiveContent:
    """Read an archive through once and store nothing of it.

    Args:
        archive: `docker save`'s file, gzipped or not.
        most_bytes: to stop at, as soon as it is known to take more; `images` may then lack some.

    Raises:
        ArchiveError: it is damaged, or no `docker save` file.
    """
    need, images = 0, None
    try:
        with archive.open("rb") as file:
            opened = igzip.open(archive, "rb") if file.read(2) == _GZIP else archive.open("rb")
        with opened as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for part in _parts(tar):
                if isinstance(part, tuple):
                    images = part
                    continue
                need += part
                if most_bytes is not None and need > most_bytes:
                    return ArchiveContent(images or (), need)
    except (tarfile.TarError, EOFError, OSError, isal_zlib.error) as error:
        raise ArchiveError(f"damaged, or no `docker save` file ({error})") from error
    if images is None:
        raise ArchiveError("no `docker save` file: it has no manifest.json")
    return ArchiveContent(images, need)


def _parts(tar: tarfile.TarFile) -> Iterator[int | tuple[str, ...]]:
    """Yield sizes of files and of layers unpacked, in parts, and the images' names where they are.

    A layer may be gzipped itself.
    """
    for member in filter(tarfile.TarInfo.isfile, tar):
        yield member.size
        content = tar.extractfile(member)
        if member.name == "manifest.json":
            yield _names(content.read(_MOST_MANIFEST_BYTES))
            continue
        part = content.read(_CHUNK)
        unzip = isal_zlib.decompressobj(31) if part.startswith(_GZIP) else None
        while part:
            yield len(unzip.decompress(part, _CHUNK) if unzip else part)
            while unzip and unzip.unconsumed_tail:
                yield len(unzip.decompress(unzip.unconsumed_tail, _CHUNK))
            part = content.read(_CHUNK)


def _names(manifest: bytes) -> tuple[str, ...]:
    try:
        entries = json.loads(manifest)
        return tuple(str(tag) for entry in entries for tag in entry["RepoTags"] or ())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArchiveError(f"its manifest.json cannot be read ({error!r})") from error

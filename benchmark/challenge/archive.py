"""A team's `docker save` file, read through before it is loaded: its images and what they take."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from isal import igzip, isal_zlib

_MOST_MANIFEST_BYTES = 16 << 20
_CHUNK = 1 << 20


class ArchiveError(ValueError):
    """A file that is no archive of images; one line says why."""


class ArchiveContent(NamedTuple):
    """What an archive contains.

    Attributes:
        images: names with tags, as `docker load` will give them.
        load_bytes: what loading takes on the engine's disk at its height: the archive unpacked, and
            the layers unpacked from it.
    """

    images: tuple[str, ...]
    load_bytes: int


def inspect_archive(archive: Path, most_bytes: int | None = None) -> ArchiveContent:
    """Read an archive through once and store nothing of it.

    Args:
        archive: `docker save`'s file, gzipped or not; so may its layers be.
        most_bytes: to stop at, as soon as it is known to take more; `images` may then lack some.

    Raises:
        ArchiveError: it is damaged, or no `docker save` file.
    """
    need, images = 0, None
    try:
        with archive.open("rb") as file, tarfile.open(fileobj=_unzipped(file), mode="r|") as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is None:  # a folder or a link
                    continue
                need += member.size
                if member.name == "manifest.json":
                    entries = json.loads(content.read(_MOST_MANIFEST_BYTES))
                    images = tuple(str(tag) for entry in entries for tag in entry["RepoTags"] or ())
                    continue
                layer = _unzipped(content)
                while part := layer.read(_CHUNK):
                    need += len(part)
                    if most_bytes is not None and need > most_bytes:
                        return ArchiveContent(images or (), need)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArchiveError(f"its manifest.json cannot be read ({error!r})") from error
    except (tarfile.TarError, EOFError, OSError, isal_zlib.error) as error:  # type: ignore[misc]
        raise ArchiveError(f"damaged, or no `docker save` file ({error})") from error
    if images is None:
        raise ArchiveError("no `docker save` file: it has no manifest.json")
    return ArchiveContent(images, need)


def _unzipped(file: Any) -> Any:  # noqa: ANN401 (any file object of the libraries)
    buffered = io.BufferedReader(file)
    return igzip.GzipFile(fileobj=buffered) if buffered.peek(2)[:2] == b"\x1f\x8b" else buffered

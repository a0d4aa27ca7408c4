"""A team's `docker save` file, read through before it is loaded: its images and what they take."""

import json
import tarfile
from pathlib import Path

from isal import igzip, isal_zlib

_GZIP = b"\x1f\x8b"
_MOST_MANIFEST_BYTES = 16 << 20
_UNZIPPED = 3  # bytes of a layer for each of its gzipped ones, of a usual image


class ArchiveError(ValueError):
    """A file that is no archive of images; one line says why."""


def inspect_archive(archive: Path) -> tuple[list[str], int]:
    """Read an archive through once and store nothing of it.

    Args:
        archive: `docker save`'s file, gzipped or not; so may its layers be.

    Returns:
        The images' names with tags, as `docker load` will give them; and how many bytes loading
        takes on the engine's disk at its height, the archive unpacked and the layers unpacked from
        it, of which gzipped ones are estimated.

    Raises:
        ArchiveError: it is damaged, or no `docker save` file.
    """
    need, images = 0, None
    try:
        with archive.open("rb") as file:
            opened = igzip.open(archive, "rb") if file.read(2) == _GZIP else archive.open("rb")
        with opened as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is None:  # a folder or a link
                    continue
                if member.name == "manifest.json":
                    entries = json.loads(content.read(_MOST_MANIFEST_BYTES))
                    images = [str(tag) for entry in entries for tag in entry["RepoTags"] or ()]
                need += member.size * (1 + (_UNZIPPED if content.read(2) == _GZIP else 1))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArchiveError(f"its manifest.json cannot be read ({error!r})") from error
    except (tarfile.TarError, EOFError, OSError, isal_zlib.error) as error:  # type: ignore[misc]
        raise ArchiveError(f"damaged, or no `docker save` file ({error})") from error
    if images is None:
        raise ArchiveError("no `docker save` file: it has no manifest.json")
    return images, need

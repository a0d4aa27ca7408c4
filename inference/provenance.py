"""Who makes the label maps of a run: program, version, and the weights by their SHA-256."""

import hashlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from inference import __version__

MADE_BY_BYTES = 79
"""Room in a NIfTI header's `descrip`: 80 bytes, the last of which is 0."""

_DIGITS = 16  # of the SHA-256 that a label map's header holds

# Packages whose version decides what a label map says.
_PACKAGES = ("torch", "numpy", "nibabel", "isal", "connected-components-3d")


def made_by(weights: str = "", digest: str = "", labels: tuple[int, ...] = ()) -> str:
    """What a label map's header says of its maker, in ASCII, at most 79 characters.

    Args:
        weights: their files' names without endings; cut where there is no room for them.
        digest: `Provenance.digest`, hexadecimal; its first 16 digits are taken.
        labels: that were asked for; () for all.
    """
    program = f"abdoseg {__version__}"
    if not digest:
        return program
    end = f" sha256:{digest[:_DIGITS]}"
    if labels:
        end += f" labels:{','.join(map(str, labels))}"
    shown = "".join(c if " " < c <= "~" else "?" for c in weights)
    return f"{program} {shown[: MADE_BY_BYTES - len(program) - 1 - len(end)]}{end}"


@dataclass
class Provenance:
    """What made the label maps of a run.

    Attributes:
        find_weights: tells the weights' files; called once, when first asked for.
        labels: that were asked for; () for all.
        device: the network runs on, in words; "" until it does.
        precision: of the network's numbers, such as bfloat16; "" until it runs.
    """

    find_weights: Callable[[], Sequence[Path]]
    labels: tuple[int, ...] = ()
    device: str = ""
    precision: str = ""

    @cached_property
    def weights(self) -> tuple[Path, ...]:
        """The weights' files; of several the probabilities are averaged."""
        return tuple(self.find_weights())

    @property
    def weights_names(self) -> str:
        """The files' names, joined by "+"."""
        return "+".join(path.name for path in self.weights)

    @cached_property
    def digests(self) -> str:
        """SHA-256 of each of the weights' files, hexadecimal, joined by "+".

        Raises:
            OSError: a file cannot be read.
        """
        found = []
        for path in self.weights:
            with path.open("rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest())
        return "+".join(found)

    @property
    def digest(self) -> str:
        """The SHA-256 of the one weights' file, or that of `digests` where there are several.

        Raises:
            OSError: a file cannot be read.
        """
        if len(self.weights) == 1:
            return self.digests
        return hashlib.sha256(self.digests.encode()).hexdigest()

    @cached_property
    def made_by(self) -> str:
        """What the header of each label map says.

        Raises:
            OSError: the weights cannot be read.
        """
        stems = "+".join(path.stem for path in self.weights)
        return made_by(stems, self.digest, self.labels)

    @cached_property
    def versions(self) -> dict[str, str | None]:
        """Of the program, the interpreter and the packages that a label map depends on."""
        from importlib.metadata import PackageNotFoundError, version  # for a manifest alone

        found: dict[str, str | None] = {"abdoseg": __version__, "python": platform.python_version()}
        for package in _PACKAGES:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = None
        return found

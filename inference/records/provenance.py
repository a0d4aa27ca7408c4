"""What makes the label maps of a run: program, version, and the weights by their SHA-256."""

import hashlib
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .. import __version__

_SIGNATURE_BYTES = 79  # of a NIfTI header's `descrip`, without the 0 at its end
_DIGITS = 16  # of the SHA-256 in a label map's header

# Packages whose version may change a label map.
_PACKAGES = ("torch", "numpy", "nibabel", "isal", "connected-components-3d")


def format_signature(weights: str = "", digest: str = "", labels: tuple[int, ...] = ()) -> str:
    """Return a label map's origin for its header, in ASCII, at most 79 characters.

    Args:
        weights: their files' names without endings; cut where they are too long.
        digest: `Provenance.digest`, hexadecimal; its first 16 digits are used.
        labels: that were asked for; () for all.
    """
    program = f"abdoseg {__version__}"
    if not digest:
        return program
    end = f" sha256:{digest[:_DIGITS]}"
    if labels:
        end += f" labels:{','.join(map(str, labels))}"
    shown = "".join(c if " " < c <= "~" else "?" for c in weights)
    return f"{program} {shown[: _SIGNATURE_BYTES - len(program) - 1 - len(end)]}{end}"


def same_signature(one: str, other: str) -> bool:
    """Return whether version, weights and labels are the same; weights may have other names."""
    names = re.compile(r"(?<=^abdoseg)( \S+) .*(?= sha256:)")
    return names.sub(r"\1", one) == names.sub(r"\1", other)


@dataclass
class Provenance:
    """What makes the label maps of a run; weights that cannot be read are an `OSError`.

    Attributes:
        find_weights: returns the weights' files; called once, when they are first asked for.
        labels: that were asked for; () for all.
        device: of the network, as text; "" until it runs.
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
        """SHA-256 of each of the weights' files, hexadecimal, joined by "+"."""
        found = []
        for path in self.weights:
            with path.open("rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest())
        return "+".join(found)

    @property
    def digest(self) -> str:
        """The SHA-256 of the one weights' file, or that of `digests` where there are several."""
        if len(self.weights) == 1:
            return self.digests
        return hashlib.sha256(self.digests.encode()).hexdigest()

    @cached_property
    def signature(self) -> str:
        """The signature of each label map."""
        stems = "+".join(path.stem for path in self.weights)
        return format_signature(stems, self.digest, self.labels)

    @cached_property
    def versions(self) -> dict[str, str | None]:
        """Versions of the program, of Python and of the packages that a label map depends on."""
        from importlib.metadata import PackageNotFoundError, version  # for a manifest alone

        found: dict[str, str | None] = {"abdoseg": __version__, "python": platform.python_version()}
        for package in _PACKAGES:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = None
        return found

"""What the commands share: errors that end one in a line, and numbers as options."""

import argparse
import contextlib
import math
import re
from collections.abc import Callable


class HarnessError(RuntimeError):
    """A command cannot go on: exit code 2; the message is the reason, in one line."""


def number(
    what: str, accepts: Callable[[float], bool], kind: type = float
) -> Callable[[str], float]:
    """Return an option's type that refuses every other number with "WHAT is needed"."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if math.isfinite(value) and accepts(value):
                return value
        raise argparse.ArgumentTypeError(f"{what} is needed, not {text!r}")

    return parse


positive = number("a number above 0", lambda value: value > 0)
not_negative = number("a number of 0 or more", lambda value: value >= 0)
count = number("a whole number from 1", lambda value: value >= 1, int)
whole = number("a whole number from 0", lambda value: value >= 0, int)
odd_count = number("an odd number such as 1, 3 or 5", lambda n: n >= 1 and n % 2 == 1, int)


def memory_size(text: str) -> str:
    """Read a size as `docker run -m` takes it: "28g", "28G" and "28gb" are "28g"; or "512m"."""
    match = re.fullmatch(r"([1-9]\d*[mg])b?", text.lower())
    if not match:
        raise argparse.ArgumentTypeError(f"a size like 28g or 512m is needed, not {text!r}")
    return match[1]


def size_mb(size: str) -> int:
    """Return a `memory_size` in MB (2**20 bytes)."""
    return int(size[:-1]) * (1024 if size[-1] == "g" else 1)

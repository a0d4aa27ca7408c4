"""Numbers on a command line, each refused in a line that says what is needed."""

import argparse
import math


def positive(text: str) -> float:
    """Read an option that is a number above 0."""
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"a number above 0 is needed, not {text}")
    return value


def not_negative(text: str) -> float:
    """Read an option that is a number of 0 or more."""
    value = float(text)
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"a number of 0 or more is needed, not {text}")
    return value


def odd_count(text: str) -> int:
    """Read a number of repetitions: odd, so that one of them is the middle."""
    value = int(text)
    if value < 1 or value % 2 == 0:
        raise argparse.ArgumentTypeError(
            f"an odd number such as 1, 3 or 5 is needed, so that one run is in the middle, not "
            f"{text}"
        )
    return value

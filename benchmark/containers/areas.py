"""Areas under the curves that were sampled."""

from collections.abc import Sequence

import numpy as np


def flare_area(samples: Sequence[float], interval: float, tolerance: float = 0.0) -> float:
    """Area under a curve by the organisers' rule: round(sum(samples) * interval).

    Nothing is subtracted but the tolerance, no time stamp is used, and each sample stands for one
    interval (`load_json.py` of the organisers, where the interval is 0.1 s).

    Args:
        samples: one reading a tick, in MB.
        interval: seconds.
        tolerance: MB that cost nothing; each sample counts as max(0, sample − tolerance).

    Returns:
        The area in MB·s, a whole number.
    """
    return float(np.round(np.maximum(np.asarray(samples) - tolerance, 0).sum() * interval))


def true_area(times: Sequence[float], samples: Sequence[float], tolerance: float = 0.0) -> float:
    """Area under a curve by the trapezoidal rule over the times of the readings.

    Args:
        times: seconds, one for each sample.
        samples: MB.
        tolerance: MB that cost nothing; each sample counts as max(0, sample − tolerance).

    Returns:
        The area in MB·s from the first reading to the last.
    """
    return float(np.trapezoid(np.maximum(np.asarray(samples) - tolerance, 0), times))

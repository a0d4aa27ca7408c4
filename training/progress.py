"""What a run says of its progress: lines, the time that is left, and how long is too long."""

import time

import torch

from training.recipe import Recipe

LONGEST_SILENCE_S = 30.0
"""A run that reaches no line of its `log_interval` for so long says where it is."""

_TOO_LONG_S = 24 * 3600.0


def duration(seconds: float) -> str:
    """Seconds in the unit that a reader would choose: s, min, h or days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours >= 48:
        return f"{hours / 24:.0f} days"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def too_long(seconds: float, recipe: Recipe, device: torch.device) -> str:
    """What to do where a run would take more than a day of a CPU, in one line; "" elsewhere.

    Args:
        seconds: that the whole run would take.
        recipe: of the run.
        device: that trains.
    """
    if device.type != "cpu" or seconds < _TOO_LONG_S:
        return ""
    slim = recipe.base_channels <= 16 and recipe.matrix_reduction > 1
    instead = "give fewer --steps" if slim else "use --recipe slim"
    return f"about {max(1, round(seconds / 86400))} days on this device: {instead}, or a GPU"


class StepClock:
    """Tells when a step is worth a line beside those of `log_interval`, and writes that line.

    The first step of a sitting is told at once, for only then is it known how long the run will
    take; after that nothing is silent for longer than `LONGEST_SILENCE_S`.
    """

    def __init__(self, recipe: Recipe, device: torch.device, step: int) -> None:
        self.recipe = recipe
        self.device = device
        self.first = step + 1
        self.started = self.told = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether this step, just done, is to be told."""
        return step == self.first or time.monotonic() - self.told >= LONGEST_SILENCE_S

    def pause(self, seconds: float) -> None:
        """Leave out time that was no training."""
        self.started += seconds
        self.told += seconds

    def told_now(self) -> None:
        """A line was printed otherwise."""
        self.told = time.monotonic()

    def lines(self, step: int, loss: float) -> list[str]:
        """The line of a step, and after the first one what to do if the run takes too long.

        Args:
            step: just done.
            loss: of this step alone.
        """
        self.told = time.monotonic()
        seconds = (self.told - self.started) / (step - self.first + 1)
        left = seconds * (self.recipe.steps - step)
        lines = [
            f"step {step}/{self.recipe.steps}  loss {loss:.4f}  {seconds:.1f} s a step  "
            f"{duration(left)} left"
        ]
        if step == self.first:
            lines += filter(None, [too_long(left + seconds, self.recipe, self.device)])
        return lines

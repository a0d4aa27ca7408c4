"""The state of a run: what a checkpoint holds, and where a run resumes."""

import errno
import math
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from inference.files import one_line, whole_file
from training import TrainingError
from training.tables import Metrics

ADVICE = (
    "the same command with a lower --learning-rate, --set gradient_clip=1 or --set precision=fp32 "
    "resumes at the last checkpoint"
)
"""What may help a run whose loss or weights are no longer finite; these may change on resuming."""


_ERRORS = OSError, RuntimeError, EOFError, UnpicklingError, LookupError, TypeError, ValueError


@dataclass
class State:
    """Everything of a run that changes from step to step."""

    network: nn.Module
    average: nn.Module | None  # exponential moving
    optimizer: torch.optim.Optimizer
    loss_sum: Tensor  # of the steps since the last row of metrics, on the device
    loss_count: int = 0  # of those steps
    step: int = 0  # done so far
    seconds: float = 0.0  # of training
    metrics: list[Metrics] = field(default_factory=list)  # rows of `metrics.csv`

    @property
    def trained(self) -> nn.Module:
        """The network that is scored and exported: the average where there is one."""
        return self.average or self.network

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole and flushed to the disk or not at all.

        Raises:
            TrainingError: the weights are no longer finite; what is there stays.
            OSError: the file cannot be written.
        """
        content = {
            "network": self.network.state_dict(),
            "average": self.average and self.average.state_dict(),
            "weights": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss_sum": self.loss_sum.item(),
            **{name: getattr(self, name) for name in ("loss_count", "step", "seconds")},
            "metrics": [tuple(row) for row in self.metrics],
        }
        if not all_finite(content):
            there = f"{path} stays as it was" if path.is_file() else "no checkpoint is there"
            raise TrainingError(
                f"the weights are not finite at step {self.step}, so not saved: {there}; {ADVICE}"
            )
        with whole_file(path) as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # torch's own, on top of what the file raised
                raise error.__context__ or error from None

    def load(self, path: Path, device: torch.device) -> None:
        """Resume from what `save` wrote; raises as `read_checkpoint`."""
        content = read_checkpoint(path, device)
        self.network.load_state_dict(content["network"])
        if self.average:
            self.average.load_state_dict(content["average"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.loss_sum.fill_(content["loss_sum"])
        self.loss_count, self.step = content["loss_count"], content["step"]
        self.seconds = content["seconds"]
        self.metrics = [Metrics(*row) for row in content["metrics"]]


def all_finite(content: object) -> bool:
    """Return whether no number in a checkpoint, or in a part of it, is infinite or NaN."""
    if isinstance(content, Tensor):
        return bool(content.isfinite().all())
    if isinstance(content, dict | list | tuple):
        return all(map(all_finite, content.values() if isinstance(content, dict) else content))
    return not isinstance(content, float) or math.isfinite(content)


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `State.save` wrote; its tensors are on `device`.

    Raises:
        TrainingError: the file cannot be read, or is damaged.
    """
    try:
        with path.open("rb") as file:  # torch opens no path that is not UTF-8
            content = torch.load(file, map_location=device, weights_only=True)
        return {**content, "step": int(content["step"])}
    except _ERRORS as error:
        # Torch seeks before the start of a file that is cut short.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise TrainingError(f"{path}: {one_line(error)}") from error
        raise TrainingError(f"{path}: a damaged checkpoint: delete it to start again") from error

"""The state of a run: what a checkpoint holds, and what a run goes on from."""

import math
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from inference.files import one_line, whole_file

ADVICE = (
    "the same command with a lower --learning-rate, --gradient-clip 1 or --precision fp32 "
    "goes on from the last checkpoint"
)
"""What may help a run whose loss or weights are no longer finite; it may change on resuming."""

_NUMBERS = ("step", "loss_count", "seconds", "best")


class RunError(ValueError):
    """A run that cannot start, go on or be exported; the message is the reason, in one line."""


@dataclass
class State:
    """Everything of a run that changes from step to step.

    Attributes:
        network: that is trained.
        average: its exponential moving average, or None.
        optimizer, scaler: with their moments and scale.
        loss_sum: of the steps since the last line of progress, on the device.
        loss_count: of those steps.
        step: done so far.
        seconds: of training.
        best: the greatest held-out mean organ DSC yet; -1 before the first scoring.

    A step changes the network's statistics before it changes its weights. Those that are saved are
    the statistics as `settle` last saw them, so that a checkpoint is never of half a step.
    """

    network: nn.Module
    average: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loss_sum: Tensor
    loss_count: int = 0
    step: int = 0
    seconds: float = 0.0
    best: float = -1.0
    _settled: dict[str, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.settle()

    def settle(self) -> None:
        """Take the network's statistics as those of a step that is done."""
        now = dict(self.network.named_buffers())
        if not hasattr(self, "_settled"):
            self._settled = {name: buffer.clone() for name, buffer in now.items()}
        torch._foreach_copy_(list(self._settled.values()), list(now.values()))

    def trained_weights(self) -> dict[str, Tensor]:
        """The state dict that is scored and exported: the average's where there is one."""
        return (self.average or self.network).state_dict()

    def _network_state(self) -> dict[str, Tensor]:
        return {**self.network.state_dict(), **self._settled}

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole and flushed to the disk or not at all.

        Raises:
            RunError: the weights are no longer finite; what is there stays.
            OSError: the file cannot be written.
        """
        network = self._network_state()
        average = self.average.state_dict() if self.average else None
        content = {
            "network": network,
            "average": average,
            "weights": average or network,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss_sum": self.loss_sum.item(),
            **{name: getattr(self, name) for name in _NUMBERS},
        }
        if not all_finite(content):
            there = f"{path} stays as it was" if path.is_file() else "no checkpoint is there"
            raise RunError(
                f"the weights are not finite at step {self.step}, so not saved: {there}; {ADVICE}"
            )
        with whole_file(path) as file:
            torch.save(content, file)

    def load(self, path: Path, device: torch.device) -> None:
        """Take up what `save` wrote.

        Raises:
            RunError: as `read_checkpoint`.
        """
        content = read_checkpoint(path, device)
        self.network.load_state_dict(content["network"])
        self.settle()
        if self.average:
            self.average.load_state_dict(content["average"])
        self.optimizer.load_state_dict(content["optimizer"])
        if content["scaler"]:  # empty where the run has been of another precision than fp16 so far
            self.scaler.load_state_dict(content["scaler"])
        self.loss_sum.fill_(content["loss_sum"])
        for name in _NUMBERS:
            setattr(self, name, content[name])


def all_finite(content: object) -> bool:
    """Return whether no number in a checkpoint, or in a part of it, is infinite or NaN."""
    if isinstance(content, Tensor):
        return bool(content.isfinite().all())
    if isinstance(content, dict | list | tuple):
        values = content.values() if isinstance(content, dict) else content
        return all(map(all_finite, values))
    return not isinstance(content, float) or math.isfinite(content)


def read_checkpoint(path: Path, device: torch.device | str = "cpu", *, mmap: bool = False) -> dict:
    """Read what `State.save` wrote.

    Args:
        path: of the file.
        device: for its tensors.
        mmap: read no tensor before it is used.

    Raises:
        RunError: the file cannot be read, or is damaged.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
        return {**content, "step": int(content["step"])}
    except OSError as error:
        raise RunError(f"{path}: {one_line(error)}") from error
    except (
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise RunError(
            f"{path}: damaged, not a checkpoint: delete it to begin anew, or put a whole one there"
        ) from error

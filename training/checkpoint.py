"""The state of a run: what a checkpoint holds, and what a run goes on from."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from inference.files import whole_file

_NUMBERS = ("step", "loss_count", "seconds", "best")


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
        """Write a checkpoint, whole or not at all."""
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
        with whole_file(path) as file:
            torch.save(content, file)

    def load(self, path: Path, device: torch.device) -> None:
        """Take up what `save` wrote."""
        content = torch.load(path, map_location=device, weights_only=True)
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


def steps_done(path: Path) -> int:
    """The steps that a checkpoint has behind it; its tensors are not read.

    Raises:
        OSError: the file cannot be read.
    """
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return int(content["step"])

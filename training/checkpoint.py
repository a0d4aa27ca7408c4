"""The state of a run: what a checkpoint holds, and what a run goes on from."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

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

    def trained_weights(self) -> dict[str, Tensor]:
        """The state dict that is scored and exported: the average's where there is one."""
        return (self.average or self.network).state_dict()

    def save(self, path: Path) -> None:
        """Write a checkpoint under a temporary name, then rename it."""
        content = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "weights": self.trained_weights(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss_sum": self.loss_sum.item(),
            **{name: getattr(self, name) for name in _NUMBERS},
        }
        temporary = path.with_name(f".{path.name}.partial")
        torch.save(content, temporary)
        temporary.replace(path)

    def load(self, path: Path, device: torch.device) -> None:
        """Take up what `save` wrote."""
        content = torch.load(path, map_location=device, weights_only=True)
        self.network.load_state_dict(content["network"])
        if self.average:
            self.average.load_state_dict(content["average"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.loss_sum.fill_(content["loss_sum"])
        for name in _NUMBERS:
            setattr(self, name, content[name])

"""The processes of a run: those of `torchrun`, signals that ask for an end, readers of slices."""

import dataclasses
import os
import signal
from datetime import timedelta

import torch
from torch import distributed

from inference.prediction import choose_device


@dataclasses.dataclass
class Processes:
    """Where this process stands among those of `torchrun`; alone, it is number 0 of 1."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0


def join_processes(device: str) -> Processes:
    """Join the processes that torchrun started, with NCCL on CUDA and Gloo on a CPU.

    Raises:
        ValueError: the device asked for is not there.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes(0, 1, choose_device(device))
    local = int(os.environ["LOCAL_RANK"])
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    chosen = choose_device(f"cuda:{local}" if on_cuda else "cpu")
    if on_cuda:
        torch.cuda.set_device(chosen)
    # Scoring a large volume may keep the others waiting for longer than NCCL's ten minutes.
    distributed.init_process_group("nccl" if on_cuda else "gloo", timeout=timedelta(hours=2))
    return Processes(int(os.environ["RANK"]), count, chosen)


class StopRequest:
    """Whether SIGTERM or Ctrl-C came; the step under way is finished and a checkpoint saved."""

    def __init__(self) -> None:
        self.signal = 0
        self.previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def _note(self, number: int, _frame: object) -> None:
        self.signal = number
        self.restore()  # a second one ends the process at once

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def seen_by_any(self, processes: Processes) -> bool:
        """Whether a signal came to one of the processes; all of them must ask."""
        if processes.count == 1:
            return bool(self.signal)
        seen = torch.tensor([self.signal], device=processes.device)
        distributed.all_reduce(seen, distributed.ReduceOp.MAX)
        self.signal = int(seen.item())
        return bool(self.signal)


def leave_stopping_to_parent(_worker: int) -> None:
    """Ctrl-C and `kill` of a group reach the readers of slices too, which must not die first."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

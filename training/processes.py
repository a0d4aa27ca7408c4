"""The processes of a run: those of `torchrun`, and the signals that ask them to stop."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from inference.device import choose_device, thread_count

Result = TypeVar("Result")


@dataclass
class Processes:
    """This process among those of `torchrun`; alone, it is number 0 of 1."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def report(self, line: str) -> None:
        """Print a line if this is the first process."""
        if self.first:
            print(line, flush=True)

    def greatest(self, *numbers: int) -> list[int]:
        """Return the greatest of each of some numbers over all processes; all must call it."""
        if self.count == 1:
            return list(numbers)
        gathered = torch.tensor(numbers, device=self.device)
        distributed.all_reduce(gathered, distributed.ReduceOp.MAX)
        return [int(number) for number in gathered]


def join_processes(device: str) -> Processes:
    """Join the processes that torchrun started, with NCCL on CUDA and Gloo on a CPU.

    Raises:
        ValueError: the device asked for is not there.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        torch.set_num_threads(thread_count())
        return Processes(0, 1, choose_device(device))
    local = int(os.environ["LOCAL_RANK"])
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    chosen = choose_device(f"cuda:{local}" if on_cuda else "cpu")
    if on_cuda:
        torch.cuda.set_device(chosen)
    # Scoring a large volume may keep the others waiting for longer than NCCL's ten minutes.
    distributed.init_process_group("nccl" if on_cuda else "gloo", timeout=timedelta(hours=2))
    return Processes(int(os.environ["RANK"]), count, chosen)


def first_then_others(processes: Processes, work: Callable[[], Result]) -> Result:
    """Run in the first process what fills a cache, and then in the others, which read it."""
    if not processes.first:
        distributed.barrier()
    done = work()
    if processes.first and processes.count > 1:
        distributed.barrier()
    return done


@dataclass
class StopRequest:
    """A signal that asks a run to end."""

    signal: int = 0  # its number, or 0 before it comes
    # Whether the first signal is only noted, for the loop to save and end after its step; a second
    # one, or any before the loop, raises KeyboardInterrupt at once.
    after_step: bool = False

    def note(self, number: int, _frame: object) -> None:
        """Handle a signal."""
        at_once = self.signal or not self.after_step
        self.signal = self.signal or number
        if at_once:
            raise KeyboardInterrupt
        # By os.write: a print may be under way.
        os.write(2, b"stopping after this step; once more to stop without saving\n")

"""The processes of a run: those of `torchrun`, signals that ask for an end, readers of slices."""

import dataclasses
import os
import signal
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from inference.device import choose_device, thread_count

Result = TypeVar("Result")

GRACE_S = 7.0
"""How long a step may go on after SIGTERM or Ctrl-C; with the saving, an end in some 10 s."""


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
    """Do in the first process what fills a cache, and then in the others, who find it there."""
    if not processes.first:
        distributed.barrier()
    done = work()
    if processes.first and processes.count > 1:
        distributed.barrier()
    return done


def stop_signals() -> list[int]:
    """Return the signals that ask for an end: a lost terminal's too, unless nohup ignores it."""
    hangs_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hangs_up else [])]


class StopRequest:
    """SIGTERM, SIGHUP, Ctrl-C: answered at once, obeyed after the step under way or `GRACE_S`.

    A step of a large network on a CPU is a few calls into torch, a minute each, and Python handles
    signals between calls only. So a thread waits for them, on the descriptor that the signal itself
    writes to; where a step outlasts the grace, it saves the state of before the step and ends the
    process. A second signal ends it at once.

    Attributes:
        signal: its number, 0 before it came.
        unbroken: held by whoever changes what `save` saves, so that it is never saved half changed.
    """

    def __init__(self, save: Callable[[], str] | None = None) -> None:
        """Listen; as a context, until it is left.

        Args:
            save: writes what must survive, called by another thread while `unbroken` is held;
                returns what to say of it. None leaves the end to the process itself, however long
                its step.
        """
        self.signal = 0
        self.unbroken = threading.RLock()
        self._save = save
        self._over = False
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._descriptor = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self.previous = {number: signal.signal(number, self._note) for number in stop_signals()}
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()

    def _note(self, number: int, _frame: object) -> None:
        self.signal = self.signal or number

    def _next_signal(self, timeout: float | None) -> int:
        """The number of the next signal; 0 if none comes in time or nobody listens any longer."""
        self._read.settimeout(timeout)
        try:
            while received := self._read.recv(1):
                if received[0] in self.previous:
                    return received[0]
        except TimeoutError:
            pass
        return 0

    def _watch(self) -> None:
        number = self._next_signal(None)
        if not number:
            return
        self.signal = number
        within = f" or {GRACE_S:.0f} s of it" if self._save else ""
        print(
            f"{signal.Signals(number).name}: stopping after this step{within}; once more to stop "
            "without saving",
            flush=True,
        )
        second = self._next_signal(GRACE_S if self._save else None)
        if second:
            os._exit(128 + second)
        with self.unbroken:
            if self._save and not self._over:
                print(self._save(), flush=True)
                os._exit(128 + number)

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back to whoever had them."""
        with self.unbroken:
            self._over = True
        signal.set_wakeup_fd(self._descriptor)
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self._write.close()
        self._watcher.join()
        self._read.close()

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
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)

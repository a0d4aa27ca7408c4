"""Cases handed out over a Ray cluster, to whoever is free, and again where a worker was lost.

Ray places the workers, carries calls and results, notices that a process or a node has died and
says why, and waits for room. What is left to do here is which case goes where:

- `ray.util.ActorPool` gives an actor one call at a time, so nothing would overlap, and takes a dead
  actor for a free one.
- `max_restarts` and `max_task_retries` send a case back to the very actor that it may have killed,
  beside the very cases that died with it, and wait for that actor as long as no other node has room
  for it. A case that kills its worker would so use up the tries of its neighbours.
- `ray.data` retries in the same manner, fails as a whole after that, and needs pyarrow.

So a lost worker is replaced by a new one, wherever there is room, and the cases it held go first to
others, each alone on its worker: that tells the one that kills from those that were beside it.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from tqdm import tqdm

from cluster.worker import AHEAD, Worker
from inference.case import Case
from inference.command import make_service
from inference.files import one_line, printable
from inference.phases import PhaseTimer
from inference.sources import NiftiFile
from inference.startup import StartError

TRIES = 3
"""How often a case is begun at most, and how often a worker that dies before it is ready."""

_GRACE_SECONDS = 10.0
"""How long the cases under way may take when the run is to end."""

_PATIENCE_SECONDS = 30.0
"""Without any worker for so long, one line says what is waited for."""


@dataclass(eq=False)
class _Hired:
    """A worker, and the cases it has.

    Attributes:
        actor: Ray's handle.
        start: how many were started in this place and died before they were ready, and this one.
        ready: its network is loaded.
        held: its cases.
    """

    actor: ActorHandle
    start: int
    ready: bool = False
    held: list[Case] = field(default_factory=list)


class Spread:
    """Runs cases as `Service.run` does, on the workers of the cluster joined; leaves it then.

    Attributes:
        provenance, recorded: as in `Service`.

    Args:
        options: of the command line, paths absolute; `workers` is how many there are to be, and
            `each` what Ray is to set aside for one.
        timer: to which the seconds of every case are reported.
        on_case: called with each case when it has ended.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        timer: PhaseTimer,
        *,
        on_slices: object = None,
        on_case: Callable[[Case], None],
    ) -> None:
        # Whether a label map is there is for the workers to see.
        planned = argparse.Namespace(**{**vars(options), "keep_existing": False})
        self._planner = make_service(planned, timer, on_case=self._report)
        self.provenance = self._planner.provenance
        self.recorded: Callable[[str], dict | None] = lambda name: {}
        self._options = options
        self._timer = timer
        self._on_case = on_case
        self._actor_class = ray.remote(Worker).options(max_concurrency=AHEAD, **options.each)
        self._workers: list[_Hired] = []
        self._calls: dict[ray.ObjectRef, tuple[_Hired, Case | None]] = {}
        self._fresh: deque[Case] = deque()
        self._again: deque[Case] = deque()
        self._tries: Counter[str] = Counter()
        self._said: set[str] = set()
        self._ever_ready = False
        self._dismissed = ""

    def run(self, sources: list[NiftiFile]) -> list[Case]:
        """Segment every volume; a case that fails does not stop the others.

        Returns:
            One `Case` per source, in order, each "done", "kept" or "failed".

        Raises:
            StartError: no worker could be started.
            KeyboardInterrupt: raised by a signal's handler; what was under way has been given 10 s.
        """
        with contextlib.ExitStack() as stack:
            bar = tqdm(
                total=len(sources), unit="case", leave=False, disable=self._options.quiet or None
            )
            self._bar = stack.enter_context(bar)
            # Ray prints pages about every dead process, until it is left; our own lines go to
            # standard error.
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.callback(ray.shutdown)
            cases = self._planner.plan(sources)
            waiting = [case for case in cases if case.status == "waiting"]
            self._fresh.extend(sorted(waiting, key=lambda case: -case.source.byte_count))
            if waiting:
                folder = self._options.output
                mark = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".run-"))
                self._mark = Path(mark.name)
                self._sample = waiting[0].source.path
                self._hand_out()
        return cases

    def _hand_out(self) -> None:
        for _ in range(min(self._options.workers, len(self._fresh))):
            self._hire()
        try:
            while self._fresh or self._again or any(case for _, case in self._calls.values()):
                if not self._workers and (self._fresh or self._again):
                    self._give_up()
                    continue
                for worker in self._workers:
                    while case := self._next_for(worker):
                        worker.held.append(case)
                        record = self.recorded(case.name)
                        segmented = worker.actor.segment.remote(case.source, record)
                        self._calls[segmented] = (worker, case)
                ended, _ = ray.wait(list(self._calls), timeout=_PATIENCE_SECONDS)
                for call in ended:
                    self._take(call)
                if not ended and not any(worker.ready for worker in self._workers):
                    self._say_once("waiting for room in the cluster for a worker")
        except KeyboardInterrupt:
            held = [call for call, (_, case) in self._calls.items() if case]
            if held:
                ended, _ = ray.wait(held, num_returns=len(held), timeout=_GRACE_SECONDS)
                for call in ended:
                    self._take(call)
            raise

    def _hire(self, start: int = 1) -> None:
        """Ask Ray for a worker; it is handed cases once it is ready."""
        options = argparse.Namespace(**{**vars(self._options), "paths": []})
        worker = _Hired(self._actor_class.remote(options, self._sample, self._mark), start)
        self._workers.append(worker)
        self._calls[worker.actor.start.remote()] = (worker, None)

    def _next_for(self, worker: _Hired) -> Case | None:
        """The case to hand to a worker now, if any."""
        alone = any(self._tries[case.name] for case in worker.held)
        if not worker.ready or alone or len(worker.held) == AHEAD:
            return None
        if self._again:  # first of all, on the first worker that has nothing else
            return None if worker.held else self._again.popleft()
        return self._fresh.popleft() if self._fresh else None

    def _take(self, call: ray.ObjectRef) -> None:
        """Take what has become of a call."""
        worker, case = self._calls[call]
        try:
            result = ray.get(call)
        except RayTaskError as error:  # an exception there
            if case is None:
                self._dismiss(worker, one_line(error.cause))
            else:
                self._end(worker, case, status="failed", reason=one_line(error.cause))
        except RayError as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                self._dismiss(worker, str(error).splitlines()[-1])  # it lacks a package, say
            else:
                self._lose(worker, case, _why_lost(error))
        else:
            if case is None:
                worker.ready = self._ever_ready = True
                self._say_once(result)
            else:
                segmented, seconds = result
                self._timer.record(case.name, seconds)
                self._end(worker, case, **vars(segmented))
        del self._calls[call]

    def _end(self, worker: _Hired, case: Case, **outcome: object) -> None:
        if case in worker.held:  # a signal may have come in between, and the call is taken again
            worker.held.remove(case)
        vars(case).update(outcome)
        self._report(case)

    def _lose(self, worker: _Hired, case: Case | None, reason: str) -> None:
        """A worker is gone: another takes its place, and its cases are tried again, or failed."""
        if worker in self._workers:  # the first of its calls to come back
            self._workers.remove(worker)
            ray.kill(worker.actor)  # if it only could not be reached
            held = ", ".join(case.name for case in worker.held)
            self._say(f"warning: a worker was lost: {reason}; it had {held or 'no case'}")
            if worker.start < TRIES or worker.ready:
                self._hire(1 if worker.ready else worker.start + 1)
            else:
                self._dismissed = f"it died {TRIES} times before it was ready ({reason})"
        if case is None:
            return
        self._tries[case.name] += 1
        if self._tries[case.name] < TRIES:
            worker.held.remove(case)
            self._again.append(case)
        else:
            reason = f"its worker was lost {TRIES} times, the last time because {reason}"
            self._end(worker, case, status="failed", reason=reason)

    def _dismiss(self, worker: _Hired, reason: str) -> None:
        """A worker cannot begin, and no other could in its place."""
        self._workers.remove(worker)
        ray.kill(worker.actor)
        self._dismissed = reason
        self._say_once(f"warning: a worker could not begin: {reason}")

    def _give_up(self) -> None:
        """Fail what is left when no worker is."""
        if not self._ever_ready:
            raise StartError(f"no worker could begin: {self._dismissed}")
        for case in (*self._again, *self._fresh):
            case.status, case.reason = "failed", f"no worker is left: {self._dismissed}"
            self._report(case)
        self._again.clear()
        self._fresh.clear()

    def _report(self, case: Case) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            self._on_case(case)
        self._bar.update()

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # whoever listened may be gone
            tqdm.write(printable(line), file=sys.stderr)

    def _say_once(self, line: str) -> None:
        if line and line not in self._said:
            self._said.add(line)
            self._say(line)


def _why_lost(error: RayError) -> str:
    text = str(error)
    if isinstance(error, OutOfMemoryError) or "low on memory" in text:
        return "its node ran low on memory"
    if "node has died" in text or "node was terminated" in text:
        return "its node died"
    return "its process died, as it does when memory runs out"

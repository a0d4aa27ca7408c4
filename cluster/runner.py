"""Cases distributed over a Ray cluster, and tried again where a worker was lost.

Ray places the workers, carries calls and results, detects dead processes and nodes, and waits for
free resources. Which case goes where is decided here: `ray.util.ActorPool` gives an actor one call
at a time, so that nothing overlaps, and takes a dead actor for a free one; `max_task_retries` and
`ray.data` send a case back to the actor that it may have killed, beside the cases that died with
it, so that it uses up their tries. Here another worker replaces a lost one, and its cases go first
to others, each alone on its worker: that separates the one that kills from those beside it.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from tqdm import tqdm

from cluster.worker import CASES_IN_FLIGHT, Worker
from inference.case import Case
from inference.files import one_line, printable
from inference.loading import NetworkLoader
from inference.phases import PhaseTimer
from inference.service import Observer, Service
from inference.sources import Source
from inference.startup import StartError

TRIES = 3
"""How often a case is tried at most, and a worker that dies before it is ready."""

_GRACE_SECONDS = 10.0
"""For the cases in flight when the run is to end."""

_PATIENCE_SECONDS = 30.0
"""Without any worker for so long, a line reports why."""


@dataclass(eq=False)
class WorkerHandle:
    """A worker, and the cases it has."""

    actor: ActorHandle
    start: int  # 1, and one more for each before it that died before it was ready
    ready: bool = False  # its network is loaded
    cases: list[Case] = field(default_factory=list)


class RayRunner(Observer):
    """Runs cases as `Service.run` does, on the workers of the cluster joined; leaves it then.

    Args:
        options: of the command line, paths absolute; `workers` is how many there are to be, and
            `each` what Ray is to set aside for one.
        loader: of the network that the workers load.
        observer: of every case.
        timer: to which the seconds of every case are reported.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        loader: NetworkLoader,
        observer: Observer,
        timer: PhaseTimer,
    ) -> None:
        # Whether a label map is there is for the workers to see.
        planned = argparse.Namespace(**{**vars(options), "keep_existing": False})
        self._planner = Service(planned, loader, self, timer)
        self._options, self._timer, self._observer = options, timer, observer
        worker_class = ray.remote(Worker)
        self._actor_class = worker_class.options(max_concurrency=CASES_IN_FLIGHT, **options.each)
        self._workers: list[WorkerHandle] = []
        self._calls: dict[ray.ObjectRef, tuple[WorkerHandle, Case | None]] = {}
        self._queue: deque[Case] = deque()
        self._retries: deque[Case] = deque()
        self._losses: Counter[str] = Counter()
        self._printed: set[str] = set()
        self._ever_ready = False
        self._why_removed = ""

    def run(self, sources: Sequence[Source]) -> list[Case]:
        """Segment every volume, as `Service.run`; at a signal what is under way is given 10 s.

        Raises:
            StartError: no worker could be started.
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
            self._queue.extend(sorted(waiting, key=lambda case: -case.source.byte_count))
            if waiting:
                folder = self._options.output
                mark = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".run-"))
                self._mark = Path(mark.name)
                self._sample = min(waiting[0].source.files)
                self._distribute()
        return cases

    def _distribute(self) -> None:
        for _ in range(min(self._options.workers, len(self._queue))):
            self._start_worker()
        try:
            while self._queue or self._retries or any(case for _, case in self._calls.values()):
                if not self._workers and (self._queue or self._retries):
                    self._fail_rest()
                    continue
                for worker in self._workers:
                    while case := self._next_case(worker):
                        worker.cases.append(case)
                        record = self._observer.recorded(case.name)
                        segmented: ray.ObjectRef = worker.actor.segment.remote(case.source, record)
                        self._calls[segmented] = (worker, case)
                ended, _ = ray.wait(list(self._calls), timeout=_PATIENCE_SECONDS)
                for call in ended:
                    self._receive(call)
                if not ended and not any(worker.ready for worker in self._workers):
                    self._print_once("waiting for free resources in the cluster for a worker")
        except KeyboardInterrupt:
            calls = [call for call, (_, case) in self._calls.items() if case]
            if calls:
                ended, _ = ray.wait(calls, num_returns=len(calls), timeout=_GRACE_SECONDS)
                for call in ended:
                    self._receive(call)
            raise

    def _start_worker(self, start: int = 1) -> None:
        """Ask Ray for a worker; it gets cases once it is ready."""
        options = argparse.Namespace(**{**vars(self._options), "sources": []})
        actor: Any = self._actor_class.remote(options, self._sample, self._mark)
        worker = WorkerHandle(actor, start)
        self._workers.append(worker)
        self._calls[worker.actor.start.remote()] = (worker, None)

    def _next_case(self, worker: WorkerHandle) -> Case | None:
        """Return the case that a worker gets now, if any."""
        alone = any(self._losses[case.name] for case in worker.cases)
        if not worker.ready or alone or len(worker.cases) == CASES_IN_FLIGHT:
            return None
        if self._retries:  # first of all, on the first worker that has nothing else
            return None if worker.cases else self._retries.popleft()
        return self._queue.popleft() if self._queue else None

    def _receive(self, call: ray.ObjectRef) -> None:
        """Receive the result of a call."""
        worker, case = self._calls[call]
        try:
            result = ray.get(call)
        except RayTaskError as error:  # an exception there
            if case is None:
                self._remove(worker, one_line(error.cause))
            else:
                self._end(worker, case, status="failed", reason=one_line(error.cause))
        except RayError as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                self._remove(worker, str(error).splitlines()[-1])  # such as a missing package
            else:
                self._replace(worker, case, _why_lost(error))
        else:
            if case is None:
                worker.ready = self._ever_ready = True
                self._print_once(result)
            else:
                segmented, seconds = result
                self._timer.record(case.name, seconds)
                self._end(worker, case, **vars(segmented))
        del self._calls[call]

    def _end(self, worker: WorkerHandle, case: Case, **outcome: object) -> None:
        if case in worker.cases:  # a signal may have come in between, and the call is taken again
            worker.cases.remove(case)
        vars(case).update(outcome)
        self.on_case(case)

    def _replace(self, worker: WorkerHandle, case: Case | None, reason: str) -> None:
        """Start another worker for one that is lost; its cases are tried again, or failed."""
        if worker in self._workers:  # the first of its calls to come back
            self._workers.remove(worker)
            ray.kill(worker.actor)  # if it only could not be reached
            cases = ", ".join(case.name for case in worker.cases)
            self._print(f"warning: a worker was lost: {reason}; it had {cases or 'no case'}")
            if worker.start < TRIES or worker.ready:
                self._start_worker(1 if worker.ready else worker.start + 1)
            else:
                self._why_removed = f"it died {TRIES} times before it was ready ({reason})"
        if case is None:
            return
        self._losses[case.name] += 1
        if self._losses[case.name] < TRIES:
            worker.cases.remove(case)
            self._retries.append(case)
        else:
            reason = f"its worker was lost {TRIES} times, the last time because {reason}"
            self._end(worker, case, status="failed", reason=reason)

    def _remove(self, worker: WorkerHandle, reason: str) -> None:
        """Remove a worker that cannot start; no other could in its place."""
        self._workers.remove(worker)
        ray.kill(worker.actor)
        self._why_removed = reason
        self._print_once(f"warning: a worker could not start: {reason}")

    def _fail_rest(self) -> None:
        """Fail what is left when no worker is."""
        if not self._ever_ready:
            raise StartError(f"no worker could start: {self._why_removed}")
        for case in (*self._retries, *self._queue):
            case.status, case.reason = "failed", f"no worker is left: {self._why_removed}"
            self.on_case(case)
        self._retries.clear()
        self._queue.clear()

    def on_case(self, case: Case) -> None:
        """Report a case that has ended, beside the bar."""
        with tqdm.external_write_mode(file=sys.stderr):
            self._observer.on_case(case)
        self._bar.update()

    def _print(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # whoever listened may be gone
            tqdm.write(printable(line), file=sys.stderr)

    def _print_once(self, line: str) -> None:
        if line and line not in self._printed:
            self._printed.add(line)
            self._print(line)


def _why_lost(error: RayError) -> str:
    text = str(error)
    if isinstance(error, OutOfMemoryError) or "low on memory" in text:
        return "its node ran low on memory"
    if "node has died" in text or "node was terminated" in text:
        return "its node died"
    return "its process died, as it does when memory runs out"

"""One worker: a service with its network loaded once, fed case by case from elsewhere."""

import argparse
import contextlib
import os
import threading
from concurrent.futures import Future
from io import StringIO
from pathlib import Path
from queue import SimpleQueue

import ray

from inference import startup
from inference.case import Case
from inference.loading import NetworkLoader
from inference.memory import memory_limit
from inference.phases import PhaseTimer
from inference.service import Observer, Service
from inference.sources import Source

CASES_IN_FLIGHT = 3
"""Cases a worker has at a time: one is read, one predicted, one written."""

_MEMORY_SHARE = 0.9
"""Of a node's memory for its workers; from 95 % on, Ray ends them."""


class Worker(Observer):
    """What an actor of Ray runs; up to `CASES_IN_FLIGHT` calls of `segment` at once.

    Args:
        options: of the command line, paths absolute.
        sample: a volume that must be there.
        mark: a file of the run in the outputs folder, which must be there too.
    """

    def __init__(self, options: argparse.Namespace, sample: Path, mark: Path) -> None:
        self._options, self._sample, self._mark = options, sample, mark
        self._timer = PhaseTimer()
        self._waiting: SimpleQueue[Case] = SimpleQueue()
        self._ended: dict[str, Future] = {}
        self._records: dict[str, dict | None] = {}

    def start(self) -> str:
        """Load the network, start to take cases, and return what the service prints of both.

        Raises:
            ValueError: the folders are not those of the run, the device is not there, or the
                weights do not fit the network.
        """
        if not self._sample.exists():
            raise ValueError(f"{self._sample} is not there")
        if not self._mark.exists():
            raise ValueError(f"{self._options.output} is another folder there")
        startup.share_interpreter()
        startup.silence_libraries()
        loader = NetworkLoader(self._options, self._timer)
        self._service = Service(self._options, loader, self, self._timer, _memory_share())
        printed = StringIO()
        with contextlib.redirect_stderr(printed):
            _ = loader.predictor
        threading.Thread(target=self._segment_all, daemon=True).start()
        return printed.getvalue().strip()

    def segment(self, source: Source, record: dict | None) -> tuple[Case, dict[str, float]]:
        """Segment one volume, while others are being read and written.

        `record` is what `Observer.recorded` returns for it. Return the case, "done", "kept" or
        "failed", and its seconds per stage.
        """
        self._records[source.name] = record
        (case,) = self._service.plan([source])
        if case.status == "waiting":
            ended = self._ended[case.name] = Future()
            self._waiting.put(case)
            ended.result()
        return case, self._timer.seconds(case.name)

    def _segment_all(self) -> None:
        try:
            self._service.segment(iter(self._waiting.get, None))
        finally:
            os._exit(1)  # without its service the worker must not look alive

    def recorded(self, name: str) -> dict | None:
        """Return the record that came with a case."""
        return self._records.get(name)

    def on_case(self, case: Case) -> None:
        """Answer the call that waits for a case."""
        if ended := self._ended.pop(case.name, None):
            ended.set_result(None)


def _memory_share() -> int:
    """Return the bytes for this worker: as much of the node's memory as of its GPUs or CPUs."""
    context = ray.get_runtime_context()
    mine = context.get_assigned_resources()
    kind = "GPU" if "GPU" in mine else "CPU"
    (node,) = (node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    return int(memory_limit() * _MEMORY_SHARE * mine[kind] / node["Resources"][kind])

"""Command line of the cluster: `python -m cluster`."""

import argparse
import logging
import os
import re
import secrets
import socket
import sys
from typing import TYPE_CHECKING, Any

from inference.command import run
from inference.files import one_line
from inference.loading import NetworkLoader
from inference.memory import cpu_limit
from inference.options import make_parser, parse_arguments
from inference.phases import PhaseTimer
from inference.service import Observer
from inference.sources import NiftiFile
from inference.startup import StartError
from inference.terminal import log

if TYPE_CHECKING:
    from cluster.runner import RayRunner

_CPUS = 4
"""Cores for a worker without a GPU, or as many as a node has."""

_OBJECT_STORE_BYTES = 100 << 20
"""Of a cluster that is started here; nothing but a case's statistics goes through it."""


def make_cluster_parser() -> argparse.ArgumentParser:
    """Return the service's parser with the cluster's options."""
    parser = make_parser("cluster")
    parser.description = (
        f"{parser.description} Spreads them over a Ray cluster: a worker for each GPU or, without "
        "any, for every few cores. All nodes need this project and the folders under the same "
        "paths."
    )
    parser.add_argument(
        "--address",
        metavar="auto|HOST:PORT",
        help="the cluster to join, from one of its nodes; auto finds it (default: RAY_ADDRESS, or "
        "this machine alone, for this run)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="(default: as many as the cluster can hold; more start when nodes join)",
    )
    parser.add_argument(
        "--cpus",
        type=int,
        metavar="N",
        help=f"cores for each worker that has no GPU (default: {_CPUS}, or all of a smaller node)",
    )
    return parser


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the service's options and the cluster's, paths absolute for every node."""
    parser = make_cluster_parser()
    options = parse_arguments(arguments, parser)
    for name in ("workers", "cpus"):
        if (number := getattr(options, name)) is not None and number < 1:
            parser.error(f"--{name} must be at least 1")
    if options.device not in ("auto", "cuda", "cpu"):
        parser.error(f"--device {options.device}: choose auto, cuda or cpu; Ray chooses the GPU")
    if options.address is None:
        options.address = os.environ.get("RAY_ADDRESS", "local")
    if not re.fullmatch(r"auto|local|.+:\d+", options.address):
        parser.error(f"--address {options.address}: give auto or HOST:PORT")
    if not all(isinstance(source, NiftiFile) for source in options.sources):
        parser.error(
            f"--input {options.input}: DICOM series are not spread over a cluster; python -m "
            "inference segments them on one machine"
        )
    options.sources = [NiftiFile(source.path.absolute()) for source in options.sources]
    options.output = options.output.absolute()
    options.weights = [path.absolute() for path in options.weights]
    return options


def _join(address: str) -> None:
    """Join a cluster, or start one on this machine that listens to nobody else.

    Raises:
        StartError: there is none, or no Ray.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    how: dict[str, Any] = {}
    if address == "local":
        # Ray runs whatever reaches its ports. These settings, which it reads when it is imported,
        # make it use the loopback address, and ask for a token that nobody else has and that is not
        # stored in the home folder.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
        how = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        how["num_cpus"] = cpu_limit()
    try:
        if address not in ("auto", "local"):  # Ray itself would wait for many minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        import ray

        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **how)
    except ImportError as error:
        raise StartError("Ray is missing: pip install -r requirements-cluster.txt") from error
    except Exception as error:  # a time-out of Ray's is a plain Exception
        reason = one_line(error)
        if isinstance(error, OSError) and error.filename:
            reason += f": {error.filename} (RAY_TMPDIR names another folder)"
        raise StartError(f"--address {address}: {reason}") from error


def _plan_workers(options: argparse.Namespace) -> None:
    """Set what each worker takes, `each`, and how many `workers` there are to be.

    Raises:
        ValueError: no node has enough for one.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    cores = [int(node.get("CPU", 0)) for node in nodes]
    if options.device == "cuda" or (options.device == "auto" and gpus):
        options.device, most = "cuda", gpus
        options.each = {"num_gpus": 1, "num_cpus": 1}
        if not most:
            raise ValueError("no node of the cluster has a GPU")
    else:
        options.device = "cpu"
        cpus = options.cpus or min(_CPUS, max(cores))
        most = sum(number // cpus for number in cores if cpus)
        options.each = {"num_cpus": cpus}
        if not most:
            raise ValueError(f"no node of the cluster has {cpus or 1} cores for a worker")
    options.workers = options.workers or most


def _start(
    options: argparse.Namespace, loader: NetworkLoader, observer: Observer, timer: PhaseTimer
) -> "RayRunner":
    """Join the cluster, and return what runs cases on it."""
    _join(options.address)
    from cluster.runner import RayRunner

    _plan_workers(options)
    if not options.quiet:
        cores = options.each["num_cpus"]
        size = "a GPU each" if options.device == "cuda" else f"no GPU, cores for each: {cores}"
        log(f"Ray at {options.address}: {options.workers} workers, {size}")
    return RayRunner(options, loader, observer, timer)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return its exit code as the service's `run`."""
    options = _parse(arguments)
    try:
        return run(options, _start)
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()

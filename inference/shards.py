"""A fixed part of the cases for each of many machines, without communication."""

import heapq
import re
from collections.abc import Mapping
from pathlib import Path

from .files import output_key
from .sources import Source

_SLURM = "SLURM_ARRAY_TASK_"
_KUBERNETES = "JOB_COMPLETION_INDEX"


def parse_shard(text: str, environment: Mapping[str, str]) -> tuple[int, int]:
    """Return which shard, from 0, of how many.

    Args:
        text: "I/N", I from 0; "auto", from the scheduler's variables; or "auto/N", the index from
            the scheduler as it is and N from the caller, who must give it where the scheduler does
            not (Kubernetes), or where only some tasks of an array are run again.
        environment: in which a Slurm array or an Indexed Job of Kubernetes has the task's number.

    Raises:
        ValueError: it is no such text, or the scheduler's variables are missing.
    """
    match = re.fullmatch(r"(?:(auto)|(\d+))(?:/(\d+))?", text.strip())
    if not match or (match[2] and not match[3]):
        raise ValueError(f"{text}: give I/N with I from 0 to N-1, auto, or auto/N")
    if match[2]:
        index = int(match[2])
    else:
        found = [name for name in (f"{_SLURM}ID", _KUBERNETES) if name in environment]
        if not found:
            raise ValueError(f"auto: neither {_SLURM}ID nor {_KUBERNETES} is set; give I/N")
        index = _number(environment, found[0])
    if match[3]:
        count = int(match[3])
    elif found[0] == _KUBERNETES:
        raise ValueError(f"auto: {_KUBERNETES} comes without a count; give auto/N")
    else:  # a Slurm array, whatever its first number and step
        count = _number(environment, f"{_SLURM}COUNT")
        index -= _number(environment, f"{_SLURM}MIN", default="0")
        index, beside = divmod(index, max(1, _number(environment, f"{_SLURM}STEP", default="1")))
        if beside or not 0 <= index < count:
            raise ValueError("auto: the array's numbers have gaps; use --array=0-N, or give auto/N")
    if not 0 <= index < count:
        raise ValueError(f"{text}: shard {index} of {count} does not exist; they count from 0")
    return index, count


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name, default)
    if not re.fullmatch(r"\d+", text):
        raise ValueError(f"auto: {name} is {text!r}, not a number")
    return int(text)


def shard_of(sources: list[Source], index: int, count: int) -> list[Source]:
    """Return the inputs of one shard; every input is in exactly one of them.

    Cases go from the largest file down to the shard that has the fewest bytes so far, which leaves
    no shard more than the largest case behind another. Inputs whose label maps would have the same
    name, or one that a file system takes for the same, stay together: one machine sees that. Sizes
    and names alone decide: while shards run, inputs must not be added, removed or changed.

    Args:
        sources: all inputs, in any order, which the result has too.
        index: of the shard, from 0.
        count: of shards.
    """
    groups: dict[str, list[Source]] = {}
    for source in sources:
        groups.setdefault(output_key(source.name), []).append(source)
    bytes_of = {name: sum(one.byte_count for one in group) for name, group in groups.items()}
    shards = [(0, shard) for shard in range(count)]
    chosen: set[Source] = set()
    for name in sorted(groups, key=lambda name: (-bytes_of[name], name)):
        taken, shard = shards[0]
        # A case costs something even where its file is empty.
        heapq.heapreplace(shards, (taken + bytes_of[name] + 1, shard))
        if shard == index:
            chosen.update(groups[name])
    return [source for source in sources if source in chosen]


def shard_file(path: Path, index: int, count: int) -> Path:
    """Return the name of a shard's own file: `volumes.csv` becomes `volumes.3-of-8.csv`."""
    return path.with_name(f"{path.stem}.{index}-of-{count}{path.suffix}")

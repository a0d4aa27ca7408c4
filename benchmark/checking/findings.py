"""What the runs of a check amount to: passed, warned or failed, a function for each line of it.

Failed is what costs cases in the challenge, or is not what it asks for. Warned is what costs
points by degree, costs nothing there but elsewhere, or could not be checked. What each costs and
what to do is in `findings.toml`.
"""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmark.checking.trials import HARDENED, NO_NETWORK, SMALL_SHARED_MEMORY, Trial
from benchmark.containers.results import PENALTY, TOLERANCES
from benchmark.options import size_mb
from benchmark.text import by, listed
from inference.labels import LABEL_NAMES
from inference.volume import read_volume

PASSED, WARNED, FAILED = "passed", "warned", "failed"

LOST = (
    f"a lost case: DSC 0, NSD 0, {PENALTY['seconds']:.0f} s and "
    f"{PENALTY['auc_gpu_mb_s']:,.0f} MB·s (FLARE 2022 rules)"
)
"""What a case costs that gives no label map."""

FREE = TOLERANCES["flare23"]
"""Seconds and MB of GPU memory that cost nothing."""

START, MODES = "starts with the organisers' command", (NO_NETWORK, HARDENED, SMALL_SHARED_MEMORY)
_TEXTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_ROUNDING = 1e-3  # of the labelled voxels: what a second run may label otherwise with a warning
_NEARLY_ALL = 0.9  # of the memory limit
_ASPECTS = ("name", "file", "shape", "affine", "type", "labels")


class Finding(NamedTuple):
    """One line of the list; cost in the challenge and advice are empty if it passed."""

    level: str
    check: str
    found: str
    cost: str = ""
    advice: str = ""


def finding(level: str, check: str, found: str, trial: Trial | None = None) -> Finding:
    """Return a line with its cost and advice, which may depend on a run that failed."""
    if level == PASSED:
        return Finding(level, check, found)
    text = _TEXTS[re.split("[,:]", check)[0]]
    names = {"lost": LOST, "last": len(LABEL_NAMES) - 1}
    act = (trial and advice(trial)) or text["advice"].format(**names)
    return Finding(level, check, found, text["cost"].format(**names), act)


def advice(trial: Trial) -> str | None:
    """Return what to do about a run that failed, by its log; None if that has no known symptom."""
    for symptom in _TEXTS["symptoms"]:
        words = "|".join(symptom.get("words", ()))
        if symptom.get("status") == trial.result["status"] or (
            words and re.search(words, trial.printed)
        ):
            return symptom["advice"]
    return None


def judge_run(check: str, trial: Trial) -> Finding:
    """Judge whether a run by the organisers' command ended well."""
    if not trial.ended:
        return finding(FAILED, check, _how_it_ended(trial), trial)
    size, seconds = by(trial.result["image_size"]), trial.result["seconds"]
    return finding(PASSED, check, f"{size}, {seconds:.1f} s")


def judge_mode(trial: Trial, first: Trial) -> Finding:
    """Judge a run in another way than the organisers' own, against theirs."""
    if not trial.ran:
        level = FAILED if trial.mode == NO_NETWORK else WARNED
        return finding(level, trial.mode, _how_it_ended(trial), trial)
    differing = _differing(first, trial) if trial.digest != first.digest else None
    if differing and differing[0]:  # other bytes may be the same labels
        found = f"another label map than by the organisers' command: {_share(*differing)}"
        return finding(WARNED, trial.mode, found)
    return finding(PASSED, trial.mode, f"a label map after {trial.result['seconds']:.1f} s")


def judge_outputs(trials: Sequence[Trial]) -> list[Finding]:
    """Judge names, files, shapes, affines, types and labels of the label maps of ended runs."""
    ended = [(trial, trial.result["output"]) for trial in trials if trial.ended]
    findings = []
    for aspect in _ASPECTS:
        check = f"output {aspect.removesuffix('s')}s"
        wrong = [
            f"{trial.label}: {problem}"
            for trial, output in ended
            for kind, problem in zip(output["aspects"], output["problems"], strict=True)
            if kind == aspect
        ]
        checked = ", ".join(trial.label for trial, output in ended if _was_checked(output, aspect))
        if wrong:
            findings.append(finding(FAILED, check, "; ".join(wrong)))
        elif checked:
            findings.append(finding(PASSED, check, f"as they must be: {checked}"))
    if empty := ", ".join(sorted({trial.label for trial, _ in ended if trial.empty})):
        findings.append(finding(WARNED, "something is labelled", f"no organ at all in {empty}"))
    return findings


def judge_determinism(first: Trial, again: Trial) -> Finding:
    """Judge the same volume twice, by the same command."""
    check = "twice the same"
    if not again.ran:
        return finding(FAILED, check, f"the second run: {_how_it_ended(again)}", again)
    if first.digest == again.digest:
        return finding(PASSED, check, "the same bytes")
    differing = _differing(first, again)
    if differing is None:
        return finding(WARNED, check, "the bytes differ, and the labels cannot be compared")
    if not differing[0]:
        return finding(WARNED, check, "the labels are the same, the bytes differ")
    level = WARNED if differing[0] <= _ROUNDING * differing[1] else FAILED
    return finding(level, check, _share(*differing))


def judge_time(trials: Sequence[Trial]) -> Finding:
    """Judge the wall clock of the organisers' command by the tolerance."""
    check = f"time, {FREE.seconds:g} s cost nothing"
    times = {trial.label: trial.result["seconds"] for trial in trials if trial.ran}
    above = {label: seconds for label, seconds in times.items() if seconds > FREE.seconds}
    if not above:
        return finding(PASSED, check, f"at most {max(times.values(), default=0.0):.1f} s")
    each = (f"{label} {s:.1f} s, {s - FREE.seconds:.1f} s above" for label, s in above.items())
    return finding(WARNED, check, ", ".join(each))


def judge_gpu_memory(trials: Sequence[Trial]) -> Finding:
    """Judge the GPU memory of the organisers' command by the tolerance."""
    check = f"GPU memory, {FREE.mb:,.0f} MB cost nothing"
    read = [t.result | {"label": t.label} for t in trials if t.result["peak_gpu_mb"] is not None]
    if not read:
        reasons = [trial.result["sampler"]["gpu_error"] for trial in trials]
        why = next(filter(None, reasons), "no GPU memory can be read here")
        return finding(WARNED, check, f"not measured: {why}")
    above = [result for result in read if result["peak_gpu_mb"] > FREE.mb]
    if not above:
        most = max(result["peak_gpu_mb"] for result in read)
        return finding(PASSED, check, f"at most {most:,.0f} MB")
    each = "{label} {peak_gpu_mb:,.0f} MB, {auc_flare_tolerated_mb_s:,.0f} MB·s above"
    return finding(WARNED, check, ", ".join(each.format(**result) for result in above))


def judge_memory(trials: Sequence[Trial], memory: str) -> Finding:
    """Judge the most RAM of any run by the limit."""
    mb, label = max((trial.result["max_ram_mb"] or 0.0, trial.label) for trial in trials)
    level = PASSED if mb <= _NEARLY_ALL * size_mb(memory) else WARNED
    return finding(level, f"memory, at most {memory}", f"at most {mb:,.0f} MB ({label})")


def judge_extra_files(trials: Sequence[Trial]) -> Finding:
    """Judge what containers wrote beside the label map."""
    # Where there is no label map, what is there instead is reported with the names.
    extra = {
        t.label: t.extra_files for t in trials if t.extra_files and t.result["output"]["found"]
    }
    names = [name for of_run in extra.values() for name in of_run]
    level = FAILED if any(name.endswith((".nii.gz", ".nii")) for name in names) else WARNED
    shown = "; ".join(f"{label}: {listed(of_run, 5)}" for label, of_run in extra.items())
    return finding(level if extra else PASSED, "extra files", shown or "none")


def judge_damaged(trial: Trial) -> Finding:
    """Judge a file that ends in its middle: the run must end, with an exit code."""
    check = "a damaged input"
    status, written = trial.result["status"], trial.result["output"]["found"]
    if status == "crashed" and not written:
        return finding(PASSED, check, f"refused: {trial.result['reason']}")
    found = "a label map is written of half a file" if written else "exit code 0, and no label map"
    if status in ("timeout", "out of memory"):
        found = _how_it_ended(trial)
    return finding(WARNED, check, found)


def not_run(reason: str) -> Finding:
    """Return what stands for everything else where the first run gave no label map."""
    return finding(WARNED, "everything else", f"not run: {reason}")


def _was_checked(output: dict, aspect: str) -> bool:
    if aspect == "name":
        return output["found"]
    if aspect in ("file", "shape"):
        return output["found"] and "file" not in output["aspects"]
    return output["scorable"]


def _how_it_ended(trial: Trial) -> str:
    if trial.ended:
        return "; ".join(trial.result["output"]["problems"])
    return f"{trial.result['status']}: {trial.result['reason']}"


def _differing(first: Trial, second: Trial) -> tuple[int, int] | None:
    """Count voxels whose labels differ, and voxels that either labels; None if shapes differ."""
    if not all(trial.result["output"]["scorable"] for trial in (first, second)):
        return None
    one, two = (read_volume(trial.label_map).voxels for trial in (first, second))
    if one.shape != two.shape:
        return None
    differ = sum(np.count_nonzero(a != b) for a, b in zip(one, two, strict=True))
    labelled = sum(np.count_nonzero((a != 0) | (b != 0)) for a, b in zip(one, two, strict=True))
    return int(differ), int(labelled)


def _share(differ: int, labelled: int) -> str:
    return f"{differ:,} of {labelled:,} labelled voxels differ"

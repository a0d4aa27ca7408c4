"""What the runs of a check amount to: passed, warned or failed, with its cost and what to do.

Failed is what costs cases in the challenge, or is not what it asks for. Warned is what costs
points by degree, costs nothing there but elsewhere, or could not be looked at.

It is long because it is the whole list: a function for each line of it, with its words.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmark.checking import symptoms
from benchmark.checking.trials import (
    HARDENED,
    NO_NETWORK,
    ORGANISERS,
    SMALL_SHARED_MEMORY,
    Trial,
)
from benchmark.containers.tables import PENALTY, by
from inference.labels import LABEL_NAMES
from inference.volume import read_volume

PASSED, WARNED, FAILED = "passed", "warned", "failed"

LOST = (
    f"a lost case: DSC 0, NSD 0, {PENALTY['seconds']:.0f} s and "
    f"{PENALTY['auc_gpu_mb_s']:,.0f} MB·s (FLARE 2022 rules)"
)
"""What a case costs that gives no label map."""

_ROUNDING = 1e-3
"""Of the labelled voxels: what a second run may label otherwise and still only be warned of."""

_NEARLY_ALL = 0.9  # of the memory limit

_ASPECTS = {
    "name": (
        "output names",
        f"{LOST}: only outputs/NAME.nii.gz is taken of an input NAME_0000.nii.gz",
        "take `_0000` off the input's name and write into /workspace/outputs itself",
    ),
    "file": (
        "output files",
        LOST,
        "write a regular, whole NIfTI file: no link, and nothing still being written at the end",
    ),
    "shape": (
        "output shapes",
        "DSC 0 and NSD 0: arrays are compared as stored, voxel by voxel",
        "resample the label map back to the input's own grid, in the input's own order of axes",
    ),
    "affine": (
        "output affines",
        "nothing if only the header is wrong, for the scorer compares arrays as stored; DSC near 0 "
        "if the array is turned as well; and whoever opens it sees organs in the wrong place",
        "write with the input's affine: Nifti1Image(labels, image.affine, image.header), or "
        "CopyInformation in SimpleITK",
    ),
    "type": (
        "output types",
        "fractions are cut off by the scorer: 12.9999 counts as 12",
        "store the labels as uint8, without slope and intercept",
    ),
    "labels": (
        "output labels",
        f"voxels of a label that is none of 0 to {len(LABEL_NAMES) - 1} are lost, or count as "
        "another organ once the scorer has made them 8-bit",
        f"map the network's classes to 0 to {len(LABEL_NAMES) - 1} as the challenge numbers them",
    ),
}
"""Of each aspect of an output check: the check's name, what it costs, and what to do."""

_MODES = {
    NO_NETWORK: (
        FAILED,
        f"{LOST}, every time: no network is promised",
        "put weights and all else that is downloaded into the image; set HF_HUB_OFFLINE=1 and its "
        "like while testing",
    ),
    SMALL_SHARED_MEMORY: (
        WARNED,
        "nothing where the organisers give 28 GB of shared memory (2023); every case where they "
        "leave --shm-size out (2021, 2022)",
        "set num_workers=0, or torch.multiprocessing.set_sharing_strategy('file_system')",
    ),
    HARDENED: (
        WARNED,
        "nothing in the challenge; hospitals and clusters that run no container as root cannot "
        "use it",
        "write nothing but outputs/ and /tmp, make all files readable by anyone (chmod -R a+rX), "
        "and keep caches out of the home folder (MPLCONFIGDIR, NUMBA_CACHE_DIR, TORCH_HOME)",
    ),
}
"""Of each way but the organisers' own: how bad it is to fail, what it costs, and what to do."""


@dataclass(frozen=True)
class Finding:
    """One line of the list.

    Attributes:
        level: "passed", "warned" or "failed".
        check: what was looked at.
        found: what was found.
        cost: what it would cost in the challenge; empty if passed.
        advice: what to do; empty if passed.
    """

    level: str
    check: str
    found: str
    cost: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Limits:
    """What runs are held against.

    Attributes:
        seconds: that cost nothing.
        gpu_mb: MB of device memory that cost nothing.
        memory: of RAM, as `docker run -m` takes it, and in MB.
    """

    seconds: float
    gpu_mb: float
    memory: str
    memory_mb: float


def judge_start(trial: Trial, limits: Limits) -> Finding:
    """The first run, by the organisers' exact command line."""
    check = "starts with the organisers' command"
    if trial.outcome.status == "ok":
        found = f"exit code 0 after {trial.outcome.seconds:.1f} s, within {limits.memory} of memory"
        return Finding(PASSED, check, found)
    return Finding(FAILED, check, _how_it_ended(trial), f"{LOST}, every time", _advice(trial))


def judge_mode(trial: Trial, first: Trial) -> Finding:
    """A run in another way than the organisers' own, held against theirs."""
    level, cost, advice = _MODES[trial.mode]
    if not trial.ran:
        return Finding(
            level, trial.mode, _how_it_ended(trial), cost, symptoms.advice(trial) or advice
        )
    differing = _differing(first, trial) if trial.digest != first.digest else None
    if differing and differing[0]:  # other bytes may hold the same labels
        found = f"another label map than by the organisers' command: {_share(*differing)}"
        return Finding(WARNED, trial.mode, found, "the scores here are not theirs", advice)
    return Finding(PASSED, trial.mode, f"a label map after {trial.outcome.seconds:.1f} s")


def judge_volume(trial: Trial) -> Finding:
    """A volume by the organisers' command: whether the run ended well."""
    check = f"volume: {trial.label}"
    if trial.outcome.status == "ok":
        size = by(trial.image_size)
        return Finding(PASSED, check, f"{size}, {trial.outcome.seconds:.1f} s")
    return Finding(FAILED, check, _how_it_ended(trial), LOST, _advice(trial))


def judge_outputs(trials: Sequence[Trial]) -> list[Finding]:
    """Names, files, shapes, affines, types and labels of the label maps of runs that ended well."""
    ended = [trial for trial in trials if trial.outcome.status == "ok"]
    findings = []
    for aspect, (check, cost, advice) in _ASPECTS.items():
        wrong = [
            f"{trial.label}: {problem}"
            for trial in ended
            for kind, problem in zip(trial.output.aspects, trial.output.problems, strict=True)
            if kind == aspect
        ]
        looked_at = [trial for trial in ended if _was_looked_at(trial, aspect)]
        if wrong:
            findings.append(Finding(FAILED, check, "; ".join(wrong), cost, advice))
        elif looked_at:
            findings.append(Finding(PASSED, check, f"as they must be: {_labels_of(looked_at)}"))
    empty = sorted({trial.label for trial in ended if trial.empty})
    if empty:
        findings.append(
            Finding(
                WARNED, "something is labelled", f"no organ at all in {', '.join(empty)}",
                "DSC 0 where the patient is as the reference says",
                "phantoms are cartoons of an abdomen: try --inputs with CTs of your own",
            )
        )  # fmt: skip
    return findings


def judge_determinism(first: Trial, again: Trial) -> Finding:
    """The same volume twice, by the same command."""
    check = "twice the same"
    if not again.ran:
        found = f"the second run: {_how_it_ended(again)}"
        return Finding(FAILED, check, found, f"{LOST}, now and then", _advice(again))
    if first.digest == again.digest:
        return Finding(PASSED, check, "the same bytes")
    differing = _differing(first, again)
    if differing is None:
        found, advice = "the bytes differ, and the labels cannot be compared", "mend the label map"
        return Finding(WARNED, check, found, "unknown", advice)
    count, labelled = differing
    if count == 0:
        return Finding(
            WARNED, check, "the labels are the same, the bytes differ", "nothing",
            "gzip writes the time into its header: mtime=0 gives the same file every time",
        )  # fmt: skip
    level = WARNED if count <= _ROUNDING * labelled else FAILED
    return Finding(
        level, check, _share(count, labelled), "the scores are another draw than yours",
        "model.eval(), fixed seeds, and no test-time augmentation by chance",
    )  # fmt: skip


def judge_time(trials: Sequence[Trial], limits: Limits) -> Finding:
    """Wall clock of the organisers' command against the tolerance."""
    check = f"time, {limits.seconds:g} s cost nothing"
    measured = [trial for trial in trials if trial.ran]
    above = [trial for trial in measured if trial.outcome.seconds > limits.seconds]
    if not above:
        return Finding(PASSED, check, f"at most {_most(t.outcome.seconds for t in measured):.1f} s")
    found = ", ".join(
        f"{trial.label} {trial.outcome.seconds:.1f} s, "
        f"{trial.outcome.seconds - limits.seconds:.1f} s above"
        for trial in above
    )
    return Finding(
        WARNED, check, found, "ranked by the seconds above",
        "their machine has a GPU and other cores than this one: `benchmark efficiency` on one like "
        "theirs says more",
    )  # fmt: skip


def judge_gpu_memory(trials: Sequence[Trial], limits: Limits) -> Finding:
    """Device memory of the organisers' command against the tolerance."""
    check = f"GPU memory, {limits.gpu_mb:,.0f} MB cost nothing"
    measured = [trial for trial in trials if trial.peak_gpu_mb is not None]
    if not measured:
        return Finding(
            WARNED, check, "not measured: there is no GPU here", "unknown",
            "check it on a machine with an NVIDIA GPU",
        )  # fmt: skip
    above = [trial for trial in measured if trial.peak_gpu_mb > limits.gpu_mb]
    if not above:
        return Finding(PASSED, check, f"at most {_most(t.peak_gpu_mb for t in measured):,.0f} MB")
    found = ", ".join(
        f"{trial.label} {trial.peak_gpu_mb:,.0f} MB, {trial.auc_tolerated_mb_s:,.0f} MB·s above"
        for trial in above
    )
    return Finding(
        WARNED, check, found, "ranked by the area above",
        "smaller batches or patches, half precision, torch.inference_mode()",
    )  # fmt: skip


def judge_memory(trials: Sequence[Trial], limits: Limits) -> Finding:
    """The most RAM of any run against the limit."""
    check = f"memory, at most {limits.memory}"
    most = max(trials, key=lambda trial: trial.max_ram_mb)
    found = f"at most {most.max_ram_mb:,.0f} MB ({most.label})"
    if most.max_ram_mb <= _NEARLY_ALL * limits.memory_mb:
        return Finding(PASSED, check, found)
    return Finding(
        WARNED, check, found, f"{LOST}, once a volume is a little larger",
        "keep fewer copies of the volume, and probabilities of one label at a time",
    )  # fmt: skip


def judge_leftovers(trials: Sequence[Trial]) -> list[Finding]:
    """What containers left beside the label map, and what they did to their inputs."""
    # Where there is no label map, what is there instead is said of the names.
    left = {trial.label: trial.left for trial in trials if trial.left and trial.output.found}
    shown = "; ".join(
        f"{label}: {', '.join(names[:5])}" + (" …" if len(names) > 5 else "")
        for label, names in left.items()
    )
    check = "files left behind"
    if not left:
        findings = [Finding(PASSED, check, "none")]
    elif any(name.endswith((".nii.gz", ".nii")) for names in left.values() for name in names):
        findings = [
            Finding(
                FAILED, check, shown,
                "may be taken for the label map of another case, whose own it replaces",
                "write nothing but outputs/NAME.nii.gz; what lies between goes to /tmp",
            )
        ]  # fmt: skip
    else:
        findings = [
            Finding(
                WARNED, check, shown, "nothing that is known; they are in the next case's way",
                "remove them before the container ends; what lies between goes to /tmp",
            )
        ]  # fmt: skip
    touched = sorted({trial.label for trial in trials if trial.inputs_touched})
    if touched:
        findings.append(
            Finding(
                WARNED, "inputs left alone", f"inputs/ was changed: {', '.join(touched)}",
                "nothing that is known; a read-only mount fails",
                "write what lies between to /tmp",
            )
        )  # fmt: skip
    return findings


def judge_damaged(trial: Trial) -> Finding:
    """A file that ends in its middle: the run must end, and say so."""
    check = "a damaged input"
    ended, written = trial.outcome, trial.output.found
    if ended.status == "crashed" and not written:
        return Finding(PASSED, check, f"refused: {ended.reason}")
    if ended.status in ("timeout", "out of memory"):
        found = _how_it_ended(trial)
    elif written:
        found = "a label map is written of half a file"
    else:
        found = "exit code 0, and no label map"
    return Finding(
        WARNED, check, found, "nothing unless their copy is damaged, which nobody would notice",
        "let the exit code say that a case failed, and write no label map of it",
    )  # fmt: skip


def not_run(left_out: str) -> Finding:
    """What is left out because the first run gave no label map."""
    return Finding(
        WARNED, "everything else", f"not run: {left_out}", "unknown",
        "mend what failed, and check again",
    )  # fmt: skip


def _labels_of(trials: Sequence[Trial]) -> str:
    return ", ".join(trial.label for trial in trials)


def _was_looked_at(trial: Trial, aspect: str) -> bool:
    if aspect == "name":
        return trial.output.found
    if aspect in ("file", "shape"):
        return trial.output.found and "file" not in trial.output.aspects
    return trial.output.scorable


def _how_it_ended(trial: Trial) -> str:
    if trial.outcome.status != "ok":
        return f"{trial.outcome.status}: {trial.outcome.reason}"
    return "; ".join(trial.output.problems)


def _advice(trial: Trial) -> str:
    return symptoms.advice(trial) or (
        f"run it by hand and read what it prints; the last lines are in check/ of the report "
        f"({ORGANISERS})"
    )


def _differing(first: Trial, second: Trial) -> tuple[int, int] | None:
    """Voxels whose labels differ, and voxels that either labels; None if they have no one shape."""
    if not (first.output.scorable and second.output.scorable):
        return None
    one, two = (read_volume(trial.label_map).voxels for trial in (first, second))
    if one.shape != two.shape:
        return None
    differ = labelled = 0
    for a, b in zip(one, two, strict=True):
        differ += np.count_nonzero(a != b)
        labelled += np.count_nonzero((a != 0) | (b != 0))
    return int(differ), int(labelled)


def _share(count: int, labelled: int) -> str:
    return f"{count:,} of {labelled:,} labelled voxels differ"


def _most(values: Iterable[float]) -> float:
    return max(values, default=0.0)

"""What the runs of a check amount to: passed, warned or failed, with its cost and what to do.

Failed is what costs cases in the challenge, or is not what it asks for. Warned is what costs
points by degree, costs nothing there but elsewhere, or could not be checked.

It is long because it is the whole list: a function for each line of it, with its words.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmark.checking.trials import HARDENED, NO_NETWORK, SMALL_SHARED_MEMORY, Trial
from benchmark.containers.results import PENALTY, TOLERANCES
from benchmark.options import size_mb
from benchmark.text import by
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

_ROUNDING = 1e-3  # of the labelled voxels: what a second run may label otherwise with a warning

_NEARLY_ALL = 0.9  # of the memory limit

_LAST = len(LABEL_NAMES) - 1

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
        f"voxels of a label outside 0 to {_LAST} are lost, or count as another organ once the "
        "scorer has made them 8-bit",
        f"map the network's classes to 0 to {_LAST} as the challenge numbers them",
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

_SYMPTOMS = {
    r"Name or service not known|Temporary failure in name resolution|Network is unreachable"
    r"|Could not resolve host|Failed to establish a new connection|urlopen error|getaddrinfo"
    r"|Max retries exceeded|ConnectionError": "it asks for the network, which is not promised: put "
    "weights and all else that is downloaded into the image",
    r"Read-only file system|Permission denied|PermissionError": "it writes, or reads, where it may "
    "not: write nothing but outputs/ and /tmp, and make every file of the image readable by anyone "
    "(chmod -R a+rX)",
    r"Bus error|unable to mmap|unable to open shared memory|No space left on device"
    r"|insufficient shared memory": "it needs more shared memory: num_workers=0, or "
    "torch.multiprocessing.set_sharing_strategy('file_system')",
    r"exec format error": "it is built for another processor: docker build --platform linux/amd64",
    r"predict\.sh: No such file|open predict\.sh|open '?predict\.sh": "predict.sh must lie in the "
    "image's working folder: WORKDIR /workspace, COPY predict.sh .",
    r"/bin/bash\S* ?:? .*no such file|\"/bin/bash\"": "the organisers call /bin/bash, and no "
    "ENTRYPOINT may stand before it: install bash",
    r"\$'?\\r|\r: (not found|command not found)|bad interpreter": "a script has line ends of "
    "Windows: convert it to those of Unix",
    r"No CUDA GPUs are available|Found no NVIDIA driver|libcuda\.so|CUDA driver version"
    r"|No CUDA runtime is found|Torch not compiled with CUDA|no kernel image is available": "it "
    "needs a GPU that is not here, or one that its CUDA fits: check it on a machine like the "
    "organisers', or let it run on the CPU where there is none",
}
"""Words of a log, and what they call for."""


@dataclass(frozen=True)
class Finding:
    """One line of the list; cost in the challenge and advice are empty if it passed."""

    level: str
    check: str
    found: str
    cost: str = ""
    advice: str = ""


def advice(trial: Trial) -> str | None:
    """Return what to do about a run that failed, by its log; None where that tells nothing."""
    if trial.outcome.status == "timeout":
        return (
            "find what it waits for; if it is only slow, --timeout 3600 waits as long as the "
            "challenge does"
        )
    if trial.outcome.status == "out of memory":
        return "hold fewer copies of the volume, and work slice by slice or patch by patch"
    return next((act for words, act in _SYMPTOMS.items() if re.search(words, trial.printed)), None)


def judge_start(trial: Trial, memory: str) -> Finding:
    """Judge the first run, by the organisers' exact command line."""
    check = "starts with the organisers' command"
    if trial.outcome.status == "ok":
        found = f"exit code 0 after {trial.outcome.seconds:.1f} s, within {memory} of memory"
        return Finding(PASSED, check, found)
    return Finding(FAILED, check, _how_it_ended(trial), f"{LOST}, every time", _advice(trial))


def judge_mode(trial: Trial, first: Trial) -> Finding:
    """Judge a run in another way than the organisers' own, against theirs."""
    level, cost, what_to_do = _MODES[trial.mode]
    if not trial.ran:
        act = advice(trial) or what_to_do
        return Finding(level, trial.mode, _how_it_ended(trial), cost, act)
    differing = _differing(first, trial) if trial.digest != first.digest else None
    if differing and differing[0]:  # other bytes may hold the same labels
        found = f"another label map than by the organisers' command: {_share(*differing)}"
        return Finding(WARNED, trial.mode, found, "the scores here are not theirs", what_to_do)
    return Finding(PASSED, trial.mode, f"a label map after {trial.outcome.seconds:.1f} s")


def judge_volume(trial: Trial) -> Finding:
    """Judge a volume by the organisers' command: whether the run ended well."""
    check = f"volume: {trial.label}"
    if trial.outcome.status == "ok":
        found = f"{by(trial.image_size)}, {trial.outcome.seconds:.1f} s"
        return Finding(PASSED, check, found)
    return Finding(FAILED, check, _how_it_ended(trial), LOST, _advice(trial))


def judge_outputs(trials: Sequence[Trial]) -> list[Finding]:
    """Judge names, files, shapes, affines, types and labels of the label maps of ended runs."""
    ended = [trial for trial in trials if trial.outcome.status == "ok"]
    findings = []
    for aspect, (check, cost, what_to_do) in _ASPECTS.items():
        wrong = [
            f"{trial.label}: {problem}"
            for trial in ended
            for kind, problem in zip(trial.output.aspects, trial.output.problems, strict=True)
            if kind == aspect
        ]
        checked = ", ".join(trial.label for trial in ended if _was_checked(trial, aspect))
        if wrong:
            findings.append(Finding(FAILED, check, "; ".join(wrong), cost, what_to_do))
        elif checked:
            findings.append(Finding(PASSED, check, f"as they must be: {checked}"))
    if empty := sorted({trial.label for trial in ended if trial.empty}):
        found = f"no organ at all in {', '.join(empty)}"
        cost = "DSC 0 where the patient is as the reference shows"
        act = "phantoms are cartoons of an abdomen: try --inputs with CTs of your own"
        findings.append(Finding(WARNED, "something is labelled", found, cost, act))
    return findings


def judge_determinism(first: Trial, again: Trial) -> Finding:
    """Judge the same volume twice, by the same command."""
    check = "twice the same"
    if not again.ran:
        found = f"the second run: {_how_it_ended(again)}"
        return Finding(FAILED, check, found, f"{LOST}, now and then", _advice(again))
    if first.digest == again.digest:
        return Finding(PASSED, check, "the same bytes")
    differing = _differing(first, again)
    if differing is None:
        found = "the bytes differ, and the labels cannot be compared"
        return Finding(WARNED, check, found, "unknown", "mend the label map")
    if not differing[0]:
        act = "gzip writes the time into its header: mtime=0 gives the same file every time"
        return Finding(WARNED, check, "the labels are the same, the bytes differ", "nothing", act)
    level = WARNED if differing[0] <= _ROUNDING * differing[1] else FAILED
    act = "model.eval(), fixed seeds, and no test-time augmentation by chance"
    return Finding(level, check, _share(*differing), "other scores than yours, by chance", act)


def judge_time(trials: Sequence[Trial]) -> Finding:
    """Judge the wall clock of the organisers' command by the tolerance."""
    check = f"time, {FREE.seconds:g} s cost nothing"
    times = {trial.label: trial.outcome.seconds for trial in trials if trial.ran}
    above = {label: seconds for label, seconds in times.items() if seconds > FREE.seconds}
    if not above:
        return Finding(PASSED, check, f"at most {max(times.values(), default=0.0):.1f} s")
    found = ", ".join(f"{k} {s:.1f} s, {s - FREE.seconds:.1f} s above" for k, s in above.items())
    act = (
        "their machine has a GPU and other cores than this one: `benchmark efficiency` on one like "
        "theirs tells more"
    )
    return Finding(WARNED, check, found, "ranked by the seconds above", act)


def judge_gpu_memory(trials: Sequence[Trial]) -> Finding:
    """Judge the GPU memory of the organisers' command by the tolerance."""
    check = f"GPU memory, {FREE.mb:,.0f} MB cost nothing"
    measured = [trial for trial in trials if trial.peak_gpu_mb is not None]
    if not measured:
        broken = [trial.gpu_error for trial in trials if trial.gpu_error]
        found = f"not measured: {broken[0] if broken else 'no GPU memory can be read here'}"
        act = "check it on a machine with an NVIDIA GPU"
        return Finding(WARNED, check, found, "unknown", act)
    above = [trial for trial in measured if trial.peak_gpu_mb > FREE.mb]
    if not above:
        most = max(trial.peak_gpu_mb for trial in measured)
        return Finding(PASSED, check, f"at most {most:,.0f} MB")
    found = ", ".join(
        f"{trial.label} {trial.peak_gpu_mb:,.0f} MB, "
        f"{trial.figures['auc_flare_tolerated_mb_s']:,.0f} MB·s above"
        for trial in above
    )
    act = "smaller batches or patches, half precision, torch.inference_mode()"
    return Finding(WARNED, check, found, "ranked by the area above", act)


def judge_memory(trials: Sequence[Trial], memory: str) -> Finding:
    """Judge the most RAM of any run by the limit."""
    check = f"memory, at most {memory}"
    most = max(trials, key=lambda trial: trial.max_ram_mb)
    found = f"at most {most.max_ram_mb:,.0f} MB ({most.label})"
    if most.max_ram_mb <= _NEARLY_ALL * size_mb(memory):
        return Finding(PASSED, check, found)
    act = "hold fewer copies of the volume, and probabilities of one label at a time"
    return Finding(WARNED, check, found, f"{LOST}, once a volume is a little larger", act)


def judge_leftovers(trials: Sequence[Trial]) -> list[Finding]:
    """Judge what containers left beside the label map, and what they did to their inputs."""
    # Where there is no label map, what is there instead is reported with the names.
    left = {trial.label: trial.left for trial in trials if trial.left and trial.output.found}
    shown = "; ".join(
        f"{label}: {', '.join(names[:5])}" + " …" * (len(names) > 5)
        for label, names in left.items()
    )
    check = "files left behind"
    if not left:
        findings = [Finding(PASSED, check, "none")]
    elif any(name.endswith((".nii.gz", ".nii")) for names in left.values() for name in names):
        cost = "may be taken for the label map of another case, whose own it replaces"
        act = "write nothing but outputs/NAME.nii.gz; what lies between goes to /tmp"
        findings = [Finding(FAILED, check, shown, cost, act)]
    else:
        cost = "nothing that is known; they are in the next case's way"
        act = "remove them before the container ends; what lies between goes to /tmp"
        findings = [Finding(WARNED, check, shown, cost, act)]
    if touched := sorted({trial.label for trial in trials if trial.inputs_touched}):
        found = f"inputs/ was changed: {', '.join(touched)}"
        cost = "nothing that is known; a read-only mount fails"
        act = "write what lies between to /tmp"
        findings.append(Finding(WARNED, "inputs left alone", found, cost, act))
    return findings


def judge_damaged(trial: Trial) -> Finding:
    """Judge a file that ends in its middle: the run must end, with an exit code."""
    check = "a damaged input"
    ended, written = trial.outcome, trial.output.found
    if ended.status == "crashed" and not written:
        return Finding(PASSED, check, f"refused: {ended.reason}")
    found = "a label map is written of half a file" if written else "exit code 0, and no label map"
    if ended.status in ("timeout", "out of memory"):
        found = _how_it_ended(trial)
    cost = "nothing unless their copy is damaged, which nobody would notice"
    act = "let the exit code show that a case failed, and write no label map of it"
    return Finding(WARNED, check, found, cost, act)


def not_run(reason: str) -> Finding:
    """Return what stands for everything else where the first run gave no label map."""
    act = "mend what failed, and check again"
    return Finding(WARNED, "everything else", f"not run: {reason}", "unknown", act)


def _was_checked(trial: Trial, aspect: str) -> bool:
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
    by_hand = "run it by hand and read what it prints; the last lines are in check/ of the report"
    return advice(trial) or by_hand


def _differing(first: Trial, second: Trial) -> tuple[int, int] | None:
    """Count voxels whose labels differ, and voxels that either labels; None if shapes differ."""
    if not (first.output.scorable and second.output.scorable):
        return None
    one, two = (read_volume(trial.label_map).voxels for trial in (first, second))
    if one.shape != two.shape:
        return None
    differ = sum(np.count_nonzero(a != b) for a, b in zip(one, two, strict=True))
    labelled = sum(np.count_nonzero((a != 0) | (b != 0)) for a, b in zip(one, two, strict=True))
    return int(differ), int(labelled)


def _share(differ: int, labelled: int) -> str:
    return f"{differ:,} of {labelled:,} labelled voxels differ"

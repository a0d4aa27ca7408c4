"""Training data: data sets on disk, a memory-mapped cache of their volumes, and random slices.

A data set is a folder in one of three layouts:

    imagesTr*/NAME_0000.nii.gz and labelsTr*/NAME.nii.gz    the challenge, nnU-Net
    images/NAME_0000.nii.gz and labels/NAME.nii.gz          plain
    part-*/cases.json and part-*/NAME-*.png                 packed (`training/packing.py`)

Beside them may lie `cases.json`, which says of each case what its annotator looked for:

    {"NAME": {"annotated_labels": [1, 2, 13], "patient": "P7", "split": "left_out",
              "slices": "stack", "window_hu": [-160, 240], "label_quality": "expert"}, …}

A label that is not listed may be present and unmarked. A case with an empty list is unlabelled and
not used. `patient` is whom several cases share; without it each case is a patient. A case whose
`split` is `left_out` is never trained on; it is there for a last score. A `stack` is of single
slices that do not touch, so that nothing in it is whole in 3D. `window_hu` is the range outside
which an 8-bit picture lost its HU (training draws such windows for other slices as well, by the
recipe's `window_probability`, so that the network does not learn them as a mark). Labels whose
`label_quality` does not begin with "expert" are sampled half as often. Where nothing
says what was looked for, it is the labels present, the rule for the challenge's own set. A data
set with numbers of its own comes with a label map file (`label_maps/*.json`), or with nnU-Net's
`dataset.json`, whose names say which of its numbers are ours and that all of these were looked for.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from inference.files import case_name, find_cases
from inference.labels import LABEL_NAMES
from training import TrainingError
from training.label_mapping import NUM_LABELS, LabelMapping


@dataclass
class Case:
    """One labelled volume.

    Attributes:
        data_set: name of its folder.
        name: NAME of `NAME_0000.nii.gz`.
        image, label: paths of the files.
        patient: whom the case is of.
        mapping: of its label numbers, or None if they are the challenge's.
        annotated: our labels that its annotator looked for, without 0; None until the label map is
            read, where the rule is "labels present".
        stack: whether its slices do not touch: single slices of a patient in one file.
        window_hu: the range outside which its HU are lost, or None.
        expert: whether people, not a model, made its labels.
        packed: what is known of a packed case, or None.
        cached: what the cache knows of it, once there.
    """

    data_set: str
    name: str
    image: Path
    label: Path
    patient: str
    mapping: LabelMapping | None = None
    annotated: tuple[int, ...] | None = None
    stack: bool = False
    window_hu: tuple[float, float] | None = None
    expert: bool = True
    packed: dict | None = None
    cached: "CachedVolume | None" = None


@dataclass(frozen=True)
class CachedVolume:
    """A volume and its label map, mapped from the cache or, of a packed case, in memory.

    Attributes:
        image: HU, int16, (slices, rows, columns), SPL, or the path of its .npy file.
        labels: label map in our numbers, uint8, of the same shape, or the path of its .npy file.
        shape: of both.
        spacing: (slice, row, column), mm.
        window: 1st and 99th percentile, HU, of the file's own values.
        count, total, total_of_squares: of the voxels clipped to the window, HU.
        slice_labels: per slice a bit mask of the labels in it.
        remark: where the headers of image and label map disagree, or "".
    """

    image: Path | np.ndarray
    labels: Path | np.ndarray
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    window: tuple[float, float]
    count: int
    total: float
    total_of_squares: float
    slice_labels: tuple[int, ...]
    remark: str

    @classmethod
    def of(cls, image: Path | np.ndarray, labels: Path | np.ndarray, about: dict) -> "CachedVolume":
        """Return a volume of which `about`, maybe out of JSON, holds the other attributes."""
        lists = ("shape", "spacing", "window", "slice_labels")
        about = {**about, **{name: tuple(about[name]) for name in lists}}
        return cls(image=image, labels=labels, **about)

    @property
    def hu(self) -> np.ndarray:
        """The HU; mapped anew each time: thousands of open maps would exhaust a process's files."""
        return self.image if isinstance(self.image, np.ndarray) else np.load(self.image, "r")

    @property
    def label_map(self) -> np.ndarray:
        """The label map, as `hu`."""
        return self.labels if isinstance(self.labels, np.ndarray) else np.load(self.labels, "r")

    @property
    def pixel_mm(self) -> float:
        """The size of a pixel in plane, mm."""
        return (self.spacing[1] * self.spacing[2]) ** 0.5

    @property
    def present(self) -> tuple[int, ...]:
        """The labels in the volume, without 0."""
        mask = np.bitwise_or.reduce(np.array(self.slice_labels, np.int64))
        return tuple(label for label in range(1, NUM_LABELS) if mask >> label & 1)


class Files(NamedTuple):
    """The files of a data set.

    Attributes:
        images: case names and images.
        labels: label maps by case name.
        described: what `cases.json` says, by case.
    """

    images: list[tuple[str, Path]]
    labels: dict[str, Path]
    described: dict[str, dict]


def find_files(folder: Path) -> Files:
    """Find the files of a data set in one of the layouts of this module's head.

    Raises:
        TrainingError: not a data set, or its description is damaged.
    """
    described: dict[str, dict] = {}
    for path in (folder / "cases.json", *sorted(folder.glob("part-*/cases.json"))):
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            packed = [about["packed"] for about in content.values() if about.get("packed")]
        except (ValueError, AttributeError, TypeError) as error:
            raise TrainingError(f"{path}: not of the form {{case: {{…}}, …}} ({error})") from error
        for about in packed:
            about["folder"] = path.parent
        described |= content
    packed = {name: about["packed"] for name, about in described.items() if "packed" in about}
    if packed:
        images, labels = (
            {name: about["folder"] / about[kind][0] for name, about in packed.items()}
            for kind in ("images", "labels")
        )
        return Files(list(images.items()), labels, described)
    for patterns in (("imagesTr*", "labelsTr*"), ("images", "labels")):
        images, labels = (
            [file for part in sorted(folder.glob(pattern)) if part.is_dir()
             for file in find_cases(part)]
            for pattern in patterns
        )  # fmt: skip
        if images or labels:
            # A label map has no channel number: phantom_0000 is that of phantom_0000_0000.
            names = [path.name.removesuffix(".gz").removesuffix(".nii") for path in labels]
            named = [(case_name(path), path) for path in images]
            return Files(named, dict(zip(names, labels, strict=True)), described)
    raise TrainingError(
        f"{folder}: no volumes in imagesTr*/ and labelsTr*/, images/ and labels/, and no part-*/"
    )


def _one_of(about: dict, name: str, *choices: str) -> str:
    if (value := about.get(name, choices[0])) not in choices:
        raise ValueError(f"{name} is {' or '.join(choices)}, not {value!r}")
    return value


def find_training_cases(
    folder: Path, mapping: LabelMapping | None = None, *, left_out: bool = False
) -> list[Case]:
    """Return the labelled cases of a data set, sorted by name; none of their files is read.

    Args:
        folder: in one of the layouts of this module's head.
        mapping: of its label numbers.
        left_out: find the cases whose split is `left_out`, and only them; else all but them.

    Returns:
        Cases that have a label map and are not described as unlabelled.

    Raises:
        TrainingError: not a data set, or its description holds what is none of this module's head:
            read as something else, a case that was to be left out might be trained on.
    """
    files, cases = find_files(folder), []
    for name, image in sorted(files.images):
        about = files.described.get(name, {})
        annotated = about.get("annotated_labels", mapping.annotated_labels if mapping else None)
        if name not in files.labels or annotated == []:
            continue
        try:
            if (_one_of(about, "split", "train", "left_out") == "left_out") != left_out:
                continue
            if annotated is not None:
                annotated = tuple(sorted(set(annotated) - {0}))
                if not set(annotated) <= set(range(NUM_LABELS)):
                    raise ValueError(f"labels are 1 to {NUM_LABELS - 1}")
            window_hu = about.get("window_hu")
            if window_hu is not None:
                low, high = window_hu = tuple(map(float, window_hu))
                if not low < high:
                    raise ValueError(f"window_hu is [low, high], not {about['window_hu']!r}")
            cases.append(
                Case(
                    data_set=folder.name,
                    name=name,
                    image=image,
                    label=files.labels[name],
                    patient=str(about.get("patient", name)),
                    mapping=mapping,
                    annotated=annotated,
                    stack=_one_of(about, "slices", "volume", "stack") == "stack",
                    window_hu=window_hu,
                    expert=str(about.get("label_quality", "expert")).startswith("expert"),
                    packed=about.get("packed"),
                )
            )
        except (TypeError, ValueError) as error:
            raise TrainingError(f"{folder}/cases.json: {name}: {error}") from error
    return cases


def split_patients(
    cases: list[Case],
    fraction: float,
    seed: int,
    held_out: list[str] | None = None,
    fold: tuple[int, int] | None = None,
) -> tuple[list[Case], list[Case]]:
    """Divide cases into those trained on and those held out, all of a patient on one side.

    Patients are ranked by a hash of the seed and their name, so that a new case does not move the
    others to the other side of a fraction. Folds take every so-many-th of that rank: together they
    hold each patient out once, and their sizes differ by one at most.

    Args:
        cases: of all data sets.
        fraction: of the patients to hold out; at least one unless it is 0.
        seed: of the choice.
        held_out: names of cases or patients to hold out instead.
        fold: (number, count): the fold to hold out instead.

    Raises:
        TrainingError: a name is unknown, there are fewer patients than folds, or nothing is left to
            train on.
    """
    patients = sorted({case.patient for case in cases})
    ranked = sorted(
        patients,
        key=lambda name: hashlib.sha256(f"{seed}:{name}".encode(errors="surrogateescape")).digest(),
    )
    if held_out is not None:
        unknown = set(held_out) - {case.name for case in cases} - set(patients)
        if unknown:
            raise TrainingError(f"held-out cases that are not in the data: {', '.join(unknown)}")
        chosen = {case.patient for case in cases if {case.name, case.patient} & set(held_out)}
    elif fold is not None:
        number, count = fold
        if count > len(patients):
            raise TrainingError(f"{count} folds of {len(patients)} patients: give fewer folds")
        chosen = set(ranked[number::count])
    else:
        chosen = set(ranked[: max(1, round(fraction * len(patients)))] if fraction else ())
    kept = [case for case in cases if case.patient not in chosen]
    if not kept:
        raise TrainingError(
            f"nothing is left to train on: {len(cases)} cases of {len(patients)} patients, "
            f"{len(chosen)} held out"
        )
    return kept, [case for case in cases if case.patient in chosen]


def intensity_statistics(cases: list[Case]) -> tuple[float, float]:
    """Return mean and deviation, HU, of all voxels, each volume clipped to its own window."""
    count = sum(case.cached.count for case in cases)
    mean = sum(case.cached.total for case in cases) / count
    variance = sum(case.cached.total_of_squares for case in cases) / count - mean**2
    return mean, max(variance, 0.0) ** 0.5


def label_table(training: list[Case], held_out: list[Case]) -> str:
    """Return a table of the cases annotated for each label, and where it is present."""
    lines = [f"{'label':<24}{'annotated':>10}{'present':>9}{'slices':>8}{'held out':>10}"]
    for label in range(1, NUM_LABELS):
        annotated = [case for case in training if label in case.annotated]
        present = [case for case in annotated if label in case.cached.present]
        slices = sum(mask >> label & 1 for case in annotated for mask in case.cached.slice_labels)
        unseen = sum(label in case.annotated for case in held_out)
        lines.append(
            f"{label:>2} {LABEL_NAMES[label]:<21}{len(annotated):>10}{len(present):>9}"
            f"{slices:>8}{unseen:>10}"
        )
    return "\n".join(lines)

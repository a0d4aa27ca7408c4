"""Data sets on disk and their cases.

A data set is a folder in one of three layouts:

    imagesTr*/NAME_0000.nii.gz and labelsTr*/NAME.nii.gz    the challenge, nnU-Net
    images/NAME_0000.nii.gz and labels/NAME.nii.gz          plain
    part-*/cases.json and part-*/NAME-*.png                 packed (`training/packing.py`)

Beside them may lie `cases.json`, which describes each case:

    {"NAME": {"annotated_labels": [1, 2, 13], "patient": "P7", "split": "left_out",
              "slices": "stack", "window_hu": [-160, 240], "label_quality": "expert"}, …}

- `annotated_labels`: those that the annotator marked wherever they are; any other may be present
  and unmarked. With an empty list the case is not used. Without one they are those that the label
  map file (`label_maps/*.json`) or nnU-Net's `dataset.json` lists, else the labels present.
- `patient`: shared by the cases of a patient; without it each case is a patient.
- `split`: a case that is `left_out` is never trained on, only scored at last.
- `slices`: a `stack` has single slices that do not touch: nothing in it is whole in 3D.
- `window_hu`: the range outside which HU were lost, as in 8-bit images.
- `label_quality`: labels are sampled half as often where it does not begin with "expert".
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inference.files import case_name, find_cases
from inference.labels import LABEL_NAMES
from training import TrainingError
from training.label_mapping import CHALLENGE, NUM_LABELS, LabelMapping
from training.recipe import Recipe


@dataclass(frozen=True)
class CaseFiles:
    """A labelled volume on disk; of a packed case, `image` and `label` are the first files."""

    data_set: str  # name of its folder
    name: str  # NAME of `NAME_0000.nii.gz`
    image: Path
    label: Path
    patient: str
    mapping: LabelMapping = CHALLENGE
    annotated: tuple[int, ...] | None = None  # our labels without 0; None: the labels present
    left_out: bool = False
    stack: bool = False
    window_hu: tuple[float, float] | None = None
    expert: bool = True  # whether people, not a model, made its labels
    packed: dict[str, Any] | None = None  # what `cases.json` has of a packed case


@dataclass(frozen=True)
class CachedVolume:
    """A volume and its label map, mapped from .npy files of the cache or, if packed, in memory."""

    image: Path | np.ndarray  # HU, int16, (slices, rows, columns), SPL
    labels: Path | np.ndarray  # in our numbers, uint8
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]  # (slice, row, column), mm
    window: tuple[float, float]  # 1st and 99th percentile of the file's own values, HU
    count: int  # of voxels, and their sums when they are clipped to the window, HU
    total: float
    total_of_squares: float
    slice_labels: tuple[int, ...]  # per slice a bit mask of the labels in it
    remark: str = ""  # where the headers of image and label map disagree

    @classmethod
    def of(
        cls, image: Path | np.ndarray, labels: Path | np.ndarray, about: dict[str, Any]
    ) -> "CachedVolume":
        """Return a volume with its other attributes out of JSON."""
        lists = ("shape", "spacing", "window", "slice_labels")
        about = {**about, **{name: tuple(about[name]) for name in lists}}
        return cls(image=image, labels=labels, **about)

    @property
    def hu(self) -> np.ndarray:
        """The HU; mapped anew each time: thousands of open maps would exhaust a process's files."""
        return np.load(self.image, "r") if isinstance(self.image, Path) else self.image

    @property
    def label_map(self) -> np.ndarray:
        """The label map, as `hu`."""
        return np.load(self.labels, "r") if isinstance(self.labels, Path) else self.labels

    @property
    def present(self) -> tuple[int, ...]:
        """The labels in the volume, without 0."""
        mask = np.bitwise_or.reduce(np.array(self.slice_labels, np.int64))
        return tuple(label for label in range(1, NUM_LABELS) if mask >> label & 1)


@dataclass(frozen=True)
class Case:
    """A labelled volume that was read."""

    files: CaseFiles
    annotated: tuple[int, ...]  # labels that its annotator marked, without 0; others are unknown
    cached: CachedVolume

    @property
    def name(self) -> str:
        """The name of the case."""
        return self.files.name

    @property
    def patient(self) -> str:
        """The name of its patient."""
        return self.files.patient


def annotated_mask(labels: tuple[int, ...]) -> np.ndarray:
    """Return (15,) bool: True for the labels given and for 0."""
    mask = np.zeros(NUM_LABELS, bool)
    mask[[0, *labels]] = True
    return mask


def annotated_only(labels: np.ndarray, annotated: tuple[int, ...]) -> np.ndarray:
    """Return a label map in which labels that were not annotated are 0."""
    return np.where(annotated_mask(annotated), np.arange(NUM_LABELS), 0).astype(np.uint8)[labels]


def _cases_json(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what is described of each case; of packed ones with the folder of their part."""
    described: dict[str, dict[str, Any]] = {}
    for path in (folder / "cases.json", *sorted(folder.glob("part-*/cases.json"))):
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for about in content.values():
                if about.get("packed"):
                    about["packed"]["folder"] = path.parent
        except (ValueError, AttributeError, TypeError) as error:
            raise TrainingError(f"{path}: not of the form {{case: {{…}}, …}} ({error})") from error
        described |= content
    return described


def _files(
    folder: Path, described: dict[str, dict[str, Any]]
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return images and label maps by case, in the layout that the folder has."""
    packed = {name: about["packed"] for name, about in described.items() if "packed" in about}
    if packed:
        of_packed = [
            {name: about["folder"] / about[kind][0] for name, about in packed.items()}
            for kind in ("images", "labels")
        ]
        return of_packed[0], of_packed[1]
    for patterns in (("imagesTr*", "labelsTr*"), ("images", "labels")):
        images, labels = (
            [file for part in sorted(folder.glob(pattern)) if part.is_dir()
             for file in find_cases(part)]
            for pattern in patterns
        )  # fmt: skip
        if images or labels:
            # A label map has no channel number: phantom_0000 is that of phantom_0000_0000.
            names = [path.name.removesuffix(".gz").removesuffix(".nii") for path in labels]
            of_image = {case_name(path): path for path in images}
            return of_image, dict(zip(names, labels, strict=True))
    raise TrainingError(
        f"{folder}: no volumes in imagesTr*/ and labelsTr*/, images/ and labels/, and no part-*/"
    )


def _one_of(about: dict[str, Any], name: str, *choices: str) -> str:
    if (value := about.get(name, choices[0])) not in choices:
        raise ValueError(f"{name} is {' or '.join(choices)}, not {value!r}")
    return value


def _window(about: dict[str, Any]) -> tuple[float, float] | None:
    if (window := about.get("window_hu")) is None:
        return None
    low, high = map(float, window)
    if not low < high:
        raise ValueError(f"window_hu is [low, high], not {window!r}")
    return low, high


def find_training_cases(
    folder: Path, mapping: LabelMapping = CHALLENGE
) -> tuple[list[CaseFiles], dict[str, list[str]]]:
    """Find the labelled cases of a data set in one of the layouts above; no volume is read.

    Returns:
        Cases that have a label map and are not described as unlabelled, sorted by name; and the
        names of the others, by reason.

    Raises:
        TrainingError: not a data set, or `cases.json` has values that this module's head does not
            list: taken as something else, a left-out case might be trained on.
    """
    described, cases = _cases_json(folder), []
    images, labels = _files(folder, described)
    unlabelled = {name for name, about in described.items() if about.get("annotated_labels") == []}
    for name in sorted((set(images) & set(labels)) - unlabelled):
        about = described.get(name, {})
        try:
            annotated = about.get("annotated_labels", mapping.annotated_labels)
            if annotated is not None:
                annotated = tuple(sorted(set(annotated) - {0}))
                if not set(annotated) <= set(range(NUM_LABELS)):
                    raise ValueError(f"labels are 1 to {NUM_LABELS - 1}")
            case = CaseFiles(
                data_set=folder.name,
                name=name,
                image=images[name],
                label=labels[name],
                patient=str(about.get("patient", name)),
                mapping=mapping,
                annotated=annotated,
                left_out=_one_of(about, "split", "train", "left_out") == "left_out",
                stack=_one_of(about, "slices", "volume", "stack") == "stack",
                window_hu=_window(about),
                expert=str(about.get("label_quality", "expert")).startswith("expert"),
                packed=about.get("packed"),
            )
        except (TypeError, ValueError) as error:
            raise TrainingError(f"{folder}/cases.json: {name}: {error}") from error
        cases.append(case)
    unused = {
        "no label map": set(images) - set(labels),
        "a label map without an image": set(labels) - set(images),
        "in cases.json without an image": set(described) - set(images),
        "described as unlabelled (annotated_labels is empty)": unlabelled & set(images),
    }
    return cases, {reason: sorted(names) for reason, names in unused.items() if names}


def split_patients(
    cases: list[Case], recipe: Recipe, held_out: list[str] | None = None
) -> tuple[list[Case], list[Case]]:
    """Divide cases into those trained on and those held out, all of a patient on one side.

    Held out are the cases or patients named, else a fold or a fraction (at least one patient unless
    it is 0). Patients are ranked by a hash of the seed and their name, so that a new case does not
    move the others to the other side of a fraction. Folds take every so-many-th of that rank:
    together they hold each patient out once, and their sizes differ by one at most.

    Raises:
        TrainingError: a name is unknown, there are fewer patients than folds, or nothing is left to
            train on.
    """

    def rank(patient: str) -> bytes:
        return hashlib.sha256(f"{recipe.seed}:{patient}".encode(errors="surrogateescape")).digest()

    patients = sorted({case.patient for case in cases}, key=rank)
    if held_out is not None:
        unknown = set(held_out) - {case.name for case in cases} - set(patients)
        if unknown:
            raise TrainingError(f"held-out cases that are not in the data: {', '.join(unknown)}")
        chosen = {case.patient for case in cases if {case.name, case.patient} & set(held_out)}
    elif recipe.folds > len(patients):
        raise TrainingError(f"{recipe.folds} folds of {len(patients)} patients: give fewer folds")
    elif recipe.folds:
        chosen = set(patients[recipe.fold :: recipe.folds])
    else:
        fraction = recipe.held_out_fraction
        chosen = set(patients[: max(1, round(fraction * len(patients)))] if fraction else ())
    training = [case for case in cases if case.patient not in chosen]
    if not training:
        raise TrainingError(
            f"nothing is left to train on: {len(cases)} cases of {len(patients)} patients, "
            f"{len(chosen)} held out"
        )
    return training, [case for case in cases if case.patient in chosen]


def intensity_statistics(volumes: list[CachedVolume]) -> tuple[float, float]:
    """Return mean and deviation, HU, of all voxels, each volume clipped to its own window."""
    count = sum(volume.count for volume in volumes)
    mean = sum(volume.total for volume in volumes) / count
    variance = sum(volume.total_of_squares for volume in volumes) / count - mean**2
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

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

import numpy as np

from inference.files import case_name, find_cases
from inference.labels import LABEL_NAMES
from training.label_mapping import NUM_LABELS, DataError, LabelMapping


@dataclass
class Case:
    """One labelled volume.

    Attributes:
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
    def present(self) -> tuple[int, ...]:
        """The labels in the volume, without 0."""
        mask = np.bitwise_or.reduce(np.array(self.slice_labels, np.int64))
        return tuple(label for label in range(1, NUM_LABELS) if mask >> label & 1)


def _pair_folders(folder: Path) -> tuple[list[Path], list[Path]]:
    """The image and label folders of a data set."""
    for image_pattern, label_pattern in (("imagesTr*", "labelsTr*"), ("images", "labels")):
        images = sorted(path for path in folder.glob(image_pattern) if path.is_dir())
        labels = sorted(path for path in folder.glob(label_pattern) if path.is_dir())
        if images and labels:
            return images, labels
    raise DataError(
        f"{folder}: neither imagesTr*/ and labelsTr*/ nor images/ and labels/ nor part-*/cases.json"
    )


def paired_files(folder: Path) -> tuple[list[tuple[str, Path]], dict[str, Path]]:
    """The images of a data set, with their case's name, and its label maps by that name.

    Raises:
        DataError: not a data set.
    """
    described = read_description(folder)
    packed = {name: about["packed"] for name, about in described.items() if "packed" in about}
    if packed:
        images, labels = (
            {name: about["folder"] / about[kind][0] for name, about in packed.items()}
            for kind in ("images", "labels")
        )
        return list(images.items()), labels
    image_folders, label_folders = _pair_folders(folder)
    images = [(case_name(path), path) for part in image_folders for path in find_cases(part)]
    # A label map has no channel number: one called phantom_0000 is that of phantom_0000_0000.
    labels = {
        path.name.removesuffix(".gz").removesuffix(".nii"): path
        for part in label_folders
        for path in find_cases(part)
    }
    return images, labels


def read_description(folder: Path) -> dict[str, dict]:
    """What a data set's `cases.json` says, by case; nothing if there is none.

    Raises:
        DataError: it is damaged.
    """
    described: dict[str, dict] = {}
    for path in (folder / "cases.json", *sorted(folder.glob("part-*/cases.json"))):
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error})") from error
        if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
            raise DataError(f"{path}: not of the form {{case: {{…}}, …}}")
        for about in content.values():
            if "packed" in about:
                about["packed"]["folder"] = path.parent
        described |= content
    return described


def _described(about: dict) -> tuple[bool, bool, tuple[float, float] | None]:
    """Whether a case is left out, whether it is a stack, and its window, from `cases.json`.

    Raises:
        ValueError, TypeError: a value that is none of those of this module's head: read as
            something else, a case that was to be left out might be trained on.
    """
    split, slices = about.get("split", "train"), about.get("slices", "volume")
    if split not in ("train", "left_out"):
        raise ValueError(f"split is train or left_out, not {split!r}")
    if slices not in ("volume", "stack"):
        raise ValueError(f"slices is volume or stack, not {slices!r}")
    window = about.get("window_hu")
    if window is not None:
        low, high = (float(value) for value in window)
        if not low < high:
            raise ValueError(f"window_hu is [low, high], not {window!r}")
        window = (low, high)
    return split == "left_out", slices == "stack", window


def find_training_cases(
    folder: Path, mapping: LabelMapping | None = None, *, left_out: bool = False
) -> list[Case]:
    """The labelled cases of a data set, sorted by name; none of their files is read.

    Args:
        folder: in one of the layouts of this module's head.
        mapping: of its label numbers.
        left_out: find the cases whose split is `left_out`, and only them; else all but them.

    Returns:
        Cases that have a label map and are not described as unlabelled.

    Raises:
        DataError: not a data set, or its description is damaged or names labels we do not have.
    """
    images, label_paths = paired_files(folder)
    description, described = folder / "cases.json", read_description(folder)
    cases = []
    for name, image in images:
        about = described.get(name, {})
        annotated = about.get("annotated_labels", mapping.annotated_labels if mapping else None)
        if name not in label_paths or annotated == []:
            continue
        try:
            of_split, stack, window_hu = _described(about)
        except (TypeError, ValueError) as error:
            raise DataError(f"{description}: {name}: {error}") from error
        if of_split != left_out:
            continue
        if annotated is not None:
            annotated = tuple(sorted(set(annotated) - {0}))
            if not set(annotated) <= set(range(NUM_LABELS)):
                raise DataError(f"{description}: {name}: labels are 1 to {NUM_LABELS - 1}")
        cases.append(
            Case(
                name=name,
                image=image,
                label=label_paths[name],
                patient=str(about.get("patient", name)),
                mapping=mapping,
                annotated=annotated,
                stack=stack,
                window_hu=window_hu,
                expert=str(about.get("label_quality", "expert")).startswith("expert"),
                packed=about.get("packed"),
            )
        )
    return sorted(cases, key=lambda case: case.name)


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
        DataError: a name is unknown, there are fewer patients than folds, or nothing is left to
            train on.
    """
    patients = sorted({case.patient for case in cases})
    ranked = sorted(patients, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    if held_out is not None:
        unknown = set(held_out) - {case.name for case in cases} - set(patients)
        if unknown:
            raise DataError(f"held-out cases that are not in the data: {', '.join(unknown)}")
        chosen = {case.patient for case in cases if {case.name, case.patient} & set(held_out)}
    elif fold is not None:
        number, count = fold
        if count > len(patients):
            raise DataError(f"{count} folds of {len(patients)} patients: give fewer --folds")
        chosen = set(ranked[number::count])
    else:
        chosen = set(ranked[: max(1, round(fraction * len(patients)))] if fraction else ())
    kept = [case for case in cases if case.patient not in chosen]
    if not kept:
        raise DataError(
            f"nothing is left to train on: {len(cases)} cases of {len(patients)} patients, "
            f"{len(chosen)} held out"
        )
    return kept, [case for case in cases if case.patient in chosen]


def intensity_statistics(cases: list[Case]) -> tuple[float, float]:
    """Mean and standard deviation, HU, of all voxels, each volume clipped to its own window."""
    count = sum(case.cached.count for case in cases)
    mean = sum(case.cached.total for case in cases) / count
    variance = sum(case.cached.total_of_squares for case in cases) / count - mean**2
    return mean, max(variance, 0.0) ** 0.5


def never_present(cases: list[Case]) -> str:
    """Return a caution naming the labels annotated in every case and present in none, or ""."""
    if not cases:
        return ""
    everywhere = set.intersection(*(set(case.annotated) for case in cases))
    absent = sorted(everywhere.difference(*(case.cached.present for case in cases)))
    names = ", ".join(LABEL_NAMES[label] for label in absent)
    return f"annotated in every case and present in none: {names}" if names else ""


def label_table(training: list[Case], held_out: list[Case]) -> str:
    """A table of the cases annotated for each label, and of those in which it is present."""
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

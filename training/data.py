"""Training data: data sets on disk, a memory-mapped cache of their volumes, and random slices.

A data set is a folder in one of three layouts:

    imagesTr*/NAME_0000.nii.gz and labelsTr*/NAME.nii.gz    the challenge, nnU-Net
    images/NAME_0000.nii.gz and labels/NAME.nii.gz          plain

Beside them may lie `cases.json`, which says of each case what its annotator looked for:

    {"NAME": {"annotated_labels": [1, 2, 13], "patient": "P7", "split": "left_out",
              "slices": "stack", "window_hu": [-160, 240]}, …}

A label that is not listed may be present and unmarked. A case with an empty list is unlabelled and
not used. `patient` is whom several cases share; without it each case is a patient. A case whose
`split` is `left_out` is never trained on; it is there for a last score. A `stack` is of single
slices that do not touch, so that nothing in it is whole in 3D. `window_hu` is the range outside
which an 8-bit picture lost its HU (training draws such windows for other slices as well, by the
recipe's `window_probability`, so that the network does not learn them as a mark). Where nothing
says what was looked for, it is the labels present, the rule for the challenge's own set. A data
set with numbers of its own comes with a label map file (`label_maps/*.json`), or with nnU-Net's
`dataset.json`, whose names say which of its numbers are ours and that all of these were looked for.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from inference.intensity import percentiles
from inference.labels import LABEL_NAMES
from inference.volume import (
    Volume,
    VolumeError,
    case_name,
    find_cases,
    read_volume,
    write_atomically,
)
from training.loss import IGNORED

LABEL_MAPS = Path(__file__).parent / "label_maps"
"""Where the shipped label maps lie."""

_CACHE_VERSION = 1
_NUM_LABELS = len(LABEL_NAMES)


class DataError(ValueError):
    """Data that cannot be trained on; the message is the reason, in one line."""


@dataclass(frozen=True)
class LabelMapping:
    """How a data set's own label numbers become the challenge's.

    Attributes:
        name: of the file.
        description: of the data set.
        labels: the data set's numbers to ours; numbers left out become background.
        annotated_labels: what its annotators looked for, unless `cases.json` says otherwise.
        ignored: the data set's names of what is none of our labels.
    """

    name: str
    description: str
    labels: dict[int, int]
    annotated_labels: tuple[int, ...]
    ignored: tuple[str, ...] = ()


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
    cached: "CachedVolume | None" = None


@dataclass(frozen=True)
class CachedVolume:
    """A volume and its label map in the cache.

    Attributes:
        image: path of the HU, .npy, int16, (slices, rows, columns), SPL.
        labels: path of the label map in our numbers, .npy, uint8, the same shape.
        shape: of both.
        spacing: (slice, row, column), mm.
        window: 1st and 99th percentile, HU, of the file's own values.
        count, total, total_of_squares: of the voxels clipped to the window, HU.
        slice_labels: per slice a bit mask of the labels in it.
        remark: where the headers of image and label map disagree, or "".
    """

    image: Path
    labels: Path
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    window: tuple[float, float]
    count: int
    total: float
    total_of_squares: float
    slice_labels: tuple[int, ...]
    remark: str

    @property
    def present(self) -> tuple[int, ...]:
        """The labels in the volume, without 0."""
        mask = np.bitwise_or.reduce(np.array(self.slice_labels, np.int64))
        return tuple(label for label in range(1, _NUM_LABELS) if mask >> label & 1)


def load_label_mapping(name: str) -> LabelMapping:
    """Read a label map file: a shipped one by name (`amos`), or a path ending in .json.

    Raises:
        DataError: no such file, or not of the form of the shipped ones.
    """
    path = Path(name) if name.endswith(".json") else LABEL_MAPS / f"{name}.json"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in LABEL_MAPS.glob("*.json")))
        raise DataError(f"no label map {name}: name one of {shipped} or a .json file")
    try:
        content = json.loads(path.read_text())
        mapping = LabelMapping(
            name=path.stem,
            description=content.get("description", path.stem),
            labels={int(theirs): int(ours) for theirs, ours in content["labels"].items()},
            annotated_labels=tuple(sorted(content["annotated_labels"])),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a label map ({error!r})") from error
    if not set(mapping.labels.values()) | set(mapping.annotated_labels) <= set(range(_NUM_LABELS)):
        raise DataError(f"{path}: our labels are 0 to {_NUM_LABELS - 1}")
    return mapping


def _same_name(name: str) -> str:
    """A structure's name without what data sets spell differently: case, order, sides, "gland"."""
    words = [word.lower() for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    sides = {"l": "left", "r": "right"}
    return " ".join(sorted(sides.get(word, word) for word in words if word != "gland"))


_OTHER_NAMES = {
    "lkidney": 13, "rkidney": 2, "postcava": 6, "vena cava": 6, "ivc": 6, "inf vena cava": 6,
    "arota": 5, "oesophagus": 10, "eso": 10, "gall bladder": 9, "rag": 7, "lag": 8, "tumour": 14,
    "lesion": 14, "lesions": 14, "tumors": 14, "cancer": 14,
}  # fmt: skip
"""Names in use for our labels; "arota" is how AMOS spells it."""

_LABEL_OF_NAME = {
    _same_name(name): label
    for name, label in [
        *((name, label) for label, name in enumerate(LABEL_NAMES)),
        *_OTHER_NAMES.items(),
    ]
}


def nnunet_label_mapping(folder: Path) -> LabelMapping | None:
    """The label numbers of an nnU-Net raw folder, by the names in its `dataset.json`.

    Both forms of the file are read: `"labels": {"liver": 1}` and the older `{"1": "liver"}`.

    Returns:
        The mapping, or None if the folder has no `dataset.json`.

    Raises:
        DataError: the file is damaged, speaks of files that are not NIfTI, has regions of several
            numbers or a number for voxels to ignore, or names none of our labels.
    """
    path = folder / "dataset.json"
    if not path.is_file():
        return None
    names, regions = {}, []  # by number: several of them may share a name
    try:
        content = json.loads(path.read_text())
        for name, number in content["labels"].items():
            if isinstance(number, list):
                regions.append(name)
                continue
            if name.isdigit():
                name, number = number, name  # the older form
            names[int(number)] = str(name)
        ending = content.get("file_ending", ".nii.gz")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not nnU-Net's ({error!r})") from error
    if ending not in (".nii", ".nii.gz"):
        raise DataError(f"{path}: files end in {ending}: convert them to .nii.gz")
    if regions:
        raise DataError(
            f"{path}: {', '.join(regions)}: regions of several numbers are not read: say what "
            "each number is in a label map file, DIR=MAP.json"
        )
    if "ignore" in names.values():
        raise DataError(
            f"{path}: voxels labelled ignore are not read: taken as 0 they would be taught as "
            "background; leave those cases out"
        )
    known = {number: _LABEL_OF_NAME.get(_same_name(name)) for number, name in names.items()}
    labels = {number: label for number, label in known.items() if label}
    if not labels:
        raise DataError(f"{path}: none of {', '.join(names.values())} is a label of ours")
    return LabelMapping(
        name="dataset.json",
        description=str(content.get("name", folder.name)),
        labels=labels,
        annotated_labels=tuple(sorted(set(labels.values()))),
        ignored=tuple(names[number] for number, label in known.items() if label is None),
    )


def _pair_folders(folder: Path) -> tuple[list[Path], list[Path]]:
    """The image and label folders of a data set."""
    for image_pattern, label_pattern in (("imagesTr*", "labelsTr*"), ("images", "labels")):
        images = sorted(path for path in folder.glob(image_pattern) if path.is_dir())
        labels = sorted(path for path in folder.glob(label_pattern) if path.is_dir())
        if images and labels:
            return images, labels
    raise DataError(
        f"{folder}: neither imagesTr*/ and labelsTr*/ nor images/ and labels/ are there"
    )


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
    image_folders, label_folders = _pair_folders(folder)
    description = folder / "cases.json"
    described = {}
    if description.is_file():
        try:
            described = json.loads(description.read_text())
        except ValueError as error:
            raise DataError(f"{description}: not JSON ({error})") from error
    # A label map has no channel number: one called phantom_0000 is that of phantom_0000_0000.
    label_paths = {
        path.name.removesuffix(".gz").removesuffix(".nii"): path
        for folder in label_folders
        for path in find_cases(folder)
    }
    cases = []
    for image in (path for folder in image_folders for path in find_cases(folder)):
        name = case_name(image)
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
            if not set(annotated) <= set(range(_NUM_LABELS)):
                raise DataError(f"{description}: {name}: labels are 1 to {_NUM_LABELS - 1}")
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
            )
        )
    return sorted(cases, key=lambda case: case.name)


def _disagreement(image: Volume, label: Volume) -> tuple[str, bool]:
    """How the headers of an image and its label map disagree, and whether they can be paired.

    Both are compared as SPL arrays. Where only positions differ, the arrays belong together as
    stored (the challenge itself compares raw arrays); where an axis runs the other way, nobody can
    tell which header is right.
    """
    if image.voxels.shape != label.voxels.shape:
        return f"shapes {image.voxels.shape} and {label.voxels.shape} differ", False
    corners = np.array(np.meshgrid(*((0, size - 1) for size in image.voxels.shape))).reshape(3, -1)
    points = []
    for volume in (image, label):
        indices = np.empty((4, corners.shape[1]))
        indices[3] = 1
        for axis, (disk_axis, flip) in enumerate(
            zip(volume.disk_axes, volume.disk_flips, strict=True)
        ):
            last = volume.voxels.shape[axis] - 1
            indices[disk_axis] = last - corners[axis] if flip else corners[axis]
        points.append(volume.affine @ indices)
    distance = float(np.linalg.norm((points[0] - points[1])[:3], axis=0).max())
    if distance <= 0.1 * min(image.spacing):
        return "", True
    if (image.disk_axes, image.disk_flips) != (label.disk_axes, label.disk_flips):
        return f"orientations differ and corners lie {distance:.1f} mm apart", False
    return f"corners lie {distance:.1f} mm apart; paired as stored", True


def _hu(volume: Volume) -> np.ndarray:
    """The volume in HU as int16, rounded where the file has fractions or scales."""
    if volume.voxels.dtype == np.int16 and (volume.slope, volume.intercept) == (1, 0):
        return np.ascontiguousarray(volume.voxels)
    limits = np.iinfo(np.int16)
    hu = np.empty(volume.voxels.shape, np.int16)
    for index, voxels in enumerate(volume.voxels):  # slice by slice: no float copy of the volume
        values = np.nan_to_num(volume.slope * voxels.astype(np.float64) + volume.intercept)
        hu[index] = np.clip(np.rint(values), limits.min, limits.max)
    return hu


def _our_labels(volume: Volume, mapping: LabelMapping | None) -> np.ndarray:
    """A label map in our numbers, uint8; floats are taken where they are whole numbers."""
    values = volume.slope * volume.voxels + volume.intercept
    numbers = np.rint(values)
    if not np.isfinite(values).all() or np.abs(values - numbers).max() > 1e-3:
        raise VolumeError("the label map holds values that are not whole numbers")
    if numbers.min() < 0 or numbers.max() > 65535:
        raise VolumeError(f"the label map holds numbers up to {numbers.max():g}")
    table = np.zeros(65536, np.uint8)
    if mapping is None:
        if numbers.max() >= _NUM_LABELS:
            raise VolumeError(
                f"the label map holds {numbers.max():g}, our labels are 0 to {_NUM_LABELS - 1}: "
                "name the data set's own numbers with DIR=MAP"
            )
        table[:_NUM_LABELS] = np.arange(_NUM_LABELS)
    for theirs, ours in (mapping.labels if mapping else {}).items():
        table[theirs] = ours
    return table[numbers.astype(np.uint16)]


def _cache_key(case: Case) -> str:
    """What the cached files depend on."""
    parts = [str(_CACHE_VERSION), json.dumps(case.mapping.labels if case.mapping else None)]
    for path in (case.image, case.label):
        status = path.stat()
        parts += [str(path.resolve()), str(status.st_size), str(status.st_mtime_ns)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with temporary.open("wb") as file:
        np.save(file, array)
    temporary.replace(path)


def cache_case(case: Case, folder: Path) -> CachedVolume:
    """Read a case into the cache, or find it there.

    Args:
        case: its files are identified by path, size and time of change.
        folder: of the cache.

    Raises:
        VolumeError: a file cannot be used, or image and label map do not belong together.
        OSError: a file cannot be read or written.
    """
    stem = f"{case.name}-{_cache_key(case)}"
    image_path, labels_path = folder / f"{stem}.hu.npy", folder / f"{stem}.labels.npy"
    about_path = folder / f"{stem}.json"
    if about_path.is_file():
        about = json.loads(about_path.read_text())
        lists = ("shape", "spacing", "window", "slice_labels")
        about.update({name: tuple(about[name]) for name in lists})
        return CachedVolume(image=image_path, labels=labels_path, **about)

    image, label = read_volume(case.image), read_volume(case.label)
    remark, paired = _disagreement(image, label)
    if not paired:
        raise VolumeError(remark)
    try:
        window = sorted(
            image.slope * value + image.intercept for value in percentiles(image.voxels)
        )
    except ValueError as error:
        raise VolumeError(str(error)) from error
    hu, labels = _hu(image), _our_labels(label, case.mapping)
    total = total_of_squares = 0.0
    for values in hu:
        clipped = np.clip(values.astype(np.float64), *window)
        total += float(clipped.sum())
        total_of_squares += float(np.square(clipped).sum())
    about = {
        "shape": hu.shape,
        "spacing": image.spacing,
        "window": window,
        "count": hu.size,
        "total": total,
        "total_of_squares": total_of_squares,
        "slice_labels": [
            int(np.bitwise_or.reduce(1 << np.flatnonzero(np.bincount(part.ravel()))))
            for part in labels
        ],
        "remark": remark,
    }
    save_array(image_path, hu)
    save_array(labels_path, labels)
    write_atomically(about_path, json.dumps(about).encode())  # last: it makes the others valid
    return cache_case(case, folder)


def cache_cases(
    cases: list[Case], folder: Path, report: Callable[[str], None] = print
) -> list[Case]:
    """Bring every case into the cache, and settle what its annotator looked for.

    Returns:
        The cases that can be used, in order; the others, and headers that disagree, are reported.

    Raises:
        OSError: the cache cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    usable, reports = [], {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        waiting = {pool.submit(cache_case, case, folder): case for case in cases}
        for done, future in enumerate(as_completed(waiting), 1):
            case = waiting[future]
            try:
                case.cached = future.result()
            except VolumeError as error:
                reports[case.name] = f"{case.name}: left out: {error}"
                continue
            finally:
                if done % 50 == 0:
                    report(f"cached {done} of {len(cases)} cases")
            if case.cached.remark:
                reports[case.name] = f"{case.name}: headers disagree: {case.cached.remark}"
            if case.annotated is None:
                case.annotated = case.cached.present
            if case.annotated:
                usable.append(case)
            else:
                reports[case.name] = f"{case.name}: left out: nothing is labelled"
    for name in sorted(reports):
        report(reports[name])
    return sorted(usable, key=lambda case: case.name)


def split_patients(
    cases: list[Case], fraction: float, seed: int, held_out: list[str] | None = None
) -> tuple[list[Case], list[Case]]:
    """Divide cases into those trained on and those held out, all of a patient on one side.

    Patients are ranked by a hash of the seed and their name, so that a new case does not move the
    others to the other side.

    Args:
        cases: of all data sets.
        fraction: of the patients to hold out; at least one unless it is 0.
        seed: of the choice.
        held_out: names of cases or patients to hold out instead.

    Raises:
        DataError: a name is unknown, or nothing is left to train on.
    """
    patients = sorted({case.patient for case in cases})
    if held_out is not None:
        unknown = set(held_out) - {case.name for case in cases} - set(patients)
        if unknown:
            raise DataError(f"held-out cases that are not in the data: {', '.join(unknown)}")
        chosen = {case.patient for case in cases if {case.name, case.patient} & set(held_out)}
    else:
        count = max(1, round(fraction * len(patients))) if fraction else 0
        ranked = sorted(
            patients, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()
        )
        chosen = set(ranked[:count])
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


def label_table(training: list[Case], held_out: list[Case]) -> str:
    """A table of the cases annotated for each label, and of those in which it is present."""
    lines = [f"{'label':<24}{'annotated':>10}{'present':>9}{'slices':>8}{'held out':>10}"]
    for label in range(1, _NUM_LABELS):
        annotated = [case for case in training if label in case.annotated]
        present = [case for case in annotated if label in case.cached.present]
        slices = sum(mask >> label & 1 for case in annotated for mask in case.cached.slice_labels)
        unseen = sum(label in case.annotated for case in held_out)
        lines.append(
            f"{label:>2} {LABEL_NAMES[label]:<21}{len(annotated):>10}{len(present):>9}"
            f"{slices:>8}{unseen:>10}"
        )
    return "\n".join(lines)


class Slice(NamedTuple):
    """One slice to train on, whether read or drawn.

    Attributes:
        hu: (rows, columns), int16.
        labels: (rows, columns), uint8; 0 where no annotated label is.
        annotated: (15,), bool: the labels looked for, 0 among them.
        window: to which the HU are clipped.
        pixel_mm: size of a pixel.
    """

    hu: np.ndarray
    labels: np.ndarray
    annotated: np.ndarray
    window: tuple[float, float]
    pixel_mm: float


def annotated_mask(labels: tuple[int, ...]) -> np.ndarray:
    """(15,) bool: True for the labels given and for 0."""
    mask = np.zeros(_NUM_LABELS, bool)
    mask[[0, *labels]] = True
    return mask


def annotated_only(labels: np.ndarray, annotated: np.ndarray) -> np.ndarray:
    """A label map in which labels that nobody looked for are 0, as if they were unmarked."""
    return np.where(annotated, np.arange(_NUM_LABELS), 0).astype(np.uint8)[labels]


@dataclass
class SliceDataset(Dataset):
    """An endless sequence of random slices: the one at a position depends on the seed alone.

    So a run that is taken up again, or divided over processes, draws the very slices that it would
    have drawn.

    Attributes:
        cases: cached.
        seed: of the draws.
        rare_organ_fraction: of the slices that are drawn by label, a label uniformly among those in
            the data and then one of its slices; the others are drawn uniformly from all slices.
        synthesise: draws a slice with a generator, or None.
        synthetic_fraction: of the slices that come from it.
    """

    cases: list[Case]
    seed: int = 0
    rare_organ_fraction: float = 0.0
    synthesise: Callable[[np.random.Generator], Slice] | None = None
    synthetic_fraction: float = 0.0
    _all: np.ndarray = field(init=False, repr=False)
    _showing: list[np.ndarray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.cases:  # every slice is drawn
            return
        masks = [np.array(case.cached.slice_labels, np.int64) for case in self.cases]
        self._all = np.array(
            [(number, index) for number, mask in enumerate(masks) for index in range(len(mask))]
        )
        looked_for = np.array([annotated_mask(case.annotated) for case in self.cases])
        mask = np.concatenate(masks)
        shown = [
            self._all[(mask >> label & 1).astype(bool) & looked_for[self._all[:, 0], label]]
            for label in range(1, _NUM_LABELS)
        ]
        self._showing = [rows for rows in shown if len(rows)]

    def __getitem__(self, position: int) -> Slice:
        """The slice at a position, 0 or more, of the sequence."""
        rng = np.random.default_rng((self.seed, position))
        if self.synthetic_fraction and rng.random() < self.synthetic_fraction:
            return self.synthesise(rng)
        rows = self._all
        if self._showing and rng.random() < self.rare_organ_fraction:
            rows = self._showing[rng.integers(len(self._showing))]
        number, index = rows[rng.integers(len(rows))]
        case = self.cases[number]
        # Opened anew each time: thousands of open maps would exhaust a process's file descriptors.
        hu = np.load(case.cached.image, mmap_mode="r")[index]
        labels = np.load(case.cached.labels, mmap_mode="r")[index]
        annotated = annotated_mask(case.annotated)
        _, row_mm, column_mm = case.cached.spacing
        return Slice(
            hu=np.array(hu),
            labels=annotated_only(labels, annotated),
            annotated=annotated,
            window=case.cached.window,
            pixel_mm=(row_mm * column_mm) ** 0.5,
        )


class Batch(NamedTuple):
    """Slices stacked.

    Attributes:
        hu: (N, 1, H, W), int16.
        labels: (N, H, W), uint8, `IGNORED` in the padding.
        annotated: (N, 15), bool.
        window: (N, 2), float32, HU.
        pixel_mm: (N,), float32.
    """

    hu: Tensor
    labels: Tensor
    annotated: Tensor
    window: Tensor
    pixel_mm: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on a device; pinned memory goes there while the host works on."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def collate(slices: list[Slice], multiple: int) -> Batch:
    """Stack slices, padded on all sides to the largest of them: their middles are in one place.

    The image's padding repeats its edge, as in inference; the labels' is `IGNORED`.

    Args:
        slices: of any sizes.
        multiple: of which rows and columns are to be.
    """
    rows, columns = (
        -(-max(part.hu.shape[axis] for part in slices) // multiple) * multiple for axis in (0, 1)
    )
    hu = np.empty((len(slices), 1, rows, columns), np.int16)
    labels = np.full((len(slices), rows, columns), IGNORED, np.uint8)
    for index, part in enumerate(slices):
        height, width = part.hu.shape
        top, left = (rows - height) // 2, (columns - width) // 2
        around = ((top, rows - height - top), (left, columns - width - left))
        hu[index, 0] = np.pad(part.hu, around, mode="edge")
        labels[index, top : top + height, left : left + width] = part.labels
    return Batch(
        hu=torch.from_numpy(hu),
        labels=torch.from_numpy(labels),
        annotated=torch.from_numpy(np.stack([part.annotated for part in slices])),
        window=torch.tensor([part.window for part in slices], dtype=torch.float32),
        pixel_mm=torch.tensor([part.pixel_mm for part in slices], dtype=torch.float32),
    )

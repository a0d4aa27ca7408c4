"""How a data set's own label numbers become the challenge's."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from inference.labels import LABEL_NAMES
from training import TrainingError

NUM_LABELS = len(LABEL_NAMES)

LARGEST_NUMBER = 65535
"""That a label map may hold."""

LABEL_MAPS = Path(__file__).parent / "label_maps"
"""Where the shipped label maps lie."""


@dataclass(frozen=True)
class LabelMapping:
    """How a data set's own label numbers become the challenge's.

    Attributes:
        name: of the file.
        description: of the data set.
        labels: the data set's numbers to ours, 0 for what is no label of ours; a label map that
            holds another number is refused.
        annotated_labels: what its annotators looked for, unless `cases.json` says otherwise.
        ignored: the data set's names of what is none of our labels.
    """

    name: str
    description: str
    labels: dict[int, int]
    annotated_labels: tuple[int, ...]
    ignored: tuple[str, ...] = ()


def load_label_mapping(name: str) -> LabelMapping:
    """Read a label map file: a shipped one by name (`amos`), or a path ending in .json.

    Its `labels` give the data set's numbers in ours, its `background` those that are none of ours.

    Raises:
        TrainingError: no such file, or not of the form of the shipped ones.
    """
    path = Path(name) if name.endswith(".json") else LABEL_MAPS / f"{name}.json"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in LABEL_MAPS.glob("*.json")))
        raise TrainingError(f"no label map {name}: name one of {shipped} or a .json file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        labels = dict.fromkeys(map(int, content.get("background", ())), 0)
        labels |= {int(theirs): int(ours) for theirs, ours in content["labels"].items()}
        mapping = LabelMapping(
            name=path.stem,
            description=content.get("description", path.stem),
            labels={0: 0, **labels},
            annotated_labels=tuple(sorted(content["annotated_labels"])),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path}: not a label map ({error!r})") from error
    if not set(mapping.labels.values()) | set(mapping.annotated_labels) <= set(range(NUM_LABELS)):
        raise TrainingError(f"{path}: our labels are 0 to {NUM_LABELS - 1}")
    _check_numbers(path, mapping.labels)
    return mapping


def _check_numbers(path: Path, labels: dict[int, int]) -> None:
    """Raise TrainingError where a mapping's numbers cannot be those of a label map."""
    if labels[0]:
        raise TrainingError(f"{path}: 0 must be the background, not {LABEL_NAMES[labels[0]]}")
    if min(labels) < 0 or max(labels) > LARGEST_NUMBER:
        raise TrainingError(f"{path}: label numbers are 0 to {LARGEST_NUMBER}")


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

_BACKGROUND_NAMES = ("background", "bg", "unlabeled", "unlabelled", "none", "other", "clear label")

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
        TrainingError: the file is damaged, speaks of files that are not NIfTI, has regions of
            several numbers or a number for voxels to ignore, gives 0 to a structure, or names none
            of our labels.
    """
    path = folder / "dataset.json"
    if not path.is_file():
        return None
    names, regions = {}, []  # by number: several of them may share a name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, number in content["labels"].items():
            if isinstance(number, list):
                regions.append(name)
                continue
            if name.isdigit():
                name, number = number, name  # the older form
            names[int(number)] = str(name)
        ending = content.get("file_ending", ".nii.gz")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path}: not nnU-Net's ({error!r})") from error
    if ending not in (".nii", ".nii.gz"):
        raise TrainingError(f"{path}: files end in {ending}: convert them to .nii.gz")
    if regions:
        raise TrainingError(
            f"{path}: {', '.join(regions)}: regions of several numbers are not read: say what "
            "each number is in a label map file, DIR=MAP.json"
        )
    if "ignore" in names.values():
        raise TrainingError(
            f"{path}: voxels labelled ignore are not read: taken as 0 they would be taught as "
            "background; leave those cases out"
        )
    background = names.pop(0, "background")
    if background.strip().lower() not in _BACKGROUND_NAMES:
        raise TrainingError(f"{path}: 0 must be the background, not {background}")
    labels = {number: _LABEL_OF_NAME.get(_same_name(name), 0) for number, name in names.items()}
    annotated = tuple(sorted(set(labels.values()) - {0}))
    if not annotated:
        raise TrainingError(f"{path}: none of {', '.join(names.values())} is a label of ours")
    _check_numbers(path, labels := {0: 0, **labels})
    return LabelMapping(
        name="dataset.json",
        description=str(content.get("name", folder.name)),
        labels=labels,
        annotated_labels=annotated,
        ignored=tuple(name for number, name in names.items() if not labels[number]),
    )

"""How a data set's own label numbers become the challenge's."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from inference.labels import LABEL_NAMES
from training import TrainingError, shipped_or_own

NUM_LABELS = len(LABEL_NAMES)

LARGEST_NUMBER = 65535
"""That a label map may hold."""

LABEL_MAPS = Path(__file__).parent / "label_maps"


@dataclass(frozen=True)
class LabelMapping:
    """How a data set's own label numbers become the challenge's."""

    name: str  # of the file
    description: str  # of the data set
    labels: dict[int, int]  # its numbers to ours, 0 for what we do not segment; others are refused
    # Ours that its annotators marked wherever they are, unless `cases.json` lists others; None:
    # those present in each case.
    annotated_labels: tuple[int, ...] | None
    ignored: tuple[str, ...] = ()  # its names of structures that become background

    def __post_init__(self) -> None:
        """Check the numbers; raises TrainingError."""
        ours = set(self.labels.values()) | set(self.annotated_labels or ())
        if not ours <= set(range(NUM_LABELS)):
            raise TrainingError(f"{self.name}: our labels are 0 to {NUM_LABELS - 1}")
        if self.labels[0]:
            raise TrainingError(f"{self.name}: 0 must be the background, not {self.labels[0]}")
        if min(self.labels) < 0 or max(self.labels) > LARGEST_NUMBER:
            raise TrainingError(f"{self.name}: label numbers are 0 to {LARGEST_NUMBER}")


CHALLENGE = LabelMapping("", "", {label: label for label in range(NUM_LABELS)}, None)
"""The challenge's own numbers."""


def load_label_mapping(name: str) -> LabelMapping:
    """Read a label map file: a shipped one by name (`amos`), or a path ending in .json.

    Its `labels` turn the data set's numbers into ours, its `background` lists those of structures
    that we do not segment.

    Raises:
        TrainingError: no such file, or not of the form of the shipped ones.
    """
    path = shipped_or_own(LABEL_MAPS, name, ".json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        labels = dict.fromkeys(map(int, content.get("background", ())), 0)
        labels |= {int(theirs): int(ours) for theirs, ours in content["labels"].items()}
        return LabelMapping(
            name=path.name,
            description=content.get("description", path.stem),
            labels={0: 0, **labels},
            annotated_labels=tuple(sorted(content["annotated_labels"])),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path}: not a label map ({error!r})") from error


def _same_name(name: str) -> str:
    """Return a structure's name without what data sets spell differently: case, order, "gland"."""
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

_LABEL_OF_NAME = {_same_name(name): label for label, name in enumerate(LABEL_NAMES)} | {
    _same_name(name): label for name, label in _OTHER_NAMES.items()
}


def nnunet_label_mapping(folder: Path) -> LabelMapping | None:
    """Return the label numbers of an nnU-Net raw folder, by the names in its `dataset.json`.

    Both forms of the file are read: `"labels": {"liver": 1}` and the older `{"1": "liver"}`. None
    if there is no such file.

    Raises:
        TrainingError: the file is damaged, its images are not NIfTI, it has regions of several
            numbers or a number for voxels to ignore, gives 0 to a structure, or has none of our
            labels.
    """
    path = folder / "dataset.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        regions = [name for name, number in content["labels"].items() if isinstance(number, list)]
        names = {  # several numbers may share a name
            int(name if name.isdigit() else number): str(number if name.isdigit() else name)
            for name, number in content["labels"].items()  # {"1": "liver"} is the older form
            if name not in regions
        }
        ending = content.get("file_ending", ".nii.gz")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path}: not nnU-Net's ({error!r})") from error
    background = names.pop(0, "background")
    labels = {number: _LABEL_OF_NAME.get(_same_name(name), 0) for number, name in names.items()}
    annotated = tuple(sorted(set(labels.values()) - {0}))
    for wrong, reason in (
        (regions, f"{', '.join(regions)}: regions of several numbers are not read: describe each "
         "number in a label map file, DIR=MAP.json"),
        (ending not in (".nii", ".nii.gz"), f"files end in {ending}: convert them to .nii.gz"),
        ("ignore" in names.values(), "voxels labelled ignore are not read, and as 0 they would be "
         "taught as background: remove those cases"),
        (background.strip().lower() not in _BACKGROUND_NAMES,
         f"0 must be the background, not {background}"),
        (not annotated, f"none of {', '.join(names.values())} is one of our labels"),
    ):  # fmt: skip
        if wrong:
            raise TrainingError(f"{path}: {reason}")
    return LabelMapping(
        name="dataset.json",
        description=str(content.get("name", folder.name)),
        labels={0: 0, **labels},
        annotated_labels=annotated,
        ignored=tuple(name for number, name in names.items() if not labels[number]),
    )

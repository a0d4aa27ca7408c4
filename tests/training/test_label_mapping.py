"""Others' numbers for structures: the shipped maps, and nnU-Net's `dataset.json`."""

import json

import pytest

from inference.labels import LABEL_NAMES
from training import TrainingError
from training.label_mapping import load_label_mapping, nnunet_label_mapping

# As the data sets' own papers and label files have them.
AMOS = [
    *("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach"),
    *("aorta", "inferior vena cava", "pancreas", "right adrenal gland", "left adrenal gland"),
    *("duodenum", "bladder", "prostate"),
]

BTCV = [
    *("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach"),
    *("aorta", "inferior vena cava", "portal and splenic vein", "pancreas"),
    *("right adrenal gland", "left adrenal gland"),
]


@pytest.mark.parametrize(("name", "theirs"), [("amos", AMOS), ("btcv", BTCV)])
def test_shipped_label_maps(name, theirs):
    mapping = load_label_mapping(name)
    expected = {
        number: LABEL_NAMES.index(structure)
        for number, structure in enumerate(theirs, 1)
        if structure in LABEL_NAMES
    }
    assert {theirs: ours for theirs, ours in mapping.labels.items() if ours} == expected
    assert set(mapping.labels) == set(range(len(theirs) + 1))
    assert set(mapping.annotated_labels) == set(expected.values())


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "Liver": 6, "kidney_left": 3, "arota": 8, "bladder": 14, "postcava": 9},
        {"0": "background", "6": "liver", "3": "left kidney", "8": "Aorta", "14": "bladder",
         "9": "inferior_vena_cava"},
    ],
)  # fmt: skip
def test_nnunet_names_its_numbers(tmp_path, labels):
    """Both forms of dataset.json; numbers of AMOS, whose shipped map knows the same."""
    (tmp_path / "dataset.json").write_text(json.dumps({"name": "mine", "labels": labels}))
    mapping = nnunet_label_mapping(tmp_path)
    assert mapping.labels == {0: 0, 6: 1, 3: 13, 8: 5, 9: 6, 14: 0}
    amos = load_label_mapping("amos").labels
    assert all(amos[theirs] == ours for theirs, ours in mapping.labels.items())
    assert mapping.annotated_labels == (1, 5, 6, 13)
    assert mapping.ignored == ("bladder",)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        *((spelling, 13) for spelling in ("kidney_l", "LKidney", "lkidney", "LeftKidney")),
        *((spelling, 7) for spelling in ("adrenal_gland_right", "Adrenal R", "RAG")),
        *((spelling, 6) for spelling in ("IVC", "Postcava", "vena_cava", "inferior vena cava")),
        *((spelling, 10) for spelling in ("oesophagus", "Esophagus")),
        *((spelling, 14) for spelling in ("Tumour", "lesion", "cancer")),
        *((spelling, None) for spelling in ("kidney", "adrenal gland", "liver vessel", "colon")),
    ],
)
def test_names_are_known_in_many_spellings(tmp_path, name, label):
    labels = {"background": 0, "spleen": 1, name: 2}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    mapping = nnunet_label_mapping(tmp_path)
    assert mapping.labels == {0: 0, 1: 3, 2: label or 0}
    assert mapping.ignored == (() if label else (name,))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not nnU-Net's"),
        ('{"labels": {"liver": [1, 2]}}', "regions"),
        ('{"labels": {"femur": 1}}', "none of femur"),
        ('{"labels": {"liver": 1, "ignore": 2}}', "labelled ignore"),
        ('{"labels": {"liver": 1}, "file_ending": ".png"}', "convert"),
        ('{"labels": {"liver": 0, "spleen": 1}}', "0 must be"),
        ('{"labels": {"0": "bladder", "1": "spleen"}}', "0 must be"),
        ('{"labels": {"background": 0, "spleen": -1}}', "numbers are 0 to"),
    ],
)
def test_a_dataset_json_that_cannot_be_used(tmp_path, content, reason):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(TrainingError, match=reason):
        nnunet_label_mapping(tmp_path)
    assert nnunet_label_mapping(tmp_path.parent) is None


@pytest.mark.parametrize("labels", [{"0": 1}, {"-1": 1}, {"70000": 1}])
def test_a_map_of_numbers_that_cannot_be_is_refused(tmp_path, labels):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"labels": labels, "annotated_labels": [1]}))
    with pytest.raises(TrainingError):
        load_label_mapping(str(path))

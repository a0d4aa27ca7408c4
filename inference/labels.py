"""The label numbers of the FLARE 2023 challenge."""

LABEL_NAMES = (
    "background",
    "liver",
    "right kidney",
    "spleen",
    "pancreas",
    "aorta",
    "inferior vena cava",
    "right adrenal gland",
    "left adrenal gland",
    "gallbladder",
    "esophagus",
    "stomach",
    "duodenum",
    "left kidney",
    "tumor",
)
"""Name of each label; the index is the label's number."""

ORGANS = tuple(range(1, 14))
"""The 13 organs, of each of which the largest connected component is kept (paper section 2.3)."""

TUMOR = 14
"""A patient may have many tumors, so this label keeps all its components."""

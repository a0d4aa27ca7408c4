"""Batch inference for abdominal CT multi-organ segmentation.

The case flows through five modules, in this order:

    volume.py      read       NIfTI file -> Volume
    intensity.py   normalise  Volume -> percentiles, then z-scores on the device
    prediction.py  predict    slices -> label map
    components.py  keep the largest connected component of each organ
    label_map.py   write      label map -> NIfTI file on the input's own grid

`service.py` runs a folder of cases through them, `files.py` finds and writes files, `memory.py`
knows what fits, `options.py` and `command.py` are the command line and `__main__.py` how it starts
and ends.
"""

"""Batch inference for abdominal CT multi-organ segmentation.

The case flows through five modules, in this order:

    volume.py      read       NIfTI file -> Volume
    intensity.py   normalise  Volume -> percentiles, then z-scores on the device
    prediction.py  predict    slices -> label map
    components.py  keep the largest connected component of each organ
    label_map.py   write      label map -> NIfTI file on the input's own grid

`service.py` runs the cases (`case.py`) through them, `outputs.py` writes the files of each,
`files.py` finds and writes files, `memory.py` knows the limits, `shards.py` a machine's part.
`loading.py` decides weights and device, and loads the network of `network/`; `cuda/` is what only
CUDA needs, `records/` what is recorded of each case. `options.py`, `command.py`, `progress.py` and
`terminal.py` are the command line, `startup.py` and `signals.py` what it does to its process.
"""

__version__ = "0.2.0"
"""Version of the program, defined here alone; it is in every label map's header."""


def __getattr__(name: str) -> object:
    """Import the Python interface when it is asked for: it takes torch with it."""
    if name in ("Segmenter", "Segmentation"):
        from . import segmenter

        return getattr(segmenter, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Batch inference for abdominal CT multi-organ segmentation.

The case flows through five modules, in this order:

    volume.py      read       NIfTI file -> Volume
    intensity.py   normalise  Volume -> percentiles, then z-scores on the device
    prediction.py  predict    slices -> label map
    components.py  keep the largest connected component of each organ
    label_map.py   write      label map -> NIfTI file on the input's own grid

`service.py` runs a folder of cases (`case.py`) through them, `outputs.py` knows what is written of
each, `files.py` finds and writes files, `memory.py` knows what fits, `shards.py` which cases are
this machine's. `flags.py` says what to doubt, `provenance.py` what made a label map; `manifest.py`
has the record of each case, `statistics.py` the table of them. `options.py`, `command.py` and
`progress.py` are the command line; `__main__.py` and `signals.py` are how it starts and ends.
"""

__version__ = "0.2.0"
"""Of the program: the one place that says it. It stands in every label map's header."""


def __getattr__(name: str) -> object:
    """Import the Python interface when it is asked for: it takes torch with it."""
    if name in ("Segmenter", "Segmentation"):
        from . import segmenter

        return getattr(segmenter, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

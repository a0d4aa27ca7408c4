"""Synthetic abdominal CT whose truth is known, for demonstration, tests, timings and training.

Takes a seed, a grid (shape and spacing in mm) and a contrast phase. The way through: `structures`
and `shapes` make a `body` and a `patient`, `sampling` puts the patient on a `grid`, `rendering`
makes HU of it; `phantom` does it all and gives a volume with its exact label map.
"""

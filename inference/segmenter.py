"""The Python interface: segment one CT after another, in any process and from any thread."""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import nibabel
import numpy as np
import torch

from .components import keep_largest_components
from .device import choose_device
from .intensity import percentiles
from .label_map import label_map_image
from .network.weights import default_weights, load_weights
from .prediction import Predictor
from .records.flags import Flag, find_flags
from .records.statistics import label_statistics
from .volume import Volume, image_volume, read_volume

PathLike: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True)
class Segmentation:
    """What was found in a volume."""

    labels: nibabel.Nifti1Image  # the label map, uint8, on the volume's grid
    statistics: dict[str, dict]  # `voxels`, `volumes_ml` and `mean_hu`, each by label name
    flags: list[Flag]  # doubts about the result (`inference/records/flags.py`)
    notes: tuple[str, ...]  # what the header leaves open, and what was assumed; one line each


class Segmenter:
    """Segments CT volumes with the same result as the command line.

    Args:
        weights: a weights file, or several whose probabilities are averaged; by default the best
            of those that ship for the device.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: the weights or the device cannot be used.
        OSError: a weights file cannot be read.
    """

    def __init__(
        self, weights: PathLike | Sequence[PathLike] | None = None, device: str = "auto"
    ) -> None:
        chosen = choose_device(device)
        if weights is None:
            weights = default_weights(on_cuda=chosen.type == "cuda")[0]
        paths = [weights] if isinstance(weights, str | os.PathLike) else weights
        self._predictor = Predictor([load_weights(Path(path)) for path in paths], chosen)
        self._lock = threading.Lock()

    def __call__(self, ct: PathLike | nibabel.Nifti1Image) -> nibabel.Nifti1Image:
        """Segment a volume.

        Args:
            ct: path of a NIfTI file, or a nibabel image; intensities in HU.

        Returns:
            Its label map, uint8, on the same grid.

        Raises:
            ValueError: it cannot be segmented; the message is the reason, in one line.
            OSError: the file cannot be read.
        """
        volume = _volume_of(ct)
        return label_map_image(self._label_map(volume)[0], volume)

    def segment(self, ct: PathLike | nibabel.Nifti1Image) -> Segmentation:
        """Segment a volume and measure every label; arguments and errors as for a call."""
        volume = _volume_of(ct)
        label_map, flags = self._label_map(volume)
        return Segmentation(
            labels=label_map_image(label_map, volume),
            statistics=label_statistics(label_map, volume),
            flags=flags,
            notes=volume.notes,
        )

    def _label_map(self, volume: Volume) -> tuple[np.ndarray, list[Flag]]:
        metadata = self._predictor.metadata
        low, high = percentiles(volume.voxels)
        with self._lock:
            threads = torch.get_num_threads()
            try:
                label_map = self._predictor.predict(
                    volume.voxels,
                    window=(low, high),
                    slope=volume.slope,
                    intercept=volume.intercept,
                    reduction=metadata.reduction_at(volume.spacing),
                )
            finally:
                torch.set_num_threads(threads)  # the lanes' number becomes that of new threads
        sizes = keep_largest_components(label_map)
        return label_map, find_flags(label_map, sizes, volume, (low, high), metadata.clip_hu)


def _volume_of(ct: PathLike | nibabel.Nifti1Image) -> Volume:
    return read_volume(Path(ct)) if isinstance(ct, str | os.PathLike) else image_volume(ct)

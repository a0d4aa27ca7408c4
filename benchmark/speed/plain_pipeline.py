"""Segment by the paper's pipeline written plainly, the baseline that the service is measured by.

As its authors ran it: nibabel's own reading and writing, one slice at a time in fp32, the logits
back to the host, one scikit-image labelling per organ, one step after another. Weights, padding and
orientation are the service's, so its label maps are too. The authors' program did more than its
text has (it rotated and resized each slice many times on the CPU); this baseline does not, and is
faster than theirs was.
"""

import argparse
import os
from pathlib import Path

import nibabel
import numpy as np
import torch
from skimage.measure import label
from torch.nn import functional

from benchmark.options import HarnessError
from benchmark.text import log
from inference.files import case_name, find_cases, one_line
from inference.labels import ORGANS
from inference.network.model import DOWNSAMPLING, AttentionUNet
from inference.network.weights import WeightsError, WeightsMetadata, load_weights
from inference.phases import LOG_VARIABLE, PhaseTimer
from inference.terminal import existing
from inference.volume import ORIENTATION


def load_network(path: Path, device: torch.device) -> tuple[AttentionUNet, WeightsMetadata]:
    """Return the network as it was trained: fp32, batch normalisation apart, three channels in."""
    state_dict, metadata = load_weights(path)
    network = AttentionUNet(**metadata.network)
    network.load_state_dict(state_dict)
    return network.to(device).eval(), metadata


def normalise(hu: np.ndarray, metadata: WeightsMetadata) -> np.ndarray:
    """Clip to the volume's own percentiles, and what more the weights ask for, and z-score.

    Paper section 2.1; float64.
    """
    low, high = np.percentile(hu, metadata.percentiles)
    clipped = np.clip(hu, low, high)
    if metadata.clip_hu:
        clipped = np.clip(clipped, *metadata.clip_hu)
    return (clipped - metadata.intensity_mean) / metadata.intensity_std


@torch.no_grad()
def predict(
    network: AttentionUNet, z_scores: np.ndarray, matrix_reduction: int, device: torch.device
) -> np.ndarray:
    """Label z-scores (slices, rows, columns), one slice at a time."""
    rows, columns = z_scores.shape[1:]
    label_map = np.zeros(z_scores.shape, np.uint8)
    multiple = DOWNSAMPLING * matrix_reduction
    padding = ((0, -rows % multiple), (0, -columns % multiple))
    for index, z_score in enumerate(z_scores):
        padded = np.pad(z_score, padding, mode="edge").astype(np.float32)
        slices = torch.from_numpy(padded).to(device).repeat(1, 3, 1, 1)
        if matrix_reduction == 1:
            logits = network(slices)
        else:
            logits = network(functional.avg_pool2d(slices, matrix_reduction))
            logits = functional.interpolate(logits, size=padded.shape, mode="bilinear")
        labels = logits[0].cpu().numpy().argmax(axis=0)
        label_map[index] = labels[:rows, :columns]
    return label_map


def keep_largest_components(label_map: np.ndarray) -> np.ndarray:
    """Keep the largest 6-connected component of each organ (paper section 2.3)."""
    result = label_map.copy()
    for organ in ORGANS:
        components = label(label_map == organ, connectivity=1)
        sizes = np.bincount(components.ravel())
        if len(sizes) > 1:
            largest = np.argmax(sizes[1:]) + 1
            result[(components > 0) & (components != largest)] = 0
    return result


def segment(
    source: Path,
    target: Path,
    network: AttentionUNet,
    metadata: WeightsMetadata,
    device: torch.device,
    timer: PhaseTimer,
) -> None:
    """Read, normalise, predict, keep the largest components and write one volume."""
    case = case_name(source)
    with timer.phase("read", case):
        image = nibabel.Nifti1Image.from_filename(source)
        hu = image.get_fdata()
        start = nibabel.io_orientation(image.affine)
        wanted = nibabel.orientations.axcodes2ornt(ORIENTATION)
        to_network = nibabel.orientations.ornt_transform(start, wanted)
        hu = nibabel.orientations.apply_orientation(hu, to_network)
        sizes = nibabel.affines.voxel_sizes(image.affine)
        spacing = tuple(sizes[np.argsort(to_network[:, 0])])
    with timer.phase("percentiles", case):
        z_scores = normalise(hu, metadata)
    with timer.phase("predict", case):
        label_map = predict(network, z_scores, metadata.reduction_at(spacing), device)
    with timer.phase("components", case):
        label_map = keep_largest_components(label_map)
    with timer.phase("write", case):
        to_file = nibabel.orientations.ornt_transform(wanted, start)
        label_map = nibabel.orientations.apply_orientation(label_map, to_file)
        header = image.header.copy()
        header.set_data_dtype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(label_map, image.affine, header), target)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmark plain-pipeline`."""
    add = parser.add_argument
    add("--input", type=existing, required=True, metavar="DIR|FILE", help="CT volumes")
    add("--output", type=Path, required=True, metavar="DIR", help="where label maps go")
    text = "one file of weights"
    add("--weights", type=existing, required=True, metavar="FILE.safetensors", help=text)
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=usual, help="cpu, cuda or cuda:N (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Run it.

    Returns:
        0, or 1 if a case failed.

    Raises:
        HarnessError: the weights cannot be used.
    """
    timer = PhaseTimer(os.environ.get(LOG_VARIABLE))
    device = torch.device(options.device)
    try:
        with timer.phase("context"):
            network, metadata = load_network(options.weights, device)
    except WeightsError as error:
        raise HarnessError(f"--weights {options.weights}: {error}") from error
    options.output.mkdir(parents=True, exist_ok=True)
    code = 0
    for source in find_cases(options.input):
        try:
            target = options.output / f"{case_name(source)}.nii.gz"
            segment(source, target, network, metadata, device, timer)
        except Exception as error:
            log(f"error: {source}: {one_line(error)}")
            code = 1
    return code

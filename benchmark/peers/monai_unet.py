"""MONAI as its tutorials run it: load, orient, scale, slide a window over slices, save.

The network is MONAI's DynUNet, nnU-Net's in another's words: 8 stages, 32 to 512 channels, instance
norms, random weights from a seed. fp32, as MONAI computes unless told otherwise.
"""

import argparse
import json
from pathlib import Path

import torch
from monai.data import MetaTensor
from monai.inferers import SliceInferer
from monai.networks.nets import DynUNet
from monai.transforms import (
    Compose,
    EnsureChannelFirst,
    LoadImage,
    Orientation,
    SaveImage,
    ScaleIntensityRange,
)
from torch.utils.flop_counter import FlopCounterMode

_CLASSES = 15
_STAGES = 8
_PATCH = (512, 512)
_WINDOW_HU = (-175, 250)  # of MONAI's tutorial on abdominal organs (BTCV)


def make_network(seed: int) -> DynUNet:
    """The network in evaluation mode."""
    torch.manual_seed(seed)
    strides = [1, *[2] * (_STAGES - 1)]
    return DynUNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=_CLASSES,
        kernel_size=[3] * _STAGES,
        strides=strides,
        upsample_kernel_size=strides[1:],
    ).eval()


@torch.no_grad()
def segment(source: Path, outputs: Path, network: DynUNet, device: torch.device) -> None:
    """Read, predict and write one volume, `NAME_0000.nii.gz` to `NAME.nii.gz`."""
    prepare = Compose(
        [
            LoadImage(image_only=True),
            EnsureChannelFirst(),
            Orientation(axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            ScaleIntensityRange(*_WINDOW_HU, 0.0, 1.0, clip=True),
        ]
    )
    infer = SliceInferer(roi_size=_PATCH, spatial_dim=2, sw_batch_size=1, overlap=0.5)
    image = prepare(source)
    logits = infer(image[None].to(device), network)[0]
    labels = MetaTensor(logits.argmax(dim=0, keepdim=True), meta=image.meta)
    labels.applied_operations = image.applied_operations
    labels = prepare.transforms[2].inverse(labels)
    target = outputs / source.name.replace("_0000", "").removesuffix(".nii.gz")
    SaveImage(output_dtype="uint8", resample=False, print_log=False)(labels, filename=str(target))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.peers.monai_unet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmark.peers.monai_unet --input CTS --output LABELS",
    )
    parser.add_argument("--input", type=Path, metavar="DIR")
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--describe", action="store_true", help="print what the network costs")
    options = parser.parse_args()
    if options.describe:
        network = make_network(options.seed).to("meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, 1, *_PATCH, device="meta"))
        parameters = sum(weights.numel() for weights in network.parameters())
        print(json.dumps({"parameters": parameters, "gmac": counter.get_total_flops() / 2e9}))
    else:
        network = make_network(options.seed).to(options.device)
        options.output.mkdir(parents=True, exist_ok=True)
        for path in sorted(options.input.glob("*_0000.nii.gz")):
            segment(path, options.output, network, torch.device(options.device))

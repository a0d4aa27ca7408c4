"""The form of the network that runs: what only training needs is folded away or dropped."""

import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from inference.model import AttentionUNet


def _fold_norms(layers: nn.Sequential) -> None:
    """Put each batch normalisation's evaluation statistics into the convolution before it."""
    for index in range(1, len(layers)):
        if isinstance(layers[index], nn.BatchNorm2d):
            layers[index - 1] = fuse_conv_bn_eval(layers[index - 1], layers[index])
            layers[index] = nn.Identity()  # keeps the indices at which the skips leave


def _sum_input_channels(convolution: nn.Conv2d) -> nn.Conv2d:
    """The convolution of one channel equal to that of the same channel repeated."""
    summed = nn.Conv2d(1, convolution.out_channels, 3, padding=1, device="meta")
    summed.weight = nn.Parameter(convolution.weight.sum(dim=1, keepdim=True))
    summed.bias = convolution.bias
    return summed


@torch.no_grad()
def fold(network: AttentionUNet) -> AttentionUNet:
    """Turn a trained network into its inference form, in place.

    Batch normalisation is folded into the convolutions, the first convolution's three input
    channels, always alike, are summed into one, and the training-only classifiers are dropped.

    Args:
        network: in fp32, because the statistics do not survive folding in half precision.

    Returns:
        The same network in evaluation mode: z-scored slices (N, 1, H, W) to logits
        (N, num_classes, H, W).
    """
    network.eval().requires_grad_(False)
    _fold_norms(network.encoder)
    _fold_norms(network.fusion)
    for decoder in network.decoders:
        _fold_norms(decoder.refine)
    for supervision in network.supervision:
        _fold_norms(supervision)
    network.encoder[0] = _sum_input_channels(network.encoder[0])
    network.classifiers = nn.ModuleList()
    return network.requires_grad_(False)

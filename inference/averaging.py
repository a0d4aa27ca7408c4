"""Several networks as one: the mean of their probabilities, for those who ask for it.

What it costs is the sum of what they cost; maps of two networks are never held at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from inference.folding import FoldedUNet
from inference.weights import WeightsMetadata


class AveragedNetworks(nn.Module):
    """Networks for the same labels and slices, in place of one.

    Args:
        networks: folded, at least one.
        metadata: of each. Slices come normalised as the first wants them.
    """

    def __init__(self, networks: Sequence[FoldedUNet], metadata: Sequence[WeightsMetadata]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        first = metadata[0]
        self._normalisations = [
            (
                first.intensity_std / other.intensity_std,
                (first.intensity_mean - other.intensity_mean) / other.intensity_std,
            )
            for other in metadata
        ]

    def fuse_on_cuda(self) -> None:
        """As `FoldedUNet.fuse_on_cuda`."""
        for network in self.networks:
            network.fuse_on_cuda()

    def forward(self, slices: Tensor) -> Tensor:
        """Mean probabilities (N, num_classes, H, W), fp32, of z-scored slices (N, 1, H, W)."""
        total = None
        for network, (scale, shift) in zip(self.networks, self._normalisations, strict=True):
            logits = network(slices if (scale, shift) == (1, 0) else slices * scale + shift)
            probabilities = torch.softmax(logits, dim=1, dtype=torch.float32)
            del logits
            total = probabilities if total is None else total.add_(probabilities)
        return total.div_(len(self.networks))

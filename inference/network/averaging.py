"""Average the probabilities of several networks, which run one after another."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .folding import FoldedUNet
from .weights import WeightsMetadata


class AveragedNetworks(nn.Module):
    """Several networks for the same labels and slices, used like one.

    The input is normalised by the mean and deviation of the first one's metadata.
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

    def forward(self, slices: Tensor) -> Tensor:
        """Return mean probabilities (N, classes, H, W), fp32, of z-scored slices (N, 1, H, W)."""
        total = torch.zeros((), dtype=torch.float32, device=slices.device)
        for network, (scale, shift) in zip(self.networks, self._normalisations, strict=True):
            logits = network(slices if (scale, shift) == (1, 0) else slices * scale + shift)
            total = torch.softmax(logits, dim=1, dtype=torch.float32).add_(total)
            del logits
        return total.div_(len(self.networks))

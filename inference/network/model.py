"""The attention U-Net with deep supervision (paper section 2.2, figures 1 and 2)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

DOWNSAMPLING = 16
"""Rows and columns of a slice are multiples of this: the encoder halves them four times."""

SKIP_LAYERS = (5, 12, 19, 26)
"""Encoder layers whose output is a skip connection: the last ReLU before each pooling."""


class Attention(nn.Module):
    """The paper's "combination of ReLU and Sigmoid": values in [0.5, 1), no parameters."""

    def forward(self, features: Tensor) -> Tensor:
        """Return the attention of each value, in the same shape."""
        return torch.sigmoid(torch.relu(features))


ATTENTIONS = {"relu-sigmoid": Attention, "none": nn.Identity}
"""Layers after each decoder's merge and the fusion, by the name in a weights file."""


def conv_norm_relu(in_channels: int, out_channels: int) -> list[nn.Module]:
    """Return a 3x3 convolution, batch normalisation and ReLU, as in torchvision's `vgg13_bn`."""
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


class Decoder(nn.Module):
    """One decoder level: upsample, concatenate the skip connection, reduce, attend, refine.

    Args:
        in_channels, out_channels: of the features.
        attention: of `ATTENTIONS`.
        reduces_first: reduce the upsampled features before the concatenation too, with the same
            weights; every level but 4 does.
        refines: end with two more convolutions; every level but 1 does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        attention: nn.Module,
        *,
        reduces_first: bool,
        refines: bool,
    ) -> None:
        super().__init__()
        self.reduces_first = reduces_first
        self.attention = attention
        self.upsample = nn.ConvTranspose2d(in_channels, in_channels, 2, stride=2)
        self.reduce = nn.Conv2d(2 * out_channels, out_channels, 3, padding=1)
        self.refine = nn.Sequential()
        if refines:
            for _ in range(2):
                self.refine.extend(conv_norm_relu(out_channels, out_channels))

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        """Map features (N, in, H, W) and skip (N, out, 2H, 2W) to (N, out, 2H, 2W)."""
        features = self.upsample(features)
        if self.reduces_first:
            features = self.reduce(features)
        features = self.reduce(torch.cat([features, skip], dim=1))
        return self.refine(self.attention(features))


class AttentionUNet(nn.Module):
    """VGG-13 encoder, four attention decoders, and the fusion of four supervised feature maps.

    Args:
        num_classes: number of labels, background included.
        base_channels: width of the first encoder stage, a multiple of 4; all widths are in
            proportion. The default has 24,496,331 parameters and costs 284.39 GMAC for a slice of
            512x512; 16, the slim network, costs a sixteenth.
        attention: a name of `ATTENTIONS`; "none" is the comparison in the paper's Table 5.
        supervised_channels: of each of the four supervised maps; 0 is the paper's quarter of
            `base_channels`, which is too few for 15 labels in a slim network.

    With 64 base channels the encoder has the state-dict keys and shapes of torchvision's
    `vgg13_bn().features[:33]`.

    Raises:
        ValueError: unknown attention, or a wrong number of base channels.
    """

    def __init__(
        self,
        num_classes: int = 15,
        base_channels: int = 64,
        attention: str = "relu-sigmoid",
        supervised_channels: int = 0,
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, not {attention}")
        self.attention = ATTENTIONS[attention]()
        if base_channels < 4 or base_channels % 4:
            raise ValueError(f"base_channels must be a positive multiple of 4, not {base_channels}")
        stages = [base_channels * scale for scale in (1, 2, 4, 8, 8)]
        supervised = supervised_channels or base_channels // 4

        self.encoder = nn.Sequential()
        in_channels = 3
        for stage, channels in enumerate(stages):
            if stage > 0:
                self.encoder.append(nn.MaxPool2d(2))
            for _ in range(2):
                self.encoder.extend(conv_norm_relu(in_channels, channels))
                in_channels = channels

        # Levels 4, 3, 2, 1, at 1/8, 1/4, 1/2 and all of the resolution.
        levels = list(zip(stages[:0:-1], stages[-2::-1], strict=True))
        self.decoders = nn.ModuleList(
            Decoder(deep, shallow, self.attention, reduces_first=level > 0, refines=level < 3)
            for level, (deep, shallow) in enumerate(levels)
        )
        self.supervision = nn.ModuleList(
            nn.Sequential(*conv_norm_relu(shallow, supervised)) for _, shallow in levels
        )
        self.classifiers = nn.ModuleList(
            nn.Conv2d(supervised, num_classes, 3, padding=1) for _ in levels
        )
        self.fusion = nn.Sequential(*conv_norm_relu(len(levels) * supervised, base_channels))
        self.head = nn.Conv2d(base_channels, num_classes, 3, padding=1)

    def forward(self, slices: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Segment z-scored slices (N, 3, H, W): three equal channels, H and W multiples of 16.

        Returns:
            In evaluation mode the final logits (N, num_classes, H, W). In training mode also a list
            of the four supervised logits of that shape, levels 4 to 1.
        """
        size = slices.shape[-2:]
        features, skips = slices, []
        for index, layer in enumerate(self.encoder):
            features = layer(features)
            if index in SKIP_LAYERS:
                skips.append(features)

        supervised = []
        for decoder, supervision in zip(self.decoders, self.supervision, strict=True):
            features = decoder(features, skips.pop())
            supervised.append(
                functional.interpolate(
                    supervision(features), size=size, mode="bilinear", align_corners=False
                )
            )
        logits = self.head(self.attention(self.fusion(torch.cat(supervised, dim=1))))
        if not self.training:
            return logits
        return logits, [
            classifier(maps) for classifier, maps in zip(self.classifiers, supervised, strict=True)
        ]

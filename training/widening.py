"""A narrow network's weights in a wider one that begins as the same function.

Net2WiderNet (Chen, Goodfellow and Shlens, ICLR 2016): a wide network that begins where a narrow one
has got to is spared most of the steps that it would take from random weights.
"""

import torch
from torch import Tensor

_LEVELS = 4  # supervised maps that the fusion sees, one after another


def widened(narrow: dict[str, Tensor], wide: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a narrow `AttentionUNet` as those of a wide one.

    Where `base_channels` is k times as much, each channel is there k times, and what reads it takes
    a part of each copy, the parts drawn at random, so that the copies learn different things. The
    supervised maps get new channels with random weights, which at first nothing reads.

    Args:
        narrow: state dict to begin with.
        wide: state dict of a new network, with random weights.

    Returns:
        A state dict for the wide network, fp32; of networks alike it is the narrow one's.

    Raises:
        ValueError: one network is not the other made wider.
    """
    if narrow.keys() != wide.keys():
        raise ValueError("not of the same layers")
    return {name: _widened(name, narrow[name], new) for name, new in wide.items()}


def _widened(name: str, weights: Tensor, new: Tensor) -> Tensor:
    if weights.is_floating_point():
        weights = weights.float()
    layer = name.split(".")[0]
    if weights.ndim > 1:  # what it reads, before what it makes
        axis = 0 if "upsample" in name else 1  # a transposed convolution's is (in, out, …)
        if layer in ("fusion", "classifiers"):
            weights = _reading_more(weights, new.shape[1], _LEVELS if layer == "fusion" else 1)
        else:
            weights = _reading_copies(weights, axis, _times(weights, new, axis))
        weights = _making(weights, new, 1 - axis, layer)
    elif weights.ndim == 1:
        weights = _making(weights, new, 0, layer)
    if weights.shape != new.shape:
        raise ValueError(f"{name} is of another shape")
    return weights


def _times(weights: Tensor, new: Tensor, axis: int) -> int:
    """How many times as many channels there are."""
    times, more = divmod(new.shape[axis], weights.shape[axis])
    if more or not times:
        raise ValueError("the new width is no multiple of the old one")
    return times


def _reading_copies(weights: Tensor, axis: int, times: int) -> Tensor:
    """Weights that read so many copies of each channel along an axis, and sum to the old ones."""
    if times == 1:
        return weights
    shares = weights.unsqueeze(axis + 1).repeat_interleave(times, axis + 1) / times
    noise = torch.randn(shares.shape) * shares.std()
    return (shares + noise - noise.mean(axis + 1, keepdim=True)).flatten(axis, axis + 1)


def _reading_more(weights: Tensor, channels: int, levels: int) -> Tensor:
    """Weights (out, levels x in, …) that read more channels of each level, by 0."""
    by_level = weights.unflatten(1, (levels, -1))
    more = channels // levels - by_level.shape[2]
    if more < 0:
        raise ValueError("the supervised maps have fewer channels")
    zeros = by_level.new_zeros((*by_level.shape[:2], more, *by_level.shape[3:]))
    return torch.cat([by_level, zeros], dim=2).flatten(1, 2)


def _making(weights: Tensor, new: Tensor, axis: int, layer: str) -> Tensor:
    """Weights that make more channels along an axis: new ones of supervised maps, else copies."""
    if layer == "supervision":
        had = min(weights.shape[axis], new.shape[axis])
        return torch.cat([weights, new.narrow(axis, had, new.shape[axis] - had)], dim=axis)
    return weights.repeat_interleave(_times(weights, new, axis), dim=axis)

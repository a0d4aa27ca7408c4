"""A narrow network's weights in a wider one that starts as the same function.

Net2WiderNet (Chen, Goodfellow and Shlens, ICLR 2016): a wide network that starts where a narrow one
has got to is spared most of the steps that it would take from random weights.

The paper's attention, sigmoid(ReLU(z)), is not the identity, but near 0 a difference of two is
nearly linear: sigmoid(ReLU(z)) - sigmoid(ReLU(-z)) = z/4 - z³/48 + …. So a wide network with the
attention can start as a narrow one without: where the narrow one has x, half of the copies have
z = scale · x and half have -z, and the next layer takes 4/scale times the difference of the two.
The constant 1/2 cancels, at borders and in half precision too.
"""

import copy

import torch
from torch import Tensor
from torch.nn import functional

from inference.network.model import SKIP_LAYERS, Attention, AttentionUNet

_LEVELS = 4  # decoders, and supervised maps that the fusion reads, one after another

_EPSILON = 1e-5  # of batch normalisation

# Standard deviation of z. The attention bends larger ones: 0.07 is the largest, in hundredths, with
# which all maps correlate with the narrow network's by 0.999. Smaller ones are lost in bfloat16,
# whose steps above 1/2 are 1/256, and make the function more sensitive to a step of training.
_SPREAD = 0.07

# Share of log(scale) that batch normalisation takes; convolutions take the rest. Adam's steps are
# of one size, so small weights change by much: in 60 steps at 4e-4 with a spread of 0.06 the loss
# was above that without attention by 0.16 (share 0), 0.08 (1/2), 0.05 (3/4) and 0.15 (1).
_BY_NORMALISATION = 2 / 3

# The fusion's x is not negative, so that -z gives 1/2 alone: half of its copies have this times z.
_LESS = 0.25


def widen(narrow: AttentionUNet, wide: AttentionUNet) -> None:
    """Give a wide network the weights of a narrow one, in place; both are fp32.

    Where `base_channels` is k times as much, each channel is there k times, and what reads it takes
    a part of each copy, the parts drawn at random, so that the copies learn different things. The
    supervised maps get new channels with random weights, which at first nothing reads.

    Afterwards the wide network computes what the narrow one does; networks of the same width have
    the same weights. If it has the attention and the narrow one has not, k must be even, and it
    computes nearly that.

    Raises:
        ValueError: one network is not the other made wider.
    """
    attends, attended = (isinstance(one.attention, Attention) for one in (wide, narrow))
    if attended and not attends:
        raise ValueError("it has the attention")
    if attends and not attended:
        times, more = divmod(wide.head.in_channels, 2 * narrow.head.in_channels)
        if more:
            raise ValueError("a new attention takes an even multiple of the old width")
        narrow = _prepared_for_attention(narrow)
    weights = narrow.state_dict()
    wide.load_state_dict(
        {name: _widened(name, weights[name], new) for name, new in wide.state_dict().items()}
    )
    if attends and not attended:
        _negate_half(wide, 2 * times)


@torch.no_grad()
def _prepared_for_attention(narrow: AttentionUNet) -> AttentionUNet:
    """Return a copy of a network in which z stands for x, and z/4 is read as x was.

    The batch normalisation of all that a decoder reads takes a part of the scale, which ReLU and
    max pooling pass on, and the decoder's convolutions the rest. The batch normalisation of all
    that reads scaled maps takes it back.
    """
    network = copy.deepcopy(narrow).eval()
    # The decoders and the fusion share this module. With the slim weights the standard deviation of
    # x is 12 to 18 on noise and 14 to 21 on CT, so that no slices are needed.
    spreads: list[Tensor] = []
    network.attention.register_forward_hook(lambda _, __, x: spreads.append(x.std()))
    network(torch.randn(1, 1, 256, 256).expand(-1, 3, -1, -1))
    *scales, fusion_scale = (_SPREAD / spread for spread in spreads)

    weights = network.state_dict()
    features_norm = f"encoder.{len(network.encoder) - 2}"
    for level, scale in enumerate(scales):
        skip = SKIP_LAYERS[-1 - level]
        outer = scale**_BY_NORMALISATION
        for norm in (features_norm, f"encoder.{skip - 1}"):
            _scale(weights, norm, outer)
        # Others that read these: the encoder after its pooling, and the supervision.
        _absorb(weights, f"encoder.{skip + 2}", f"encoder.{skip + 3}", outer)
        if level > 0:
            _absorb(weights, f"supervision.{level - 1}.0", f"supervision.{level - 1}.1", outer)
        # Where `reduce` runs twice, the first half of its weights reads half of the upsampled
        # features, then its own output, which is z: so these features get the whole scale and that
        # half of the weights stays. The second half reads maps with the outer part of the scale.
        upsample, reduce = f"decoders.{level}.upsample", f"decoders.{level}.reduce"
        channels = len(weights[f"{reduce}.bias"])
        weights[f"{upsample}.weight"][:, :channels] *= scale / outer
        weights[f"{upsample}.bias"][:channels] *= scale
        weights[f"{upsample}.bias"][channels:] *= outer
        weights[f"{reduce}.weight"][:, channels:] *= scale / outer
        weights[f"{reduce}.bias"] *= scale
        # What reads the attention, which makes z/4 of z.
        reader = _reader(weights, level)
        _absorb(weights, f"{reader}.0", f"{reader}.1", scale / 4)
        if reader.startswith("decoders"):
            features_norm = f"{reader}.4"
    _scale(weights, "fusion.1", fusion_scale)
    weights["head.weight"] *= 4 / fusion_scale / (1 - _LESS)
    return network


def _reader(weights: dict[str, Tensor], level: int) -> str:
    """Return the name of the layers that read a decoder's attention."""
    refine = f"decoders.{level}.refine"
    return refine if f"{refine}.0.weight" in weights else f"supervision.{level}"


def _scale(weights: dict[str, Tensor], norm: str, scale: Tensor) -> None:
    weights[f"{norm}.weight"] *= scale
    weights[f"{norm}.bias"] *= scale


def _absorb(weights: dict[str, Tensor], convolution: str, norm: str, scale: Tensor) -> None:
    """Let a convolution and its batch normalisation read scaled inputs as they read them before."""
    weights[f"{convolution}.bias"] *= scale
    weights[f"{norm}.running_mean"] *= scale
    variance = weights[f"{norm}.running_var"]
    before = variance + _EPSILON
    variance *= scale**2
    weights[f"{norm}.weight"] *= ((variance + _EPSILON) / before).sqrt() / scale  # 1 but for eps


@torch.no_grad()
def _negate_half(network: AttentionUNet, times: int) -> None:
    """Let half of each channel's copies that the attention sees be the others' negative."""
    weights = network.state_dict()
    for level in range(_LEVELS):
        # Where `reduce` runs twice it reads positive copies first and both kinds then: so the
        # first half alone.
        made = weights[f"decoders.{level}.reduce.weight"], weights[f"decoders.{level}.reduce.bias"]
        _read_halves(made[0][:, : len(made[1])], times, 0)
        for part in made:
            part.unflatten(0, (-1, 2, times // 2))[:, 1].neg_()
        _read_halves(weights[f"{_reader(weights, level)}.0.weight"], times, -1)
    for part in (weights["fusion.1.weight"], weights["fusion.1.bias"]):
        part.unflatten(0, (-1, 2, times // 2))[:, 1] *= _LESS
    _read_halves(weights["head.weight"], times, -1)


def _read_halves(weights: Tensor, times: int, second: int) -> None:
    """Let weights (out, in, rows, columns) read the first half of each channel's copies alone.

    They read the other half `second` times: 0, or -1 where it is negative.
    """
    halves = weights.unflatten(1, (-1, 2, times // 2))
    halves[:, :, 0] += halves[:, :, 1]
    halves[:, :, 1] = second * halves[:, :, 0]


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
    """Return how many times as many channels there are."""
    times, more = divmod(new.shape[axis], weights.shape[axis])
    if more or not times:
        raise ValueError("the new width is no multiple of the old one")
    return times


def _reading_copies(weights: Tensor, axis: int, times: int) -> Tensor:
    """Return weights that read copies of each channel along an axis and sum to the old ones."""
    if times == 1:
        return weights
    shares = weights.unsqueeze(axis + 1).repeat_interleave(times, axis + 1) / times
    noise = torch.randn(shares.shape) * shares.std()
    return (shares + noise - noise.mean(axis + 1, keepdim=True)).flatten(axis, axis + 1)


def _reading_more(weights: Tensor, channels: int, levels: int) -> Tensor:
    """Return weights (out, levels x in, …) that read more channels of each level, by 0."""
    by_level = weights.unflatten(1, (levels, -1))
    more = channels // levels - by_level.shape[2]
    if more < 0:
        raise ValueError("the supervised maps have fewer channels")
    return functional.pad(by_level, (0, 0, 0, 0, 0, more)).flatten(1, 2)


def _making(weights: Tensor, new: Tensor, axis: int, layer: str) -> Tensor:
    """Return weights that make more channels: new ones of supervised maps, else copies."""
    if layer == "supervision":
        had = min(weights.shape[axis], new.shape[axis])
        return torch.cat([weights, new.narrow(axis, had, new.shape[axis] - had)], dim=axis)
    return weights.repeat_interleave(_times(weights, new, axis), dim=axis)

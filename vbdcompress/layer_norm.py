"""LayerNorm and RMSNorm that lose channels, and still count them as the zeros that they had become.

Modules of a network's own that compute the same, over another dimension too, are known by what they give.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vbdcompress.compare import gives_the_same, in_double

# What is added to a variance, where no attribute of a module says it
_USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12)
# Of inputs: variances of small ones show what is added, large ones are let through
_SCALES = (1e-3, 1e3)
# Of images, and of series, for which alone the code may be
_PLACES = ((3, 4, 5), (3, 5))


class NarrowLayerNorm(nn.LayerNorm):
    """nn.LayerNorm over `whole` channels along `dim`, of which it is given those that are not 0."""

    whole: int
    dim: int = -1

    def forward(self, input: Tensor) -> Tensor:
        zeros = self.whole - input.shape[self.dim]
        if not zeros and self.dim == -1:
            return super().forward(input)
        given = _wide(input)
        mean = given.sum(self.dim, keepdim=True) / self.whole
        centred = given - mean
        square = centred.square().sum(self.dim, keepdim=True)
        # a zero is as far from the mean as that is from 0
        variance = (square + zeros * mean.square()) / self.whole
        return _finish(input, centred * torch.rsqrt(variance + self.eps), self, self.dim)


class NarrowRMSNorm(nn.RMSNorm):
    """nn.RMSNorm over `whole` channels along `dim`, of which it is given those that are not 0."""

    whole: int
    dim: int = -1

    def forward(self, x: Tensor) -> Tensor:
        if self.whole == x.shape[self.dim] and self.dim == -1:
            return super().forward(x)
        given = _wide(x)
        square = given.square().sum(self.dim, keepdim=True) / self.whole
        eps = torch.finfo(given.dtype).eps if self.eps is None else self.eps
        return _finish(x, given * torch.rsqrt(square + eps), self, self.dim)


Narrow = NarrowLayerNorm | NarrowRMSNorm
ChannelNorm = nn.LayerNorm | nn.RMSNorm


def _wide(given: Tensor) -> Tensor:
    """As torch's own take it: sums in float16 would overflow."""
    return given if given.dtype == torch.float64 else given.float()


def _finish(given: Tensor, normalised: Tensor, norm: nn.Module, dim: int) -> Tensor:
    """With weight and bias, in the type that torch's own norms give: float32 under autocast on CUDA."""
    shape = [1] * normalised.dim()
    shape[dim] = -1
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    if weight is not None:
        normalised = normalised * weight.view(shape)
    if bias is not None:
        normalised = normalised + bias.view(shape)
    stays_wide = given.is_cuda and torch.is_autocast_enabled("cuda")
    return normalised if stays_wide else normalised.to(given.dtype)


def is_channel_norm(module: object) -> bool:
    """Whether it is torch's own LayerNorm or RMSNorm over one dimension, or one of those here."""
    kinds = nn.LayerNorm, nn.RMSNorm, NarrowLayerNorm, NarrowRMSNorm
    return type(module) in kinds and len(module.normalized_shape) == 1  # type: ignore[attr-defined]


def narrow_norm_(norm: ChannelNorm, kept: int) -> None:
    """Let a norm whose weights are cut already count the channels that it has lost, in place."""
    if not isinstance(norm, Narrow):
        (whole,) = norm.normalized_shape
        norm.__class__ = NarrowLayerNorm if isinstance(norm, nn.LayerNorm) else NarrowRMSNorm
        vars(norm)["whole"] = whole
    norm.normalized_shape = (kept,)


def open_norm(module: nn.Module) -> Narrow | None:
    """A module with a weight, and perhaps a bias, for each channel, that computes a LayerNorm or RMSNorm
    over them, in the last dimension or in that behind the batch; None for others, and for torch's own.
    """
    held = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    torchs = type(module).__module__.startswith("torch.") or isinstance(module, Narrow)
    if torchs or module._modules or module._buffers or held.keys() not in ({"weight"}, {"weight", "bias"}):
        return None
    if {parameter.shape for parameter in held.values()} != {held["weight"].shape[:1]}:
        return None
    if not all(parameter.is_floating_point() for parameter in held.values()):
        return None
    for opened in _candidates(module, len(held["weight"]), "bias" in held):
        if _computes(module, opened):
            for name, parameter in held.items():
                opened.register_parameter(name, parameter)
            return opened.train(module.training)
    return None


def _candidates(module: nn.Module, width: int, with_bias: bool) -> Iterator[Narrow]:
    own = [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1]
    for dim in (-1, 1):
        for eps in dict.fromkeys((*own, *_USUAL_EPS)):
            norms: list[Narrow] = [NarrowLayerNorm(width, eps, bias=with_bias)]
            norms += [] if with_bias else [NarrowRMSNorm(width, eps)]
            for norm in norms:
                norm.whole, norm.dim = width, dim
                yield norm


@torch.no_grad()
@torch.random.fork_rng(devices=[])
def _computes(module: nn.Module, norm: Narrow) -> bool:
    """Whether a module is that, in training too, whatever its weights are."""
    trial, expecting = copy.deepcopy(module).cpu().double(), copy.deepcopy(norm).double()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trial.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        expecting.get_parameter(name).copy_(parameter)
    with in_double():
        for places in _PLACES:
            plain = torch.randn(*places, norm.whole, generator=generator, dtype=torch.float64)
            if all(
                gives_the_same(trial.train(training), expecting, scale * plain.movedim(-1, norm.dim))
                for scale in _SCALES
                for training in (False, True)
            ):
                return True
    return False

"""Layers whose own code computes their weights at each call, output by output: standardised (NFNet, BiT),
normalised or scaled."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vbdcompress.errors import TRACE_ERRORS

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PRODUCTS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
# Largest difference of what is the same, relative to the largest value, in float32
_SAME = 2e-5
# Of fewer weights an output, anything is a factor and a shift
_FEWEST = 3


def plain_kind(module: nn.Module) -> Any:
    """The layer of torch's that it is a subclass of, with a forward of its own; None for others."""
    kind = next((each for each in _PLAIN if isinstance(module, each)), None)
    weight = module._parameters.get("weight")
    if kind is None or type(module).forward is kind.forward or module._modules or weight is None:
        return None
    return kind if weight.is_floating_point() else None


def make_plain_(module: nn.Module, weight: Tensor | None = None) -> None:
    """Let it be torch's own layer, in place: with its own bias, and nothing else that its code took.

    Args:
        module: with a `plain_kind`.
        weight: of the plain layer; None: as it lies there.
    """
    own = module._parameters
    if weight is not None and own["weight"] is not None:
        own["weight"] = nn.Parameter(weight.to(own["weight"].device), own["weight"].requires_grad)
    module.__class__ = plain_kind(module)
    module._parameters = {"weight": own["weight"], "bias": own.get("bias")}
    module._buffers = {}


def computed_weight(module: nn.Module) -> Tensor | None:
    """[as its own weight] what a layer multiplies by, where that can be stored; None for other layers.

    Known by what it does to noise: it makes one product, of just what it is given, with its own bias. Weights
    are a factor and a shift of its own, output by output. Masks, signs, quantised or noisy weights are not:
    their layers hold on to them while they train.
    """
    if plain_kind(module) is None:
        return None
    trial = copy.deepcopy(module)
    try:
        return _computed_weight(trial.cpu())
    except TRACE_ERRORS:  # it takes more than an input, or gives more than an output
        return None


@torch.no_grad()
@torch.random.fork_rng(devices=[])
def _computed_weight(trial: nn.Module) -> Tensor | None:
    own = trial._parameters
    raw, bias = own["weight"], own.get("bias")
    assert raw is not None
    if raw[0].numel() < _FEWEST or (
        not raw.requires_grad and any(p.requires_grad for p in trial.parameters())
    ):
        return None
    found = []
    for number, training in enumerate((False, False, True)):
        given = _given(trial, number)
        with _Products() as products:
            output = trial.train(training)(given)
        if len(products.made) != 1 or not isinstance(output, Tensor):
            return None
        ((multiplied, weight, added),) = products.made
        if multiplied is not given or weight is raw or weight.shape != raw.shape or added is not bias:
            return None
        found.append(weight.clone())
        plain = copy.deepcopy(trial)
        make_plain_(plain, weight)
        if not _alike(plain(given), output):
            return None
    alike = all(torch.equal(weight, found[0]) for weight in found) and _is_of_each_output(raw, found[0])
    return found[0] if alike else None


def _is_of_each_output(raw: Tensor, computed: Tensor) -> bool:
    """Whether one is the other times a factor, and a shift, of each output (of the first dimension)."""
    one, other = (tensor.flatten(1).double() for tensor in (raw, computed))
    one, centred = one - one.mean(1, keepdim=True), other - other.mean(1, keepdim=True)
    factor = (one * centred).sum(1, keepdim=True) / one.square().sum(1, keepdim=True)
    return bool((factor != 0).all()) and _alike(factor * one, centred)


def _alike(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= _SAME * expected.abs().max())


def _given(layer: nn.Module, more: int) -> Tensor:
    """Noise that a layer takes; of a convolution `more` places larger than it reaches."""
    if isinstance(layer, nn.Linear):
        return torch.randn(2, layer.in_features, dtype=layer.weight.dtype)
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    sizes = (
        1 + apart * (size - 1) + more for size, apart in zip(layer.kernel_size, layer.dilation, strict=True)
    )
    return torch.randn(2, layer.in_channels, *sizes, dtype=layer.weight.dtype)


class _Products(TorchFunctionMode):
    """Notes what is multiplied, by what weight, and the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, Any, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            given = dict(zip(("input", "weight", "bias"), args[:3], strict=False)) | kwargs
            self.made.append((given["input"], given["weight"], given.get("bias")))
        return func(*args, **kwargs)

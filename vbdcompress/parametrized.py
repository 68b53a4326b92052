"""Weights that are computed at each call: by torch.nn.utils.parametrizations (weight_norm, spectral_norm,
orthogonal), or by a layer's own code (standardised weights)."""

import copy
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from vbdcompress.errors import TRACE_ERRORS

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PRODUCTS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
# Largest difference of what is the same function, relative to the largest output
_SAME = 1e-5


def computes_weights(module: nn.Module) -> bool:
    """Whether its weights are computed, and can be stored instead."""
    return parametrize.is_parametrized(module) or _plain_layer(module) is not None


def store_weights_(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Let modules keep what is computed in eval mode as plain weights, in place.

    Args:
        names: of modules; those that compute none stay as they are. None: all.
    """
    held = Counter(id(own) for module in model.modules() for own in module.parameters(recurse=False))
    stored: dict[int, nn.Module | None] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if names is not None and name not in names:
            continue
        if parametrize.is_parametrized(module):
            own_class_(module)
            computed = module.parametrizations
            assert isinstance(computed, nn.ModuleDict)
            computed.eval()
            for weight in list(computed):
                parametrize.remove_parametrizations(module, weight, leave_parametrized=True)
        elif name and all(held[id(own)] == 1 for own in module.parameters(recurse=False)):
            if id(module) not in stored:
                stored[id(module)] = _plain_layer(module)
            if (plain := stored[id(module)]) is not None:
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, plain)


def own_class_(module: nn.Module) -> None:
    """A class of its own: a deep copy shares its original's, from which torch would delete the parameter."""
    shared = type(module)
    content = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, content)


class _Products(TorchFunctionMode):
    """Notes what is multiplied, and by what weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, Any, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            given = dict(zip(("input", "weight", "bias"), args[:3], strict=False)) | kwargs
            self.found.append((given["input"], given["weight"], given.get("bias")))
        return func(*args, **kwargs)


@torch.no_grad()
@torch.random.fork_rng(devices=[])
def _plain_layer(module: nn.Module) -> nn.Module | None:
    """The layer of torch that does the same with the weights that a subclass of it computes; None for others.

    Known by what it does: one product, of just what it is given, with weights that are the same whatever that
    is, in training too.
    """
    kind = next((each for each in _PLAIN if isinstance(module, each)), None)
    held = module._modules or module._forward_hooks or module._forward_pre_hooks
    if kind is None or type(module).forward is kind.forward or held:
        return None
    assert isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    computed, in_training = _computed(module, training=False), _computed(module, training=True)
    if computed is None or in_training is None or not all(map(_equal, computed, in_training)):
        return None
    weight, bias = computed
    plain = _unfilled(module, kind, bias=bias is not None)
    asked = any(parameter.requires_grad for parameter in module.parameters())
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            setattr(plain, name, nn.Parameter(tensor, asked))
    given = _given(module)
    expected, found = copy.deepcopy(module).cpu()(given), plain(given)
    if found.shape != expected.shape or (found - expected).abs().max() > _SAME * expected.abs().max():
        return None
    return plain.to(module.weight.device).train(module.training)


def _unfilled(module: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, kind: Any, *, bias: bool) -> nn.Module:
    """A layer of torch's own of the same sizes."""
    if isinstance(module, nn.Linear):
        return nn.Linear(module.in_features, module.out_features, bias, device="meta")
    layer: nn.Module = kind(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        bias,
        module.padding_mode,
        device="meta",
    )
    return layer


def _computed(module: nn.Module, training: bool) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a layer's only product; None where there are more, or it takes its own weight."""
    trial, given = copy.deepcopy(module).cpu().train(training), _given(module)
    try:
        with _Products() as products:
            trial(given)
    except TRACE_ERRORS:
        return None
    if len(products.found) != 1:
        return None
    multiplied, weight, bias = products.found[0]
    if multiplied is not given or weight is trial.weight or weight.shape != trial.weight.shape:
        return None
    return weight.detach().clone(), None if bias is None else bias.detach().clone()


def _given(layer: nn.Module) -> Tensor:
    """Noise that a layer takes."""
    if isinstance(layer, nn.Linear):
        return torch.randn(2, layer.in_features, dtype=layer.weight.dtype)
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    sizes = (2 + apart * (size - 1) for size, apart in zip(layer.kernel_size, layer.dilation, strict=True))
    return torch.randn(2, layer.in_channels, *sizes, dtype=layer.weight.dtype)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))

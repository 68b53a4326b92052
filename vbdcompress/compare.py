"""Two networks compared: copies to be tried, and whether what one gives is exactly what the other does."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from vbdcompress.errors import TRACE_ERRORS

# Largest |masked - sliced| over the largest |masked|, in float64
EXACT = 1e-10
# Largest difference of what is the same function in float64, relative to the largest output
_SAME = 1e-12
# What a module keeps its weights and parts in
_PARTS = ("_parameters", "_modules")


def forget_calls_(model: nn.Module) -> None:
    """Let go of what forward kept, in place.

    What it computed of weights once in eval mode, such as tables of attention, would be of other weights
    later: modules that keep such drop it as they go to training mode, where they are taken and back. Losses
    on the way are detached, so that the network can be copied.
    """
    for module in model.modules():
        held = {name: tree_leaves(value) for name, value in vars(module).items() if name not in _PARTS}
        if any(isinstance(item, Tensor) for name in held.keys() - {"_buffers"} for item in held[name]):
            _train_and_back(module)
        for name, items in held.items():
            if name in vars(module) and any(map(is_computed, items)):
                vars(module)[name] = tree_map(_detached, vars(module)[name])


def _train_and_back(module: nn.Module) -> None:
    modes = [(each, each.training) for each in module.modules()]
    module.train(not module.training)
    module.train(not module.training)
    for each, training in modes:
        each.training = training


def _detached(item: Any) -> Any:
    return item.detach() if is_computed(item) else item


def is_computed(item: Any) -> bool:
    """Whether it is a tensor with a graph behind it, which can't be copied."""
    return isinstance(item, Tensor) and item.grad_fn is not None


def as_double(tensor: Tensor) -> Tensor:
    """On the CPU; in float64 where it holds floating point numbers, complex ones likewise."""
    plain = tensor.detach().cpu()
    if plain.is_complex():
        return plain.to(torch.complex128)
    return plain.double() if plain.is_floating_point() else plain


def double_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, all numbers in double precision; torch's own leaves complex ones."""
    copied = copy.deepcopy(model).cpu().double()
    copied.eval()
    forget_calls_(copied)
    for tensor in (*copied.parameters(), *copied.buffers()):
        if tensor.is_complex():
            tensor.data = tensor.data.to(torch.complex128)
    return copied


@contextmanager
def in_double() -> Iterator[None]:
    """Let a network's own code compute in float64: what it makes, or asks for, in float32 is float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Promotion():
            yield
    finally:
        torch.set_default_dtype(before)


class _Promotion(TorchFunctionMode):
    """Every float32 that is named is float64; a tensor in float32 beside one in float64 is made one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__deepcopy__"):  # the latter is our own doing, not the network's
            return func(*args, **kwargs)
        func = torch.Tensor.double if func is torch.Tensor.float else func
        found = {item if isinstance(item, torch.dtype) else item.dtype for item in _typed(args, kwargs)}
        if torch.float32 not in found:
            return func(*args, **kwargs)
        args, kwargs = tree_map(lambda item: torch.float64 if item is torch.float32 else item, (args, kwargs))
        writes = (
            name in ("__set__", "__setitem__")
            or (name.endswith("_") and not name.endswith("__"))
            or "out" in kwargs
        )
        if not writes and torch.float64 in {
            item.dtype for item in _typed(args, kwargs) if isinstance(item, Tensor)
        }:
            args, kwargs = tree_map(_promoted, (args, kwargs))
        return func(*args, **kwargs)


def _typed(args: Iterable[Any], kwargs: dict[str, Any]) -> Iterator[Tensor | torch.dtype]:
    """The tensors and types among arguments, in lists of them too."""
    for item in (*args, *kwargs.values()):
        if isinstance(item, Tensor | torch.dtype):
            yield item
        elif isinstance(item, list | tuple):
            yield from _typed(item, {})


def _promoted(item: Any) -> Any:
    return item.double() if isinstance(item, Tensor) and item.dtype is torch.float32 else item


def flatten_output(output: Any) -> list[Tensor]:
    """All tensors in a network's output: bare, or in tuples, lists, dicts and dataclasses."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = output.values()
    elif is_dataclass(output) and not isinstance(output, type):
        output = [getattr(output, item.name) for item in fields(output)]
    if isinstance(output, str | bytes) or not hasattr(output, "__iter__"):
        return []
    return [tensor for item in output for tensor in flatten_output(item)]


def as_real(tensor: Tensor) -> Tensor:
    """[..., 2] of complex numbers, others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def gives_the_same(module: nn.Module, like: Callable[[Tensor], Tensor], given: Tensor) -> bool:
    """Whether a module gives what a function does, to rounding in float64; not where it fails."""
    try:
        found, expected = module(given), like(given)
    except TRACE_ERRORS:
        return False
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return bool((found - expected).abs().max() <= _SAME * expected.abs().max())


def relative_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest difference over all outputs, relative to the largest expected; inf where shapes differ."""
    shapes = [tuple(tensor.shape) for tensor in expected]
    if not shapes or shapes != [tuple(tensor.shape) for tensor in found]:
        return float("inf")
    worst = 0.0
    for one, other in zip(expected, found, strict=True):
        if not one.numel():
            continue
        left, right = (as_real(tensor.detach()).double() for tensor in (one, other))
        equal = (left == right) | (left.isnan() & right.isnan())  # a mask's infinities too
        difference = float(torch.where(equal, 0.0, left - right).abs().max())
        scale = float(torch.where(left.isfinite(), left, 0.0).abs().max()) or 1.0
        worst = max(worst, difference / scale if np.isfinite(difference) else float("inf"))
    return worst

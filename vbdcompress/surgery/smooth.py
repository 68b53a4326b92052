"""Operations in whose place the probe looks at others, with derivatives that hide nothing."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Their derivative is 0 on half of their range, or beyond a bound
_CLIPPING = {
    *(torch.relu, torch.Tensor.relu, nn.functional.relu, nn.functional.relu6, nn.functional.hardtanh),
    *(nn.functional.hardswish, nn.functional.hardsigmoid, nn.functional.threshold),
    *(torch.clamp, torch.Tensor.clamp, torch.clamp_min, torch.Tensor.clamp_min),
    *(torch.clip, torch.Tensor.clip, torch.clamp_max, torch.Tensor.clamp_max),
}
_CLIPPING_ = {
    *(torch.relu_, torch.Tensor.relu_, torch.Tensor.clamp_, torch.Tensor.clamp_min_),
    *(torch.clamp_, torch.clamp_min_, torch.clip_, torch.Tensor.clip_, torch.clamp_max_),
    torch.Tensor.clamp_max_,
}

# The larger or smaller of two: their derivative says of one alone
_BETWEEN_TWO = {
    *(torch.max, torch.Tensor.max, torch.maximum, torch.Tensor.maximum, torch.fmax, torch.Tensor.fmax),
    *(torch.min, torch.Tensor.min, torch.minimum, torch.Tensor.minimum, torch.fmin, torch.Tensor.fmin),
}
# They let no derivative through, and what they give is what they are given
_STOPPING = {torch.detach, torch.Tensor.detach, torch.Tensor.detach_}
# Of a derivative, let through all the same: x + (f(x) - x).detach() still depends on x
_SHARE = 0.37
# torch refuses them where there is a derivative
_LEAVING: set[Any] = {torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.requires_grad_}


class Smooth(TorchFunctionMode):
    """Activations that clip become a bend, attention a sum: what depends on what stays the same.

    A bend, not a scaling: behind a norm over each channel the mean of what is linear depends on nothing.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention and not (kwargs or {}).get("enable_gqa"):
            return _attend(*args, **(kwargs or {}))
        if func in _CLIPPING_ or (func in _CLIPPING and (kwargs or {}).get("inplace")):
            return args[0].copy_(_bend(args[0].clone()))
        if func in _CLIPPING and args[0].is_floating_point():
            return _bend(args[0])
        if func in _BETWEEN_TWO and (two := _two_of(args, kwargs or {})):
            return _bend(0.6 * two[0] + 0.4 * two[1])
        if func in _STOPPING and args[0].requires_grad:
            shared = _SHARE * args[0] + (1 - _SHARE) * args[0].detach()
            return args[0] if func is torch.Tensor.detach_ else shared
        if func in _LEAVING and args[0].requires_grad:
            args = (args[0].detach(), *args[1:])
        return func(*args, **(kwargs or {}))


def _two_of(args: Any, kwargs: Any) -> tuple[Tensor, Tensor] | None:
    """The two real tensors that an operation is between; None where it is along a dimension of one."""
    two = (*args, *(kwargs[name] for name in ("input", "other") if name in kwargs))
    real = [isinstance(each, Tensor) and each.is_floating_point() for each in two]
    return (two[0], two[1]) if real == [True, True] else None


def _bend(x: Tensor) -> Tensor:
    """Of derivatives from 0.8 to 1, hardly further from 0 than x: so within bounds that x is within."""
    return 0.9 * x + 0.1 * (1 - x.cos())


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    """Each channel of a head's output from all of its query and key, and its own of the value; cheaply."""
    scores = query.sum(-1, keepdim=True) + key.sum((-1, -2))[..., None, None]
    if attn_mask is not None and attn_mask.is_floating_point():
        scores = scores + attn_mask.sum(-1, keepdim=True)
    return scores + value.sum(-2, keepdim=True)

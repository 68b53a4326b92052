"""Inputs of other sizes that a network takes, to see what hangs on them."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vbdcompress.errors import TRACE_ERRORS
from vbdcompress.gather import GatherLinear
from vbdcompress.inputs import Inputs, call, first, map_tensors, tensors_of


@torch.no_grad()
def other_sizes(model: nn.Module, example: Inputs) -> list[Inputs]:
    """Two examples in other sizes that the network takes: half as long, or twice, in what may be lengths.

    A sum over a length makes a constant that is another one at another length.

    Args:
        model: in eval mode.
        example: a batch of inputs.
    """
    found = []
    widths = _gathered_widths(model, example)
    for size in sorted({n for tensor in tensors_of(example) for n in tensor.shape[1:] if n > 1}):
        for change in (partial(_halved, size=size), partial(_doubled, size=size)):
            other = map_tensors(first(example, 2), change)
            try:
                same = _gathered_widths(model, other) == widths
            except TRACE_ERRORS:
                continue  # a size that is fixed, as numbers of channels are
            if same:
                found.append(other)
                break
    return found


def _gathered_widths(model: nn.Module, inputs: Inputs) -> list[int]:
    """What layers that pick features are given: a gather takes any width, which the whole layer would not."""
    widths: list[int] = []

    def note(_: nn.Module, args: Any) -> None:
        widths.append(args[0].shape[-1])

    gathers = [module for module in model.modules() if isinstance(module, GatherLinear)]
    hooks = [module.register_forward_pre_hook(note) for module in gathers]
    try:
        call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return widths


def _halved(tensor: Tensor, size: int) -> Tensor:
    for dim in _dims_of(tensor, size):
        tensor = tensor.narrow(dim, 0, size // 2)
    return tensor.contiguous()


def _doubled(tensor: Tensor, size: int) -> Tensor:
    for dim in _dims_of(tensor, size):
        tensor = torch.cat([tensor, tensor], dim)
    return tensor


def _dims_of(tensor: Tensor, size: int) -> Iterator[int]:
    return (dim for dim in range(1, tensor.dim()) if tensor.shape[dim] == size)

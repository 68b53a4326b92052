"""Channels that are 0: a norm over them and others counts them, so they must be before they go."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from vbdcompress.errors import TRACE_ERRORS
from vbdcompress.inputs import Inputs, call, input_of
from vbdcompress.layer_norm import ChannelNorm
from vbdcompress.recurrent import Recurrent, recurrent_parameters, rows_of_units
from vbdcompress.surgery.groups import ChannelGroup, Member
from vbdcompress.surgery.walk import tensor_of
from vbdcompress.surgery.weights import Index, Reader, input_dim, shares, unwritten_outputs, zero_outputs_

HEARD = "a norm counts its channels, and other than 0 arrives there from one that nothing writes"


def norms_over(model: nn.Module, group: ChannelGroup) -> list[Member]:
    """The LayerNorms and RMSNorms on the way of a group's channels."""
    return [member for member in group.between if isinstance(model.get_submodule(member.layer), ChannelNorm)]


def is_counted(model: nn.Module, group: ChannelGroup) -> bool:
    """Whether a norm is over its channels."""
    return bool(norms_over(model, group))


@torch.no_grad()
def silence_(model: nn.Module, group: ChannelGroup, channels: Index) -> None:
    """Set to 0 what writes some channels, in place; where they are counted, all that is on their way, too."""
    for member in group.writers:
        layer = model.get_submodule(member.layer)
        assert isinstance(layer, Reader)
        zero_outputs_(layer, member.positions(channels).tolist())
    if is_counted(model, group):
        for tensor, dim, index in _on_the_way(model, group):
            places = torch.from_numpy(np.flatnonzero(np.isin(index, channels)))
            tensor.index_fill_(dim, places.to(tensor.device), 0.0)


def heed_norms(model: nn.Module, inputs: Inputs, group: ChannelGroup) -> ChannelGroup:
    """The group; whole where its channels can't be silenced: one may have to stay, and would be counted.

    Args:
        model: to try it on, a copy of it.
        inputs: a batch.
    """
    if group.whole_because is not None or not is_counted(model, group):
        return group
    trial, heard = copy.deepcopy(model), list[bool]()
    silence_(trial, group, np.arange(group.size))

    def listen(layer: nn.Module, args: Any, kwargs: Any, index: Index) -> None:
        places = torch.from_numpy(np.flatnonzero(index >= 0))
        heard.append(bool(input_of(args, kwargs).index_select(input_dim(layer), places).any()))

    for member in norms_over(trial, group):
        hook = partial(listen, index=member.index)
        trial.get_submodule(member.layer).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            call(trial, inputs)
    except TRACE_ERRORS:
        return group.whole(HEARD)
    return group.whole(HEARD) if any(heard) else group


@torch.no_grad()
def silent_channels(model: nn.Module, group: ChannelGroup) -> Index:
    """Those that nothing writes, and that nothing on the way makes other than 0."""
    heard = np.zeros(group.size, dtype=bool)

    def hear(index: Index, sounds: Tensor) -> None:
        found = index[sounds.cpu().numpy()]
        heard[found[found >= 0]] = True

    for member in group.writers:
        hear(member.index, _written(model.get_submodule(member.layer)))
    for tensor, dim, index in _on_the_way(model, group):
        hear(index, (tensor != 0).movedim(dim, 0).reshape(len(index), -1).any(1))
    return np.flatnonzero(~heard)


def _written(layer: nn.Module) -> Tensor:
    """[outputs] bool: whether a weight or bias that writes it is not 0."""
    assert isinstance(layer, Reader)
    if isinstance(layer, Recurrent):
        parameters = [getattr(layer, name) for name in recurrent_parameters(layer)]
        rows = [rows_of_units(layer, [unit]) for unit in range(layer.hidden_size)]
        units = [any(bool(each[own].any()) for each in parameters) for own in rows]
        return torch.tensor(units * (2 if getattr(layer, "bidirectional", False) else 1))
    written = ~unwritten_outputs(layer)
    bias = getattr(layer, "bias", None)
    return written if bias is None else written | (bias != 0)


def _on_the_way(model: nn.Module, group: ChannelGroup) -> Iterator[tuple[Tensor, int, Index]]:
    """What has a number for each channel and might make a 0 another one: tensor, dimension, and the channel
    at each of its places along that.
    """
    for member in group.between:
        layer, index = model.get_submodule(member.layer), member.index
        if isinstance(layer, _ConvNd):
            groups, read, written = shares(layer)
            index = index[np.arange(groups * written) // written * read]
        for name, tensor in layer._parameters.items():
            if tensor is not None and not (isinstance(layer, _ConvNd) and name == "weight"):
                yield tensor.data, 0, index
    for parameter in group.parameters:
        yield tensor_of(model, parameter.layer).data, parameter.dim, parameter.index

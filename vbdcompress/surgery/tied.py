"""Tables of embeddings whose weight the last layer shares: both lose the same channels.

Gates of what that layer reads can't go into a weight that others hold, too. In language models it reads what
a norm gives, and they go into what that multiplies each channel by.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from vbdcompress.surgery.groups import ChannelGroup
from vbdcompress.surgery.silence import norms_over
from vbdcompress.surgery.weights import Index, Reader, Table, scale_inputs_, zero_inputs_


def find_taker(model: nn.Module, group: ChannelGroup, names: Collection[str]) -> tuple[str, str] | None:
    """(reader, norm) of a group whose tables of embeddings share their weight with one reader.

    None where other layers hold it too, or the channels of these, or where no norm is over the same.

    Args:
        names: of the weight.
    """
    owners = [name.removesuffix(".weight") for name in names]
    members = {member.layer: member for member in (*group.writers, *group.readers)}
    if not all(name.endswith(".weight") for name in names) or not members.keys() >= set(owners):
        return None
    readers = [name for name in owners if isinstance(model.get_submodule(name), nn.Linear)]
    tables = [name for name in owners if isinstance(model.get_submodule(name), Table)]
    if len(readers) != 1 or len(tables) < len(owners) - 1:
        return None
    index = members[readers[0]].index
    if not all(np.array_equal(members[name].index, index) for name in tables):
        return None
    norms = _candidates(model, group, index)
    return (readers[0], norms[-1]) if norms else None


def with_other_takers(model: nn.Module, group: ChannelGroup) -> Iterator[ChannelGroup]:
    """The group with another norm than the last that runs, for code may go on from the reader, or before."""
    indices = {member.layer: member.index for member in group.readers}
    for place, (reader, norm) in enumerate(group.takers):
        for other in _candidates(model, group, indices[reader]):
            if other != norm:
                takers = (*group.takers[:place], (reader, other), *group.takers[place + 1 :])
                yield replace(group, takers=takers)


def _candidates(model: nn.Module, group: ChannelGroup, index: Index) -> list[str]:
    """Norms that multiply each channel that a reader is given, in the order in which they run."""
    return [
        member.layer
        for member in norms_over(model, group)
        if model.get_submodule(member.layer)._parameters.get("weight") is not None
        and np.array_equal(member.index, index)
    ]


@torch.no_grad()
def fold_factors_(model: nn.Module, reader: str, factors: Tensor, takers: Mapping[str, str]) -> None:
    """Multiply what a layer reads by factors, [inputs], in place: in its weights, or in the norm before it.

    Args:
        takers: reader -> norm, as of `find_taker`.
    """
    layer = model.get_submodule(reader)
    assert isinstance(layer, Reader)
    if reader not in takers:
        scale_inputs_(layer, factors)
        return
    for parameter in model.get_submodule(takers[reader]).parameters(recurse=False):
        parameter.mul_(factors)
    zero_inputs_(layer, torch.nonzero(factors == 0).flatten().tolist())

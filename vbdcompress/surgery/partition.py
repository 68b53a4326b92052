"""A group that can't go channel by channel, in parts.

A shortcut padded with channels of zeros ties some channels of a stream and not the others: the first can
go, the others are as many as the network's code says. Code that takes a tensor in halves needs both to
lose alike.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from vbdcompress.surgery.groups import NOT_HERE, ChannelGroup, Member
from vbdcompress.surgery.weights import Index

# More different ways through the network than this are no parts, but a shuffle
MOST_PARTS = 8

AnyMember = TypeVar("AnyMember", bound=Member)


def parts_of(group: ChannelGroup) -> list[Index]:
    """The group's channels in sets that pass the same layers equally often; none where it is but one."""
    if group.is_features:
        return []
    members = (*group.writers, *group.readers, *group.between, *group.parameters)
    passed = [np.bincount(member.index[member.index >= 0], minlength=group.size) for member in members]
    kinds, kind_of = np.unique(np.stack(passed), axis=1, return_inverse=True)
    if not 1 < kinds.shape[1] <= MOST_PARTS:
        return []
    parts = [np.flatnonzero(kind_of.reshape(-1) == kind) for kind in range(kinds.shape[1])]
    return sorted(parts, key=lambda part: int(part[0]))


def take(group: ChannelGroup, parts: Sequence[Index]) -> ChannelGroup:
    """The group of some of its channels only, called after the first layer that writes them.

    Args:
        group: see `parts_of`.
        parts: sets of channels, of one size; the nth of each go together.
    """
    numbers = np.full(group.size, NOT_HERE, dtype=np.int64)
    for part in parts:
        numbers[part] = np.arange(len(part))

    def of(members: tuple[AnyMember, ...]) -> tuple[AnyMember, ...]:
        moved = (replace(m, index=np.where(m.index >= 0, numbers[m.index], NOT_HERE)) for m in members)
        return tuple(member for member in moved if (member.index >= 0).any())

    writers = of(group.writers)
    return ChannelGroup(
        writers[0].layer,
        len(parts[0]),
        writers,
        of(group.readers),
        of(group.between),
        parameters=of(group.parameters),
        foldable=group.foldable,
    )

"""A group that can't go channel by channel, in parts.

A shortcut padded with channels of zeros ties some channels of a stream and not the others: the first can
go, the others are as many as the network's code says. Code that takes a tensor in halves needs both to
lose alike.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from torch import nn

from vbdcompress.surgery.groups import NOT_HERE, ChannelGroup, Member
from vbdcompress.surgery.numbers import following_numbers, numbers_around, with_heads
from vbdcompress.surgery.weights import Index

# More different ways through the network than this are no parts, but a shuffle
MOST_PARTS = 8

Kind = tuple[tuple[str, ...], ...]
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


@dataclass(frozen=True)
class Piece:
    """Some of a group's channels, and how they go.

    Attributes:
        parts: which of `parts_of`; the nth channels of each go together. None: all channels, one by one.
        numbers: as of ChannelGroup.
        stays: whether they stay whole instead.
    """

    parts: tuple[int, ...] | None = None
    numbers: tuple[str, ...] = ()
    stays: bool = False


# The division of a group that nothing helps
STAYS = (Piece(stays=True),)


def find_pieces(
    trial: nn.Module, group: ChannelGroup, goes: Callable[[ChannelGroup], bool]
) -> tuple[Piece, ...]:
    """How a group that failed can go: as it is, with numbers that follow; or each part that goes alone,
    others in equal shares where they do, and the rest stays.

    Args:
        trial: the network.
        goes: whether the trial of a group finds it exact.
    """
    group = replace(group, whole_because=None)
    if met := following_numbers(trial, group, goes):
        return (Piece(None, met.numbers),)
    parts = parts_of(group)

    def of(*chosen: int) -> ChannelGroup:
        return with_heads(trial, take(group, [parts[number] for number in chosen]))

    pieces = [Piece((n,), part.numbers) for n in range(len(parts)) if goes(part := of(n))]
    rest = [n for n in range(len(parts)) if (n,) not in {piece.parts for piece in pieces}]
    if len(rest) > 1 and _alike([parts[n] for n in rest]) and goes(together := of(*rest)):
        pieces.append(Piece(tuple(rest), together.numbers))
        rest = []
    # what could go alone can also go with the others, who need it
    if rest and _alike(parts):
        together = of(*range(len(parts)))
        met = together if goes(together) else following_numbers(trial, together, goes)
        if met:
            return (Piece(tuple(range(len(parts))), met.numbers),)
    if pieces and rest:
        pieces.append(Piece(tuple(rest), stays=True))
    return tuple(pieces) or STAYS


def kind_of(model: nn.Module, group: ChannelGroup) -> Kind:
    """What it has in common with groups of other blocks that are built alike: names but for digits."""
    members = ([member.layer for member in each] for each in (group.writers, group.readers, group.between))
    return tuple(tuple(map(_pattern, names)) for names in (*members, numbers_around(model, group, 0)))


def _pattern(name: str) -> str:
    block, _, own = name.rpartition(".")
    return f"{re.sub(r'[0-9]+', '#', block)}.{own}"


def divide(trial: nn.Module, group: ChannelGroup, pieces: Sequence[Piece]) -> list[ChannelGroup]:
    """A group in pieces, as `find_pieces` found them of this group, or of another one of its kind.

    Args:
        group: with the reason for those that stay whole.
    """
    parts, divided = parts_of(group), []
    if pieces in ((), STAYS) or any(n >= len(parts) for piece in pieces for n in piece.parts or ()):
        return [group]
    for piece in pieces:
        part = replace(group, whole_because=None)
        if piece.parts is not None:
            chosen = [parts[n] for n in piece.parts]
            part = take(group, [np.concatenate(chosen)] if piece.stays else chosen)
        part = replace(part, numbers=_numbers_like(piece.numbers, numbers_around(trial, part, 0)))
        divided.append(part.whole(group.whole_because or "") if piece.stays else part)
    names = [group.name, *(f"{group.name} ({number})" for number in range(2, len(divided) + 1))]
    return [replace(part, name=name) for part, name in zip(divided, names, strict=True)]


def _numbers_like(numbers: tuple[str, ...], around: Collection[str]) -> tuple[str, ...]:
    """The same numbers, or those that are called so in another block."""
    if set(numbers) <= set(around):
        return numbers
    alike = {_pattern(number) for number in numbers}
    return tuple(number for number in around if _pattern(number) in alike)


def _alike(parts: Sequence[Index]) -> bool:
    return len({len(part) for part in parts}) == 1


def beside_unread(
    group: ChannelGroup, unread: Sequence[ChannelGroup], goes: Callable[[ChannelGroup], bool]
) -> ChannelGroup | None:
    """A group that failed, with a layer that adds to its channels what nothing reads; None: there is none.

    The last of a stream's layers may be called in vain: where nothing follows it, no derivative says what
    it meets.
    """
    for other in unread:
        if other.channels == group.size:
            writers = tuple(Member(each.layer, np.arange(len(each.index))) for each in other.writers)
            met = replace(group, whole_because=None, writers=(*group.writers, *writers))
            if goes(met):
                return met
    return None

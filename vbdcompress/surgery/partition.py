"""A group that can't go channel by channel, in parts.

A shortcut padded with channels of zeros ties some channels of a stream and not the others: the first can
go, the others are as many as the network's code says. Code that takes a tensor in halves needs both to
lose alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from torch import nn

from vbdcompress.surgery.groups import NOT_HERE, READ_WIDTHS, ChannelGroup, Member
from vbdcompress.surgery.plan import numbers_around
from vbdcompress.surgery.weights import Index

# More different ways through the network than this are no parts, but a shuffle
MOST_PARTS = 8
# Of numbers that happen to be as large as a group, no more are tried one by one
MOST_NUMBERS = 8

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


def in_parts(
    trial: nn.Module, group: ChannelGroup, goes: Callable[[ChannelGroup], bool]
) -> list[ChannelGroup]:
    """A group that failed: with a width of its module's kept, or with numbers that follow; or each part that
    goes alone, others in equal shares where they do, and the rest.

    Args:
        trial: the network.
        goes: whether the trial of a group finds it exact.
    """
    reason = group.whole_because or ""
    fewer = replace(group, whole_because=None, widths=tuple(n for n in group.widths if n not in READ_WIDTHS))
    owners = {trial.get_submodule(member.layer.rpartition(".")[0]) for member in group.writers}
    if any(hasattr(owner, name) for owner in owners for name in READ_WIDTHS) and goes(fewer):
        return [fewer]
    if met := _following_numbers(trial, replace(group, whole_because=None), goes):
        return [met]
    parts = parts_of(group)
    single = [part for part in parts if goes(take(group, [part]))]
    groups = [take(group, [part]) for part in single]
    rest = [part for part in parts if not any(part is other for other in single)]
    if len(rest) > 1 and _alike(rest) and goes(together := take(group, rest)):
        groups.append(together)
        rest = []
    # what could go alone can also go with the others, who need it
    if rest and _alike(parts):
        together = take(group, parts)
        met = together if goes(together) else _following_numbers(trial, together, goes)
        groups, rest = ([met], []) if met else (groups, rest)
    if not groups:
        return [group]
    if rest:
        groups.append(take(group, [np.concatenate(rest)]).whole(reason))
    names = [group.name, *(f"{group.name} ({number})" for number in range(2, len(groups) + 1))]
    return [replace(part, name=name) for part, name in zip(groups, names, strict=True)]


def _following_numbers(
    trial: nn.Module, group: ChannelGroup, goes: Callable[[ChannelGroup], bool]
) -> ChannelGroup | None:
    """The group with those numbers of channels that must follow it; None: there are none, or it fails."""
    around = tuple(numbers_around(trial, group, 0))
    tries = [around, *((number,) for number in around[:MOST_NUMBERS] if len(around) > 1)]
    numbers = next((each for each in tries if each and goes(replace(group, numbers=each))), None)
    if numbers is None:
        return None
    for number in numbers:  # one that only happens to be as large stays
        fewer = tuple(other for other in numbers if other != number)
        if fewer and goes(replace(group, numbers=fewer)):
            numbers = fewer
    return replace(group, numbers=numbers)


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

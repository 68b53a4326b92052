"""Numbers that modules keep beside their layers, of heads, of channels: which of them follow what goes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from numbers import Real
from typing import TypeGuard

from torch import nn

from vbdcompress.opening import Opened
from vbdcompress.surgery.groups import ChannelGroup

# What attention calls the number of its heads,
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
# and that of all their channels, which some call so that they read, too
_WIDTHS = ("attn_dim", "all_head_size", "inner_dim", "embed_dim", "dim")
# Of numbers that happen to be as large as a group, no more are tried one by one
_MOST = 8


def numbers_around(model: nn.Module, group: ChannelGroup, gone: int) -> dict[str, int]:
    """Dotted names of numbers that modules around the group's layers keep, as many as its channels, or as the
    positions of these in a layer -> what they are without those that go.

    Args:
        gone: how many of the group's channels go.
    """
    members = (*group.writers, *group.readers, *group.between)
    counts = {group.size, *(int((member.index >= 0).sum()) for member in members)}
    left = {count: count // group.size * (group.size - gone) for count in counts if count % group.size == 0}
    around = {above for member in members for above in _above(member.layer)}
    return {
        f"{name}.{own}".lstrip("."): left[value]
        for name in sorted(around)
        if not isinstance(module := model.get_submodule(name), Opened)
        for own, value in vars(module).items()
        if _is_number(value) and value in left
    }


def _is_number(value: object) -> TypeGuard[int]:
    """Also of numpy, or a float: some count by dividing."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _above(layer: str) -> Iterator[str]:
    """The modules that a layer stands in, the network itself last."""
    while layer:
        layer = layer.rpartition(".")[0]
        yield layer


def with_heads(model: nn.Module, group: ChannelGroup) -> ChannelGroup:
    """The group with what its writers' module keeps as the number of its heads, and of their channels.

    By their names: they say what is left even where no code needs them.
    """
    writing = {member.layer.rpartition(".")[0] for member in group.writers}
    width = len(group.readers[0].index) if group.readers else None
    held = [(*name.rpartition("."), count) for name, count in numbers_around(model, group, 0).items()]
    heads = {owner for owner, _, own, count in held if own in _HEADS and count == group.size}
    numbers = (
        f"{owner}.{own}".lstrip(".")
        for owner, _, own, count in held
        if owner in heads & writing
        and ((own in _HEADS and count == group.size) or (own in _WIDTHS and count == width))
    )
    return replace(group, numbers=tuple(numbers))


def following_numbers(
    model: nn.Module, group: ChannelGroup, goes: Callable[[ChannelGroup], bool]
) -> ChannelGroup | None:
    """A group that failed, with those numbers that must follow it; None: there are none, or it fails so, too.

    Args:
        model: the network.
        goes: whether the trial of a group finds it exact.
    """
    named, around = with_heads(model, group).numbers, tuple(numbers_around(model, group, 0))
    single = ((number,) for number in around[:_MOST])
    tried = {group.numbers}
    for numbers in chain(_without_one(named), [(), around], _without_one(around), single):
        if numbers not in tried and goes(replace(group, numbers=numbers)):
            return replace(group, numbers=_fewest(group, numbers, frozenset(named), goes))
        tried.add(numbers)
    return None


def _without_one(numbers: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return (numbers[:place] + numbers[place + 1 :] for place in range(min(len(numbers), _MOST)))


def _fewest(
    group: ChannelGroup,
    numbers: tuple[str, ...],
    named: frozenset[str],
    goes: Callable[[ChannelGroup], bool],
) -> tuple[str, ...]:
    """Without those that only happen to be as large, and by their names are none of heads."""
    for number in numbers:
        fewer = tuple(other for other in numbers if other != number)
        if number not in named and fewer and goes(replace(group, numbers=fewer)):
            numbers = fewer
    return numbers

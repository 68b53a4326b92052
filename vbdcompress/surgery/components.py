"""Positions of a tensor in which several channels of one leaf meet, as in attention's heads."""

from collections.abc import Collection, Iterator, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from vbdcompress.surgery.flows import NONE, Flow, Place, along, labels_met, reaching_channels


def components(
    tensor: Tensor, dim: int, flow: Flow, positions: Sequence[int], cotangent: Tensor
) -> Iterator[tuple[list[int], list[Place]]]:
    """Positions that depend on several channels, each set with all the channels that meet in it."""
    look = _Look(tensor, dim, flow, cotangent)
    left, found, guesses = set(positions), list[_Component](), True
    while left:
        found.append(look.around(min(left)))
        left -= found[-1].reached
        if guesses and len(found) > 1:
            more = look.continued(found[-2], found[-1], left)
            guesses = bool(more)  # where it fails once, it does again, most likely
            found += more
            left -= {position for one in more for position in one.reached}
    for one in found:
        yield one.positions.tolist(), [flow.source.place(channel) for channel in one.channels.tolist()]


@dataclass(frozen=True)
class _Component:
    """Positions of a reading and the channels of a source that meet in them, both in order."""

    positions: Tensor
    channels: Tensor

    @property
    def reached(self) -> set[int]:
        return set(self.positions.tolist())


@dataclass(frozen=True)
class _Look:
    """What depends on what, between one source and a reading."""

    tensor: Tensor
    dim: int
    flow: Flow
    cotangent: Tensor

    def channels(self, positions: Tensor) -> set[int]:
        """Those on which any of the positions depends."""
        picked = torch.zeros_like(self.tensor)
        noise = torch.randn_like(self.tensor.detach().index_select(self.dim, positions))
        picked.index_copy_(self.dim, positions, noise)
        source = self.flow.source
        (slope,) = torch.autograd.grad(self.tensor, source.values, picked, retain_graph=True)
        return set(reaching_channels(source, slope))

    def positions(self, channels: Collection[int]) -> set[int]:
        """Those that depend on any of the channels."""
        source, steps = self.flow.source, torch.zeros(self.flow.source.count, dtype=self.cotangent.dtype)
        steps[sorted(channels)] = 1 + torch.rand(len(channels), dtype=steps.dtype)
        taken = self.flow.steps(torch.randn_like(source.values), steps)
        moved = along([self.flow], [taken], self.cotangent, self.dim).abs().amax(1)
        return set(torch.nonzero(moved > NONE * moved.max()).flatten().tolist())

    def around(self, position: int) -> _Component:
        """All that meets with what meets in a position, step by step."""
        members, channels = {position}, set[int]()
        while True:
            found = self.channels(torch.tensor(sorted(members)))
            reached = self.positions(found) | members
            if found == channels and reached == members:
                return _Component(torch.tensor(sorted(members)), torch.tensor(sorted(channels)))
            members, channels = reached, found | channels

    def continued(self, first: _Component, second: _Component, left: Set[int]) -> list[_Component]:
        """Components that go on from two at the distance of these, as heads do: all that fit, or none.

        They are seen to be such: no position depends on channels of others, and each channel of one is
        needed there; the channels that its first position depends on reach all its positions.
        """
        guess = list(_further(first, second, left))
        if not guess:
            return []
        positions = torch.cat([one.positions for one in guess])
        channels = torch.cat([one.channels for one in guess])
        count, most = self.flow.source.count, len(guess)
        if channels.min() < 0 or channels.max() >= count or channels.bincount().max() > 1:
            return []
        labels = torch.full([count], most + 1)
        labels[channels] = torch.arange(1, most + 1).repeat_interleave(len(first.channels))
        met = labels_met([self.flow], labels, self.cotangent, self.dim)
        apart = all(met[place] == number for number, one in enumerate(guess, 1) for place in one.reached)
        if not apart or self.channels(positions) != set(channels.tolist()):
            return []
        starts = torch.stack([one.positions[0] for one in guess])
        return guess if set(positions.tolist()) <= self.positions(self.channels(starts)) else []


def _further(first: _Component, second: _Component, left: Set[int]) -> Iterator[_Component]:
    """At the distance of two, again and again, as long as there are such positions left."""
    if len(first.positions) != len(second.positions) or len(first.channels) != len(second.channels):
        return
    free, one = set(left), second
    while True:
        positions = one.positions + second.positions - first.positions
        one = _Component(positions, one.channels + second.channels - first.channels)
        if not one.reached <= free:
            return
        free -= one.reached
        yield one

"""Which channels must go together, who writes them and who reads them.

Two channels that meet at one position of anything, by a sum, a softmax or a reshape, go together;
where channels meet is found by `probe`, from the derivatives of what lies between the layers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from vbdcompress.compare import forget_calls_
from vbdcompress.errors import TRACE_ERRORS, words_of
from vbdcompress.gather import GatherLinear
from vbdcompress.inputs import Inputs, holds_data, map_tensors
from vbdcompress.recurrent import Recurrent
from vbdcompress.surgery.flows import Place
from vbdcompress.surgery.probe import record
from vbdcompress.surgery.reading import Recording
from vbdcompress.surgery.roles import role_of
from vbdcompress.surgery.ties import UNREAD, Ties
from vbdcompress.surgery.walk import tensor_of
from vbdcompress.surgery.weights import Index, layer_widths

NOT_HERE = -1


@dataclass(frozen=True)
class Member:
    """A layer's part in a group.

    Attributes:
        layer: dotted name.
        index: [positions] the group's channel at each position of the layer's input (readers),
            output (writers) or channels (between); NOT_HERE where it belongs to none.
    """

    layer: str
    index: Index

    def positions(self, channels: Index) -> Index:
        """Positions that belong to any of the channels."""
        return np.flatnonzero(np.isin(self.index, channels))


@dataclass(frozen=True)
class Parameter(Member):
    """A parameter or buffer of no layer known by its type, with an entry for each channel along a dimension.

    Attributes:
        dim: that dimension; `layer` is its dotted name.
    """

    dim: int = 0


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that must be removed together, or the single features that one Linear reads.

    Attributes:
        name: of the first writer, or of the reader for features.
        size: number of channels that can go one by one.
        writers: layers whose outputs these are; none for features.
        readers: layers whose inputs these are.
        between: layers with something for each channel on the way: batch norm, depthwise convolution.
        whole_because: why no channel may go; None where they may.
        parameters: others with something for each channel on the way: a scale, a table of heads.
        numbers: dotted names of what modules around its layers keep as the number of its channels; see
            `numbers`.
        foldable: whether nothing but the writers decides what the readers are given; see `influence`.
        takers: (reader, norm) where gates of the reader's inputs go into the norm's weights; see `tied`.
        suspect: what keeps it whole where its trial fails; None: what the trial says.
    """

    name: str
    size: int
    writers: tuple[Member, ...]
    readers: tuple[Member, ...]
    between: tuple[Member, ...] = ()
    whole_because: str | None = None
    parameters: tuple[Parameter, ...] = ()
    numbers: tuple[str, ...] = ()
    foldable: bool = True
    takers: tuple[tuple[str, str], ...] = ()
    suspect: str | None = None

    @property
    def is_features(self) -> bool:
        """Whether it is the features that one Linear reads: cut by a gather, no writer changes."""
        return not self.writers

    @property
    def channels(self) -> int:
        """Those that can go one by one; all of them in a group that stays whole."""
        if self.whole_because is None:
            return self.size
        return max(int((member.index >= 0).sum()) for member in self.writers or self.readers)

    def whole(self, reason: str) -> "ChannelGroup":
        """The same group, left whole for a reason."""
        return replace(self, whole_because=reason)


@dataclass(frozen=True)
class GroupScan:
    """All groups of a network, and why there are none where it could not be traced.

    Attributes:
        read_elsewhere: layers whose weight the network's code uses outside of their own call, too.
    """

    groups: tuple[ChannelGroup, ...]
    failure: str | None = None
    read_elsewhere: frozenset[str] = frozenset()

    @property
    def removable(self) -> tuple[ChannelGroup, ...]:
        """Groups from which channels may go."""
        return tuple(group for group in self.groups if group.whole_because is None)


def trace_groups(model: nn.Module, example: Inputs, *, features: bool = False, seed: int = 0) -> GroupScan:
    """The channel groups of a plain network.

    Args:
        model: float64, eval mode; left as it was.
        example: one batch of inputs.
        features: also the single features of Linear layers that read the network's input or a
            flattened feature map.
        seed: of the noise that the network is looked at with.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # some networks take nothing but the example, as ids; some can't work with buffers that are followed
        for buffers in (True, False):
            for prepare in (_beside_noise, _as_leaf):
                scan = _trace(model, example, prepare, features, buffers=buffers)
                if scan.failure is None:
                    return scan
        return scan


def _trace(
    model: nn.Module,
    example: Inputs,
    prepare: Callable[[Tensor, bool], Tensor],
    features: bool,
    *,
    buffers: bool,
) -> GroupScan:
    try:
        forget_calls_(model)
        is_data = holds_data(example)
        given = map_tensors(example, lambda tensor: prepare(tensor, is_data(tensor)))
        recording = record(model, given, role_of, buffers=buffers)
        ties = Ties()
        for reading in recording.readings:
            ties.reads(model, reading)
        read = {reading.layer for reading in recording.readings if reading.role != "opaque"}
        for layer in read | recording.written.keys():
            ties.shares(layer, model.get_submodule(layer))
        groups = tuple(_build_groups(model, recording, ties))
    except TRACE_ERRORS as error:
        return GroupScan((), f"its channels can't be followed: {words_of(error)}")
    return GroupScan(groups + (tuple(_feature_groups(model, recording, groups, ties)) if features else ()))


def _beside_noise(tensor: Tensor, is_data: bool) -> Tensor:
    """The example beside noise, for which branches open that the example leaves shut."""
    tensor = tensor.detach()
    if not (tensor.is_floating_point() and is_data):
        return torch.cat([tensor] * 3)
    wide = torch.cat([tensor, torch.randn_like(tensor), 5 * torch.randn_like(tensor)])
    return wide.requires_grad_()  # what depends on it, and on no layer, reads the network's input


def _as_leaf(tensor: Tensor, _is_data: bool) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


@dataclass(frozen=True)
class _Places:
    """The place that stands for each output of each writer, and for each input of each other layer."""

    writers: dict[str, list[Place]]
    readers: dict[str, list[Place]]
    between: dict[str, list[Place]]


def _find_places(model: nn.Module, recording: Recording, ties: Ties) -> _Places:
    places = _Places({}, {}, {})
    for layer, count in recording.written.items():
        places.writers[layer] = [ties.find(("writes", layer, channel)) for channel in range(count)]
        if isinstance(recurrent := model.get_submodule(layer), Recurrent):
            width, _ = layer_widths(recurrent)
            places.readers[layer] = [ties.find(("reads", layer, n)) for n in range(width)]
    for reading in recording.readings:
        if reading.role != "opaque":
            into = places.readers if reading.role == "mixing" else places.between
            # beside what a recurrent layer is given, it reads its own state
            width = max(reading.width, layer_widths(model.get_submodule(reading.layer))[0])
            into[reading.layer] = [ties.find(("reads", reading.layer, n)) for n in range(width)]
    return places


def _tied_writers(places: _Places) -> list[list[str]]:
    """The writers in sets that share a channel, in the order in which they run."""
    together = Ties()
    for layer, roots in places.writers.items():
        for root in roots:
            together.tie(("writes", layer, -1), root)
    grouped: dict[Place, list[str]] = {}
    for layer in places.writers:
        grouped.setdefault(together.find(("writes", layer, -1)), []).append(layer)
    return list(grouped.values())


def _build_groups(model: nn.Module, recording: Recording, ties: Ties) -> Iterator[ChannelGroup]:
    """Each set of layers whose outputs are tied, as one group; in the order in which they run."""
    places = _find_places(model, recording, ties)
    why, suspects = dict[Place, str](), dict[Place, str]()
    for known, pairs in ((why, ties.reasons), (suspects, ties.suspects)):
        for place, told in pairs:
            known.setdefault(ties.find(place), told)
    for layers in _tied_writers(places):
        numbers: dict[Place, int] = {}
        for layer in layers:
            for root in places.writers[layer]:
                numbers.setdefault(root, len(numbers))
        writers, readers, between = (
            tuple(_members(found, numbers))
            for found in ({layer: places.writers[layer] for layer in layers}, places.readers, places.between)
        )
        reason, suspect = (
            next((known[place] for place in numbers if place in known), None) for known in (why, suspects)
        )
        parameters = tuple(_parameters(model, ties, numbers))
        if reason is None and not readers:
            reason = UNREAD
        elif reason is None and len(numbers) == 1 and len(writers[0].index) > 1:
            beside = f", with '{parameters[-1].layer}'," if parameters else ""  # that of a norm, say
            reason = suspect or f"what lies behind it{beside} mixes its channels, so that none can go alone"
        yield ChannelGroup(
            layers[0], len(numbers), writers, readers, between, reason, parameters, suspect=suspect
        )


def _members(places: dict[str, list[Place]], numbers: dict[Place, int]) -> Iterator[Member]:
    """The layers that have a part in the group whose places are numbered."""
    for layer, found in places.items():
        index = np.array([numbers.get(root, NOT_HERE) for root in found], dtype=np.int64)
        if (index >= 0).any():
            yield Member(layer, index)


def _parameters(model: nn.Module, ties: Ties, numbers: dict[Place, int]) -> Iterator[Parameter]:
    """The bare parameters and buffers that have a part in the group whose places are numbered."""
    for name, dim in ties.parameters:
        count = tensor_of(model, name).shape[dim]
        found = {name: [ties.find(("holds", f"{name}:{dim}", number)) for number in range(count)]}
        for member in _members(found, numbers):
            yield Parameter(member.layer, member.index, dim)


def _feature_groups(
    model: nn.Module, recording: Recording, groups: tuple[ChannelGroup, ...], ties: Ties
) -> Iterator[ChannelGroup]:
    flattened = {
        member.layer
        for group in groups
        for member in group.readers
        if len(np.unique(member.index)) < len(member.index)
    }
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name not in ties.from_network_input:
            continue
        if isinstance(module, GatherLinear) or name in flattened or ties.from_network_input[name]:
            member = Member(name, np.arange(module.in_features))
            yield ChannelGroup(f"{name} (inputs)", module.in_features, (), (member,))

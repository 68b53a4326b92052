"""Which channels must go together, who writes them and who reads them.

torch-pruning traces the network into a dependency graph; here it is walked once for each layer
that writes channels, keeping for every position of every member which channel of the group it
belongs to. Only this file talks to torch-pruning.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from vbdcompress.gather import GatherLinear

Index = npt.NDArray[np.int64]
NOT_HERE = -1
# What tracing somebody's network through torch-pruning is known to raise; each becomes a reason.
TRACE_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    ArithmeticError,
)


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
class ChannelGroup:
    """Channels that must be removed together, or the single features that one Linear reads.

    Attributes:
        name: of the first writer, or of the reader for features.
        size: number of channels that can go one by one.
        writers: layers whose outputs these are; none for features.
        readers: layers whose inputs these are.
        between: layers with something for each channel on the way: batch norm, depthwise convolution.
        whole_because: why no channel may go; None where they may.
    """

    name: str
    size: int
    writers: tuple[Member, ...]
    readers: tuple[Member, ...]
    between: tuple[Member, ...] = ()
    whole_because: str | None = None

    @property
    def is_features(self) -> bool:
        """Whether it is the features that one Linear reads: cut by a gather, no writer changes."""
        return not self.writers

    def whole(self, reason: str) -> "ChannelGroup":
        """The same group, left whole for a reason."""
        return replace(self, whole_because=reason)


@dataclass(frozen=True)
class GroupScan:
    """All groups of a network, and why there are none where it could not be traced."""

    groups: tuple[ChannelGroup, ...]
    failure: str | None = None

    @property
    def removable(self) -> tuple[ChannelGroup, ...]:
        """Groups from which channels may go."""
        return tuple(group for group in self.groups if group.whole_because is None)


def trace_groups(model: nn.Module, example: Tensor, *, features: bool = False) -> GroupScan:
    """The channel groups of a plain network.

    Args:
        model: left as it was, but for being put into eval mode and back.
        example: one batch of inputs.
        features: also the single features of Linear layers that read the network's input or a
            flattened feature map.
    """
    was_training = model.training
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        for parameter in frozen:  # the graph is read off autograd
            parameter.requires_grad_(True)
        with torch.enable_grad():
            graph = tp.DependencyGraph().build_dependency(model, example_inputs=(example,), verbose=False)
            groups = tuple(_channel_groups(graph))
    except TRACE_ERRORS as error:
        return GroupScan((), f"torch-pruning can't trace the network: {type(error).__name__}: {error}")
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        model.train(was_training)
    return GroupScan(groups + (tuple(_feature_groups(graph, groups)) if features else ()))


def _channel_groups(graph: Any) -> Iterator[ChannelGroup]:
    names = graph._module2name
    visited: set[str] = set()
    for module, node in list(graph.module2node.items()):
        if _is_mixing(module) and names[module] not in visited:
            try:
                group = _trace_group(graph, node)
            except TRACE_ERRORS as error:  # one group that can't be followed does not spoil the others
                size = int(graph.get_out_channels(node))
                group = ChannelGroup(
                    names[module],
                    size,
                    (Member(names[module], np.arange(size)),),
                    (),
                    whole_because=f"torch-pruning can't follow its channels: {type(error).__name__}: {error}",
                )
            visited |= {member.layer for member in group.writers}
            yield group


def _is_mixing(module: Any) -> bool:
    """Layers whose every output reads every input: they write one group and read another."""
    return isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and module.groups == 1)


def _is_per_channel(module: Any) -> bool:
    if isinstance(module, _ConvNd):
        return module.groups == module.in_channels == module.out_channels
    if isinstance(module, nn.PReLU):
        return module.num_parameters > 1
    return isinstance(module, _BatchNorm | _InstanceNorm)


@dataclass
class _Pairs:
    """(position, root channel) pairs of one member while a group is traced."""

    module: Any
    writes: bool
    positions: list[int]
    roots: list[int]


def _trace_group(graph: Any, root: Any) -> ChannelGroup:
    size = int(graph.get_out_channels(root))
    collected = _walk_dependencies(graph, root, size)
    channel_of = _couple(collected, size)
    members: dict[str, list[Member]] = {"writers": [], "readers": [], "between": []}
    reason = None
    for pairs in collected:
        role, problem = _role_of(pairs)
        reason = reason or problem
        if role is not None:
            name = graph._module2name[pairs.module]
            index = np.full(_positions_of(pairs), NOT_HERE, dtype=np.int64)
            index[pairs.positions] = channel_of[pairs.roots]
            members[role].append(Member(name, index))
    if not members["readers"]:
        reason = reason or "no layer reads it: it is an output of the network"
    return ChannelGroup(
        graph._module2name[root.module],
        int(channel_of.max()) + 1,
        tuple(members["writers"]),
        tuple(members["readers"]),
        tuple(members["between"]),
        reason,
    )


def _walk_dependencies(graph: Any, root: Any, size: int) -> list[_Pairs]:
    """Everything that removing any output channel of the root layer touches.

    torch-pruning's own `get_pruning_group` merges the positions of a layer that is reached twice
    and forgets which channel a position came from second; this walk keeps both.
    """
    hybrid = tp._helpers._HybridIndex
    start = graph.get_pruner_of_module(root.module).prune_out_channels
    found: dict[tuple[int, bool], _Pairs] = {}
    seen: set[tuple[int, Any, tuple[Any, ...]]] = set()
    stack = [(root, start, tuple(hybrid(channel, channel) for channel in range(size)))]
    while stack:
        node, function, indices = stack.pop()
        if (id(node), function, indices) in seen:
            continue
        seen.add((id(node), function, indices))
        writes = bool(graph.is_out_channel_pruning_fn(function))
        pairs = found.setdefault((id(node), writes), _Pairs(node.module, writes, [], []))
        pairs.positions += [item.idx for item in indices]
        pairs.roots += [item.root_idx for item in indices]
        for dependency in node.dependencies:
            if dependency.is_triggered_by(function):
                mapped = list(indices)
                for mapping in dependency.index_mapping:
                    mapped = mapped if mapping is None else mapping(mapped)
                if mapped:
                    stack.append((dependency.target, dependency.handler, tuple(sorted(mapped))))
    return list(found.values())


def _couple(collected: list[_Pairs], size: int) -> Index:
    """[size] number of each root channel's class: channels that meet at one position go together."""
    parent = np.arange(size)

    def find(channel: int) -> int:
        while parent[channel] != channel:
            parent[channel] = parent[parent[channel]]
            channel = int(parent[channel])
        return channel

    for pairs in collected:
        first_at: dict[int, int] = {}
        for position, root in zip(pairs.positions, pairs.roots, strict=True):
            first, other = find(first_at.setdefault(position, root)), find(root)
            parent[max(first, other)] = min(first, other)
    roots = np.array([find(channel) for channel in range(size)])
    classes: Index = np.unique(roots, return_inverse=True)[1].astype(np.int64)
    return classes


def _role_of(pairs: _Pairs) -> tuple[str | None, str | None]:
    """The member's role in its group (None: no parameters of its own), and what keeps the group whole."""
    module = pairs.module
    if isinstance(module, GatherLinear) and not pairs.writes:
        return None, "its reader picks single features of it by a gather"
    if _is_mixing(module):
        return ("writers" if pairs.writes else "readers"), None
    if _is_per_channel(module):
        return "between", None
    if isinstance(module, nn.Parameter):
        return None, f"a bare parameter of shape {tuple(module.shape)} works on its channels"
    if isinstance(module, tp.ops._OutputOp):
        return None, "it is an output of the network"
    if isinstance(module, nn.PReLU) or type(module).__module__ == tp.ops.__name__:
        return None, None
    if isinstance(module, _ConvNd):
        return None, f"a convolution in {module.groups} groups needs them of equal size"
    return None, f"{type(module).__name__} mixes its channels, so that none can go without changing the rest"


def _positions_of(pairs: _Pairs) -> int:
    module = pairs.module
    if isinstance(module, nn.Linear):
        return module.out_features if pairs.writes else module.in_features
    if isinstance(module, _ConvNd):
        return module.out_channels if pairs.writes else module.in_channels
    return int(module.num_parameters if isinstance(module, nn.PReLU) else module.num_features)


def _feature_groups(graph: Any, groups: tuple[ChannelGroup, ...]) -> Iterator[ChannelGroup]:
    flattened = {
        member.layer
        for group in groups
        for member in group.readers
        if len(np.unique(member.index)) < len(member.index)
    }
    for module, node in graph.module2node.items():
        name = graph._module2name.get(module)
        if not isinstance(module, nn.Linear):
            continue
        if isinstance(module, GatherLinear) or name in flattened or _reads_network_input(node):
            member = Member(name, np.arange(module.in_features))
            yield ChannelGroup(f"{name} (inputs)", module.in_features, (), (member,))


def _reads_network_input(node: Any) -> bool:
    """Whether no other layer or parameter lies upstream of the node."""
    stack, seen = list(node.inputs), {id(node)}
    while stack:
        upstream = stack.pop()
        if type(upstream.module).__module__ != tp.ops.__name__:
            return False
        if id(upstream) not in seen:
            seen.add(id(upstream))
            stack += upstream.inputs
    return True

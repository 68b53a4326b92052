"""Which channels of a masked network do nothing, so that cutting them changes nothing.

A channel is dead when every weight that reads it is 0, or when every weight that writes it is 0:
then it is a constant, which goes into the bias of its readers. Both are found from the weights
alone; the one thing measured is the value of that constant behind norms and activations.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from vbdcompress.inputs import Inputs, call, input_of
from vbdcompress.surgery.groups import NOT_HERE, ChannelGroup, Member
from vbdcompress.surgery.plan import plan_removed
from vbdcompress.surgery.silence import is_counted, silence_, silent_channels
from vbdcompress.surgery.slice import RemovalPlan
from vbdcompress.surgery.weights import (
    Index,
    Reader,
    effect_of,
    input_dim,
    layer_widths,
    unread_inputs,
    unwritten_outputs,
    zero_inputs_,
)

# Two positions of one constant channel may differ by rounding (average pooling), in float64
CONSTANT_TOLERANCE = 1e-12


@dataclass
class _Liveness:
    """The masked network being whittled down, and what has been removed of each group."""

    model: nn.Module
    groups: tuple[ChannelGroup, ...]
    example: Inputs
    others: Sequence[Inputs]
    removed: dict[str, set[int]] = field(default_factory=dict)
    new_biases: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)  # groups whose last channel, which stays, nothing reads


@torch.no_grad()
def plan_removal_(
    model: nn.Module,
    groups: Iterable[ChannelGroup],
    example: Inputs,
    *,
    fold: bool = True,
    round_to: int = 1,
    others: Sequence[Inputs] = (),
) -> RemovalPlan:
    """What can be cut from a masked network; folds constants into biases, in place.

    Args:
        model: plain, eval mode, float64 and on the CPU for exactness. Afterwards it computes the
            same function, with dead channels' weights set to 0 and constants moved into biases.
        groups: those from which channels may go. The last channel of a group always stays.
        example: a batch of inputs, to measure constants on: as unlike each other as can be.
        fold: whether constants may be folded at all.
        round_to: of each group as many dead channels stay, now all 0, as make a multiple of this.
        others: more batches, of other sizes: a constant is the same on them, too.
    """
    state = _Liveness(model, tuple(groups), example, others)
    state.removed = {group.name: set() for group in state.groups}
    while _remove_unread(state) or (fold and _fold_constants(state)):
        pass
    for group in sorted(state.groups, key=lambda group: group.is_features):
        gone = state.removed[group.name]
        behind = _behind_channels(state, group) if group.is_features else set()
        most = group.size - len(behind)
        kept = most - len(gone - behind)  # none, where the last one lies behind a channel that goes
        wanted = min(most, -(-max(1, kept) // round_to) * round_to)
        gone -= set(sorted(gone - behind)[: wanted - kept])
    for kind in ("writers", "readers", "between"):
        _keep_one_of_each(state, kind)
    return plan_removed(
        model, [(group, state.removed[group.name]) for group in state.groups], state.new_biases
    )


def _keep_one_of_each(state: _Liveness, kind: Literal["writers", "readers", "between"]) -> None:
    """Let every layer keep a channel: what is left of its group may all be other layers'."""
    parts: dict[str, list[tuple[ChannelGroup, Member]]] = {}
    for group in state.groups:
        if not group.is_features:
            for member in getattr(group, kind):
                parts.setdefault(member.layer, []).append((group, member))
    for held in parts.values():
        lost = np.zeros(len(held[0][1].index), dtype=bool)
        for group, member in held:
            lost[member.positions(np.array(sorted(state.removed[group.name]), dtype=np.int64))] = True
        if lost.all():
            group, member = held[0]
            state.removed[group.name].discard(int(member.index[member.index >= 0].min()))


def _behind_channels(state: _Liveness, features: ChannelGroup) -> set[int]:
    """Features of a group that go in any case: they are those of channels that go."""
    behind: set[int] = set()
    for group in state.groups:
        gone = np.array(sorted(state.removed[group.name]), dtype=np.int64)
        if group.is_features or not len(gone):
            continue
        for member in group.readers:
            for reader in features.readers:
                if reader.layer == member.layer:
                    behind.update(reader.index[member.positions(gone)].tolist())
    return behind - {NOT_HERE}


def _layer(model: nn.Module, member: Member) -> Reader:
    layer = model.get_submodule(member.layer)
    assert isinstance(layer, Reader)
    return layer


def _channels_with_all_zero(group: ChannelGroup, zero_at: list[tuple[Member, Tensor]]) -> Index:
    """Channels all of whose positions in all members are zero; zero_at: [positions] bool."""
    alive = np.zeros(group.size, dtype=bool)
    for member, zero in zero_at:
        busy = member.index[~zero.cpu().numpy()]
        alive[busy[busy >= 0]] = True
    dead: Index = np.flatnonzero(~alive)
    return dead


def _remove_unread(state: _Liveness) -> bool:
    """Remove channels that no weight reads; True where any went."""
    changed = False
    for group in state.groups:
        zero_at = [(m, unread_inputs(_layer(state.model, m))) for m in group.readers]
        dead = _channels_with_all_zero(group, zero_at)
        gone = state.removed[group.name]
        if is_counted(state.model, group):
            dead = np.intersect1d(dead, silent_channels(state.model, group))
        new = [int(channel) for channel in dead if int(channel) not in gone]
        if len(gone) + len(new) == group.size:
            last, new = new[:1], new[1:]  # the last channel stays, but what only it reads may go
            if last and group.name not in state.unread:
                state.unread.add(group.name)
                silence_(state.model, group, np.array(last))
                changed = True
        if new:
            gone.update(new)
            silence_(state.model, group, np.array(new))
            changed = True
    return changed


def _fold_constants(state: _Liveness) -> bool:
    """Move constant channels into their readers' biases; True where any was moved."""
    silent: dict[str, Index] = {}
    for group in state.groups:
        if group.is_features or not group.foldable or is_counted(state.model, group):
            continue
        zero_at = [(m, unwritten_outputs(_layer(state.model, m))) for m in group.writers]
        found = _channels_with_all_zero(group, zero_at)
        gone = state.removed[group.name]
        candidates = np.array([c for c in found if int(c) not in gone], dtype=np.int64)
        if len(candidates) and len(gone) + 1 < group.size:
            silent[group.name] = candidates
    if not silent:
        return False
    inputs = _record_inputs(state)
    changed = False
    for group in state.groups:
        if group.name in silent:
            changed |= _fold_channels(state, group, silent[group.name], inputs)
    return changed


def _record_inputs(state: _Liveness) -> dict[str, tuple[Tensor, Tensor]]:
    """Reader -> smallest and largest value of each input position over the example and the other batches."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    readers = {member.layer for group in state.groups for member in group.readers}

    def record(name: str, layer: nn.Module, value: Tensor) -> None:
        flat = value.movedim(input_dim(layer), 0).flatten(1)
        low, high = flat.amin(1), flat.amax(1)
        if name in found:  # a layer used twice is constant only where both uses agree
            low, high = torch.minimum(low, found[name][0]), torch.maximum(high, found[name][1])
        found[name] = low, high

    hooks = []
    for name in sorted(readers):
        layer = state.model.get_submodule(name)
        hooks.append(
            layer.register_forward_pre_hook(
                lambda layer, args, kwargs, name=name: record(name, layer, input_of(args, kwargs)),
                with_kwargs=True,
            )
        )
    try:
        for inputs in (state.example, *state.others):
            call(state.model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _fold_channels(
    state: _Liveness, group: ChannelGroup, channels: Index, inputs: dict[str, tuple[Tensor, Tensor]]
) -> bool:
    """Fold those of the channels that are constant and that all their readers can take."""
    readers = [
        (member, layer)
        for member in group.readers
        if isinstance(layer := state.model.get_submodule(member.layer), nn.Linear | _ConvNd)
        and member.layer in inputs  # it ran on the example
    ]
    if len(readers) < len(group.readers):
        return False
    for member, layer in readers:
        low, high = inputs[member.layer]
        refused = high - low > CONSTANT_TOLERANCE * (1 + high.abs())
        if _pads_with_zeros(layer):  # the border would read 0 where the middle reads the constant
            refused |= ~unread_inputs(layer) & (high != 0)
        channels = np.setdiff1d(channels, member.index[refused.cpu().numpy()])
    for member, layer in readers:
        positions = member.positions(channels)
        constant = inputs[member.layer][1][positions]
        _fold_into_bias(state, member.layer, layer, positions, constant)
    return len(channels) > 0


def _pads_with_zeros(layer: nn.Linear | _ConvNd) -> bool:
    """Whether some output of the layer reads a position outside its input, or not every position it could."""
    if isinstance(layer, nn.Linear):
        return False
    if isinstance(layer, _ConvTransposeNd):
        return True  # overlaps differ from output to output
    padding = layer.padding if isinstance(layer.padding, tuple) else (layer.padding,)
    return layer.padding_mode == "zeros" and any(amount not in (0, "valid") for amount in padding)


def _fold_into_bias(
    state: _Liveness, name: str, layer: nn.Linear | _ConvNd, positions: Index, constant: Tensor
) -> None:
    if bool((constant != 0).any()):
        constants = layer.weight.new_zeros(layer_widths(layer)[0])
        constants[positions] = constant.to(constants.dtype)  # the code between may make float32
        shift = effect_of(layer, constants)
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(shift), layer.weight.requires_grad)
            state.new_biases.add(name)
        layer.bias += shift
    zero_inputs_(layer, positions.tolist())

"""From the channels that go to the RemovalPlan: what layers, and what stands beside them, lose."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn
from torch.nn.modules.conv import _ConvNd

from vbdcompress.opening import Opened
from vbdcompress.surgery.groups import ChannelGroup, Member
from vbdcompress.surgery.numbers import numbers_around
from vbdcompress.surgery.slice import LayerCut, RemovalPlan
from vbdcompress.surgery.weights import Index, layer_widths, outputs_of_inputs


def plan_removed(
    model: nn.Module, removed: Iterable[tuple[ChannelGroup, Collection[int]]], new_biases: Collection[str]
) -> RemovalPlan:
    """What the removal of channels takes from every module.

    Args:
        model: the masked network, whole.
        removed: the channels that go from each group.
        new_biases: layers that have a bias now, and had none.
    """
    every = [(group, np.array(sorted(gone), dtype=np.int64)) for group, gone in removed if gone]
    lost_inputs: dict[str, Index] = {}
    lost_features: dict[str, Index] = {}
    lost_outputs: dict[str, Index] = {}

    def lose(where: dict[str, Index], member: Member, positions: Index) -> None:
        before = where.get(member.layer, np.array([], dtype=np.int64))
        where[member.layer] = np.union1d(before, positions)

    for group, gone in every:
        for member in group.readers:
            lose(lost_features if group.is_features else lost_inputs, member, member.positions(gone))
        for member in group.writers:
            lose(lost_outputs, member, member.positions(gone))
        for member in group.between:
            layer = model.get_submodule(member.layer)
            lose(lost_outputs, member, outputs_of_inputs(layer, member.positions(gone)))
    beside = _beside_layers(model, every)
    cuts = {}
    for name, layer in model.named_modules():
        cut = LayerCut(opened=isinstance(layer, Opened))
        if name in {*lost_inputs, *lost_features, *lost_outputs, *new_biases}:
            lost = lost_inputs.get(name), lost_features.get(name), lost_outputs.get(name)
            cut = replace(_layer_cut(layer, *lost, name in new_biases), opened=cut.opened)
        if name in beside:
            parameters = {**(cut.parameters or {}), **beside[name].parameters}
            cut = replace(cut, parameters=parameters, attributes=beside[name].attributes)
        if cut != LayerCut():
            cuts[name] = cut
    return RemovalPlan(cuts)


@dataclass
class _Beside:
    """What of a module changes beside its layers, as in LayerCut."""

    parameters: dict[str, tuple[int, Sequence[int]]] = field(default_factory=dict)
    attributes: dict[str, int] = field(default_factory=dict)


def _beside_layers(model: nn.Module, removed: list[tuple[ChannelGroup, Index]]) -> dict[str, _Beside]:
    found: dict[str, _Beside] = defaultdict(_Beside)
    for group, gone in removed:
        for parameter in group.parameters:
            owner, _, own = parameter.layer.rpartition(".")
            _, before = found[owner].parameters.get(own, (parameter.dim, range(len(parameter.index))))
            kept = np.setdiff1d(np.array(before), parameter.positions(gone))
            found[owner].parameters[own] = (parameter.dim, _tuple(kept))
        around = numbers_around(model, group, len(gone)) if group.numbers else {}
        for number in group.numbers:
            owner, _, own = number.rpartition(".")
            found[owner].attributes[own] = around[number]
    return dict(found)


def _layer_cut(
    layer: nn.Module, inputs: Index | None, features: Index | None, outputs: Index | None, new_bias: bool
) -> LayerCut:
    width_in, width_out = layer_widths(layer)
    arriving = np.setdiff1d(np.arange(width_in), inputs if inputs is not None else [])
    kept = np.setdiff1d(arriving, features if features is not None else [])
    picks = features is not None and len(kept) < len(arriving)
    left = None if outputs is None else _tuple(np.setdiff1d(np.arange(width_out), outputs))
    beside = {}
    if left is not None and isinstance(layer, nn.Linear | _ConvNd):
        # a layer of the network's own may hold more for each output, as gains of standardised weights
        beside = {
            own: (0, left)
            for own, held in layer._parameters.items()
            if own not in ("weight", "bias") and held is not None and held.shape[:1] == (width_out,)
        }
    return LayerCut(
        inputs=_tuple(kept) if len(kept) < width_in else None,
        outputs=left,
        gather=_tuple(np.searchsorted(arriving, kept)) if picks else None,
        new_bias=new_bias,
        parameters=beside or None,
    )


def _tuple(index: Index) -> tuple[int, ...]:
    return tuple(int(position) for position in index)

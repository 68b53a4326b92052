"""Channels mode of convert: gates at the inputs of the layers that read a group, and what each would save."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from vbdcompress.config import Cost
from vbdcompress.count import layer_sizes
from vbdcompress.evaluation import device_of
from vbdcompress.gather import GatherLinear
from vbdcompress.inputs import Inputs
from vbdcompress.layer_norm import ChannelNorm, is_channel_norm
from vbdcompress.records import LayerRow
from vbdcompress.recurrent import Recurrent
from vbdcompress.surgery.groups import ChannelGroup, GroupScan
from vbdcompress.surgery.silence import is_counted, norms_over, silence_
from vbdcompress.surgery.tied import fold_factors_
from vbdcompress.surgery.weights import (
    Table,
    input_dim,
    keeps_groups_apart,
    layer_widths,
)
from vbdcompress.vbd.gates import ChannelGate, InputGate, NormGate, RecurrentGate, attach_gate_, detach_gate_

_SIZE_FIELDS: dict[Cost, tuple[str, ...]] = {
    "params": ("parameters",),
    "macs": ("macs",),
    "params+macs": ("parameters", "macs"),
}


def channel_costs(
    model: nn.Module, example: Inputs, groups: Sequence[ChannelGroup], cost: Cost
) -> dict[str, float]:
    """Group -> what one of its channels saves in the original network, over the mean of all gates."""
    if cost == "none":
        return {group.name: 1.0 for group in groups}
    layers = {row.name: row for row in layer_sizes(model, example)}
    count = sum(group.size for group in groups)
    weighed = []
    for field in _SIZE_FIELDS[cost]:
        saved = {
            group.name: sum(
                getattr(layers[member.layer], field) * float((member.index >= 0).mean())
                for member in (*group.writers, *group.between, *group.readers)
                if member.layer in layers
            )
            / group.size
            for group in groups
        }
        mean = sum(saved[group.name] * group.size for group in groups) / max(1, count)
        if mean:  # 0 where torch counts no MACs
            weighed.append({name: value / mean for name, value in saved.items()})
    return {
        group.name: sum(costs[group.name] for costs in weighed) / len(weighed) if weighed else 1.0
        for group in groups
    }


def convert_channels_(
    model: nn.Module, scan: GroupScan, log_sigma2: float, costs: Mapping[str, float]
) -> Iterator[LayerRow]:
    """Put a gate in front of each layer that reads a removable group, in place; a row for each layer.

    Args:
        log_sigma2: initial log variance of the gates.
        costs: group -> weight of the KL of each of its gates.
    """
    device = device_of(model)
    real = next(tensor for tensor in model.parameters() if tensor.is_floating_point())
    dtype = torch.promote_types(real.dtype, torch.float32)
    gates = {
        group.name: ChannelGate(group.size, log_sigma2, group.name, costs[group.name]).to(device, dtype)
        for group in scan.removable
    }
    reads: dict[str, list[ChannelGroup]] = {}
    counted: dict[str, list[ChannelGroup]] = {}
    for group in scan.groups:
        for member in group.readers:
            reads.setdefault(member.layer, []).append(group)
    for group in scan.removable:
        for member in norms_over(model, group):
            counted.setdefault(member.layer, []).append(group)
    for name, module in list(model.named_modules()):
        if name in counted:
            attach_gate_(module, _gate_for(name, module, counted[name], gates).to(device))
        count = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if not count:
            continue
        removable = [group for group in reads.get(name, []) if group.whole_because is None]
        if removable:
            attach_gate_(module, _gate_for(name, module, removable, gates).to(device))
            told = ", ".join(f"'{group.name}' ({group.size})" for group in removable)
            yield LayerRow(name, type(module).__name__, "converted", f"gates on its inputs: {told}", count)
        else:
            reason = _why_ungated(name, module, reads.get(name, []), scan)
            yield LayerRow(name, type(module).__name__, "left", reason, count)


def _why_ungated(name: str, module: nn.Module, reads: Sequence[ChannelGroup], scan: GroupScan) -> str:
    if scan.failure:
        return scan.failure
    if reads:
        return "; ".join(f"'{group.name}' stays whole: {group.whole_because}" for group in reads)
    if isinstance(module, _BatchNorm | nn.GroupNorm) or is_channel_norm(module) or keeps_groups_apart(module):
        return _whom_it_follows(name, scan)
    if isinstance(module, Table):
        return "reads no channels; its columns follow their group"
    if isinstance(module, nn.Linear | _ConvNd | Recurrent):
        return "reads the input, or channels that something mixed, such as a softmax"
    return "not a layer with separable input channels"


def _whom_it_follows(name: str, scan: GroupScan) -> str:
    """Of a layer with something for each channel."""
    groups = [group for group in scan.groups if any(member.layer == name for member in group.between)]
    if not groups:
        return "no layer's channels go through it one by one"
    whole = all(group.whole_because is not None for group in groups)
    return f"follows '{groups[0].name}', which stays whole" if whole else "follows its group"


def _gate_for(
    name: str, module: nn.Module, groups: Sequence[ChannelGroup], gates: dict[str, ChannelGate]
) -> InputGate:
    """The gate in front of the layer, built from all the groups that it reads, or that a norm is over."""
    width, _ = layer_widths(module)
    ungated = sum(group.size for group in groups)
    factors: list[Tensor] = []
    offset = 0
    for group in groups:
        # Channel groups cover different inputs of a layer; its feature group covers them all again.
        if group.is_features or not factors:
            factors.append(torch.full((width,), ungated, dtype=torch.int64))
        for member in (*group.readers, *group.between):
            if member.layer == name:
                here = torch.from_numpy(member.index)
                factors[-1] = torch.where(here >= 0, here + offset, factors[-1])
        offset += group.size
    index = torch.stack(factors) if len(factors) > 1 else factors[0]
    picked = module.input_index if isinstance(module, GatherLinear) else None
    kind = RecurrentGate if isinstance(module, Recurrent) else InputGate
    if isinstance(module, ChannelNorm):
        kind = NormGate
    return kind([gates[group.name] for group in groups], index, input_dim(module), picked)


@torch.no_grad()
def fold_gates_(model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
    """Take the gates away, in place, and multiply the weights that read each input by what its gates were.

    Args:
        model: in eval mode.
        groups: those that have gates.
    """
    found = [module for module in model.modules() if isinstance(module, ChannelGate)]
    cut = {gate.name: np.flatnonzero((gate.values(1)[0] == 0).cpu().numpy()) for gate in found}
    takers = dict(taker for group in groups for taker in group.takers)
    for name, module in list(model.named_modules()):
        if isinstance(getattr(module, "input_gate", None), InputGate):
            gate = detach_gate_(module)
            if not isinstance(gate, NormGate):
                fold_factors_(model, name, gate.values(1)[0], takers)
    for group in groups:
        if is_counted(model, group):
            silence_(model, group, cut[group.name])

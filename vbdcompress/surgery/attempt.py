"""One trial of a cut: some channels masked on a copy, then removed from it, and both must give the same."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vbdcompress.compare import EXACT, flatten_output, relative_difference
from vbdcompress.errors import TRACE_ERRORS, words_of
from vbdcompress.gather import GatherLinear
from vbdcompress.inputs import Inputs, call, input_of, with_input
from vbdcompress.recurrent import Recurrent, restore_state, scale_state, writes_units
from vbdcompress.surgery.groups import NOT_HERE, ChannelGroup
from vbdcompress.surgery.influence import why_not_training
from vbdcompress.surgery.liveness import plan_removal_
from vbdcompress.surgery.silence import is_counted, norms_over, silence_
from vbdcompress.surgery.slice import apply_plan_
from vbdcompress.surgery.tied import fold_factors_
from vbdcompress.surgery.weights import Index, input_dim

TRIAL_SHARE = 0.3
# What torch says of views and splits by a size that is another one now
_OF_SIZES = ("is invalid for input of size", "unflatten", "split_with_sizes expects")
CANT_TRAIN = "without some of its channels the network can't train"
_WRITTEN_SIZE = (
    "a size is written in its code, or taken from what it is given; "
    "in what torch.export makes of the network it may follow"
)


def random_masks(groups: Sequence[ChannelGroup], seed: int) -> dict[str, Index]:
    """Some channels of each group, drawn."""
    generator = np.random.default_rng(seed)
    return {group.name: np.sort(generator.permutation(group.size)[: _trial_count(group)]) for group in groups}


def leading_masks(groups: Sequence[ChannelGroup], seed: int) -> dict[str, Index]:
    """The first channels of each group: code that takes channels in halves survives an even cut only."""
    return {group.name: np.arange(_trial_count(group)) for group in groups}


def uneven_masks(groups: Sequence[ChannelGroup], seed: int) -> dict[str, Index]:
    """The last channels, another share of each group: groups that must lose as many are found out.

    At least two of them: `chunk` makes its last part the smaller one, so that one alone may go from there. As
    many as have no divisor in common with the other trials': code may take even numbers of channels only.
    """
    shares = np.random.default_rng(seed + 1).uniform(0.1, 0.9, len(groups))
    masks = {}
    for group, share in zip(groups, shares, strict=True):
        other = _trial_count(group)
        distances = {abs(c - share * group.size): c for c in range(2, group.size) if gcd(c, other) == 1}
        count = distances[min(distances)] if distances else 1
        masks[group.name] = np.arange(group.size - count, group.size)
    return masks


def _trial_count(group: ChannelGroup) -> int:
    return min(max(1, round(TRIAL_SHARE * group.size)), group.size - 1)


@torch.no_grad()
def try_groups(
    model: nn.Module,
    inputs: Inputs,
    groups: Sequence[ChannelGroup],
    masks: dict[str, Index],
    *,
    training: bool,
) -> str | None:
    """Mask and cut the groups on a copy; why the result differs, or None where it does not.

    Args:
        training: also run the result in training mode, where other layers may be called.
    """
    trial = copy.deepcopy(model)
    gates = _random_gates(trial, groups, masks)
    try:
        expected = _call_gated(trial, inputs, gates | _norm_masks(trial, groups, masks))
        for group in groups:
            if is_counted(trial, group):
                silence_(trial, group, masks[group.name])
        takers = dict(taker for group in groups for taker in group.takers)
        for layer, factors in gates.items():
            fold_factors_(trial, layer, factors, takers)
        apply_plan_(trial, plan_removal_(trial, groups, inputs))
        with redirect_stderr(StringIO()):  # a graph of torch.fx prints what it raises
            found = flatten_output(call(trial, inputs))
    except TRACE_ERRORS as error:
        fixed = any(words in str(error) for words in _OF_SIZES)
        return f"the network can't run without some of its channels: {words_of(error)}" + (
            f" ({_WRITTEN_SIZE})" if fixed else ""
        )
    if any(tensor.numel() and not tensor.isfinite().any() for tensor in expected):
        return "with weights unlike its own the network gives no numbers, and nothing shows what a cut does"
    difference = relative_difference(expected, found)
    if difference > EXACT:
        return f"cutting its channels changes the output (by {difference:.1g} of its largest value)"
    told = why_not_training(trial, inputs) if training else None
    if told is not None and why_not_training(copy.deepcopy(model), inputs) is None:
        return f"{CANT_TRAIN}: {told}"
    return None


def _random_gates(
    model: nn.Module, groups: Sequence[ChannelGroup], masks: dict[str, Index]
) -> dict[str, Tensor]:
    """Reader -> [inputs] factors: 0 for masked channels, others near 1 or -1, for a fit may end at either."""
    generator = torch.Generator().manual_seed(0)
    gates: dict[str, Tensor] = {}
    for group in groups:
        theta, sign = torch.rand(2, group.size + 1, generator=generator, dtype=torch.float64)
        theta = (0.5 + theta).copysign(sign - 0.5)
        theta[masks[group.name]] = 0.0
        theta[NOT_HERE] = 1.0  # the last: of inputs that belong to other groups
        for member in group.readers:
            factors = theta[torch.from_numpy(member.index)]
            gates[member.layer] = gates.get(member.layer, 1.0) * factors
    return gates


def _norm_masks(
    model: nn.Module, groups: Sequence[ChannelGroup], masks: dict[str, Index]
) -> dict[str, Tensor]:
    """Norm -> [channels] factors: 0 for masked ones, which it counts as zeros."""
    found: dict[str, Tensor] = {}
    for group in groups:
        for member in norms_over(model, group):
            kept = torch.from_numpy(~np.isin(member.index, masks[group.name])).double()
            found[member.layer] = found.get(member.layer, 1.0) * kept
    return found


def _call_gated(model: nn.Module, inputs: Inputs, gates: Mapping[str, Tensor]) -> list[Tensor]:
    """The outputs with every layer's input multiplied, not its weight: that may be used elsewhere, too."""
    layers = {model.get_submodule(name): factors for name, factors in gates.items()}

    def gate(layer: nn.Module, args: Any, kwargs: Any) -> Any:
        given, factors = input_of(args, kwargs), layers[layer]
        if isinstance(layer, GatherLinear):
            factors = factors.new_ones(given.shape[-1]).index_copy(0, layer.input_index, factors)
        if isinstance(layer, Recurrent) and writes_units(layer):
            scale_state(layer, factors[layer.input_size :])
        factors = factors[: given.shape[input_dim(layer)]]
        shape = [1] * given.dim()
        shape[input_dim(layer)] = len(factors)
        return with_input(args, kwargs, given * factors.view(shape))

    hooks = [layer.register_forward_pre_hook(gate, with_kwargs=True) for layer in layers]
    try:
        return flatten_output(call(model, inputs))
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            if isinstance(layer, Recurrent) and writes_units(layer):
                restore_state(layer)

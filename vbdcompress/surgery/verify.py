"""Groups known to be exact: each is cut on a trial copy, and one that changes the output stays whole."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vbdcompress.compare import (
    EXACT,
    as_double,
    flatten_output,
    forget_graph_,
    in_double,
    relative_difference,
)
from vbdcompress.errors import TRACE_ERRORS
from vbdcompress.gather import GatherLinear
from vbdcompress.inputs import Inputs, call, input_of, map_tensors
from vbdcompress.recurrent import Recurrent, restore_state, scale_state, writes_units
from vbdcompress.surgery.groups import (
    NOT_HERE,
    ChannelGroup,
    GroupScan,
    trace_groups,
)
from vbdcompress.surgery.influence import heed_influences, why_not_training
from vbdcompress.surgery.liveness import plan_removal_
from vbdcompress.surgery.partition import beside_unread, in_parts
from vbdcompress.surgery.plain import without_checkpointing
from vbdcompress.surgery.slice import apply_plan_
from vbdcompress.surgery.ties import UNREAD
from vbdcompress.surgery.trial import trial_copy
from vbdcompress.surgery.walk import shared_parameters, tensor_of
from vbdcompress.surgery.weights import Index, Reader, input_dim, scale_inputs_

TRIAL_SHARE = 0.3
_WRITTEN_SIZE = "a size is written in its code; in what torch.export makes of the network it may follow"


@without_checkpointing()
def find_groups(model: nn.Module, example: Inputs, *, features: bool = False, seed: int = 0) -> GroupScan:
    """The network's channel groups, each either proven exact or left whole with the reason.

    The proof: on a float64 copy with other weights (`trial_copy`), some channels of every group are masked
    and the others scaled, at the inputs of their readers; then that is done to the weights and the masked
    ones are cut, and both must give the same output. Where they do not, halving finds the groups at fault:
    three trials where all is well, however deep the network. What is at fault is tried once more in parts,
    see `partition`.

    Args:
        model: plain; left as it was.
        example: a batch of inputs.
        features: see `trace_groups`.
        seed: of the trial's weights and masks.
    """
    with in_double():
        inputs = map_tensors(example, as_double)
        return _find_groups(trial_copy(model, inputs, seed), inputs, model, features, seed)


def _find_groups(trial: nn.Module, inputs: Inputs, model: nn.Module, features: bool, seed: int) -> GroupScan:
    traced = _leave_entangled(model, trace_groups(trial, inputs, features=features, seed=seed))
    forget_graph_(trial)  # what its forward keeps of a call, it could not be copied with
    traced = heed_influences(trial, inputs, traced)
    scan = _try_scan(trial, inputs, traced, seed)
    groups: list[ChannelGroup] = []
    unread = [group for group in scan.groups if group.whole_because == UNREAD]

    def goes(group: ChannelGroup) -> bool:
        alone = GroupScan((group,))
        return (
            bool(group.readers) and group.size > 1 and bool(_try_scan(trial, inputs, alone, seed).removable)
        )

    for before, after in zip(traced.groups, scan.groups, strict=True):
        failed = before.whole_because is None and after.whole_because is not None
        met = beside_unread(after, unread, goes) if failed else None
        if met is not None:
            unread = [group for group in unread if group.name not in {each.layer for each in met.writers}]
        groups += [met] if met else in_parts(trial, after, goes) if failed else [after]
    left = {group.name for group in unread}
    groups = [group for group in groups if group.whole_because != UNREAD or group.name in left]
    proven = {id(group) for group in scan.groups}
    if all(id(group) in proven for group in groups):
        return scan
    return _try_scan(trial, inputs, replace(scan, groups=tuple(groups)), seed)


def _try_scan(trial: nn.Module, inputs: Inputs, scan: GroupScan, seed: int) -> GroupScan:
    """The same groups, those whole that can't be cut."""
    for draw in (_random_masks, _leading_masks, _uneven_masks):
        trusted = scan.removable
        masks = draw(trusted, seed)
        last = draw is _uneven_masks
        wrong = dict(_find_wrong(trial, inputs, trusted, masks, training=last)) if trusted else {}
        groups = (
            group.whole(group.suspect or wrong[group.name]) if group.name in wrong else group
            for group in scan.groups
        )
        scan = replace(scan, groups=tuple(groups))
    return scan


def _leave_entangled(model: nn.Module, scan: GroupScan) -> GroupScan:
    """Leave whole what touches a weight that is computed, or that stands elsewhere under another name."""
    tied = shared_parameters(model)
    groups = []
    for group in scan.groups:
        reason = None
        for member in (*group.writers, *group.readers, *group.between):
            layer = model.get_submodule(member.layer)
            own = layer._parameters
            if parametrize.is_parametrized(layer) or ("weight" not in own and hasattr(layer, "weight")):
                reason = f"the weight of '{member.layer}' is computed from others, not stored"
            for parameter in own.values():
                if id(parameter) in tied:
                    reason = f"'{member.layer}' shares a parameter: {', '.join(tied[id(parameter)])}"
        for held in group.parameters:
            if id(tensor_of(model, held.layer)) in tied:
                reason = f"'{held.layer}' is a parameter under more than one name"
        groups.append(group.whole(reason) if reason and group.whole_because is None else group)
    return replace(scan, groups=tuple(groups))


def _random_masks(groups: Sequence[ChannelGroup], seed: int) -> dict[str, Index]:
    generator = np.random.default_rng(seed)
    return {group.name: np.sort(generator.permutation(group.size)[: _trial_count(group)]) for group in groups}


def _leading_masks(groups: Sequence[ChannelGroup], seed: int) -> dict[str, Index]:
    """The first channels of each group: code that takes channels in halves survives an even cut only."""
    return {group.name: np.arange(_trial_count(group)) for group in groups}


def _uneven_masks(groups: Sequence[ChannelGroup], seed: int) -> dict[str, Index]:
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


def _find_wrong(
    model: nn.Module,
    inputs: Inputs,
    groups: Sequence[ChannelGroup],
    masks: dict[str, Index],
    *,
    training: bool,
) -> Iterator[tuple[str, str]]:
    """(name, reason) of each group that can't be cut without changing the output."""
    reason = _try_groups(model, inputs, groups, masks, training=training)
    if reason is None:
        return
    if len(groups) == 1:
        yield groups[0].name, reason
        return
    middle = len(groups) // 2
    wrong: dict[str, str] = {}
    for half in (groups[:middle], groups[middle:]):
        wrong |= dict(_find_wrong(model, inputs, half, masks, training=training))
    rest = [group for group in groups if group.name not in wrong]
    together = _try_groups(model, inputs, rest, masks, training=training) if rest else None
    if together is not None:
        # each half is right by itself: groups that only go together, found one by one
        kept: list[ChannelGroup] = []
        for group in rest:
            if _try_groups(model, inputs, [*kept, group], masks, training=training) is None:
                kept.append(group)
            else:
                wrong[group.name] = together
    yield from wrong.items()


@torch.no_grad()
def _try_groups(
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
        expected = _call_gated(trial, inputs, gates)
        for layer, factors in gates.items():
            scale_inputs_(layer, factors)
        apply_plan_(trial, plan_removal_(trial, groups, inputs))
        with redirect_stderr(StringIO()):  # a graph of torch.fx prints what it raises
            found = flatten_output(call(trial, inputs))
    except TRACE_ERRORS as error:
        fixed = "is invalid for input of size" in str(error) or "unflatten" in str(error)
        return f"the network can't run without some of its channels: {type(error).__name__}: {error}" + (
            f" ({_WRITTEN_SIZE})" if fixed else ""
        )
    if any(tensor.numel() and not tensor.isfinite().any() for tensor in expected):
        return "with weights unlike its own the network gives no numbers, and nothing shows what a cut does"
    difference = relative_difference(expected, found)
    if difference > EXACT:
        return f"cutting its channels changes the output (by {difference:.1g} of its largest value)"
    told = why_not_training(trial, inputs) if training else None
    if told is not None and why_not_training(copy.deepcopy(model), inputs) is None:
        return f"without some of its channels the network can't train: {told}"
    return None


def _random_gates(
    model: nn.Module, groups: Sequence[ChannelGroup], masks: dict[str, Index]
) -> dict[Reader, Tensor]:
    """Reader -> [inputs] factors: 0 for masked channels, others near 1."""
    generator = torch.Generator().manual_seed(0)
    gates: dict[Reader, Tensor] = {}
    for group in groups:
        theta = 0.5 + torch.rand(group.size + 1, generator=generator, dtype=torch.float64)
        theta[masks[group.name]] = 0.0
        theta[NOT_HERE] = 1.0  # the last: of inputs that belong to other groups
        for member in group.readers:
            layer = model.get_submodule(member.layer)
            assert isinstance(layer, Reader)
            gates[layer] = gates.get(layer, 1.0) * theta[torch.from_numpy(member.index)]
    return gates


def _call_gated(model: nn.Module, inputs: Inputs, gates: Mapping[Reader, Tensor]) -> list[Tensor]:
    """The outputs with every reader's input multiplied, not its weight: that may be used elsewhere, too."""

    def gate(layer: nn.Module, args: Any, kwargs: Any) -> Any:
        assert isinstance(layer, Reader)
        given, factors = input_of(args, kwargs), gates[layer]
        if isinstance(layer, GatherLinear):
            factors = factors.new_ones(given.shape[-1]).index_copy(0, layer.input_index, factors)
        if isinstance(layer, Recurrent) and writes_units(layer):
            scale_state(layer, factors[layer.input_size :])
        factors = factors[: given.shape[input_dim(layer)]]
        shape = [1] * given.dim()
        shape[input_dim(layer)] = len(factors)
        return (given * factors.view(shape), *args[1:]), {k: v for k, v in kwargs.items() if k != "input"}

    hooks = [layer.register_forward_pre_hook(gate, with_kwargs=True) for layer in gates]
    try:
        return flatten_output(call(model, inputs))
    finally:
        for hook in hooks:
            hook.remove()
        for layer in gates:
            if isinstance(layer, Recurrent) and writes_units(layer):
                restore_state(layer)

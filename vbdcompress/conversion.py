"""convert: give every weight or channel of a trained network a posterior."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from vbdcompress.compare import as_double, double_copy, forget_calls_, in_double
from vbdcompress.config import Cost
from vbdcompress.errors import ConfigError, ConvertError
from vbdcompress.evaluation import with_gradients
from vbdcompress.gating import channel_costs, convert_channels_, fold_gates_
from vbdcompress.inputs import Inputs, map_tensors
from vbdcompress.matrices import why_no_matrix
from vbdcompress.modes import evaluated
from vbdcompress.opening import open_layers_
from vbdcompress.originals import change_where_alike, check_model, check_noise, copy_of, unwrap
from vbdcompress.parametrized import standardised_layers, store_weights_
from vbdcompress.records import LayerRow
from vbdcompress.surgery.groups import ChannelGroup, GroupScan
from vbdcompress.surgery.reach import NO_GRADIENT, without_gradient
from vbdcompress.surgery.sizes import other_sizes
from vbdcompress.surgery.verify import find_groups
from vbdcompress.surgery.walk import check_skip, matches_skip, shared_parameters
from vbdcompress.surgery.weights import Reader, reading_weights
from vbdcompress.vbd.layers import VBD_LAYERS, WeightPosterior, attach_posterior_, detach_posterior_
from vbdcompress.vbd.posterior import set_threshold_
from vbdcompress.vbd.sampled import SampledWeight, attach_sampled_, detach_sampled_

# Weights start far below their own noise threshold; gates have few data each and start noisier.
LOG_SIGMA2 = {"weights": -10.0, "channels": -4.0}

_STORED = "its computed weights are stored, and train on as plain ones"


@dataclass(frozen=True)
class Converted:
    """A network with posteriors, and what the later stages need to know of it.

    Attributes:
        model: train it with `fit`, or with a loop of your own around `vbd.ELBO`.
        mode: "weights" or "channels".
        table: every layer, converted or left, with the reason.
        scan: the channel groups, found on the plain network.
        example: the batch that the network was traced with, on the CPU.
        stored: modules whose computed weights (weight_norm, standardised ones) became plain.
    """

    model: nn.Module
    mode: str
    table: tuple[LayerRow, ...]
    scan: GroupScan
    example: Inputs
    stored: tuple[str, ...] = ()

    @cached_property
    def other_sizes(self) -> list[Inputs]:
        """The example in other sizes that the network takes, float64: see `surgery.sizes`."""
        with in_double():
            return other_sizes(double_copy(self.model), map_tensors(self.example, as_double))

    def undo(self) -> nn.Module:
        """A plain network again, a copy: the original where nothing was trained since.

        Exact, but for what was opened, see `opening`: that stays so, the same function to rounding. Weights
        that parametrizations computed stay stored.
        """
        return self.plain(float("inf"))

    def plain(self, threshold: float, round_to: int = 1) -> nn.Module:
        """A plain copy, masked: theta where log_alpha < threshold, 0 elsewhere; gates folded into weights.

        Args:
            threshold, round_to: see `set_threshold_`.
        """
        model = evaluated(copy.deepcopy(self.model))
        set_threshold_(model, threshold, round_to)
        forget_calls_(model)
        if self.mode == "channels":
            fold_gates_(model, self.scan.removable)
        for module in list(model.modules()):
            if isinstance(module, WeightPosterior):
                detach_posterior_(module)
            elif parametrize.is_parametrized(module):
                for name, parametrization in list(module.parametrizations.items()):  # type: ignore[union-attr, operator]
                    if isinstance(parametrization[0], SampledWeight):
                        detach_sampled_(module, name)
        return model


@with_gradients()
def convert(
    model: nn.Module,
    example: Inputs,
    mode: Literal["weights", "channels"] = "channels",
    *,
    skip: Sequence[str] = (),
    prune_inputs: bool = False,
    log_sigma2: float | None = None,
    cost: Cost = "none",
) -> Converted:
    """A converted copy of a trained network; the network itself is left as it was.

    Args:
        model: any nn.Module.
        example: a batch of what it takes: a tensor, a tuple of them, or a dict of them by name.
        mode: "weights": a posterior on each weight. "channels": a gate on each channel, at the
            inputs of the layers that read it.
        skip: names of layers to leave; a name covers all below it.
        prune_inputs: also treat input features, and single flattened features, of Linear layers.
        log_sigma2: initial log variance; None takes the mode's default.
        cost: of channels mode: what weighs a channel's KL. "params", "macs", or "params+macs", the
            mean of the two: what its removal saves, relative to the mean over all gates (a tempered
            ELBO). "none": nothing, the ELBO.
    Raises:
        ConfigError: there is no such mode or cost, or a cost in weights mode.
        ConvertError: the network fails on the example, holds NaN, has lazy layers, runs on layers that
            a copy does not hold, or nothing in it can be converted.
    """
    if mode not in list(LOG_SIGMA2):
        raise ConfigError("convert", f"mode = {mode!r}, allowed are {' and '.join(map(repr, LOG_SIGMA2))}.")
    if cost not in get_args(Cost):
        raise ConfigError("convert", f"cost = {cost!r}, allowed are {', '.join(map(repr, get_args(Cost)))}.")
    if mode == "weights" and cost != "none":
        raise ConfigError("convert", f"cost = {cost!r} weighs channels; mode = 'weights' has none.")
    model = unwrap(model)
    check_skip(model, skip)
    check_model(model, example)  # without gradients: weights that hooks compute can be copied then
    converted = copy_of(model)
    called = check_model(converted, example, of=model)
    check_noise(converted, example)
    for module in converted.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False  # sparse gradients are of no use where every weight has a KL
    stored = computed_weights(converted, example, skip)
    store_weights_(converted, stored)
    example = map_tensors(example, lambda tensor: tensor.detach().cpu())
    names = [name for name, _ in converted.named_modules(remove_duplicate=False)]
    # what is not called is read past its call, and has nothing to open
    opens = [name for name in names if name in called and not _is_skipped_in_part(name, skip)]
    converted, _ = change_where_alike(converted, opens, open_layers_, example)
    called |= {name for name, _ in converted.named_modules()} - set(names)
    scan = find_groups(converted, example, features=prune_inputs)
    blind = without_gradient(converted, example)
    scan = replace(scan, groups=tuple(_leave_skipped(converted, scan.groups, skip, blind)))
    start = LOG_SIGMA2[mode] if log_sigma2 is None else log_sigma2
    if mode == "weights":
        plain = called - scan.read_elsewhere
        rows = tuple(_convert_weights_(converted, skip, start, plain, blind))
    else:
        costs = channel_costs(converted, example, scan.removable, cost)
        rows = tuple(convert_channels_(converted, scan, start, costs))
    rows = tuple(
        replace(row, reason=f"{row.reason}; {_STORED}") if row.name in stored else row for row in rows
    )
    if not any(row.action == "converted" for row in rows):
        reasons = "; ".join(f"{row.name or 'the network'}: {row.reason}" for row in rows)
        raise ConvertError(
            "convert",
            f"nothing in the network can be converted in {mode} mode: {reasons or 'it has no parameters'}.",
            "" if mode == "weights" else "Single weights may still go: --mode weights",
        )
    return Converted(converted, mode, rows, scan, example, stored)


def computed_weights(model: nn.Module, example: Inputs, skip: Sequence[str]) -> tuple[str, ...]:
    """Names of modules whose weights the user's parametrizations, or code, compute and may be stored.

    Args:
        example: a batch of inputs: with the weights stored the network must give the same.
        skip: names of layers to leave.
    """
    parametrized = [
        name
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        and not any(isinstance(inner, SampledWeight) for inner in module.modules())
    ]
    own = [name for name in standardised_layers(model) if not _is_skipped_in_part(name, skip)]
    if own:
        _, own = change_where_alike(model, own, store_weights_, example)
    return (*(name for name in parametrized if not _is_skipped_in_part(name, skip)), *own)


def _is_skipped_in_part(name: str, skip: Sequence[str]) -> bool:
    """Whether a module, or anything in it, is to be left: then its layers keep their names."""
    below = f"{name}." if name else ""
    return matches_skip(name, skip) or any(entry.startswith(below) for entry in skip)


def _convert_weights_(
    model: nn.Module, skip: Sequence[str], log_sigma2: float, plain: set[str], blind: set[str]
) -> Iterator[LayerRow]:
    """Args: plain: layers that use their weight in their own call and nowhere else."""
    tied = shared_parameters(model)
    unfit = {*tied, id(None)}  # None: the weight is computed, as the older weight_norm does
    for name, module in list(model.named_modules()):
        own = list(module.named_parameters(recurse=False))
        count = sum(parameter.numel() for _, parameter in own)
        kind = type(module).__name__
        unreached = [own_name for own_name, _ in own if f"{name}.{own_name}".lstrip(".") in blind]
        if not own:
            continue
        if matches_skip(name, skip):
            yield LayerRow(name, kind, "left", "skipped as asked", count)
        elif parametrize.is_parametrized(module) or "parametrizations" in name.split("."):
            yield LayerRow(name, kind, "left", "it already has a parametrization", count)
        elif len(unreached) == len(own):
            yield LayerRow(name, kind, "left", NO_GRADIENT, count)
        elif (
            type(module) in VBD_LAYERS and name in plain and id(module._parameters.get("weight")) not in unfit
        ):
            attach_posterior_(module, log_sigma2)
            yield LayerRow(name, kind, "converted", "a posterior on each weight, drawn at the output", count)
        else:
            for parameter_name, parameter in own:
                full_name = f"{name}.{parameter_name}".lstrip(".")
                blocked = NO_GRADIENT if parameter_name in unreached else None
                reason = blocked or _why_left(module, full_name, parameter, tied, skip)
                if reason is None:
                    attach_sampled_(module, parameter_name, log_sigma2)
                action = "left" if reason else "converted"
                told = reason or "a posterior on each weight, the weight itself drawn once a batch"
                yield LayerRow(full_name, kind, action, told, parameter.numel())


def _why_left(
    module: nn.Module, name: str, parameter: Tensor, tied: dict[int, list[str]], skip: Sequence[str]
) -> str | None:
    """Why a parameter outside the standard layers keeps a plain value; None where it need not."""
    if matches_skip(name, skip):
        return "skipped as asked"
    if hasattr(nn.ModuleDict, name.rsplit(".", 1)[-1]):
        return "called by a name that torch's parametrizations keep for themselves"
    if isinstance(module, fx.GraphModule):
        return "of the graph itself, which torch does not copy with a parametrization"
    if id(parameter) in tied:
        others = [other for other in tied[id(parameter)] if other != name]
        return f"shared with {', '.join(others)}"
    return why_no_matrix(module, name, parameter)


def _is_blind(model: nn.Module, layer: str, blind: set[str]) -> bool:
    """Whether no gradient reaches a weight that reads the layer's input."""
    module = model.get_submodule(layer)
    assert isinstance(module, Reader)
    return any(f"{layer}.{own}" in blind for own in reading_weights(module))


def _leave_skipped(
    model: nn.Module, groups: Sequence[ChannelGroup], skip: Sequence[str], blind: set[str]
) -> Iterator[ChannelGroup]:
    """Leave whole what touches a layer to skip, or is read by a layer whose weight no gradient reaches."""
    for group in groups:
        members = (*group.writers, *group.readers, *group.between)
        touched = [member.layer for member in members if _is_skipped_in_part(member.layer, skip)]
        untold = [member.layer for member in group.readers if _is_blind(model, member.layer, blind)]
        if group.whole_because is not None:
            yield group
        elif touched:
            yield group.whole(f"'{touched[0]}' is skipped as asked")
        else:
            yield group.whole(f"'{untold[0]}' reads it; {NO_GRADIENT}") if untold else group

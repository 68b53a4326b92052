"""convert: give every weight or channel of a trained network a posterior."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from vbdcompress.count import layer_sizes
from vbdcompress.errors import ConvertError
from vbdcompress.evaluation import device_of
from vbdcompress.records import LayerRow
from vbdcompress.surgery.groups import TRACE_ERRORS, ChannelGroup, GroupScan
from vbdcompress.surgery.verify import find_groups
from vbdcompress.surgery.walk import check_skip, matches_skip, shared_parameters
from vbdcompress.vbd.gates import ChannelGate, InputGate, attach_gate_, detach_gate_
from vbdcompress.vbd.layers import VBD_LAYERS, WeightPosterior, attach_posterior_, detach_posterior_
from vbdcompress.vbd.posterior import set_threshold_
from vbdcompress.vbd.sampled import SampledWeight, attach_sampled_, detach_sampled_

# Weights start far below their own noise threshold; gates have few data each and start noisier.
Cost = Literal["none", "params", "macs", "params+macs"]
_SIZE_FIELDS: dict[Cost, tuple[str, ...]] = {
    "none": (),
    "params": ("parameters",),
    "macs": ("macs",),
    "params+macs": ("parameters", "macs"),
}
LOG_SIGMA2 = {"weights": -10.0, "channels": -4.0}


@dataclass(frozen=True)
class Converted:
    """A network with posteriors, and what the later stages need to know of it.

    Attributes:
        model: train it with `fit`, or with a loop of your own around `vbd.ELBO`.
        mode: "weights" or "channels".
        table: every layer, converted or left, with the reason.
        scan: the channel groups, found on the plain network.
        example: the batch that the network was traced with, on the CPU.
    """

    model: nn.Module
    mode: str
    table: tuple[LayerRow, ...]
    scan: GroupScan
    example: Tensor

    def undo(self) -> nn.Module:
        """A plain network again, a copy: the exact original where nothing was trained since."""
        return self.plain(float("inf"))

    def plain(self, threshold: float) -> nn.Module:
        """A plain copy, masked: theta where log_alpha < threshold, 0 elsewhere; gates folded into weights."""
        model = copy.deepcopy(self.model).eval()
        set_threshold_(model, threshold)
        for module in list(model.modules()):
            if isinstance(getattr(module, "input_gate", None), InputGate):
                _fold_gate_(module, detach_gate_(module))
            if isinstance(module, WeightPosterior):
                detach_posterior_(module)
            elif parametrize.is_parametrized(module):
                for name, parametrization in list(module.parametrizations.items()):  # type: ignore[union-attr, operator]
                    if isinstance(parametrization[0], SampledWeight):
                        detach_sampled_(module, name)
        return model


def convert(
    model: nn.Module,
    example: Tensor,
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
        example: a batch of inputs that it takes.
        mode: "weights": a posterior on each weight. "channels": a gate on each channel, at the
            inputs of the layers that read it.
        skip: names of layers to leave; a name covers all below it.
        prune_inputs: also treat input features, and single flattened features, of Linear layers.
        log_sigma2: initial log variance; None takes the mode's default.
        cost: of channels mode: what weighs a channel's KL. "params", "macs", or "params+macs", the
            mean of the two: what its removal saves, relative to the mean over all gates (a tempered
            ELBO). "none": nothing, the ELBO.
    Raises:
        ConvertError: the network fails on the example, holds NaN, has lazy layers, or nothing in
            it can be converted.
    """
    check_skip(model, skip)
    called = check_model(model, example)
    try:
        converted = copy.deepcopy(model)
    except RuntimeError as error:
        raise ConvertError(
            "convert",
            f"the network can't be copied: {error}",
            "Old-style weight_norm and spectral_norm: use those of torch.nn.utils.parametrizations.",
        ) from error
    example = example.detach().cpu()
    scan = find_groups(model, example, features=prune_inputs)
    scan = GroupScan(tuple(_leave_skipped(scan.groups, skip)), scan.failure)
    start = LOG_SIGMA2[mode] if log_sigma2 is None else log_sigma2
    if mode == "weights":
        rows = tuple(_convert_weights_(converted, skip, start, called))
    else:
        costs = _channel_costs(model, example, scan.removable, cost)
        rows = tuple(_convert_channels_(converted, scan, start, costs))
    if not any(row.action == "converted" for row in rows):
        reasons = "; ".join(f"{row.name or 'the network'}: {row.reason}" for row in rows)
        raise ConvertError(
            "convert",
            f"nothing in the network can be converted in {mode} mode: {reasons or 'it has no parameters'}.",
            "" if mode == "weights" else "Single weights may still go: --mode weights",
        )
    return Converted(converted, mode, rows, scan, example)


def check_model(model: nn.Module, example: Tensor) -> set[str]:
    """Run a network on the example in eval mode; the names of the modules that were called.

    Raises:
        ConvertError: it has no weights yet, holds NaN, or fails on the example.
    """
    for name, module in model.named_modules():
        if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            raise ConvertError(
                "convert",
                f"layer '{name}' is {type(module).__name__}, which has no weights yet.",
                f"Run one batch through the model first, or skip it: --skip {name}",
            )
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise ConvertError(
                "convert",
                f"parameter '{name}' is {parameter.dtype}, too coarse to learn a variance in.",
                "Call model.float() first; --precision bf16-mixed makes the fit itself fast.",
            )
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            bad = int((~parameter.isfinite()).sum())
            raise ConvertError("convert", f"parameter '{name}' holds {bad} NaN or infinite values.")
    was_training = model.training
    model.eval()
    called: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            model(example.to(device_of(model)))
    except TRACE_ERRORS as error:
        raise ConvertError(
            "convert",
            f"the network fails on a batch of shape {tuple(example.shape)}: {type(error).__name__}: {error}",
            "Check the input's shape, and --data or --image-size.",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return called


def _convert_weights_(
    model: nn.Module, skip: Sequence[str], log_sigma2: float, called: set[str]
) -> Iterator[LayerRow]:
    tied = shared_parameters(model)
    for name, module in list(model.named_modules()):
        own = list(module.named_parameters(recurse=False))
        count = sum(parameter.numel() for _, parameter in own)
        kind = type(module).__name__
        if not own:
            continue
        if matches_skip(name, skip):
            yield LayerRow(name, kind, "left", "skipped as asked", count)
        elif parametrize.is_parametrized(module) or "parametrizations" in name.split("."):
            yield LayerRow(name, kind, "left", "it already has a parametrization", count)
        elif type(module) in VBD_LAYERS and id(module.weight) not in tied and name in called:
            attach_posterior_(module, log_sigma2)
            yield LayerRow(name, kind, "converted", "a posterior on each weight, drawn at the output", count)
        else:
            for parameter_name, parameter in own:
                full_name = f"{name}.{parameter_name}".lstrip(".")
                reason = _why_left(module, full_name, parameter, tied, skip)
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
    if id(parameter) in tied:
        others = [other for other in tied[id(parameter)] if other != name]
        return f"shared with {', '.join(others)}"
    if not parameter.is_floating_point():
        return f"of type {parameter.dtype}"
    if isinstance(module, _BatchNorm | nn.LayerNorm | nn.GroupNorm):
        return "a scale or shift of a normalisation"
    if parameter.dim() < 2 or parameter.numel() == max(parameter.shape):
        return "a vector: a bias, scale or token"
    if parameter.shape[0] == 1 or "pos" in name.rsplit(".", 1)[-1] or "bias" in name.rsplit(".", 1)[-1]:
        return "a table of positions or biases"
    return None


def _leave_skipped(groups: Sequence[ChannelGroup], skip: Sequence[str]) -> Iterator[ChannelGroup]:
    for group in groups:
        touched = [m.layer for m in (*group.writers, *group.readers) if matches_skip(m.layer, skip)]
        asked = group.whole_because is None and touched
        yield group.whole(f"'{touched[0]}' is skipped as asked") if asked else group


def _channel_costs(
    model: nn.Module, example: Tensor, groups: Sequence[ChannelGroup], cost: Cost
) -> dict[str, float]:
    """Group -> what one of its channels saves in the original network, over the mean of all gates."""
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


def _convert_channels_(
    model: nn.Module, scan: GroupScan, log_sigma2: float, costs: Mapping[str, float]
) -> Iterator[LayerRow]:
    device = device_of(model)
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    gates = {
        group.name: ChannelGate(group.size, log_sigma2, group.name, costs[group.name]).to(device, dtype)
        for group in scan.removable
    }
    reads: dict[str, list[ChannelGroup]] = {}
    for group in scan.groups:
        for member in group.readers:
            reads.setdefault(member.layer, []).append(group)
    for name, module in list(model.named_modules()):
        count = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if not count:
            continue
        removable = [group for group in reads.get(name, []) if group.whole_because is None]
        if removable:
            attach_gate_(module, _input_gate(name, module, removable, gates).to(device))
            told = ", ".join(f"'{group.name}' ({group.size})" for group in removable)
            yield LayerRow(name, type(module).__name__, "converted", f"gates on its inputs: {told}", count)
        else:
            reason = _why_ungated(module, reads.get(name, []), scan)
            yield LayerRow(name, type(module).__name__, "left", reason, count)


def _why_ungated(module: nn.Module, reads: Sequence[ChannelGroup], scan: GroupScan) -> str:
    if scan.failure:
        return scan.failure
    if reads:
        return "; ".join(f"'{group.name}' stays whole: {group.whole_because}" for group in reads)
    if isinstance(module, nn.Linear | _ConvNd):
        if isinstance(module, _ConvNd) and module.groups > 1:
            return "follows its group"
        return "reads the input, or what no prunable layer writes"
    if isinstance(module, _BatchNorm):
        return "follows its group"
    return "not a layer with separable input channels"


def _input_gate(
    name: str, module: nn.Module, groups: Sequence[ChannelGroup], gates: dict[str, ChannelGate]
) -> InputGate:
    """The gate in front of the layer, built from all the groups that it reads."""
    width = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    assert isinstance(width, int)
    ungated = sum(group.size for group in groups)
    factors: list[Tensor] = []
    offset = 0
    for group in groups:
        # Channel groups cover different inputs of a layer; its feature group covers them all again.
        if group.is_features or not factors:
            factors.append(torch.full((width,), ungated, dtype=torch.int64))
        for member in group.readers:
            if member.layer == name:
                here = torch.from_numpy(member.index)
                factors[-1] = torch.where(here >= 0, here + offset, factors[-1])
        offset += group.size
    index = torch.stack(factors) if len(factors) > 1 else factors[0]
    dim = -1 if isinstance(module, nn.Linear) else 1
    return InputGate([gates[group.name] for group in groups], index, dim)


@torch.no_grad()
def _fold_gate_(layer: nn.Module, gate: InputGate) -> None:
    """Multiply the layer's weights by the gates of the inputs that they read, in place."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    values = gate.values(1)[0].to(weight.dtype)
    shape = [1] * weight.dim()
    shape[0 if isinstance(layer, _ConvTransposeNd) else 1] = len(values)
    weight.mul_(values.view(shape))

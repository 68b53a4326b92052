"""slim: choose how much goes, and cut it out of the network."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vbdcompress.compare import (
    EXACT,
    as_double,
    double_copy,
    flatten_output,
    forget_calls_,
    in_double,
    relative_difference,
)
from vbdcompress.conversion import Converted
from vbdcompress.count import measure_size
from vbdcompress.errors import TRACE_ERRORS, ConfigError, SlimError, words_of
from vbdcompress.inputs import Inputs, call, holds_data, map_tensors
from vbdcompress.modes import evaluated
from vbdcompress.records import CurvePoint, GroupRow, Size
from vbdcompress.surgery.liveness import plan_removal_
from vbdcompress.surgery.slice import RemovalPlan, apply_plan_
from vbdcompress.vbd.posterior import KEEP_ALL, find_posteriors, log_alpha_of, set_threshold_

# Thresholds of log_alpha at which the curve is measured; the literature's is 3
CURVE_THRESHOLDS = tuple(step / 2 for step in range(-8, 13))
# Lower than the 3 of log-uniform dropout: at large alpha the KL of VBD is nearly flat, so what has become
# noise does not travel on to 3. On every network of the zoo the validation error is flat from 3 down to 0, in
# both modes (the curves in exports/*/report.json), and rises soon below.
DEFAULT_THRESHOLD = 0.0
# What torch calls a parameter behind a parametrization
_PARAMETRIZED = re.compile(r"\bparametrizations\.(\w+)\.original$")


def or_default(threshold: float | None) -> float:
    """The threshold that was asked for, or, while nobody or only a budget says one, the default."""
    return DEFAULT_THRESHOLD if threshold is None else threshold


@dataclass(frozen=True)
class Slim:
    """A network cut down.

    Attributes:
        model: plain and slim, an ordinary nn.Module in eval mode, on the CPU.
        plan: what of each layer stayed.
        groups: channels before and after, and why any group stayed whole.
        threshold: of log_alpha at which weights or channels went.
    """

    model: nn.Module
    plan: RemovalPlan
    groups: tuple[GroupRow, ...]
    threshold: float


def slim(converted: Converted, threshold: float | None = None, *, round_to: int = 1) -> Slim:
    """Remove every weight or channel with log_alpha >= threshold, exactly.

    The converted network, masked in eval mode, and the slim one compute the same function: checked in
    float64 to 1e-10, on the example and on noise that nothing was measured on.

    Args:
        converted: fitted; left as it was.
        threshold: None takes 0.
        round_to: keep a multiple of this many channels of each group, where it has so many.
    Raises:
        ConfigError: the threshold is NaN, `round_to` below 1, or it is no converted network.
        SlimError: the two differ: a defect, better a stop than a wrong network.
    """
    if not isinstance(converted, Converted):
        told = f"is given a {type(converted).__name__}, allowed is what `convert` gave."
        raise ConfigError("slim", told, "slim(converted), not slim(converted.model)")
    chosen = or_default(threshold)
    if math.isnan(chosen) or round_to < 1:
        told = f"threshold = {chosen:g}, round_to = {round_to}"
        raise ConfigError("slim", f"{told}; allowed are a number, and 1 or more.")
    forget_calls_(converted.model)  # of a loop of the user's own
    dtypes = {
        plain: tensor.dtype
        for name, tensor in _tensors(converted.model)
        for plain in (name, _PARAMETRIZED.sub(r"\1", name))
    }
    gated = double_copy(converted.model)
    set_threshold_(gated, chosen, round_to)
    with in_double():
        model, plan = _cut(converted, gated, chosen, round_to)
    for name, tensor in _tensors(model):
        weight = f"{name.rpartition('.')[0]}.weight".lstrip(".")  # of a bias that is new
        tensor.data = tensor.data.to(dtypes[name] if name in dtypes else dtypes[weight])
    forget_calls_(model)  # what it kept of a call in float64
    rows = tuple(_group_row(group, plan) for group in converted.scan.groups)
    return Slim(evaluated(model), plan, rows, chosen)


def _cut(
    converted: Converted, gated: nn.Module, chosen: float, round_to: int
) -> tuple[nn.Module, RemovalPlan]:
    """The cut network, shown to be the masked one, and what was cut.

    Args:
        gated: masked, float64, on the CPU.
    """
    defect = "This is a defect: please report it. Until then: --skip the layers at fault."
    try:
        probes, expected = _probes_for(gated, converted.example)
        others = converted.other_sizes
        for fold in (True, False):
            model = replace(converted, model=gated).plain(chosen, round_to)
            plan = plan_removal_(
                model, converted.scan.removable, probes[0], fold=fold, round_to=round_to, others=others
            )
            apply_plan_(model, plan)
            with torch.no_grad():
                difference = relative_difference(expected, flatten_output(call(model, probes[1])))
            if difference <= EXACT:
                return model, plan.storing(converted.stored)
            # else what looked constant on the probes was not: once more without folding
    except TRACE_ERRORS as error:
        told = f"the cut network can't run: {words_of(error)}"
        raise SlimError("slim", told, defect) from error
    told = f"the cut network differs from the masked one by {difference:.1g} of the largest output."
    raise SlimError("slim", told, defect)


def posterior_sigma(converted: Converted, slimmed: Slim) -> dict[str, Tensor]:
    """Standard deviation of each weight of a slim network: parameter -> its shape. Weights mode only.

    Args:
        converted: what `slimmed` was cut from.
    """
    weights = [posterior for posterior in find_posteriors(converted.model) if posterior.kind == "weight"]
    if not weights:
        return {}
    spread = converted.plain(slimmed.threshold).cpu()
    for posterior in weights:
        sigma = (0.5 * posterior.log_sigma2.detach().cpu().double()).exp()
        spread.get_parameter(posterior.name).data = sigma
    apply_plan_(spread, slimmed.plan)
    return {posterior.name: spread.get_parameter(posterior.name).detach() for posterior in weights}


@torch.no_grad()
def _probes_for(model: nn.Module, example: Inputs) -> tuple[tuple[Inputs, Inputs], list[Tensor]]:
    """Two sets of probes, and what the network gives on the second.

    The example alone where the network can't run them: sizes or ids may be fixed.
    """
    wide = _probes(example, 0), _probes(example, 1)
    try:
        outputs = [output.clone() for output in flatten_output(call(model, wide[1]))]
        if all(bool(output.isfinite().all()) for output in outputs if output.is_floating_point()):
            return wide, outputs
    except TRACE_ERRORS:
        pass
    plain = map_tensors(example, as_double)
    return (plain, plain), flatten_output(call(model, plain))


def _probes(example: Inputs, seed: int) -> Inputs:
    """The example beside inputs as unlike it as can be, float64: what looks constant on all of them is.

    Numbers: noise at their scale and far beyond. Masks: entries of the example's switched off.
    Names of tokens: others of the same range.
    """
    generator, is_data = torch.Generator().manual_seed(seed), holds_data(example)

    def widen(tensor: Tensor) -> Tensor:
        if tensor.dim() > 1 and not is_data(tensor):
            off = torch.rand((2, *tensor.shape), generator=generator) < torch.tensor([0.5, 0.1]).view(
                2, *[1] * tensor.dim()
            )
            off[..., 0] = False  # or a mask might leave nothing
            parts = [tensor, *(tensor * ~part for part in off)]
        elif tensor.is_floating_point() and tensor.dim():
            real = tensor.double()
            noise = torch.randn((2, *real.shape), generator=generator, dtype=torch.float64)
            scale = real.std() if real.numel() > 1 else torch.ones(())
            parts = [real, real.mean() + scale * noise[0], 5 * scale * noise[1]]
        elif tensor.dim():
            low, high = int(tensor.min()), int(tensor.max())
            drawn = torch.randint(low, high + 1, (2, *tensor.shape), generator=generator)
            parts = [tensor, *drawn.to(tensor.dtype)]
        else:
            return as_double(tensor)
        return as_double(torch.cat(parts))

    return map_tensors(example, widen)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    found = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in found if tensor.is_floating_point() or tensor.is_complex()]


def _group_row(group: Any, plan: RemovalPlan) -> GroupRow:
    """How many of a group's channels stayed, read off the cut of its first writer or reader."""
    if group.whole_because is not None:
        return GroupRow(group.name, group.channels, group.channels, group.whole_because)
    member = group.readers[0] if group.is_features else (group.writers or group.readers)[0]
    cut = plan.cuts.get(member.layer)
    kept_positions = None if cut is None else cut.inputs if group.is_features else cut.outputs
    here = member.index[member.index >= 0]
    if kept_positions is not None:
        kept = member.index[list(kept_positions)]
        here = kept[kept >= 0]
    return GroupRow(group.name, group.channels, len(set(here.tolist())), None)


@torch.no_grad()
def _count_gone(model: nn.Module, threshold: float) -> int:
    """How many weights or gates a cut takes, in double precision as `slim` decides it."""
    if threshold == KEEP_ALL:
        return 0
    posteriors = find_posteriors(model)
    log_alphas = (log_alpha_of(as_double(p.theta), as_double(p.log_sigma2)) for p in posteriors)
    return sum(int((each >= threshold).sum()) for each in log_alphas)


def measure_curve(
    converted: Converted,
    measure: Callable[[nn.Module], float],
    *,
    prepare: Callable[[nn.Module], None],
    size_of: Callable[[nn.Module], Size] | None = None,
    asked: float | None = None,
    round_to: int = 1,
    tell: Callable[[int, int], None] | None = None,
) -> tuple[CurvePoint, ...]:
    """Error and size against the threshold, from one fit, by cutting at each.

    Args:
        converted: fitted.
        measure: error of a slim network on the validation set, in percent.
        prepare: what is done to a slim network before it is measured (batch norm's statistics).
        size_of: a slim network's size; None: `measure_size`.
        asked: a threshold to measure beside CURVE_THRESHOLDS.
        round_to: see `slim`.
        tell: called before each cut, and at the end, with the number of thresholds done, and of all.
    Returns:
        points from the whole network down; thresholds that cut the same are one point.
    """
    points: list[CurvePoint] = []
    chosen, gone = set() if asked is None else {asked}, -1
    thresholds = sorted({*CURVE_THRESHOLDS, *chosen, float("inf")}, reverse=True)
    for number, threshold in enumerate(thresholds):
        if tell is not None:
            tell(number, len(thresholds))
        if (count := _count_gone(converted.model, threshold)) != gone:
            gone, model = count, slim(converted, threshold, round_to=round_to).model
            size = measure_size(model, converted.example) if size_of is None else size_of(model)
        if points and size == points[-1].size:
            if threshold in chosen:  # the same network: called by the threshold that was asked for
                points[-1] = replace(points[-1], threshold=threshold)
            continue
        prepare(model)
        points.append(CurvePoint(threshold, measure(model), size))
    if tell is not None:
        tell(len(thresholds), len(thresholds))
    return tuple(points)

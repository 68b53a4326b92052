"""How many bits each layer's weights get, and what that does to the error."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vbdcompress.config import Bits
from vbdcompress.records import TIE
from vbdcompress.rounding import (
    Array,
    Rounded,
    Weight,
    choose_bits,
    error_over_sigma,
    round_weight,
    roundable,
    write_rounded_,
)

# Points by which rounding may raise the validation error where no budget says more
ROUNDING_POINTS = 0.1


@dataclass(frozen=True)
class RoundedRow:
    """One weight's precision.

    Attributes:
        name: of the parameter.
        kind, bits: see `Rounded`.
        error_over_sigma: root mean square of what rounding moved, in units of the posterior's sigma;
            None where the weight has none.
    """

    name: str
    kind: str
    bits: int
    error_over_sigma: float | None


@dataclass(frozen=True)
class Rounding:
    """What rounding did to a network.

    Attributes:
        codes: parameter -> the codes that its values are now made from.
        rows: the same for readers.
        error_before, error_after: on the validation set, in percent.
    """

    codes: Mapping[str, Rounded]
    rows: tuple[RoundedRow, ...]
    error_before: float
    error_after: float

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {
            "layers": [asdict(row) for row in self.rows],
            "validation_error": {"before": self.error_before, "after": self.error_after},
        }


def first_codes(model: nn.Module, bits: Bits, sigma: Mapping[str, Tensor]) -> dict[str, Rounded]:
    """Each weight's codes before any error is measured: parameter -> codes. See `round_model_`."""
    if bits == "32":
        return {}
    weights = roundable(model)
    known = _known(weights, sigma)
    if bits != "auto":
        return {name: round_weight(weight, int(bits), known.get(name)) for name, weight in weights.items()}
    return {
        name: choose_bits(weight, known[name]) if name in known else round_weight(weight, 16)
        for name, weight in weights.items()
    }


def _known(weights: Mapping[str, Weight], sigma: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: sigma[name].float().cpu().numpy() for name in weights if name in sigma}


@torch.no_grad()
def round_model_(
    model: nn.Module,
    bits: Bits,
    sigma: Mapping[str, Tensor],
    measure: Callable[[nn.Module], float],
    allowed_error: float | None = None,
    fits: Callable[[Mapping[str, Rounded]], bool] | None = None,
) -> Rounding:
    """Round a network's matrices of weights, in place; zeros stay zeros.

    Args:
        model: plain, float32.
        bits: "16", "8" or "4" for all. "auto": for each matrix the fewest whose errors stay below the
            posterior's sigma (root mean square), and 16 where it has no posterior.
        sigma: parameter -> standard deviation of each weight; may lack some.
        measure: validation error of a network in percent.
        allowed_error: for "auto": while the rounded network's is larger, the matrix whose errors are
            largest in units of sigma gets more bits; None allows ROUNDING_POINTS above the network's own.
        fits: for "auto": whether the file may have these codes. While it may not, matrices get fewer bits
            than the posterior asks for, and none gets more.
    """
    weights = roundable(model)
    known = _known(weights, sigma)
    before = measure(model)
    codes = first_codes(model, bits, sigma)
    while bits == "auto" and fits is not None and not fits(codes):
        reducible = [name for name in known if codes[name].bits > 4]
        if not reducible:
            break
        best = min(reducible, key=lambda name: error_over_sigma(weights[name], codes[name], known[name]))
        codes[best] = round_weight(weights[best], codes[best].bits // 2, known[best])
    exact = {name: weight.tensor.detach().clone() for name, weight in weights.items()}
    over = {name: error_over_sigma(weights[name], codes[name], known[name]) for name in known}
    write_rounded_(model, codes)
    after = measure(model)
    allowed = before + ROUNDING_POINTS if allowed_error is None else max(allowed_error, before)
    coarse = set(known) if bits == "auto" else set()
    while after > allowed + TIE and (coarse := {name for name in coarse if codes[name].bits < 16}):
        worst = max(coarse, key=lambda name: over[name])
        weights[worst].tensor.copy_(exact[worst])
        finer = round_weight(weights[worst], 2 * codes[worst].bits, known[worst])
        if fits is not None and not fits(codes | {worst: finer}):
            write_rounded_(model, {worst: codes[worst]})
            coarse.remove(worst)
            continue
        over[worst] = error_over_sigma(weights[worst], finer, known[worst])
        codes[worst] = finer
        write_rounded_(model, {worst: codes[worst]})
        after = measure(model)
    rows = tuple(RoundedRow(name, item.kind, item.bits, over.get(name)) for name, item in codes.items())
    return Rounding(codes, rows, before, after)

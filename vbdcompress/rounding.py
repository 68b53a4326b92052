"""Weights in fewer bits: half precision, 8-bit integers for each output, or a codebook.

How many bits a layer needs is asked of its posterior: N(theta, sigma^2) says how exactly each weight is
known, so a rounding error that is small beside sigma loses nothing that the data had said.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList

from vbdcompress.matrices import why_no_matrix

Array = npt.NDArray[Any]
INT8_MAX = 127
HALF_MAX, HALF_NORMAL = 65504.0, 2.0**-14
# Largest weights below this have a scale of their own
SMALL = 2.0**-10
# Largest root mean square of error over sigma: at 1 rounding adds as much as the posterior leaves open
ROUNDING_OVER_SIGMA = 1.0
CODEBOOK_ROUNDS = 100
# A weight known more exactly than this counts as known this exactly
SIGMA_MIN = 1e-8


@dataclass(frozen=True)
class Rounded:
    """A weight in fewer bits; 0 stays 0, and has the code 0.

    Attributes:
        kind: "fp16", "int8" or "codebook".
        bits: of each code.
        codes: the weight's shape: float16, int8, or uint8 places in the table.
        table: [up to 2^bits] float32, its first entry 0; None without a codebook.
        scale: [outputs] float32, what the codes of each output are multiplied by, or [1]; None: by nothing.
        dim: of the outputs in the weight.
    """

    kind: Literal["fp16", "int8", "codebook"]
    bits: int
    codes: Array
    table: Array | None = None
    scale: Array | None = None
    dim: int = 0

    def decode(self) -> Array:
        """The weight, float32, as the exported graph computes it."""
        values: Array = self.codes.astype(np.float32) if self.table is None else self.table[self.codes]
        return values if self.scale is None else values * along(self.scale, self.dim, values.ndim)


def in_half(values: Array) -> Array:
    """The nearest finite values of half precision, as float32: numpy sorts float16 wrongly on some CPUs."""
    return np.clip(values, -HALF_MAX, HALF_MAX).astype(np.float16).astype(np.float32)


def along(vector: Array, dim: int, dims: int) -> Array:
    """A vector as a tensor of `dims` dimensions that broadcasts along one of them."""
    return vector.reshape([-1 if number == dim else 1 for number in range(dims)])


@dataclass(frozen=True)
class Weight:
    """A matrix of weights in a network.

    Attributes:
        tensor: the parameter.
        outputs: its dimension of the outputs, each of which may have a scale. None where a file may hold
            it cut up or in another order, as those of recurrent layers: few values are known again there.
    """

    tensor: Tensor
    outputs: int | None

    def array(self) -> Array:
        """Its values, float32."""
        values: Array = self.tensor.detach().cpu().float().numpy()
        return values


def roundable(model: nn.Module) -> dict[str, Weight]:
    """Each matrix of weights by its name, once however often it is used."""
    modules = dict(model.named_modules())
    found = {}
    for name, parameter in model.named_parameters():
        layer = modules[name.rpartition(".")[0]]
        own_weight = name.rpartition(".")[2] == "weight"
        if isinstance(layer, nn.Linear | _ConvNd):
            if own_weight:
                found[name] = Weight(parameter, 1 if isinstance(layer, _ConvTransposeNd) else 0)
        elif isinstance(layer, nn.Embedding | nn.EmbeddingBag) and own_weight:
            found[name] = Weight(parameter, 1)
        elif not isinstance(layer, ParametrizationList) and why_no_matrix(layer, name, parameter) is None:
            found[name] = Weight(parameter, None)
    return found


def round_weight(weight: Weight, bits: int, sigma: Array | None = None) -> Rounded:
    """A matrix of weights in 16, 8 or 4 bits; it is left as it was.

    Args:
        bits: 16: half precision. 8: integers with a scale for each output, or 256 values, whichever is
            smaller. 4: 16 values. Values stand where they do least harm, by k-means.
        sigma: the weight's shape: how exactly it is known; None counts every error alike.
    """
    values, dim = weight.array(), weight.outputs
    if bits == 8 and dim is not None and values.shape[dim] <= 2**bits:  # as many scales as a table has values
        return _to_int8(values, dim)
    largest = float(np.abs(values).max(initial=0.0))
    # half precision tells numbers far below this poorly from one another
    unit = 2.0 ** math.floor(math.log2(largest)) if 0 < largest < SMALL else 1.0
    values, sigma = values / np.float32(unit), None if sigma is None else sigma / unit
    if bits == 16:
        rounded = Rounded("fp16", 16, in_half(values).astype(np.float16))
    else:
        rounded = _to_codebook(values, bits, sigma)
    return rounded if unit == 1 else replace(rounded, scale=np.array([unit], dtype=np.float32))


def _to_int8(weight: Array, dim: int) -> Rounded:
    largest = np.abs(np.moveaxis(weight, dim, 0)).reshape(weight.shape[dim], -1).max(1)
    scale = (largest / INT8_MAX).astype(np.float32)
    scale[scale == 0] = 1.0
    # Half precision holds it well enough where it is no subnormal number, and is what the file then stores
    scale = np.where(scale < HALF_NORMAL, scale, in_half(scale))
    steps = np.rint(weight / along(scale, dim, weight.ndim))
    codes = np.clip(steps, -INT8_MAX, INT8_MAX).astype(np.int8)
    return Rounded("int8", 8, codes, scale=scale, dim=dim)


def _to_codebook(weight: Array, bits: int, sigma: Array | None) -> Rounded:
    kept = weight != 0
    values = weight[kept]
    table = np.concatenate([[0.0], _cluster(values, 2**bits - 1, None if sigma is None else sigma[kept])])
    table = in_half(table)
    codes = np.zeros(weight.shape, dtype=np.uint8)
    ends = (table[1:-1] + table[2:]) / 2 if len(table) > 2 else np.empty(0)
    codes[kept] = np.minimum(1 + np.searchsorted(ends, values), len(table) - 1)
    return Rounded("codebook", bits, codes, table=table)


def _cluster(values: Array, count: int, sigma: Array | None) -> Array:
    """At most `count` values in rising order, near all the given ones in units of sigma."""
    different, place = np.unique(in_half(values), return_inverse=True)
    if len(different) - (0 in different) <= count:
        few: Array = different[different != 0].astype(np.float64)
        return few
    from sklearn.cluster import KMeans  # half a second that most commands need not wait for

    # Weights that half precision does not tell apart are one point: at most some ten thousand, of millions
    each = np.ones(len(values))
    if sigma is not None:
        each = 1 / np.square(np.maximum(sigma.astype(np.float64), SIGMA_MIN))
    weights = np.bincount(place, each)
    points = np.bincount(place, each * values) / weights
    # The best quantiser's values stand as dense as the cube root of what lies there (Panter, Dite, 1951)
    share = np.cumsum(np.bincount(place, np.cbrt(each)))
    start = points[np.searchsorted(share, share[-1] * (np.arange(count) + 0.5) / count)]
    start = np.where(
        np.diff(start, prepend=-np.inf) > 0, start, np.quantile(points, np.linspace(0, 1, count))
    )
    found = KMeans(count, init=start.reshape(-1, 1), n_init=1, max_iter=CODEBOOK_ROUNDS).fit(
        points.reshape(-1, 1), sample_weight=weights
    )
    centres = np.unique(in_half(found.cluster_centers_.ravel())).astype(np.float64)
    nonzero: Array = centres[centres != 0]
    return nonzero


def error_over_sigma(weight: Weight, rounded: Rounded, sigma: Array) -> float:
    """Root mean square of (rounded - weight) / sigma over the weights that are not 0."""
    values = weight.array()
    kept = values != 0
    if not kept.any():
        return 0.0
    errors = (rounded.decode() - values)[kept].astype(np.float64) / np.maximum(sigma[kept], SIGMA_MIN)
    return float(np.sqrt(np.square(errors).mean()))


def choose_bits(weight: Weight, sigma: Array, limit: float = ROUNDING_OVER_SIGMA) -> Rounded:
    """The fewest of 4, 8 and 16 bits whose errors stay below `limit` sigma; 16 where none do."""
    for bits in (4, 8):
        rounded = round_weight(weight, bits, sigma)
        if error_over_sigma(weight, rounded, sigma) <= limit:
            return rounded
    return round_weight(weight, 16)


@torch.no_grad()
def write_rounded_(model: nn.Module, rounded: Mapping[str, Rounded]) -> None:
    """Put rounded weights in the place of a network's own, in place."""
    for name, weight in roundable(model).items():
        if name in rounded:
            weight.tensor.copy_(torch.from_numpy(np.ascontiguousarray(rounded[name].decode())))

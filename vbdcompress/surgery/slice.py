"""Cutting positions out of layers, in place, and the plan that says which."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from vbdcompress.compare import forget_calls_
from vbdcompress.errors import SlimError
from vbdcompress.gather import GatherLinear
from vbdcompress.layer_norm import ChannelNorm, narrow_norm_
from vbdcompress.opening import open_layers_
from vbdcompress.parametrized import store_weights_
from vbdcompress.recurrent import Recurrent, narrow_, recurrent_parameters, rows_of_units
from vbdcompress.surgery.walk import shared_parameters, tie_again_
from vbdcompress.surgery.weights import Table, keeps_groups_apart, shares

# Fields of a cut that list positions
POSITIONS = frozenset({"inputs", "outputs", "gather"})


@dataclass(frozen=True)
class LayerCut:
    """What of one layer stays, as indices into the original layer.

    Attributes:
        inputs, outputs: kept positions; None keeps all. Layers with one entry for each channel
            (batch norm, depthwise convolution) only have `outputs`. A recurrent layer's inputs are followed
            by the hidden units that it reads again.
        gather: positions that the layer picks from the input that it is given, where that stays
            wider than what it reads; None reads it as it comes.
        new_bias: a bias is added to a layer that had none, to hold constants of removed inputs.
        opened: the module is replaced by its opened form, see `opening`.
        stored: its computed weights are plain ones, see `parametrized`.
        attributes: new values of numbers that the module keeps beside its layers, such as num_heads.
        parameters: own parameter -> (dimension, kept positions).
    """

    inputs: tuple[int, ...] | None = None
    outputs: tuple[int, ...] | None = None
    gather: tuple[int, ...] | None = None
    new_bias: bool = False
    opened: bool = False
    stored: bool = False
    attributes: Mapping[str, int] | None = None
    parameters: Mapping[str, tuple[int, Sequence[int]]] | None = None


@dataclass(frozen=True)
class RemovalPlan:
    """Layer by layer what stays: enough to cut a freshly built original network to the slim one."""

    cuts: Mapping[str, LayerCut]

    def storing(self, names: Iterable[str]) -> "RemovalPlan":
        """The same plan, for a network whose modules of these names have parametrizations."""
        cuts = {name: replace(self.cuts.get(name, LayerCut()), stored=True) for name in names}
        return RemovalPlan({**self.cuts, **cuts})

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Plain JSON types; leaves out what is not cut."""
        return {
            name: {key: value for key, value in asdict(cut).items() if value not in (None, False)}
            for name, cut in self.cuts.items()
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Mapping[str, Any]]) -> "RemovalPlan":
        """Inverse of `to_json`. Raises SlimError where it is not such a plan."""
        try:
            return cls({name: _read_cut(cut) for name, cut in content.items()})
        except (TypeError, ValueError, AttributeError) as error:
            raise SlimError("removal plan", f"is malformed: {error}") from error


def _read_cut(content: Mapping[str, Any]) -> LayerCut:
    """Raises TypeError, ValueError or AttributeError where it is no such cut: files come from anywhere."""
    values = dict(content)
    for key in POSITIONS & values.keys():
        values[key] = _read_positions(values[key])
    if "parameters" in values:
        values["parameters"] = {
            str(name): (_read_number(dim), _read_positions(kept))
            for name, (dim, kept) in values["parameters"].items()
        }
    if "attributes" in values:
        values["attributes"] = {
            str(name): _read_number(number) for name, number in values["attributes"].items()
        }
    return LayerCut(**values)


def _read_positions(kept: Any) -> tuple[int, ...]:
    if not isinstance(kept, list | tuple):
        raise TypeError(f"positions are a {type(kept).__name__}")
    return tuple(_read_number(place) for place in kept)


def _read_number(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise TypeError(f"{number!r} is no number of something")
    return number


def apply_plan_(model: nn.Module, plan: RemovalPlan) -> None:
    """Cut a plain network down to the plan, in place.

    Raises:
        SlimError: the plan names a layer, or a position, that the network does not have.
    """
    store_weights_(model, [name for name, cut in plan.cuts.items() if cut.stored])
    open_layers_(model, {name for name, cut in plan.cuts.items() if cut.opened})
    tied = list(shared_parameters(model).values())
    for name, cut in plan.cuts.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError as error:
            raise SlimError("removal plan", f"names layer '{name}', which the network lacks.") from error
        try:
            cut_layer_(layer, cut)
        except (IndexError, RuntimeError, TypeError, AttributeError) as error:
            raise SlimError("removal plan", f"does not fit layer '{name}' ({layer}): {error}") from error
    tie_again_(model, tied)
    forget_calls_(model)


@torch.no_grad()
def cut_layer_(layer: nn.Module, cut: LayerCut) -> None:
    """Cut one layer, in place, and keep its own record of its widths true."""
    for name, value in (cut.attributes or {}).items():
        if not isinstance(vars(layer).get(name), Real) or isinstance(vars(layer)[name], bool):
            raise AttributeError(f"it keeps no number '{name}'")
        setattr(layer, name, value)
    for name, (dim, kept) in (cut.parameters or {}).items():
        _select_(layer, name, dim, kept)
    if cut.inputs is None and cut.outputs is None and not cut.new_bias:
        return
    if isinstance(layer, nn.Linear):
        _cut_linear_(layer, cut)
    elif isinstance(layer, Table):
        _select_(layer, "weight", 1, cut.outputs)
        layer.embedding_dim = layer.weight.shape[1]
    elif isinstance(layer, _ConvNd):
        _cut_conv_(layer, cut)
    elif isinstance(layer, _BatchNorm | _InstanceNorm | nn.PReLU | ChannelNorm):
        _cut_per_channel_(layer, cut)
    elif isinstance(layer, nn.GroupNorm):
        _cut_group_norm_(layer, cut)
    elif isinstance(layer, Recurrent):
        _cut_recurrent_(layer, cut)
    else:
        raise SlimError("slim", f"does not know how to cut a {type(layer).__name__}.")
    if cut.new_bias and getattr(layer, "bias", None) is None:
        width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        assert isinstance(layer.weight, Tensor)
        assert isinstance(width, int)
        layer.bias = nn.Parameter(layer.weight.new_zeros(width), layer.weight.requires_grad)


def _cut_linear_(layer: nn.Linear, cut: LayerCut) -> None:
    _select_(layer, "weight", 0, cut.outputs)
    _select_(layer, "bias", 0, cut.outputs)
    _select_(layer, "weight", 1, cut.inputs)
    layer.out_features, layer.in_features = layer.weight.shape
    if isinstance(layer, GatherLinear):  # cut once before: it picks fewer of what it picked
        _select_(layer, "input_index", 0, cut.inputs)
    elif cut.gather is not None:
        layer.__class__ = GatherLinear
        layer.register_buffer("input_index", torch.tensor(cut.gather, device=layer.weight.device))


def _cut_per_channel_(layer: nn.Module, cut: LayerCut) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        _select_(layer, name, 0, cut.outputs)
    if isinstance(layer, ChannelNorm) and cut.outputs is not None:
        narrow_norm_(layer, len(cut.outputs))
    elif cut.outputs is not None:
        field = "num_parameters" if isinstance(layer, nn.PReLU) else "num_features"
        setattr(layer, field, len(cut.outputs))


def _cut_recurrent_(layer: Recurrent, cut: LayerCut) -> None:
    units = None if cut.outputs is None else [unit for unit in cut.outputs if unit < layer.hidden_size]
    inputs = None if cut.inputs is None else [place for place in cut.inputs if place < layer.input_size]
    rows = None if units is None else rows_of_units(layer, units)
    for name in recurrent_parameters(layer):
        _select_(layer, name, 0, rows)
        if name.startswith("weight"):
            _select_(layer, name, 1, inputs if name.startswith("weight_ih") else units)
    layer.input_size = layer.input_size if inputs is None else len(inputs)
    if units is not None:
        narrow_(layer, units)


def _cut_group_norm_(layer: nn.GroupNorm, cut: LayerCut) -> None:
    kept = layer.num_channels if cut.outputs is None else len(cut.outputs)
    _select_(layer, "weight", 0, cut.outputs)
    _select_(layer, "bias", 0, cut.outputs)
    layer.num_groups = layer.num_groups * kept // layer.num_channels
    layer.num_channels = kept


def _cut_conv_(layer: _ConvNd, cut: LayerCut) -> None:
    _, inputs, outputs = shares(layer)
    transposed = isinstance(layer, _ConvTransposeNd)
    if keeps_groups_apart(layer):  # whole groups go: rows of the weight, or of its transpose
        if cut.outputs is not None:
            kept = sorted({position // outputs for position in cut.outputs})
            rows = tuple(group * inputs + number for group in kept for number in range(inputs))
            _select_(layer, "weight", 0, rows if transposed else cut.outputs)
            _select_(layer, "bias", 0, cut.outputs)
            layer.groups = len(kept)
    else:
        _select_(layer, "bias", 0, cut.outputs)
        # of several groups each loses the same: the second dimension counts within one
        here, there = (cut.inputs, cut.outputs) if transposed else (cut.outputs, cut.inputs)
        within = outputs if transposed else inputs
        _select_(layer, "weight", 0, here)
        _select_(layer, "weight", 1, None if there is None else tuple(p for p in there if p < within))
    _, inputs, outputs = shares(layer)
    layer.in_channels, layer.out_channels = layer.groups * inputs, layer.groups * outputs


def _select_(layer: nn.Module, name: str, dim: int, kept: Sequence[int] | None) -> None:
    tensor = getattr(layer, name, None)
    if kept is None or tensor is None:
        return
    index = torch.tensor(list(kept), dtype=torch.int64, device=tensor.device)
    selected = tensor.detach().index_select(dim, index).contiguous()
    if isinstance(tensor, nn.Parameter):
        setattr(layer, name, nn.Parameter(selected, requires_grad=tensor.requires_grad))
    else:
        setattr(layer, name, selected)

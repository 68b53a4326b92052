"""Recurrent layers of torch one by one: each may keep another number of hidden units."""

import re
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

# What they read are their inputs and, in the next step, their own hidden units
Recurrent = nn.RNNBase | nn.RNNCellBase
# What one layer calls its parameters, in one direction
_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class StackedRecurrent(nn.Module):
    """nn.LSTM, nn.GRU or nn.RNN of several layers, the same function and signature, with a module for each.

    Where layers are left with other units than one another, the state that comes out is the last layer's
    alone: its directions stand at the end, as they did.
    """

    def __init__(self, original: nn.RNNBase) -> None:
        super().__init__()
        self.num_layers, self.bidirectional = original.num_layers, original.bidirectional
        self.input_size, self.hidden_size = original.input_size, original.hidden_size
        self.batch_first, self.dropout, self.bias = original.batch_first, original.dropout, original.bias
        self.mode, self.proj_size = original.mode, original.proj_size
        self.layers = nn.ModuleList(_layer_of(original, number) for number in range(original.num_layers))
        self.train(original.training)

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """As nn.LSTM, nn.GRU and nn.RNN."""
        states = []
        for number, layer in enumerate(self.layers):
            if number:
                input = self._drop(input)
            input, state = layer(input, self._state_of(hx, number))
            states.append(state)
        if len({layer.kept if isinstance(layer, _Narrow) else None for layer in self.layers}) > 1:
            return input, states[-1]
        if isinstance(states[0], Tensor):
            return input, torch.cat(states)
        return input, tuple(torch.cat(part) for part in zip(*states, strict=True))

    def __getattr__(self, name: str) -> Any:
        """A weight by the name that it had, as first states are made like one."""
        found = re.fullmatch(r"((?:weight|bias)_[ih]h_l)(\d+)(_reverse)?", name)
        if found and int(found[2]) < len(self.layers):
            return getattr(self.layers[int(found[2])], f"{found[1]}0{found[3] or ''}")
        return super().__getattr__(name)

    def flatten_parameters(self) -> None:
        """As torch's own."""
        for layer in self.layers:
            assert isinstance(layer, nn.RNNBase)
            layer.flatten_parameters()

    def _drop(self, input: Any) -> Any:
        if isinstance(input, PackedSequence):
            return input._replace(data=F.dropout(input.data, self.dropout, self.training))
        return F.dropout(input, self.dropout, self.training)

    def _state_of(self, hx: Any, number: int) -> Any:
        """The part of the first state, [layers * directions, ...], that is of one layer."""
        directions = 2 if self.bidirectional else 1
        own = slice(number * directions, (number + 1) * directions)
        if hx is None:
            return None
        parts = (hx,) if isinstance(hx, Tensor) else hx
        if any(len(part) != directions * len(self.layers) for part in parts):
            raise ValueError("the first state is of the last layer alone: layers have unlike units.")
        return hx[own] if isinstance(hx, Tensor) else tuple(part[own] for part in hx)


def _layer_of(original: nn.RNNBase, number: int) -> nn.RNNBase:
    directions = 2 if original.bidirectional else 1
    options: dict[str, Any] = {
        name: getattr(original, name)
        for name in ("bias", "batch_first", "bidirectional", "nonlinearity")
        if hasattr(original, name)
    }
    size = original.hidden_size * directions if number else original.input_size
    layer: nn.RNNBase = type(original)(size, original.hidden_size, **options, device="meta")  # type: ignore[arg-type]
    for suffix in ("", "_reverse")[:directions]:
        for kind in _KINDS:
            held = getattr(original, f"{kind}_l{number}{suffix}", None)
            if held is not None:
                own = nn.Parameter(held.detach().clone(), held.requires_grad)
                setattr(layer, f"{kind}_l0{suffix}", own)
    return layer


class _Narrow:
    """A recurrent layer that was cut, and picks its own units of first states made for all that there were.

    `units` [hidden_size] says which, `kept` too. A state that it gave itself is taken as it is.
    """

    units: Tensor
    kept: tuple[int, ...]
    hidden_size: int

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        if hx is not None:
            hx = tree_map(lambda s: s if s.shape[-1] == self.hidden_size else s[..., self.units], hx)
        output: tuple[Any, Any] = super().forward(input, hx)  # type: ignore[misc]
        return output


class NarrowLSTM(_Narrow, nn.LSTM):
    """nn.LSTM that was cut."""


class NarrowGRU(_Narrow, nn.GRU):
    """nn.GRU that was cut."""


class NarrowRNN(_Narrow, nn.RNN):
    """nn.RNN that was cut."""


_NARROW: dict[type, type] = {nn.LSTM: NarrowLSTM, nn.GRU: NarrowGRU, nn.RNN: NarrowRNN}


def open_recurrent(module: nn.Module) -> StackedRecurrent | None:
    """A recurrent module of several layers with its layers in the open; None for others."""
    return StackedRecurrent(module) if _is_plain(module) and module.num_layers > 1 else None


def recurrent_parameters(layer: Recurrent) -> list[str]:
    """Names of the parameters of a recurrent module's first layer, in both directions."""
    return [name for name in layer._parameters if re.fullmatch(r"(weight|bias)_[ih]h(_l0(_reverse)?)?", name)]


def state_width(layer: Recurrent) -> int:
    """Number of what a recurrent layer reads again: its hidden units, or their projections."""
    return int(getattr(layer, "proj_size", 0) or layer.hidden_size)


def rows_of_units(layer: Recurrent, units: Sequence[int]) -> list[int]:
    """Rows of a recurrent layer's weights that write hidden units: each of its gates has one for each."""
    weight = getattr(layer, recurrent_parameters(layer)[0])
    return [first + unit for first in range(0, len(weight), layer.hidden_size) for unit in units]


def writes_units(layer: Recurrent) -> bool:
    """Whether a recurrent module is one layer of torch's own, so that its hidden units can go one by one."""
    return _is_plain(layer) and layer.num_layers == 1


def _is_plain(module: nn.Module) -> TypeGuard[nn.RNNBase]:
    """Whether it is torch's own, holds its weights, and gives its hidden units themselves."""
    if not isinstance(module, nn.RNNBase) or type(module) not in {*_NARROW, *_NARROW.values()}:
        return False
    return module.proj_size == 0 and set(module._flat_weights_names) <= set(module._parameters)


def narrow_(layer: Recurrent, units: Sequence[int]) -> None:
    """Note which of its units a layer has left, in place."""
    left = torch.tensor(units, device=next(layer.parameters()).device)
    layer.hidden_size = len(units)
    if isinstance(layer, _Narrow):  # cut once before
        layer.units = layer.units[left]
    else:
        layer.__class__ = _NARROW[type(layer)]
        layer.register_buffer("units", left)
    layer.kept = tuple(layer.get_buffer("units").tolist())


def scale_state(layer: Recurrent, factors: Tensor) -> None:
    """Let the layer read each of its hidden units, [units], by a factor, until `restore_state`."""
    assert isinstance(layer, nn.RNNBase)
    held = zip(layer._flat_weights_names, _held(layer), strict=True)
    layer._flat_weights = [w * factors.to(w.dtype) if n.startswith("weight_hh") else w for n, w in held]


def restore_state(layer: Recurrent) -> None:
    """Let the layer read its hidden units as they are."""
    assert isinstance(layer, nn.RNNBase)
    layer._flat_weights = _held(layer)


def _held(layer: nn.RNNBase) -> list[Any]:
    return [getattr(layer, name) for name in layer._flat_weights_names]

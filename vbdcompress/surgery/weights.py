"""Weights of the layers that mix channels, seen by what reads an input and by what writes an output."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from vbdcompress.layer_norm import ChannelNorm, Narrow
from vbdcompress.recurrent import Recurrent, recurrent_parameters, rows_of_units, state_width

# Their columns are channels; what they read, rows by number, are none
Table = nn.Embedding | nn.EmbeddingBag
Mixing = nn.Linear | _ConvNd | nn.Embedding | nn.EmbeddingBag
Reader = Mixing | Recurrent
Index = npt.NDArray[np.int64]


def keeps_groups_apart(module: object) -> bool:
    """Whether a convolution's groups go whole, inputs with outputs: where that is finer than equal shares.

    A depthwise convolution has as many groups as channels; 32 groups of 4 can go one by one, too,
    while 2 groups of 48 must each lose as many.
    """
    return isinstance(module, _ConvNd) and 1 < module.groups >= module.in_channels // module.groups


def is_mixing(module: object) -> bool:
    """Layers whose outputs read all inputs, or all of their group: they write one group and read another.

    A table of embeddings writes one, unless it keeps its rows to a norm, which is of all columns.
    """
    if isinstance(module, Table):
        return module.max_norm is None
    return isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and not keeps_groups_apart(module))


def shares(layer: Mixing) -> tuple[int, int, int]:
    """(groups, inputs in each, outputs in each)."""
    if isinstance(layer, nn.Linear):
        return 1, layer.weight.shape[1], layer.weight.shape[0]
    if isinstance(layer, Table):
        return 1, layer.weight.shape[0], layer.weight.shape[1]
    first, second = layer.weight.shape[:2]
    if isinstance(layer, _ConvTransposeNd):
        return layer.groups, first // layer.groups, second
    return layer.groups, second, first // layer.groups


def input_dim(layer: nn.Module) -> int:
    """The dimension of its input that a layer's channels lie along."""
    if isinstance(layer, Narrow):
        return layer.dim
    return -1 if isinstance(layer, nn.Linear | Table | Recurrent | ChannelNorm) else 1


def reading_weights(layer: Reader) -> list[str]:
    """Names of the weights that read a layer's input."""
    if isinstance(layer, Recurrent):
        return [name for name in recurrent_parameters(layer) if name.startswith("weight")]
    return ["weight"]


def layer_widths(layer: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a layer that channel groups know; for one between, both are its channels'."""
    if isinstance(layer, Recurrent):
        directions = 2 if getattr(layer, "bidirectional", False) else 1
        return layer.input_size + state_width(layer), directions * layer.hidden_size
    if isinstance(layer, Mixing):
        groups, inputs, outputs = shares(layer)
        return groups * inputs, groups * outputs
    if isinstance(layer, ChannelNorm):
        return layer.normalized_shape[-1], layer.normalized_shape[-1]
    for name in ("num_features", "num_parameters", "num_channels"):
        if isinstance(width := getattr(layer, name, None), int):
            return width, width
    raise TypeError(f"{type(layer).__name__} has no channels")


def outputs_of_inputs(layer: nn.Module, inputs: Index) -> Index:
    """Outputs of a layer between that go with its inputs: the same, or those of the same groups."""
    if not isinstance(layer, _ConvNd):
        return inputs
    _, read, written = shares(layer)
    return np.flatnonzero(np.isin(np.arange(layer.groups * written) // written, inputs // read))


def by_input(layer: Mixing) -> Tensor:
    """[groups, inputs in each, outputs in each, taps] view of the weight."""
    groups, inputs, outputs = shares(layer)
    weight = layer.weight.detach()
    if not weight.is_contiguous():  # channels last
        layer.weight.data = weight = weight.contiguous()
    if isinstance(layer, _ConvTransposeNd | Table):
        return weight.view(groups, inputs, outputs, -1)
    return weight.view(groups, outputs, inputs, -1).transpose(1, 2)


def _all_by_input(layer: Reader) -> Iterator[tuple[int, Tensor]]:
    """Of each weight that reads it, the first position that it reads, and a view as `by_input` gives it."""
    if not isinstance(layer, Recurrent):
        yield 0, by_input(layer)
        return
    for name in reading_weights(layer):
        view = getattr(layer, name).detach().t()[None, ..., None]
        yield 0 if name.startswith("weight_ih") else layer.input_size, view


def unread_inputs(layer: Reader) -> Tensor:
    """[inputs] bool: every weight that reads it is 0."""
    unread = None
    for start, weight in _all_by_input(layer):
        if unread is None:
            unread = torch.ones(layer_widths(layer)[0], dtype=torch.bool, device=weight.device)
        zero = (weight == 0).flatten(2).all(2).flatten()
        unread[start : start + len(zero)] &= zero
    assert unread is not None
    return unread


def unwritten_outputs(layer: Mixing | Recurrent) -> Tensor:
    """[outputs] bool: every weight that writes it is 0."""
    if isinstance(layer, Recurrent):  # what it writes changes from step to step
        return torch.zeros(layer_widths(layer)[1], dtype=torch.bool)
    return (by_input(layer).transpose(1, 2) == 0).flatten(2).all(2).flatten()


def zero_inputs_(layer: Reader, positions: Sequence[int]) -> None:
    """Set to 0 what reads the inputs, in place."""
    factors = torch.ones(layer_widths(layer)[0])
    factors[list(positions)] = 0.0
    scale_inputs_(layer, factors)


def zero_outputs_(layer: Mixing | Recurrent, positions: Sequence[int]) -> None:
    """Set to 0 what writes the outputs, with their biases, in place."""
    if isinstance(layer, Recurrent):
        rows = rows_of_units(layer, sorted({position % layer.hidden_size for position in positions}))
        for name in recurrent_parameters(layer):
            getattr(layer, name).data[rows] = 0.0
        return
    where = torch.as_tensor(positions, dtype=torch.int64, device=layer.weight.device)
    weight = by_input(layer).transpose(1, 2)
    weight[where // weight.shape[1], where % weight.shape[1]] = 0.0
    if getattr(layer, "bias", None) is not None:
        layer.bias.data[where] = 0.0  # type: ignore[union-attr, operator]


def scale_inputs_(layer: Reader, factors: Tensor) -> None:
    """Multiply the weights that read each input by its factor, [inputs], in place."""
    for start, weight in _all_by_input(layer):
        groups, width = weight.shape[:2]
        own = factors[start : start + groups * width].to(weight)
        weight.mul_(own.view(groups, width, 1, 1))


def effect_of(layer: Mixing, constants: Tensor) -> Tensor:
    """[outputs]: what constant inputs, [inputs], add where the layer reads all of its taps."""
    weight = by_input(layer).sum(3)
    return torch.einsum("gi,gio->go", constants.to(weight.dtype).view(weight.shape[:2]), weight).flatten()

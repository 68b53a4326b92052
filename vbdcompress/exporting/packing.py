"""Small constants in an ONNX file from which standard operators rebuild its weights.

A weight that is mostly zeros becomes the gaps between its nonzeros and their values; one in few bits
becomes its codes. onnxruntime folds what rebuilds them when a session is made, so the file runs as the
dense one does; with its optimisations switched off it would rebuild them at every run.
"""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import nn

from vbdcompress.config import Bits
from vbdcompress.exporting.rebuilding import Codes, Part, rebuild_dense, rebuild_sparse, rebuild_together
from vbdcompress.records import PackedTensor
from vbdcompress.rounding import Array, Rounded, along, in_half, roundable

# A tensor below this many bytes is not worth the operators that would rebuild it
SMALLEST = 256
# Larger ones are rebuilt alone: together they would all be in memory several times while a session is made
LARGEST_MERGED = 1 << 20
# Batch norm folded into codes' scale is multiplied in another order
FOLDED = 1e-6


# Bytes of one value; what the posterior allows may be as few as 4 bits
WIDTHS = {"32": 4.0, "16": 2.0, "8": 1.0, "4": 0.5, "auto": 0.5}


def estimate_bytes(model: nn.Module, bits: Bits, unused: Collection[str] = ()) -> int:
    """Bytes of a network's numbers in a packed file, each tensor dense or sparse, whichever is smaller.

    Args:
        unused: names of parameters that the file does not hold.
    """
    weights, total = roundable(model), 0.0
    for name, parameter in model.named_parameters():
        if name in unused:
            continue
        width = WIDTHS[bits] if name in weights else WIDTHS["32"]
        total += min(width * parameter.numel(), (width + 1) * int(parameter.count_nonzero()))
    return round(total)


@dataclass(frozen=True)
class Storage:
    """How an ONNX file stores a network.

    Attributes:
        pack: weights as the constants that `pack_` makes of them.
        rounded: parameter -> the codes that its values were made from, where they were rounded.
        metadata: properties of the file: name -> value.
    """

    pack: bool = False
    rounded: Mapping[str, Rounded] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Choice:
    """The encoding that a tensor gets.

    Attributes:
        sparse: gaps and codes; False: all codes.
        part: what rebuilds it alone.
        dense: bytes of the tensor as it stood.
    """

    name: str
    codes: Codes
    sparse: bool
    part: Part
    dense: int

    def row(self, bytes_: int) -> PackedTensor:
        """What the report says of the tensor, stored in so many bytes."""
        shape = tuple(self.codes.codes.shape)
        encoding = _describe(self.codes, self.sparse)
        return PackedTensor(self.name, encoding, shape, self.dense, bytes_, self.codes.exact)


def pack_(proto: onnx.ModelProto, rounded: Mapping[str, Rounded] | None = None) -> tuple[PackedTensor, ...]:
    """Replace float32 weights by the smallest of their encodings, in place; a row for each that was.

    Args:
        proto: a model; tensors that no encoding makes smaller stay as they are.
        rounded: parameter -> the codes that its values were made from, where they were rounded. Found
            again by its values, transposed or scaled by a folded batch norm too.
    """
    chosen = []
    letters = _free_letters(proto.graph)
    for number, tensor in enumerate(list(proto.graph.initializer)):
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.ByteSize() >= SMALLEST:
            found = _smallest(tensor, f"{letters}{number}", rounded or {})
            if found is not None:
                chosen.append(found)
                proto.graph.initializer.remove(tensor)
    nodes: list[onnx.NodeProto] = []
    rows = []
    for group in _groups(chosen):
        part = group[0].part
        if len(group) > 1:
            part = Part(part.prefix)
            rebuilt = rebuild_together(part, [each.codes for each in group])
            for value, each in zip(rebuilt, group, strict=True):
                part.finish(value, each.name)
        proto.graph.initializer.extend(part.constants)
        nodes += part.nodes
        share = part.bytes / sum(each.part.bytes for each in group)
        rows += [each.row(round(share * each.part.bytes)) for each in group]
    rest = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *rest])
    return tuple(rows)


def rebuilding_graph(proto: onnx.ModelProto, rows: Sequence[PackedTensor]) -> onnx.ModelProto:
    """What rebuilds the packed tensors of a model, alone: no input, these tensors as outputs."""
    wanted = {row.name for row in rows}
    nodes: list[onnx.NodeProto] = []
    for node in reversed(proto.graph.node):
        if wanted & set(node.output):
            nodes.insert(0, node)
            wanted |= set(node.input)
    outputs = [helper.make_tensor_value_info(row.name, onnx.TensorProto.FLOAT, row.shape) for row in rows]
    constants = [item for item in proto.graph.initializer if item.name in wanted]
    graph = helper.make_graph(nodes, "weights", [], outputs, constants)
    return helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)


def _free_letters(graph: onnx.GraphProto) -> str:
    """What the names of new tensors and constants can begin with: as a rule p, short for the file's sake."""
    names = {item.name for item in (*graph.input, *graph.initializer)}
    names |= {name for node in graph.node for name in (*node.input, *node.output)}
    return next(
        letters
        for letters in ("p" * count for count in itertools.count(1))
        if not any(re.match(rf"{letters}\d", name) for name in names)
    )


def _smallest(tensor: onnx.TensorProto, prefix: str, rounded: Mapping[str, Rounded]) -> _Choice | None:
    """The encoding with the fewest bytes; None where that is the tensor as it stands."""
    array = numpy_helper.to_array(tensor)
    parts = []
    for codes in _encodings(tensor.name, array, rounded):
        for rebuild in (rebuild_sparse, rebuild_dense):
            part = Part(prefix)
            rebuilt = rebuild(part, codes)
            if rebuilt is not None:
                part.finish(rebuilt, tensor.name)
                sparse = rebuild is rebuild_sparse
                parts.append(_Choice(tensor.name, codes, sparse, part, tensor.ByteSize()))
    smallest = min(parts, key=lambda item: item.part.bytes, default=None)
    return smallest if smallest is not None and smallest.part.bytes < tensor.ByteSize() else None


def _groups(chosen: Sequence[_Choice]) -> list[list[_Choice]]:
    """Small sparse tensors of one kind together: they take fewer bytes and operators; the others alone."""
    groups: dict[Any, list[_Choice]] = {}
    for each in chosen:
        codes = each.codes.codes
        mergeable = each.sparse and each.codes.table is None and codes.any() and codes.size <= LARGEST_MERGED
        groups.setdefault(codes.dtype if mergeable else each.name, []).append(each)
    return list(groups.values())


def _describe(codes: Codes, sparse: bool) -> str:
    kind = "codebook" if codes.table is not None else str(codes.codes.dtype)
    values = f"{kind} of {codes.table.shape[-1]}" if codes.table is not None else kind
    return f"gaps and {values}" if sparse else values


def _encodings(name: str, array: Array, rounded: Mapping[str, Rounded]) -> Iterator[Codes]:
    """The tensor's own values, and the codes of the parameter that it came from."""
    yield Codes(array, None, None, 32, exact=True)
    # Of a network inside another its name stands behind that one's; what is tied has one name of several
    likely_first = sorted(rounded, key=lambda own: name != own and not name.endswith(f".{own}"))
    for each in (rounded[own] for own in likely_first):
        if each.codes.shape == array.shape and not array[each.codes == 0].any():
            found = _scaled(each, array)
            if found is not None:
                yield found
                return
    for each in rounded.values():  # a Linear that reads more than two dimensions is written transposed
        if each.codes.shape == array.shape[::-1] and each.codes.ndim == 2:
            scale = None if each.scale is None else along(each.scale, 1 - each.dim, 2)
            codes = Codes(each.codes.T, each.table, scale, each.bits, exact=True)
            if np.array_equal(codes.decode(), array):
                yield codes
                return
    if rounded:
        yield from _encodings_of_values(array)


def _encodings_of_values(array: Array) -> Iterator[Codes]:
    """What tells from the values alone that they were rounded: pieces of weights, or in another order.

    Half precision, and a codebook of a few such values, or one for each slice along the first dimension:
    recurrent layers of both directions are one tensor.
    """
    if not np.array_equal(in_half(array), array):
        return
    yield Codes(array.astype(np.float16), None, None, 16, exact=True)
    for slices in {1, len(array)} if array.ndim > 2 else {1}:
        rows = array.reshape(slices, -1)
        each = [np.unique(row[row != 0]) for row in rows]
        most = 1 + max(map(len, each))
        if most > 2**8:
            continue
        table, codes = np.zeros((slices, most), dtype=np.float32), np.zeros(rows.shape, dtype=np.uint8)
        for number, (values, row) in enumerate(zip(each, rows, strict=True)):
            table[number, 1 : 1 + len(values)] = values
            codes[number, row != 0] = 1 + np.searchsorted(values, row[row != 0])
        tables = table[0] if slices == 1 else table
        yield Codes(codes.reshape(array.shape), tables, None, 4 if most <= 2**4 else 8, exact=True)


def _scaled(rounded: Rounded, array: Array) -> Codes | None:
    """The parameter's codes with what batch norm multiplied each output by; None where that is not all."""
    decoded = rounded.decode()
    scale = None if rounded.scale is None else along(rounded.scale, rounded.dim, array.ndim)
    if np.array_equal(decoded, array):
        return Codes(rounded.codes, rounded.table, scale, rounded.bits, exact=True)
    outputs = decoded.shape[rounded.dim]
    rows, wanted = (np.moveaxis(item, rounded.dim, 0).reshape(outputs, -1) for item in (decoded, array))
    largest = np.abs(rows).argmax(1)[:, None]
    below, above = (np.take_along_axis(item, largest, 1)[:, 0] for item in (rows, wanted))
    factors = np.divide(above, below, out=np.ones_like(above), where=below != 0)
    factors = along(factors, rounded.dim, array.ndim)
    codes = Codes(
        rounded.codes, rounded.table, factors if scale is None else factors * scale, rounded.bits, exact=False
    )
    close = np.abs(codes.decode() - array).max() <= FOLDED * np.abs(array).max()
    return codes if close else None

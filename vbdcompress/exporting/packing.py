"""Small constants in an ONNX file from which standard operators rebuild its weights.

A weight that is mostly zeros becomes the gaps between its nonzeros and their values; one in few bits
becomes its codes. onnxruntime folds what rebuilds them when a session is made, so the file runs as the
dense one does; with its optimisations switched off it would rebuild them at every run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from vbdcompress.records import PackedTensor
from vbdcompress.rounding import Array, Rounded, along

# A tensor below this many bytes is not worth the operators that would rebuild it
SMALLEST = 256
# Batch norm folded into codes' scale is multiplied in another order
FOLDED = 1e-6


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
class _Codes:
    """A tensor as codes.

    Attributes:
        codes: its shape, float32, float16, int8 or uint8.
        table: what uint8 codes are places in; None: the codes are the values.
        scale: broadcasts to its shape: what the values are multiplied by; None: nothing.
        bits: of each code.
        exact: decoding gives the tensor to the last bit.
    """

    codes: Array
    table: Array | None
    scale: Array | None
    bits: int
    exact: bool

    def decode(self) -> Array:
        values = self.codes.astype(np.float32) if self.table is None else self.table[self.codes]
        return values if self.scale is None else values * self.scale


@dataclass
class _Part:
    """Nodes and constants that rebuild one tensor."""

    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, array: Array) -> str:
        name = f"{self.prefix}{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{self.prefix}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def finish(self, output: str) -> None:
        """Call the last node's output by the tensor's own name."""
        self.nodes[-1].output[0] = output

    @property
    def bytes(self) -> int:
        """Of the file, with the two or three that go before each part."""
        parts: list[onnx.NodeProto | onnx.TensorProto] = [*self.nodes, *self.constants]
        return sum(part.ByteSize() + 3 for part in parts)


def pack_(proto: onnx.ModelProto, rounded: Mapping[str, Rounded] | None = None) -> tuple[PackedTensor, ...]:
    """Replace float32 weights by the smallest of their encodings, in place; a row for each that was.

    Args:
        proto: a model; tensors that no encoding makes smaller stay as they are.
        rounded: parameter -> the codes that its values were made from, where they were rounded. Found
            again by name, transposed or scaled by a folded batch norm too.
    """
    packed = []
    nodes: list[onnx.NodeProto] = []
    for number, tensor in enumerate(list(proto.graph.initializer)):
        dense = tensor.ByteSize()
        if tensor.data_type != onnx.TensorProto.FLOAT or dense < SMALLEST:
            continue
        array = numpy_helper.to_array(tensor)
        parts = []
        for codes in _encodings(tensor.name, array, rounded or {}):
            for build in (_sparse, _dense):
                part = _Part(f"p{number}")
                if build(part, codes):
                    part.finish(tensor.name)
                    parts.append((part, codes, build is _sparse))
        smallest = min(parts, key=lambda item: item[0].bytes, default=None)
        if smallest is None or smallest[0].bytes >= dense:
            continue
        part, codes, sparse = smallest
        proto.graph.initializer.remove(tensor)
        proto.graph.initializer.extend(part.constants)
        nodes += part.nodes
        packed.append(
            PackedTensor(
                tensor.name, _describe(codes, sparse), tuple(array.shape), dense, part.bytes, codes.exact
            )
        )
    rest = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *rest])
    return tuple(packed)


def _describe(codes: _Codes, sparse: bool) -> str:
    kind = "codebook" if codes.table is not None else str(codes.codes.dtype)
    values = f"{kind} of {len(codes.table)}" if codes.table is not None else kind
    return f"gaps and {values}" if sparse else values


def _encodings(name: str, array: Array, rounded: Mapping[str, Rounded]) -> Iterator[_Codes]:
    """The tensor's own values, and the codes of the parameter that it came from."""
    yield _Codes(array, None, None, 32, exact=True)
    for own, each in rounded.items():  # of a network inside another its name stands behind that one's
        if (name == own or name.endswith(f".{own}")) and each.codes.shape == array.shape:
            found = _scaled(each, array)
            if found is not None:
                yield found
                return
    for each in rounded.values():  # a Linear that reads more than two dimensions is written transposed
        if each.codes.shape == array.shape[::-1] and each.codes.ndim == 2:
            scale = None if each.scale is None else along(each.scale, 1 - each.dim, 2)
            codes = _Codes(each.codes.T, each.table, scale, each.bits, exact=True)
            if np.array_equal(codes.decode(), array):
                yield codes
                return


def _scaled(rounded: Rounded, array: Array) -> _Codes | None:
    """The parameter's codes with what batch norm multiplied each output by; None where that is not all."""
    decoded = rounded.decode()
    scale = None if rounded.scale is None else along(rounded.scale, rounded.dim, array.ndim)
    if np.array_equal(decoded, array):
        return _Codes(rounded.codes, rounded.table, scale, rounded.bits, exact=True)
    outputs = decoded.shape[rounded.dim]
    rows, wanted = (np.moveaxis(item, rounded.dim, 0).reshape(outputs, -1) for item in (decoded, array))
    largest = np.abs(rows).argmax(1)[:, None]
    below, above = (np.take_along_axis(item, largest, 1)[:, 0] for item in (rows, wanted))
    factors = np.divide(above, below, out=np.ones_like(above), where=below != 0)
    factors = along(factors, rounded.dim, array.ndim)
    codes = _Codes(
        rounded.codes, rounded.table, factors if scale is None else factors * scale, rounded.bits, exact=False
    )
    close = np.abs(codes.decode() - array).max() <= FOLDED * np.abs(array).max()
    return codes if close else None


def _values(part: _Part, codes: _Codes, flat: Array) -> str:
    """What rebuilds the values of codes, without their scale; `flat` are the codes to store."""
    if codes.table is None:
        stored = part.constant(flat)
        if flat.dtype == np.float32:
            return stored
        return part.add("Cast", stored, to=onnx.TensorProto.FLOAT)
    table = codes.table.astype(np.float16)
    if codes.bits == 4:
        half = -(-flat.size // 2)
        low = np.zeros(half, dtype=np.uint8)
        low[: flat.size - half] = flat.ravel()[half:]
        both = part.add("Cast", part.constant(flat.ravel()[:half] * 16 + low), to=onnx.TensorProto.INT32)
        sixteen = part.constant(np.array(16, dtype=np.int32))
        halves = part.add("Div", both, sixteen), part.add("Mod", both, sixteen)
        places = part.add("Concat", *halves, axis=0)
        if flat.size % 2:
            start, end = (part.constant(np.array([at], dtype=np.int64)) for at in (0, flat.size))
            places = part.add("Slice", places, start, end)
    else:
        places = part.add("Cast", part.constant(flat), to=onnx.TensorProto.INT32)
    values = part.add("Cast", part.constant(table), to=onnx.TensorProto.FLOAT)
    return part.add("Gather", values, places)


def _dense(part: _Part, codes: _Codes) -> bool:
    """All codes; False where that is the tensor as it stands."""
    if codes.codes.dtype == np.float32:
        return False
    rebuilt = _values(part, codes, codes.codes)
    if codes.bits == 4:
        rebuilt = part.add("Reshape", rebuilt, part.constant(np.array(codes.codes.shape, dtype=np.int64)))
    _scale(part, codes, rebuilt)
    return True


def _scale(part: _Part, codes: _Codes, rebuilt: str) -> None:
    if codes.scale is None:
        return
    half = codes.scale.astype(np.float16)
    if np.array_equal(half.astype(np.float32), codes.scale):
        scale = part.add("Cast", part.constant(half), to=onnx.TensorProto.FLOAT)
    else:
        scale = part.constant(codes.scale.astype(np.float32))
    part.add("Mul", rebuilt, scale)


def _sparse(part: _Part, codes: _Codes) -> bool:
    """Gaps between the codes that are not 0, and these."""
    flat = codes.codes.ravel()
    positions = np.flatnonzero(flat)
    shape = np.array(codes.codes.shape, dtype=np.int64)
    if not len(positions):
        part.add("ConstantOfShape", part.constant(shape))
        return True
    width = flat.itemsize if codes.bits != 4 else 0.5
    gaps, values = min(
        (_gaps(flat, positions, kind) for kind in (np.uint8, np.uint16)),
        key=lambda item: item[0].nbytes + width * len(item[1]),
    )
    places = part.add("Cast", part.constant(gaps), to=onnx.TensorProto.INT64)
    places = part.add("CumSum", places, part.constant(np.array(0, dtype=np.int64)))
    zeros = part.add("ConstantOfShape", part.constant(np.array([flat.size], dtype=np.int64)))
    rebuilt = part.add("ScatterElements", zeros, places, _values(part, codes, values))
    if codes.codes.ndim != 1:
        rebuilt = part.add("Reshape", rebuilt, part.constant(shape))
    _scale(part, codes, rebuilt)
    return True


def _gaps(flat: Array, positions: Array, kind: type[np.unsignedinteger[Any]]) -> tuple[Array, Array]:
    """(gaps, codes): a gap beyond the type's range is stepped over by zeros, written where zeros stand."""
    most = np.iinfo(kind).max
    steps = np.diff(positions, prepend=0)
    extra = np.maximum(steps - 1, 0) // most
    ends = np.cumsum(extra + 1) - 1
    gaps = np.full(ends[-1] + 1, most, dtype=kind)
    gaps[ends] = steps - extra * most
    values = np.zeros(ends[-1] + 1, dtype=flat.dtype)
    values[ends] = flat[positions]
    return gaps, values

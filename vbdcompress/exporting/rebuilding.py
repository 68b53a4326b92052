"""Nodes and constants from which standard operators rebuild a tensor: gaps, codes, tables and scales."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from string import ascii_lowercase
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from vbdcompress.rounding import Array


@dataclass(frozen=True)
class Codes:
    """A tensor as codes.

    Attributes:
        codes: its shape, float32, float16, int8 or uint8.
        table: [values], what uint8 codes are places in, or [slices, values], for each slice along the
            first dimension; None: the codes are the values.
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
        """The tensor, float32."""
        if self.table is None:
            values = self.codes.astype(np.float32)
        elif self.table.ndim == 1:
            values = self.table[self.codes]
        else:
            places = self.codes.reshape(len(self.table), -1).astype(np.int64)
            values = np.take_along_axis(self.table, places, 1).reshape(self.codes.shape)
        return values if self.scale is None else values * self.scale


@dataclass
class Part:
    """Nodes and constants that rebuild one tensor, called by the prefix: of letters, then digits."""

    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, array: Array) -> str:
        """Its name."""
        name = f"{self.prefix}{_letters(len(self.constants))}"
        self.constants.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node; the name of its output."""
        name = f"{self.prefix}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def zeros(self, shape: Sequence[int]) -> str:
        """Of a shape. By Expand: some runtimes find no value where ConstantOfShape leaves out its 0."""
        return self.add(
            "Expand", self.constant(np.zeros(1, np.float32)), self.constant(np.array(shape, dtype=np.int64))
        )

    def split(self, value: str, sizes: Sequence[int]) -> list[str]:
        """A row cut into pieces of these sizes; their names."""
        names = [f"{self.prefix}_{len(self.nodes)}_{number}" for number in range(len(sizes))]
        lengths = self.constant(np.array(sizes, dtype=np.int64))
        self.nodes.append(helper.make_node("Split", [value, lengths], names, axis=0))
        return names

    def finish(self, value: str, name: str) -> None:
        """Call what rebuilds a tensor by the tensor's own name."""
        for node in self.nodes:
            for place, output in enumerate(node.output):
                if output == value:
                    node.output[place] = name

    @property
    def bytes(self) -> int:
        """Of the file, with the two or three that go before each part."""
        parts: list[onnx.NodeProto | onnx.TensorProto] = [*self.nodes, *self.constants]
        return sum(part.ByteSize() + 3 for part in parts)


def _letters(number: int) -> str:
    """a to z, then ba, bb, ...: after a prefix that ends in a digit no two names are one."""
    above, place = divmod(number, len(ascii_lowercase))
    return (_letters(above) if above else "") + ascii_lowercase[place]


def _values(part: Part, codes: Codes, flat: Array) -> str:
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
    if table.ndim == 1:
        return part.add("Gather", values, places)
    rows = part.add("Reshape", places, part.constant(np.array([len(table), -1], dtype=np.int64)))
    return part.add("GatherElements", values, rows, axis=1)


def rebuild_dense(part: Part, codes: Codes) -> str | None:
    """The tensor from all its codes; None where these are the tensor as it stands."""
    if codes.codes.dtype == np.float32:
        return None
    rebuilt = _values(part, codes, codes.codes)
    if codes.bits == 4 or (codes.table is not None and codes.table.ndim == 2):
        rebuilt = part.add("Reshape", rebuilt, part.constant(np.array(codes.codes.shape, dtype=np.int64)))
    return _scale(part, codes, rebuilt)


def _scale(part: Part, codes: Codes, rebuilt: str) -> str:
    if codes.scale is None:
        return rebuilt
    half = codes.scale.astype(np.float16)
    if np.array_equal(half.astype(np.float32), codes.scale):
        scale = part.add("Cast", part.constant(half), to=onnx.TensorProto.FLOAT)
    else:
        scale = part.constant(codes.scale.astype(np.float32))
    return part.add("Mul", rebuilt, scale)


def rebuild_sparse(part: Part, codes: Codes) -> str | None:
    """The tensor from the gaps between the codes that are not 0, and these; None where slices have tables."""
    if codes.table is not None and codes.table.ndim == 2:
        return None
    if not codes.codes.any():
        return part.zeros(codes.codes.shape)
    return _shape_and_scale(part, codes, _scatter(part, codes.codes.ravel(), codes))


def rebuild_together(part: Part, each: Sequence[Codes]) -> list[str]:
    """Several tensors whose codes have one dtype and no table: from one row of gaps and codes, cut up."""
    row = np.concatenate([codes.codes.ravel() for codes in each])
    pieces = part.split(_scatter(part, row, each[0]), [codes.codes.size for codes in each])
    return [_shape_and_scale(part, codes, piece) for codes, piece in zip(each, pieces, strict=True)]


def _shape_and_scale(part: Part, codes: Codes, rebuilt: str) -> str:
    if codes.codes.ndim != 1:
        rebuilt = part.add("Reshape", rebuilt, part.constant(np.array(codes.codes.shape, dtype=np.int64)))
    return _scale(part, codes, rebuilt)


def _scatter(part: Part, flat: Array, codes: Codes) -> str:
    """What rebuilds a flat row of codes, some of them not 0, without their scale."""
    positions = np.flatnonzero(flat)
    width = flat.itemsize if codes.bits != 4 else 0.5
    gaps, values = min(
        (_gaps(flat, positions, kind) for kind in (np.uint8, np.uint16)),
        key=lambda item: item[0].nbytes + width * len(item[1]),
    )
    # int32: one runtime takes int64 for sizes, which it can't sum up
    places = part.add("Cast", part.constant(gaps), to=onnx.TensorProto.INT32)
    places = part.add("CumSum", places, part.constant(np.array(0, dtype=np.int32)))
    zeros = part.zeros([flat.size])
    return part.add("ScatterElements", zeros, places, _values(part, codes, values))


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

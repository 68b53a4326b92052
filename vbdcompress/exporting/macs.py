"""Multiply-accumulates of an ONNX file, counted from the shapes that a run has."""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx
import onnxruntime

from vbdcompress.exporting.feeds import batch_of, make_feeds, run_feeds
from vbdcompress.exporting.onnx_file import open_session

_RECURRENT = ("LSTM", "GRU", "RNN")
_CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv")
_PRODUCTS = ("MatMul", "MatMulInteger", "QLinearMatMul")
_COUNTED = (*_CONVOLUTIONS, "ConvTranspose", *_PRODUCTS, "Gemm", "Einsum", *_RECURRENT)
# In the names of operators that multiply and accumulate, runtimes' own among them
_MULTIPLIES = re.compile("Conv|Gemm|MatMul|Einsum|LSTM|GRU|RNN|Attention")


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates of one example.

    Attributes:
        macs: None where the file has products that are not counted.
        uncounted: the operators of these.
    """

    macs: int | None
    uncounted: tuple[str, ...] = ()


def count_macs(path: Path, dims: Mapping[str, int], batch: int = 1) -> MacCount:
    """Multiply-accumulates of one example in convolutions, matrix products and recurrent layers.

    Those in 8-bit integers count alike; of Einsum, one for each setting of all its letters.

    Of the graph as onnxruntime sees it once constants are folded: packed weights have shapes then. What
    the rest has comes from a run, for shapes that the graph itself computes can't be inferred.

    Args:
        path: ONNX file.
        dims: values of named dimensions.
        batch: of the run; a file whose batch is fixed runs at that one.
    """
    with tempfile.TemporaryDirectory() as folder:
        folded = Path(folder) / "folded.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        proto = onnx.load(folded, load_external_data=False)
        if uncounted := tuple(sorted(set(_uncounted(proto.graph)))):
            return MacCount(None, uncounted)
        # what is no result of folding still lies where the original has it
        onnx.external_data_helper.load_external_data_for_model(proto, str(path.parent))
        nodes = [node for node in proto.graph.node if node.op_type in _COUNTED]
        session = open_session(path)
        feeds = make_feeds(session, batch, dims)
        shapes = {item.name: list(item.dims) for item in proto.graph.initializer}
        shapes |= {name: list(value.shape) for name, value in feeds.items()}
        used = {name for node in nodes for name in (*node.input, node.output[0]) if name}
        asked = sorted(used - shapes.keys())
        if asked:
            del proto.graph.output[:]
            proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked)
            probe = Path(folder) / "probe.onnx"
            onnx.save(proto, probe, save_as_external_data=True)  # one message holds 2 GiB at most
            found = run_feeds(open_session(probe), path, feeds, asked)
            shapes |= {name: list(value.shape) for name, value in zip(asked, found, strict=True)}
    shaped = ([shapes.get(name, []) for name in (*node.input, node.output[0])] for node in nodes)
    total = sum(_macs(node, found) for node, found in zip(nodes, shaped, strict=True))
    return MacCount(total // batch_of(session, feeds))


def _uncounted(graph: onnx.GraphProto, of: str = "") -> Iterator[str]:
    """Operators that multiply and accumulate, and are not counted: what runs in a branch or loop is not."""
    for node in graph.node:
        is_counted = not of and node.domain in ("", "ai.onnx") and node.op_type in _COUNTED
        if not is_counted and _MULTIPLIES.search(node.op_type):
            yield node.op_type + of
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _uncounted(inner, f" in {node.op_type}")


def _macs(node: onnx.NodeProto, shapes: Sequence[list[int]]) -> int:
    """Of one node, given the shapes of its inputs and of its first output."""
    first, second, output = shapes[0], shapes[1], shapes[-1]
    if node.op_type in _RECURRENT:  # every step, [steps, batch, ...], reads all weights of both kinds
        return first[0] * first[1] * (prod(second) + prod(shapes[2]))
    if node.op_type == "ConvTranspose":
        return prod(first) * prod(second[1:])
    if node.op_type in _CONVOLUTIONS:
        weight = shapes[3] if node.op_type == "QLinearConv" else second
        return prod(output) * prod(weight[1:])
    if node.op_type == "Gemm":
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return prod(output) * first[0 if transposed else 1]
    if node.op_type == "Einsum":
        equation = next(attribute.s for attribute in node.attribute if attribute.name == "equation")
        return _einsum_macs(equation.decode(), shapes[:-1])
    return prod(output) * first[-1]


def _einsum_macs(equation: str, shapes: Sequence[list[int]]) -> int:
    """Of a sum over products of several inputs; to move the numbers of one about takes none."""
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    if len(terms) == 1:
        return 0
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        head, dots, tail = term.partition("...")
        between = len(shape) - len(head) - len(tail)
        letters = [*head, *(f"{dots}{-number}" for number in range(between, 0, -1)), *tail]
        for letter, size in zip(letters, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return prod(sizes.values())

"""The report's own code, run as a reader would, on ONNX graphs that return what they are given."""

import numpy as np
import onnx
import onnx.parser
import pytest

from vbdcompress.reporting.html import write_snippet


@pytest.mark.parametrize(
    ("shape", "mean", "std"),
    [([3, 4, 5], [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]), ([6], [0.5], [0.5]), ([2, 2], [], [])],
)
def test_write_snippet_runs_and_normalises(report, tmp_path, monkeypatch, shape, mean, std):
    """The oracle is an ONNX graph that returns its input."""
    report["input"] = {"name": 'in"put', "shape": shape, "mean": mean, "std": std}
    value = onnx.helper.make_tensor_value_info
    tensors = [value(name, onnx.TensorProto.FLOAT, ["batch", *shape]) for name in ('in"put', "out")]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ['in"put'], ["out"])], "g", tensors[:1], tensors[1:]
    )
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
    onnx.save(model, tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(write_snippet(report), names)
    # the snippet feeds zeros
    expected = np.zeros(shape) if not mean else (0 - np.array(mean)) / np.array(std)
    expected = expected.reshape(-1, *[1] * (len(shape) - 1)) if mean else expected
    np.testing.assert_allclose(names["output"][0], np.broadcast_to(expected, shape), rtol=1e-6)


IMAGE, IDS = {"shape": [3, 4, 4], "dtype": "float32"}, {"shape": [5], "dtype": "int64"}
DEPTH, MASK = {"shape": [4, 4], "dtype": "float32"}, {"shape": [3, 4, 4], "dtype": "bool"}
MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]


def concatenation(inputs):
    """A graph with one output, for that is what the snippet reads: each input flattened, in their order."""
    types = {"float32": "float", "int64": "int64", "bool": "bool"}
    shapes = [", ".join(["batch", *map(str, row["shape"])]) for row in inputs]
    given = ", ".join(
        f"{types[row['dtype']]}[{shape}] {row['name']}" for row, shape in zip(inputs, shapes, strict=True)
    )
    flat = "".join(f"c{n} = Cast<to = 1>(in{n})  f{n} = Flatten(c{n}) " for n in range(len(inputs)))
    whole = f"out = Concat<axis = 1>({', '.join(f'f{n}' for n in range(len(inputs)))})"
    return (
        f'<ir_version: 10, opset_import: ["" : 20]> g ({given}) => (float[batch, n] out) {{ {flat}{whole} }}'
    )


@pytest.mark.parametrize(
    ("rows", "normalised"),
    [
        ([IMAGE, IMAGE], [True, True]),
        ([IMAGE, IDS], [True, False]),
        ([DEPTH, IMAGE, MASK], [False, True, False]),
        ([IDS, DEPTH], [False, False]),
    ],
)
def test_write_snippet_normalises_the_inputs_of_the_shape_that_is_said(
    report, tmp_path, monkeypatch, rows, normalised
):
    report["input"] = {"name": "first", "shape": IMAGE["shape"], "mean": MEAN, "std": STD}
    report["inputs"] = [{"name": f"in{number}", **row} for number, row in enumerate(rows)]
    onnx.save(onnx.parser.parse_model(concatenation(report["inputs"])), tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(write_snippet(report), names)
    image = np.repeat(-np.array(MEAN) / np.array(STD), 16)  # the snippet feeds zeros
    expected = [
        image if is_image else np.zeros(np.prod(row["shape"]))
        for row, is_image in zip(rows, normalised, strict=True)
    ]
    np.testing.assert_allclose(names["output"][0], np.concatenate(expected), rtol=1e-6)

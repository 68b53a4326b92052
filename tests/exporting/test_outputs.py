"""Outputs: named by what they are called in torch, of sizes that hold for whatever the file takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.exporting.outputs import names_of_outputs
from vbdcompress.records import OutputRow


@dataclass
class Found:
    logits: Tensor
    hidden: Any = None


class Pair(NamedTuple):
    mean: Tensor
    spread: Tensor


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (ONE, ["output"]),
        ((ONE,), ["output"]),
        ((ONE, ONE), ["output_0", "output_1"]),
        ([ONE, None, (ONE, ONE)], ["output_0", "output_2_0", "output_2_1"]),
        ({"cls": ONE, "loss": None, "reg": ONE}, ["cls", "reg"]),
        ({"maps": [ONE, ONE]}, ["maps_0", "maps_1"]),
        ({"": ONE}, ["output"]),
        (Found(ONE), ["logits"]),
        (Pair(ONE, ONE), ["mean", "spread"]),
        ({"ids": ONE, 3: ONE}, ["ids_1", "3"]),
    ],
)
def test_outputs_are_called_by_their_keys_or_places(output: Any, names: list[str]) -> None:
    assert names_of_outputs(output, ["ids"]) == names


def test_an_output_gives_way_to_an_input_of_its_name() -> None:
    assert names_of_outputs(ONE, ["output", "output_1"]) == ["output_2"]


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 5)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        hidden = scale * self.body(x).relu()
        return {"wide": self.b(hidden), "narrow": self.a(hidden), "loss": None}


def test_the_file_s_outputs_are_those_of_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Heads().eval(), {"x": torch.randn(8, 4), "scale": 3.0}
    export_onnx(model, tmp_path / "heads.onnx", inputs)
    session = onnxruntime.InferenceSession(tmp_path / "heads.onnx", providers=["CPUExecutionProvider"])
    assert [item.name for item in session.get_inputs()] == ["x"]
    expected = model(**inputs)
    for name in ("wide", "narrow"):
        (found,) = session.run([name], {"x": inputs["x"].numpy()})
        np.testing.assert_allclose(found, expected[name].detach().numpy(), atol=1e-6)


class Tagger(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells, self.head = kind(3, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states = self.cells(x)[0]
        return self.head(states), torch.cat([states, states[:, :1]], 1)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_sizes_that_follow_a_length_are_open(kind: type[nn.RNNBase], tmp_path: Path) -> None:
    shown = [torch.randn(8, length, 3) for length in (9, 5)]
    check = export_onnx(Tagger(kind).eval(), tmp_path / "tagger.onnx", shown[0], others=shown[1:])
    session = onnxruntime.InferenceSession(tmp_path / "tagger.onnx", providers=["CPUExecutionProvider"])
    (given,), outputs = session.get_inputs(), session.get_outputs()
    assert [item.shape for item in outputs] == [
        [given.shape[0], given.shape[1], 2],
        [given.shape[0], "output_size_1", 6],
    ]
    assert check.outputs == (
        OutputRow("output_0", ("batch", "size", 2), "float32"),
        OutputRow("output_1", ("batch", "output_size_1", 6), "float32"),
    )
    assert session.run(None, {given.name: np.zeros((4, 7, 3), np.float32)})[1].shape == (4, 8, 6)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        inner = self.words(ids).mean(1)
        output = self.head(self.body(inner).softmax(1))
        return {"mean": output, "linear": output, "embedding": inner, "softmax": output.softmax(1)}


def test_outputs_may_be_called_as_values_inside_the_file_would_be(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Named().eval(), torch.randint(0, 9, (8, 5))
    check = export_onnx(model, tmp_path / "named.onnx", ids)
    assert [row.name for row in check.outputs] == ["mean", "linear", "embedding", "softmax"]
    session = onnxruntime.InferenceSession(tmp_path / "named.onnx", providers=["CPUExecutionProvider"])
    for name, expected in model(ids).items():
        (found,) = session.run([name], {"input": ids.numpy()})
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-6)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        output: Tensor = scale * self.body(x)
        return output


def test_a_number_among_the_inputs_is_an_input_without_a_batch(tmp_path: Path) -> None:
    model, inputs = Scaled().eval(), (torch.randn(8, 4), torch.tensor(3.0))
    export_onnx(model, tmp_path / "scaled.onnx", inputs)
    session = onnxruntime.InferenceSession(tmp_path / "scaled.onnx", providers=["CPUExecutionProvider"])
    assert [item.shape for item in session.get_inputs()] == [["batch", 4], []]
    given = {"input_0": inputs[0].numpy(), "input_1": np.array(-2, np.float32)}
    (found,) = session.run(None, given)
    np.testing.assert_allclose(found, -2 * model.body(inputs[0]).detach().numpy(), atol=1e-6)

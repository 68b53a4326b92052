"""Packed constants among a network's own: infinities in them, names beside theirs."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import vbdcompress.exporting.onnx_file as onnx_file
from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.exporting.packing import Storage, rebuilding_graph
from vbdcompress.exporting.rebuilding import Part


class Masked(nn.Module):
    """Attention that looks back only: a constant of zeros and infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.register_buffer("mask", torch.full((32, 32), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.softmax(y @ y.mT + self.mask, -1) @ y


def test_a_mask_of_infinities_is_packed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    check = export_onnx(
        Masked().eval(), tmp_path / "m.onnx", torch.randn(8, 32, 32), storage=Storage(pack=True)
    )
    assert [row.shape for row in check.packed] == [(32, 32)]
    (tensor,) = onnxruntime.InferenceSession(rebuilt_alone(tmp_path / "m.onnx", check.packed)).run(None, {})
    assert np.isneginf(tensor).sum() == 32 * 31 / 2


def rebuilt_alone(path: Path, rows: Any) -> bytes:
    return rebuilding_graph(onnx.load(path), rows).SerializeToString()


@pytest.mark.parametrize(("wanted", "found"), [(np.inf, -np.inf), (np.inf, 1), (1, np.nan), (np.nan, 1)])
def test_an_infinity_that_is_not_rebuilt_is_a_difference(wanted: float, found: float) -> None:
    difference = onnx_file._largest_difference(
        np.array([1, found], np.float32), np.array([1, wanted], np.float32)
    )
    assert not difference <= 1e30


class ManyInputs(nn.Module):
    """Inputs called as packed constants are, and more layers than there are letters and digits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(20, 20) for _ in range(14))
        self.last = nn.Linear(20, 30_000)
        for parameter in self.parameters():
            parameter.data *= torch.rand_like(parameter) < 0.1

    def forward(self, p0a: Tensor, p0_0: Tensor) -> Tensor:
        x = p0a + p0_0
        for layer in self.layers:
            x = layer(x).relu()
        y: Tensor = self.last(x)
        return y


def test_no_name_of_a_constant_is_taken(tmp_path: Path) -> None:
    torch.manual_seed(0)
    samples = {"p0a": torch.randn(8, 20), "p0_0": torch.randn(8, 20)}
    check = export_onnx(ManyInputs().eval(), tmp_path / "m.onnx", samples, storage=Storage(pack=True))
    assert len(check.packed) >= 15
    graph = onnx.load(tmp_path / "m.onnx").graph
    names = [item.name for item in (*graph.input, *graph.initializer)]
    names += [name for node in graph.node for name in node.output]
    assert len(names) == len(set(names))


def test_names_of_constants_do_not_repeat() -> None:
    parts = [Part(f"p{number}") for number in range(12)]
    names = [part.constant(np.zeros(1)) for part in parts for _ in range(60)]
    assert len(names) == len(set(names))

"""ONNX files of networks that take inputs of several shapes."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from vbdcompress.errors import ExportError
from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.exporting.packing import Storage
from vbdcompress.inputs import Inputs, are_alike, open_dims


class Masked(nn.Module):
    """Token ids with their mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.places = nn.Embedding(20, 16), nn.Parameter(torch.randn(1, 50, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.table(ids) + self.places[:, : ids.shape[1]]
        return self.head(self.encoder(x, src_key_padding_mask=mask)[:, 0])


def sentences(length: int, count: int = 4) -> dict[str, Tensor]:
    mask = torch.zeros(count, length, dtype=torch.bool)
    mask[1:, length - length // 3 :] = True
    return {"ids": torch.randint(1, 20, (count, length)), "mask": mask}


def images(height: int, width: int) -> Tensor:
    return torch.rand(3, 3, height, width)


def image_network() -> nn.Module:
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *head).eval()


def differences(model: nn.Module, path: Path, batches: list[Inputs]) -> list[float]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = []
    for batch in batches:
        named = batch if isinstance(batch, dict) else {session.get_inputs()[0].name: batch}
        with torch.no_grad():
            expected = model(**batch) if isinstance(batch, dict) else model(batch)
        output = session.run(None, {name: tensor.numpy() for name, tensor in named.items()})[0]
        found.append(float(np.abs(output - expected.numpy()).max()))
    return found


@pytest.mark.parametrize(
    ("first", "pack"),
    [
        (1, True),  # torch takes a size of 1 for a constant
        (6, False),
        pytest.param(1, False, marks=pytest.mark.slow),
        pytest.param(6, True, marks=pytest.mark.slow),
    ],
)
def test_a_dimension_that_differs_is_open_in_all_inputs_that_share_it(first: int, pack: bool, tmp_path: Path):
    model, path = Masked().eval(), tmp_path / "model.onnx"
    others = [sentences(9), sentences(11)]
    check = export_onnx(model, path, sentences(first), others=others, storage=Storage(pack))
    assert check.open_dims == ((1,), (1,))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [item.shape for item in session.get_inputs()] == [["batch", "size"]] * 2
    assert max(differences(model, path, [sentences(length, 5) for length in (1, 2, 9, 30)])) < 1e-5


def test_two_dimensions_that_differ_have_a_name_each(tmp_path: Path):
    model, path = image_network(), tmp_path / "model.onnx"
    check = export_onnx(model, path, images(8, 9), others=[images(12, 9), images(8, 10)])
    assert check.open_dims == ((2, 3),)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, "size_1", "size_2"]
    assert max(differences(model, path, [images(20, 7), images(6, 6)])) < 1e-5


def test_inputs_of_one_shape_leave_it_fixed(tmp_path: Path):
    path = tmp_path / "model.onnx"
    check = export_onnx(image_network(), path, images(8, 9), others=[images(8, 9)])
    assert check.open_dims == ((),)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 8, 9]


def test_a_network_for_one_size_is_not_written_for_others(tmp_path: Path):
    class Branching(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sum(1)) * (2 if x.shape[1] > 3 else 1)

    path = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match="differs from torch by"):
        export_onnx(Branching(4, 2).eval(), path, torch.rand(3, 2, 4), others=[torch.rand(3, 5, 4)])
    assert not path.exists()


@pytest.mark.parametrize("other", [torch.rand(3, 4), (torch.rand(3, 2, 4), torch.rand(3))])
def test_inputs_that_are_not_alike_are_refused(other: Inputs, tmp_path: Path):
    with pytest.raises(ExportError, match="allowed are as many, of as many dimensions"):
        export_onnx(nn.Linear(4, 2).eval(), tmp_path / "model.onnx", torch.rand(3, 2, 4), others=[other])


def test_open_dims_and_are_alike():
    shown = [(torch.rand(2, 3, 4), torch.rand(2)), (torch.rand(5, 3, 6), torch.rand(5))]
    assert open_dims(shown) == [[2], []]
    assert are_alike(shown)
    assert not are_alike([torch.rand(2, 3), torch.rand(2, 3, 4)])
    assert not are_alike([torch.rand(2, 3), (torch.rand(2, 3), torch.rand(2, 3))])

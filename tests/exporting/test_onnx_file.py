"""The exported file, judged by onnx and onnxruntime."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from vbdcompress import convert, slim
from vbdcompress.architectures import build_architecture
from vbdcompress.count import measure_size
from vbdcompress.errors import ExportError
from vbdcompress.exporting import onnx_file
from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.vbd.posterior import find_posteriors


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory):
    torch.manual_seed(0)
    model, samples = build_architecture("digits").eval(), torch.randn(9, 1, 8, 8)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return model, samples, path, export_onnx(model, path, samples, input_name="pixels")


def test_export_onnx_equals_torch_at_any_batch(digits_file):
    model, samples, path, check = digits_file
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [item.name for item in session.get_inputs()] == ["pixels"]
    assert [item.name for item in session.get_outputs()] == ["output"]
    for size in (1, 2, 5, 9):
        found = session.run(None, {"pixels": samples[:size].numpy()})[0]
        with torch.no_grad():
            np.testing.assert_allclose(found, model(samples[:size]).numpy(), rtol=1e-4, atol=1e-5)
    assert check.bytes == path.stat().st_size
    assert 0 < check.max_difference < check.tolerance


def test_export_onnx_folds_batch_norm_and_names_no_path(digits_file):
    _, _, path, _ = digits_file
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    assert all(node.domain in ("", "ai.onnx") for node in proto.graph.node)
    text = str(proto)
    assert "site-packages" not in text
    assert "vbdcompress/" not in text
    assert ".py" not in text
    assert not list(path.parent.glob("*.data"))


def test_export_onnx_keeps_no_file_that_differs(digits_file, tmp_path, monkeypatch):
    model, samples, _, _ = digits_file
    path = tmp_path / "model.onnx"
    path.write_bytes(b"what stood here before")
    real = onnx.save

    def save_with_a_fault(proto, target):
        values = onnx.numpy_helper.to_array(proto.graph.initializer[0]).copy()
        values.flat[0] += 0.05
        proto.graph.initializer[0].CopyFrom(
            onnx.numpy_helper.from_array(values, proto.graph.initializer[0].name)
        )
        real(proto, target)

    monkeypatch.setattr(onnx_file.onnx, "save", save_with_a_fault)
    with pytest.raises(ExportError, match="differs from torch by"):
        export_onnx(model, path, samples)
    assert path.read_bytes() == b"what stood here before"
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]


def test_export_onnx_writes_the_tensors_of_an_output_of_any_class(tmp_path):
    @dataclass
    class Output:
        logits: torch.Tensor
        rest: list[torch.Tensor]
        name: str = "no tensor"

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            y = self.body(x).relu()
            return Output(self.head(y), [y, y.sum(1)])

    samples = torch.randn(4, 4)
    check = export_onnx(Network(), tmp_path / "model.onnx", samples)
    assert check.max_difference < check.tolerance
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    shapes = [output.shape for output in session.run(None, {"input": samples.numpy()})]
    assert shapes == [(4, 3), (4, 5), (4,)]


def test_export_onnx_refuses_a_network_that_onnx_can_not_express(tmp_path):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) if float(x.sum()) > 0 else x

    with pytest.raises(ExportError, match="ONNX refused it"):
        export_onnx(Branching(), tmp_path / "model.onnx", torch.randn(4, 4))
    assert not list(tmp_path.iterdir())


def test_export_names_the_operation_that_onnx_lacks(tmp_path):
    model = nn.Sequential(nn.Linear(4, 13), nn.AdaptiveMaxPool1d(4)).eval()  # 13 is no multiple of 4
    with pytest.raises(ExportError) as error:
        export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, 4))
    assert "aten.adaptive_max_pool2d" in str(error.value)
    assert len(str(error.value)) < 300  # not the exporter's own page of steps


def test_export_onnx_takes_attention_in_windows(tmp_path):
    """timm's MaxViT: its exporter's kernels give other strides for weights that ask for gradients."""
    maxxvit = pytest.importorskip("timm.models.maxxvit", reason="timm is not installed")
    torch.manual_seed(0)
    config = maxxvit.MaxxVitTransformerCfg(dim_head=32, window_size=(2, 2))
    model, samples = maxxvit.PartitionAttentionCl(64, "block", config).eval(), torch.randn(9, 8, 8, 64)
    assert all(parameter.requires_grad for parameter in model.parameters())
    export_onnx(model, tmp_path / "model.onnx", samples)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(samples[:5]).numpy()
    np.testing.assert_allclose(session.run(None, {"input": samples[:5].numpy()})[0], expected, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "name", ["digits", "resnet20", pytest.param("torchvision:squeezenet1_0", marks=pytest.mark.slow)]
)
def test_export_onnx_of_a_slim_network_has_the_operators_of_the_original(name, tmp_path):
    """What slicing does to layers that share channels must not cost gathers, slices or concatenations."""
    torch.manual_seed(0)
    model = build_architecture(name).eval()
    samples = torch.randn(9, *((1, 8, 8) if name == "digits" else (3, 64, 64)))
    converted = convert(model, samples[:2])
    for posterior in find_posteriors(converted.model):
        posterior.log_sigma2.data.uniform_(-10, 10)
    slim_network = slim(converted, 3.0).model
    assert measure_size(slim_network, samples).parameters < 0.9 * measure_size(model, samples).parameters
    operators = []
    for network in (model, slim_network):
        export_onnx(network, tmp_path / "model.onnx", samples)
        proto = onnx.load(tmp_path / "model.onnx")
        operators.append(Counter(node.op_type for node in proto.graph.node))
    assert operators[0] == operators[1]
    assert not {"Identity", "Dropout", "BatchNormalization"} & set(operators[1])


class BySize(nn.Module):
    """Reads the number of examples as a plain number."""

    def forward(self, x):
        return x.reshape(len(x), -1).sum(1)


class ByList(nn.Module):
    """Reads it where no tracing follows."""

    def forward(self, x):
        return x.reshape(len(x.tolist()), -1).sum(1)


def test_export_onnx_follows_len(tmp_path):
    check = export_onnx(BySize(), tmp_path / "model.onnx", torch.randn(3, 2, 4))
    assert check.max_difference < 1e-6
    assert set(check.batch_sizes) == {1, 7}


def test_export_onnx_says_what_fixes_the_batch_size(tmp_path):
    with pytest.raises(ExportError, match=r"(?s)batches of 2 alone.*makes a plain number of the batch"):
        export_onnx(ByList(), tmp_path / "model.onnx", torch.randn(3, 2, 4))
    assert not list(tmp_path.iterdir())


class OfOutputs(nn.Module):
    """Takes inputs that are called as the file's output is, and as a value of the exporter's."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, output, output_1, linear):
        return self.head(output * output_1) + self.head(linear)


def test_export_onnx_keeps_the_names_of_inputs(tmp_path):
    names = ["output", "output_1", "linear"]
    model, samples = OfOutputs().eval(), {name: torch.randn(5, 4) for name in names}
    export_onnx(model, tmp_path / "model.onnx", samples)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [item.name for item in session.get_inputs()] == names
    assert [item.name for item in session.get_outputs()] == ["output_2"]
    found = session.run(None, {name: tensor.numpy() for name, tensor in samples.items()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, model(**samples).numpy(), rtol=1e-4, atol=1e-5)


class Causal(nn.Module):
    """torch's encoder under a mask: made at each call, as its tutorial does, or kept."""

    def __init__(self, kept):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        self.register_buffer("mask", mask if kept else None)

    def forward(self, x):
        mask = self.mask
        if mask is None:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.encoder(x, mask=mask))


@pytest.mark.parametrize("kept", [False, True])
def test_export_onnx_takes_a_transformer_under_a_causal_mask(tmp_path, kept):
    torch.manual_seed(0)
    check = export_onnx(Causal(kept).eval(), tmp_path / "model.onnx", torch.randn(4, 5, 8))
    assert check.max_difference < 1e-5


class Gridded(nn.Module):
    """Keeps a grid for the shape that it saw last, batch and all, as heads of detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shape = nn.Conv2d(3, 4, 3, padding=1), torch.Size()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.shape != y.shape:
            self.grid, self.shape = torch.arange(y.shape[-1]).to(y.dtype), y.shape
        return (y * self.grid).flatten(1)


@pytest.mark.parametrize("seen", [1, 2, 3, 8])
def test_a_shape_that_was_kept_does_not_fix_the_batch(seen: int, tmp_path: Path) -> None:
    model, samples = Gridded().eval(), torch.randn(8, 3, 6, 6)
    model(samples[:seen])
    check = export_onnx(model, tmp_path / "model.onnx", samples, batch_sizes=(1, 2, 3, 7))
    assert check.max_difference <= check.tolerance

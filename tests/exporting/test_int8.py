"""model_int8.onnx: computes in integers, near the float file, with the errors that the report says."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from vbdcompress.data import load_data
from vbdcompress.errors import ConfigError, ExportError
from vbdcompress.exporting.int8 import quantize_int8
from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.loading import load
from vbdcompress.pipeline import compress


def run(path: Path, inputs: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])


def test_quantize_int8_stores_and_multiplies_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)
    )
    samples = torch.randn(64, 3, 8, 8)
    export_onnx(model.eval(), tmp_path / "float.onnx", samples)
    quantize_int8(tmp_path / "float.onnx", tmp_path / "int8.onnx", samples.split(16))
    # an older onnxruntime refuses versions that it does not know, of operators that nobody uses, too
    assert [item.domain for item in onnx.load(tmp_path / "int8.onnx").opset_import] == [""]
    assert (tmp_path / "int8.onnx").stat().st_size < 0.6 * (tmp_path / "float.onnx").stat().st_size
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(tmp_path / "int8.onnx", options, providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert "QLinearConv" in kinds
    assert not kinds & {"Conv", "FusedConv", "Gemm"}
    expected, found = (run(tmp_path / name, samples) for name in ("float.onnx", "int8.onnx"))
    assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_the_report_says_the_error_of_the_integer_file(tmp_path: Path, zoo: Path) -> None:
    loaded, data = load(zoo / "digits.pt"), load_data("digits", None)
    batches = data.train_batches(50, seed=0)
    result = compress(
        loaded.model,
        batches,
        validation=data.validation_batches(),
        test=data.test_batches(),
        input=data.input,
        epochs=2,
        finetune_epochs=0,
        int8=True,
        pack=True,
        bits="16",
        embed_preprocessing=True,
    )
    content = result.export(tmp_path)
    assert sorted(content["files"]) == sorted(item.name for item in tmp_path.iterdir())
    mean, std = data.input.mean[0], data.input.std[0]
    pixels = ((data.test.inputs * std + mean) * 255).round().to(torch.uint8)
    wrong = run(tmp_path / "model_int8.onnx", pixels).argmax(1) != data.test.labels.numpy()
    assert content["int8"]["errors"]["test"] == pytest.approx(100 * wrong.mean())
    assert content["int8"]["errors"]["test"] < content["error"] + 3
    assert [row["batch"] for row in content["int8"]["latency"]] == [1, 64]
    assert content["int8"]["bytes"] == (tmp_path / "model_int8.onnx").stat().st_size
    plain, integer = (onnx.load(tmp_path / name) for name in ("model.onnx", "model_int8.onnx"))
    told = {item.key: item.value for item in plain.metadata_props}
    told["error"] = f"{content['int8']['errors']['test']:.2f} % on the test set"
    assert {item.key: item.value for item in integer.metadata_props} == told
    assert integer.producer_name == plain.producer_name
    # the original that latency is compared with takes pixels, too
    assert run(result.files.scratch.folder / "original_of_pixels.onnx", pixels).shape == (len(pixels), 10)


def test_batches_that_the_file_does_not_take_are_an_export_error(tmp_path: Path) -> None:
    export_onnx(nn.Linear(6, 3), tmp_path / "model.onnx", torch.randn(9, 6))
    with pytest.raises(ExportError, match=r"int8 of 'model\.onnx'"):
        quantize_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx", [torch.randn(4, 5)])
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_compress_refuses_int8_of_several_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.layer(x), x

    loader = [(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64))] * 2
    with pytest.raises(ConfigError, match="networks with one output"):
        compress(Two(), loader, validation=loader, int8=True, loss=lambda outputs, _: outputs[0].sum())

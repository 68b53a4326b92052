"""Normalisation inside the file: bytes in, what the network gives for the normalised picture out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from vbdcompress.errors import ConfigError
from vbdcompress.exporting.export import export
from vbdcompress.exporting.packing import Storage
from vbdcompress.exporting.preprocessing import to_pixels
from vbdcompress.pipeline import compress
from vbdcompress.records import InputSpec
from vbdcompress.reporting.html import write_snippet

SPEC = InputSpec((3, 6, 6), (0.49, 0.45, 0.2), (0.25, 0.3, 0.27), embedded=True)


def test_to_pixels_finds_the_bytes_that_were_normalised() -> None:
    pixels = torch.arange(256).repeat(3).reshape(1, 3, 16, 16).to(torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (SPEC.mean, SPEC.std))
    assert torch.equal(to_pixels((pixels / 255 - mean) / std, SPEC), pixels)


def test_an_embedded_file_takes_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4)).eval()
    pixels = torch.randint(0, 256, (4, 3, 6, 6), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (SPEC.mean, SPEC.std))
    samples = (pixels / 255 - mean) / std
    export(model, tmp_path, samples, input=SPEC, storage=Storage(metadata={"classes": "[]"}))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == "tensor(uint8)"
    assert session.get_modelmeta().custom_metadata_map == {"classes": "[]"}
    with torch.no_grad():
        expected = model(samples).numpy()
    np.testing.assert_allclose(
        session.run(None, {"input": pixels.numpy()})[0], expected, rtol=1e-4, atol=1e-5
    )


def test_the_report_s_own_code_feeds_a_file_that_takes_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    loader = [(torch.rand(8, 1, 4, 4) / 0.5, torch.arange(8) % 2) for _ in range(2)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    spec = InputSpec((1, 4, 4), (0.0,), (0.5,))
    options: dict[str, Any] = {"embed_preprocessing": True, "epochs": 1, "finetune_epochs": 0}
    content = compress(model, loader, validation=loader, test=loader, input=spec, **options).export(tmp_path)
    assert content["inputs"] == [{"name": "input", "shape": [1, 4, 4], "dtype": "uint8"}]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(write_snippet(content), names)  # onnxruntime refuses any other type
    assert names["output"].shape == (1, 2)


def test_compress_refuses_to_embed_what_nobody_says() -> None:
    loader = [(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64))] * 2
    with pytest.raises(ConfigError, match="by which mean and std"):
        compress(nn.Linear(6, 2), loader, validation=loader, embed_preprocessing=True)


def test_inputs_that_were_no_pixels_are_refused_before_the_fit() -> None:
    torch.manual_seed(0)
    good = [(torch.rand(8, 1, 4, 4) / 0.5, torch.arange(8) % 2) for _ in range(2)]
    bad = [(3 * images, labels) for images, labels in good]
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    spec = InputSpec((1, 4, 4), (0.0,), (0.5,))
    with pytest.raises(ConfigError, match=r"the inputs are from .* to 2\.9., pixels are from 0 to 1"):
        compress(model, good, validation=bad, input=spec, embed_preprocessing=True, epochs=1)
    # training images may have had noise added, and a test loader need have no length
    compress(model, bad, validation=good, test=Endless(good), input=spec, embed_preprocessing=True, epochs=1)


class Endless(IterableDataset):  # type: ignore[type-arg]
    """Batches without a length."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        raise TypeError("has none")

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

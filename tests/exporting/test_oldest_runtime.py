"""Exported files in the oldest onnxruntime that the README names, in a Python environment of its own."""

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from vbdcompress.exporting.int8 import quantize_int8
from vbdcompress.exporting.onnx_file import export_onnx

from .exported import CASES, export_case, run_here

VARIABLE = "VBDCOMPRESS_OLDEST_ONNXRUNTIME"
OLDEST = "1.17."
SERVE = Path(__file__).parent / "serve_oldest.py"
EXPORTS = Path(__file__).parents[2] / "exports"


def run_oldest(path: Path, given: Any, folder: Path) -> Any:
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"{VARIABLE} names no Python that has onnxruntime {OLDEST}x")
    np.save(folder / "given.npy", given)
    command = [python, str(SERVE), str(path), str(folder / "given.npy"), str(folder / "found.npy")]
    # not in this folder's reach: an environment of its own must not find this one's packages
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(OLDEST)
    return np.load(folder / "found.npy")


@pytest.mark.parametrize(("bits", "embedded"), CASES)
def test_oldest_onnxruntime_gets_the_same_logits(bits: int, embedded: bool, tmp_path: Path) -> None:
    given, expected = export_case(tmp_path, bits, embedded)
    found = run_oldest(tmp_path / "model.onnx", given, tmp_path)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_oldest_onnxruntime_takes_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    samples = torch.randn(64, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)).eval()
    export_onnx(model, tmp_path / "float.onnx", samples)
    quantize_int8(tmp_path / "float.onnx", tmp_path / "int8.onnx", samples.split(16))
    expected = run_here(tmp_path / "int8.onnx", samples.numpy())
    found = run_oldest(tmp_path / "int8.onnx", samples.numpy(), tmp_path)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("path", sorted(EXPORTS.glob("*/model.onnx")), ids=lambda path: path.parent.name)
def test_oldest_onnxruntime_takes_the_examples(path: Path, tmp_path: Path) -> None:
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    shape = (3, *(dim.dim_value for dim in dims[1:]))
    given = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = run_here(path, given)
    found = run_oldest(path, given, tmp_path)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())

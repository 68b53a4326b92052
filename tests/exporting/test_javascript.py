"""An exported file in onnxruntime's JavaScript packages gives the logits that Python gets."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from vbdcompress.architectures import build_architecture
from vbdcompress.exporting.export import export
from vbdcompress.exporting.packing import Storage
from vbdcompress.exporting.preprocessing import to_pixels
from vbdcompress.records import InputSpec
from vbdcompress.rounding import round_weight, roundable, write_rounded_

SERVE = Path(__file__).parent / "serve.cjs"
SPEC = InputSpec((1, 8, 8), (0.3,), (0.4,))


def has_package(name: str) -> bool:
    node = shutil.which("node")
    if node is None:
        return False
    return (
        subprocess.run([node, "-e", f"require('{name}')"], capture_output=True, check=False).returncode == 0
    )


@pytest.mark.parametrize("package", ["onnxruntime-node", "onnxruntime-web"])
@pytest.mark.parametrize(("bits", "embedded"), [(32, False), (4, False), (8, True)])
def test_node_gets_the_logits_that_python_gets(
    package: str, bits: int, embedded: bool, tmp_path: Path
) -> None:
    if not has_package(package):
        pytest.skip(f"node with {package}, in a folder that NODE_PATH names, is not there")
    torch.manual_seed(0)
    model = build_architecture("digits").eval()
    for layer in roundable(model).values():
        layer.weight.data *= torch.rand_like(layer.weight) < 0.2  # type: ignore[operator, arg-type]
    codes = {name: round_weight(layer, bits) for name, layer in roundable(model).items()} if bits < 32 else {}
    write_rounded_(model, codes)
    samples = torch.randn(5, 1, 8, 8)
    spec = InputSpec(SPEC.shape, SPEC.mean, SPEC.std, embedded=embedded)
    export(model, tmp_path, samples, input=spec, storage=Storage(True, codes))
    given = (to_pixels(samples, spec) if embedded else samples).numpy()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    expected: Any = session.run(None, {"input": given})[0]
    told = {"name": "input", "type": str(given.dtype), "dims": given.shape, "data": given.ravel().tolist()}
    (tmp_path / "inputs.json").write_text(json.dumps(told))
    command = ["node", str(SERVE), package, str(tmp_path / "model.onnx"), str(tmp_path / "inputs.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    np.testing.assert_allclose(
        np.reshape(found["data"], found["dims"]), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
    )

"""An exported file in onnxruntime's JavaScript packages gives the logits that Python gets."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from .exported import CASES, export_case

SERVE = Path(__file__).parent / "serve.cjs"


def has_package(name: str) -> bool:
    node = shutil.which("node")
    if node is None:
        return False
    return (
        subprocess.run([node, "-e", f"require('{name}')"], capture_output=True, check=False).returncode == 0
    )


@pytest.mark.parametrize("package", ["onnxruntime-node", "onnxruntime-web"])
@pytest.mark.parametrize(("bits", "embedded"), CASES)
def test_node_gets_the_logits_that_python_gets(
    package: str, bits: int, embedded: bool, tmp_path: Path
) -> None:
    if not has_package(package):
        pytest.skip(f"node with {package}, in a folder that NODE_PATH names, is not there")
    given, expected = export_case(tmp_path, bits, embedded)
    told = {"name": "input", "type": str(given.dtype), "dims": given.shape, "data": given.ravel().tolist()}
    (tmp_path / "inputs.json").write_text(json.dumps(told))
    command = ["node", str(SERVE), package, str(tmp_path / "model.onnx"), str(tmp_path / "inputs.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    np.testing.assert_allclose(
        np.reshape(found["data"], found["dims"]), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
    )

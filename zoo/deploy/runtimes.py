"""What other runtimes make of exported files, beside onnxruntime.

    python zoo/deploy/runtimes.py --python PYTHON

Files of the digits network as each way of storing weights writes them, and finished folders without packed
weights. Each is run on the same random inputs, in batches of 1 and 7, in a process of its own, for a runtime
may end it. PYTHON has click, onnx, onnxruntime and the runtimes installed: openvino, tract.
"""

import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

ZOO = Path(__file__).resolve().parents[1]
EXPORTS = ("resnet20_channels", "vgg_cifar_channels")
# How weights are stored -> options of `vbdcompress run zoo/digits.pt`
WAYS = {
    "dense": "--mode channels",
    "dense, takes bytes": "--mode channels --embed-preprocessing",
    "8 bits": "--mode channels --bits 8",
    "gaps": "--mode weights",
    "gaps, 8 bits": "--mode weights --bits 8",
    "gaps, 4 bits": "--mode weights --bits 4",
}
BATCHES = (1, 7)
Run = Callable[[np.ndarray], np.ndarray]


def _onnxruntime(path: str) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: np.asarray(session.run(None, {name: x})[0])


def _reference(path: str) -> Run:
    from onnx.reference import ReferenceEvaluator

    session = ReferenceEvaluator(path)
    return lambda x: np.asarray(session.run(None, {session.input_names[0]: x})[0])


def _openvino(path: str) -> Run:
    import openvino

    core = openvino.Core()
    # else products with 8-bit weights are quantised, and float32 is bfloat16 where the processor has that
    accurate = {"EXECUTION_MODE_HINT": "ACCURACY"}
    compiled = core.compile_model(core.read_model(path), "CPU", accurate)
    return lambda x: np.asarray(compiled([x])[0])


def _tract(path: str) -> Run:
    import tract

    runnable = tract.onnx().load(path).into_model().into_runnable()
    return lambda x: np.asarray(runnable.run([x])[0].to_numpy())


RUNTIMES = {"onnx": _reference, "openvino": _openvino, "tract": _tract}


@click.command()
@click.option("--python", default=sys.executable, help="The interpreter that has the runtimes.")
@click.option("--one", nargs=2, metavar="RUNTIME FILE", hidden=True, help="Print what one makes of one.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).with_name("runtimes.json"))
def main(python: str, one: tuple[str, str] | None, out: Path) -> None:
    """Make the files, and try each in each runtime."""
    if one is not None:
        click.echo(json.dumps(_compare(*one)))
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {f"digits: {way}": _export(Path(folder), options) for way, options in WAYS.items()}
        files |= {f"{name}: dense": ZOO.parent / "exports" / name / "model.onnx" for name in EXPORTS}
        rows = [{"file": name, "found": _try_all(python, name, path)} for name, path in files.items()]
    content = {"command": "python zoo/deploy/runtimes.py", "versions": _versions(python), "rows": rows}
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _export(folder: Path, options: str) -> Path:
    out = Path(tempfile.mkdtemp(dir=folder)) / "out"
    command = [sys.executable, "-m", "vbdcompress", "run", str(ZOO / "digits.pt"), "--out", str(out)]
    subprocess.run([*command, *options.split()], check=True, stdout=subprocess.DEVNULL)
    return out / "model.onnx"


def _try_all(python: str, told: str, path: Path) -> dict[str, Any]:
    """Runtime -> the largest difference, relative to the largest output, or why there is none."""
    found: dict[str, Any] = {}
    for name in RUNTIMES:
        command = [python, __file__, "--one", name, str(path)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        last = (ended.stderr.strip() or f"ended with {ended.returncode}").splitlines()[-1]
        found[name] = json.loads(ended.stdout.splitlines()[-1]) if ended.returncode == 0 else last
        click.echo(f"{told}, {name}: {found[name]}")
    return found


def _compare(runtime: str, path: str) -> float:
    expected, found = _onnxruntime(path), RUNTIMES[runtime](path)
    return max(_difference(expected(x), found(x)) for x in _inputs(path))


def _inputs(path: str) -> Sequence[np.ndarray]:
    import onnx

    generator = np.random.default_rng(0)
    given = onnx.load(path).graph.input[0].type.tensor_type
    shape = [dim.dim_value for dim in given.shape.dim[1:]]
    drawn = [generator.uniform(0, 255, (size, *shape)) for size in BATCHES]
    is_bytes = given.elem_type == onnx.TensorProto.UINT8
    return [x.astype(np.uint8) if is_bytes else (x / 127.5 - 1).astype(np.float32) for x in drawn]


def _difference(expected: np.ndarray, found: np.ndarray) -> float:
    return float(np.abs(found.reshape(expected.shape) - expected).max() / np.abs(expected).max())


def _versions(python: str) -> dict[str, str]:
    code = "import importlib.metadata as m, sys; print({name: m.version(name) for name in sys.argv[1:]})"
    command = [python, "-c", code, "onnxruntime", *RUNTIMES]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(ast.literal_eval(told))


if __name__ == "__main__":
    main()

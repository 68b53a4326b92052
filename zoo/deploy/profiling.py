"""Where an ONNX file's time goes, by onnxruntime's profiler: one thread, a batch of 64 images."""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

CALLS = 8
BATCH = 64


@dataclass(frozen=True)
class Convolution:
    """One convolution of a file.

    Attributes:
        shape: "in -> out at heightxwidth" of its output, channels as the file has them.
        macs: of one image.
        milliseconds: of one call.
    """

    shape: str
    macs: int
    milliseconds: float


@dataclass(frozen=True)
class Profile:
    """Milliseconds of one call, by kind of operator; and convolution by convolution, in order."""

    operators: dict[str, float]
    convolutions: tuple[Convolution, ...]


def profile(path: Path, image: tuple[int, ...] = (3, 32, 32)) -> Profile:
    """Run a file of one input, whose convolutions stand one behind the other."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_suffix(""))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).standard_normal((BATCH, *image)).astype(np.float32)
    for _ in range(CALLS):
        session.run(None, {"input": images})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = [event for event in events if event["name"].endswith("kernel_time")]
    spent: Counter[str] = Counter()
    for event in kernels:
        spent[_operator(event)] += event["dur"] / (1000 * CALLS)
    return Profile(
        {name: round(milliseconds, 1) for name, milliseconds in spent.most_common(3)},
        _convolutions(onnx.load(path), [event for event in kernels if _operator(event) == "Conv"]),
    )


def _operator(event: dict[str, Any]) -> str:
    return str(event["args"]["op_name"]).removeprefix("Fused")


def _convolutions(proto: onnx.ModelProto, events: list[dict[str, Any]]) -> tuple[Convolution, ...]:
    """The file's weights beside the profiler's times; the runtime keeps their order but renames the nodes."""
    shapes = {item.name: tuple(item.dims) for item in proto.graph.initializer}
    weights = [shapes[node.input[1]] for node in proto.graph.node if node.op_type == "Conv"]
    calls: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        calls[event["name"]].append(event)
    if len(calls) != len(weights):
        raise ValueError(f"{len(weights)} convolutions in the file, {len(calls)} in the profile")
    found = []
    for (out, into, *kernel), same in zip(weights, calls.values(), strict=True):
        height, width = next(iter(same[0]["args"]["output_type_shape"][0].values()))[2:]
        milliseconds = sum(event["dur"] for event in same) / (1000 * CALLS)
        macs = out * into * prod(kernel) * height * width
        found.append(Convolution(f"{into} -> {out} at {height}x{width}", macs, milliseconds))
    return tuple(found)


def compare_layers(original: Profile, cut: Profile) -> list[dict[str, Any]]:
    """Convolutions of one shape in the original together: how many, time and MACs before and after."""
    together: dict[str, list[tuple[Convolution, Convolution]]] = defaultdict(list)
    for pair in zip(original.convolutions, cut.convolutions, strict=True):
        together[pair[0].shape].append(pair)
    rows = []
    for shape, pairs in together.items():
        before, after = zip(*pairs, strict=True)
        milliseconds = [sum(layer.milliseconds for layer in side) for side in (before, after)]
        macs = [sum(layer.macs for layer in side) for side in (before, after)]
        rows.append(
            {
                "shape": shape,
                "layers": len(pairs),
                "milliseconds": [round(value, 2) for value in milliseconds],
                "macs": macs,
            }
        )
    return rows

"""Reports as a run writes them: JSON types only, numbers that fit together."""

from copy import deepcopy
from math import exp
from typing import Any

import pytest

from vbdcompress.reporting.html import render_html


def make_size(parameters: int, nonzeros: int, macs: int) -> dict[str, int]:
    return {"parameters": parameters, "nonzeros": nonzeros, "macs": macs, "bytes": 4 * parameters + 4_200}


def make_layer(
    name: str, kind: str, old: list[int], new: list[int], nonzeros: int, area: int
) -> dict[str, Any]:
    def count(shape: list[int]) -> int:
        product = 1
        for length in shape:
            product *= length
        return product

    return {
        "name": name,
        "kind": kind,
        "before": {
            "parameters": count(old) + old[0],
            "nonzeros": count(old) + old[0],
            "macs": count(old) * area,
            "shape": old,
        },
        "after": {
            "parameters": count(new) + new[0],
            "nonzeros": nonzeros,
            "macs": count(new) * area,
            "shape": new,
        },
    }


def make_epochs(number: int, start: float, end: float, beta: float = 1.0) -> list[dict[str, Any]]:
    rows = []
    for epoch in range(number):
        fade = exp(-4 * epoch / max(number - 1, 1))
        rows.append(
            {
                "epoch": epoch + 1,
                "nll": 0.02 + 0.05 * fade,
                "kl": 0.4 + 12 * fade,
                "beta": beta * min(epoch / 5, 1.0),
                "error": end + (start - end) * fade,
                "sparsity": 0.98 * (1 - fade),
                "learning_rate": 1e-3 * (1 - epoch / number),
                "seconds": 0.41,
                "examples_per_second": 2958.0,
            }
        )
    return rows


def make_counts(bins: int, low: int, high: int, total: int) -> list[int]:
    counts = [1 + int(total * exp(-(((i - low) / 4) ** 2)) / 60) for i in range(bins)]
    counts[high] += total
    return counts


EDGES = [-12 + 0.5 * i for i in range(49)]


def make_stage(mode: str, layers: list[dict[str, Any]], groups: list[dict[str, Any]]) -> dict[str, Any]:
    whole = {key: sum(layer["before"][key] for layer in layers) for key in ("parameters", "nonzeros", "macs")}
    kept = sum(layer["after"]["nonzeros"] for layer in layers) / whole["nonzeros"]
    curve = []
    for threshold in [None, *(-4 + 0.5 * i for i in range(22))]:
        share = 1.0 if threshold is None else kept * exp(0.3 * (threshold - 3.0))
        curve.append(
            {
                "threshold": threshold,
                "error": 0.74 if threshold is None else min(90.0, 1.1 + 0.3 * exp((3 - threshold) / 1.2)),
                "size": make_size(
                    int(whole["parameters"] * share),
                    int(whole["nonzeros"] * share),
                    int(whole["macs"] * share),
                ),
            }
        )
    kind = "gate" if mode == "channels" else "weight"
    return {
        "mode": mode,
        "prior": "vbd",
        "beta": 6.0 if mode == "channels" else 1.0,
        "table": [
            {
                "name": layer["name"],
                "kind": layer["kind"],
                "action": "left" if layer["kind"] == "BatchNorm2d" else "converted",
                "reason": "no weight matrix"
                if layer["kind"] == "BatchNorm2d"
                else "local reparameterisation",
                "parameters": layer["before"]["parameters"],
            }
            for layer in layers
        ],
        "groups": groups,
        "epochs": make_epochs(40, 3.1, 1.5),
        "curve": curve,
        "selection": {
            "rule": "threshold",
            "threshold": 3.0,
            "baseline_error": 0.74,
            "limits": {},
            "explanation": "threshold 3, the default of this mode",
        },
        "log_alpha": {
            "edges": EDGES,
            "layers": [
                {
                    "name": f"{layer['name']}.{kind}",
                    "kind": kind,
                    "counts": make_counts(48, 12 + place % 5, 36, layer["before"]["parameters"]),
                }
                for place, layer in enumerate(layers)
                if layer["kind"] != "BatchNorm2d"
            ],
        },
    }


def make_report(layers: list[dict[str, Any]], stages: list[dict[str, Any]]) -> dict[str, Any]:
    before, after = (
        make_size(*(sum(layer[when][key] for layer in layers) for key in ("parameters", "nonzeros", "macs")))
        for when in ("before", "after")
    )
    return {
        "schema": "vbdcompress.report",
        "schema_version": 1,
        "name": "digits",
        "created": "2026-11-22T19:00:00+00:00",
        "source": "zoo/digits.pt",
        "architecture": "digits",
        "environment": {
            "vbdcompress": "0.1.0",
            "python": "3.11.7",
            "torch": "2.15.0",
            "torchvision": "0.29.2",
            "onnx": "1.23.2",
            "onnxruntime": "1.32.0",
            "torch_pruning": "1.6.1",
            "platform": "Linux x86_64",
            "cpu_count": 2,
            "device": "cpu",
            "threads": 2,
        },
        "config": {
            "mode": "weights",
            "prior": "vbd",
            "epochs": 40,
            "lr": 0.001,
            "lr_log_sigma2": 0.003,
            "schedule": "linear",
            "beta": 1.0,
            "threshold": None,
            "max_params": None,
            "batch_size": 100,
            "finetune_epochs": 10,
            "skip": [],
            "prune_inputs": False,
            "validation_fraction": 0.1,
        },
        "seed": 0,
        "seconds": 71.3,
        "input": {"name": "input", "shape": [1, 8, 8], "mean": [0.3053], "std": [0.3769]},
        "data": {
            "name": "digits",
            "classes": [str(digit) for digit in range(10)],
            "train": 1213,
            "validation": 135,
            "test": 449,
            "validation_held_out": True,
        },
        "warnings": ["MACs of aten.native_batch_norm are not counted."],
        "error": 1.34,
        "error_split": "test",
        "errors": {"validation": {"before": 0.74, "after": 1.48}, "test": {"before": 0.89, "after": 1.34}},
        "size": {
            "before": before,
            "after": after,
            "compression_ratio": {key: before[key] / after[key] for key in before},
        },
        "uncounted_ops": ["aten.native_batch_norm"],
        "layers": layers,
        "stages": stages,
        "finetune": [{**row, "kl": 0.0, "beta": 0.0, "sparsity": None} for row in make_epochs(10, 1.6, 1.48)],
        "latency": [
            {"batch": 1, "original_ms": 0.0312, "slim_ms": 0.0187, "calls": 200},
            {"batch": 64, "original_ms": 1.214, "slim_ms": 0.402, "calls": 200},
        ],
        "export": {
            "opset": 20,
            "bytes": after["bytes"],
            "batch_sizes": [1, 7],
            "max_difference": 3e-7,
            "tolerance": 1e-4,
        },
        "files": ["model.onnx", "slim.safetensors", "report.json", "report.html"],
    }


@pytest.fixture
def report() -> dict[str, Any]:
    """A small convolutional network on digits, single weights removed."""
    layers = [
        make_layer("conv1", "Conv2d", [16, 1, 3, 3], [14, 1, 3, 3], 62, 64),
        make_layer("bn1", "BatchNorm2d", [16], [14], 28, 0),
        make_layer("conv2", "Conv2d", [32, 16, 3, 3], [25, 14, 3, 3], 231, 16),
        make_layer("bn2", "BatchNorm2d", [32], [25], 50, 0),
        make_layer("fc1", "Linear", [128, 512], [57, 400], 302, 1),
        make_layer("fc2", "Linear", [10, 128], [10, 57], 148, 1),
    ]
    return deepcopy(make_report(layers, [make_stage("weights", layers, [])]))


def make_large_report() -> dict[str, Any]:
    """152 layers, channels and then weights, a budget, reasons why groups stay whole."""
    layers = [
        make_layer(
            f"backbone.layer{i // 40 + 1}.{i % 40}.conv{i % 3 + 1}",
            "Conv2d",
            [64 + 8 * (i // 10), 64 + 8 * (i // 10), 3, 3],
            [40 + (i * 7) % 24, 40 + (i * 5) % 24, 3, 3],
            900 + 131 * i,
            196,
        )
        for i in range(152)
    ]
    groups = [
        {
            "name": layer["name"],
            "size": layer["before"]["shape"][0],
            "kept": layer["after"]["shape"][0],
            "whole_because": "its residual stream runs under a LayerNorm" if i % 20 == 0 else None,
        }
        for i, layer in enumerate(layers)
    ]
    report = make_report(layers, [make_stage("channels", layers, groups), make_stage("weights", layers, [])])
    report["name"] = "resnet152"
    report["stages"][0]["selection"] = {
        "rule": "budget",
        "threshold": 1.0,
        "baseline_error": 0.74,
        "limits": {"macs": 900_000_000},
        "explanation": "largest removal whose validation error is at most 0.8 points above the original's",
    }
    return deepcopy(report)


@pytest.fixture
def large_report() -> dict[str, Any]:
    """152 layers in two stages."""
    return make_large_report()


@pytest.fixture(scope="session")
def large_page() -> str:
    """The page of `large_report`, rendered once: its sixty bars and forty charts take a second."""
    return render_html(make_large_report())

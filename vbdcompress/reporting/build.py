"""The report as plain JSON types: the source of truth, from which the page is rendered."""

import copy
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vbdcompress.count import layer_sizes, uncounted_ops
from vbdcompress.inputs import Inputs, example_shape, names_of, tensors_of
from vbdcompress.opening import Opened, open_layers_
from vbdcompress.parametrized import store_weights_, stored_layers
from vbdcompress.precision import Rounding
from vbdcompress.records import (
    CurvePoint,
    EpochRow,
    ExportCheck,
    GroupRow,
    InputSpec,
    Latency,
    LayerRow,
    LayerSize,
    Selection,
    Size,
)
from vbdcompress.vbd.posterior import find_posteriors
from vbdcompress.versions import version_of

SCHEMA, SCHEMA_VERSION = "vbdcompress.report", 1
HISTOGRAM_EDGES = tuple(edge / 2 for edge in range(-24, 25))


@dataclass(frozen=True)
class StageRecord:
    """One stage, channels or weights: everything that was decided and seen in it.

    Attributes:
        cost: what weighed the KL of a channel.
        distillation: {"share", "temperature"} of following the original's outputs; None: the labels alone.
        logged_at: log alpha at which the network was masked for each epoch's error and sparsity.
    """

    mode: str
    prior: str
    beta: float
    table: tuple[LayerRow, ...]
    groups: tuple[GroupRow, ...]
    epochs: tuple[EpochRow, ...]
    curve: tuple[CurvePoint, ...]
    selection: Selection
    log_alpha: dict[str, Any]
    cost: str = "none"
    distillation: dict[str, float] | None = None
    logged_at: float | None = None


@dataclass(frozen=True)
class DataRecord:
    """The data of a run: what it is called, how many examples, and whether validation is honest.

    Attributes:
        validation_held_out: True where the network was not trained on the validation examples, None where
            nobody says.
        split: {"fraction", "seed"} of the validation split; None where it was given.
    """

    name: str | None
    classes: tuple[str, ...]
    train: int
    validation: int
    test: int | None
    validation_held_out: Literal[True] | None
    split: dict[str, Any] | None = None


@dataclass(frozen=True)
class ErrorRecord:
    """Errors in percent; test is None where there is no test set."""

    validation_before: float
    validation_after: float
    test_before: float | None = None
    test_after: float | None = None


@dataclass(frozen=True)
class ReportContext:
    """What a report says beside the two networks; all of it optional.

    Attributes:
        source: file or class that the network came from.
        config: options of the run.
        rounding: of the slim network's weights; None where they were not rounded.
        warnings: for a reader, one sentence each.
    """

    name: str = "network"
    source: str | None = None
    architecture: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    input: InputSpec | None = None
    data: DataRecord | None = None
    errors: ErrorRecord | None = None
    stages: Sequence[StageRecord] = ()
    finetune: Sequence[EpochRow] = ()
    rounding: Rounding | None = None
    warnings: Sequence[str] = ()
    seconds: float | None = None
    device: str = "cpu"


def report(
    original: nn.Module, slim: nn.Module, example: Inputs, sizes: tuple[Size, Size], context: ReportContext
) -> dict[str, Any]:
    """The report's content, schema version 1; latency and export are filled in by `export`.

    Args:
        original, slim: plain networks.
        example: a batch of inputs, to count MACs with.
        sizes: of the original and the slim network.
        context: the rest.
    """
    errors = context.errors
    before, after = sizes
    final = None if errors is None else errors.test_after
    whole = _with_layers_of(slim, original)
    spec = context.input or InputSpec(example_shape(example))
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "name": context.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": context.source,
        "architecture": context.architecture,
        "environment": describe_environment(context.device),
        "config": dict(context.config),
        "seed": context.config.get("seed"),
        "seconds": context.seconds,
        "input": asdict(replace(spec, name=names_of(example, spec.name)[0])),
        "inputs": _input_rows(example, spec),
        "data": None if context.data is None else asdict(context.data),
        "warnings": list(context.warnings),
        "error": final if final is not None or errors is None else errors.validation_after,
        "error_split": None if errors is None else "validation" if final is None else "test",
        "errors": None if errors is None else _error_table(errors),
        "size": {
            "before": asdict(before),
            "after": asdict(after),
            "compression_ratio": compression_ratio(before, after),
        },
        "uncounted_ops": list(uncounted_ops(whole, example)),
        "layers": _layer_rows(whole, slim, example),
        "stages": [_stage_content(stage) for stage in context.stages],
        "finetune": [asdict(row) for row in context.finetune],
        "rounding": None if context.rounding is None else context.rounding.to_json(),
        "latency": [],
        "export": None,
        "files": [],
    }


def _input_rows(example: Inputs, spec: InputSpec) -> list[dict[str, Any]]:
    """What model.onnx takes: name, shape of one example and type of each input."""
    rows = zip(names_of(example, spec.name), tensors_of(example), strict=True)
    return [
        {
            "name": name,
            "shape": list(tensor.shape[1:]),
            "dtype": "uint8" if spec.embedded else str(tensor.dtype).removeprefix("torch."),
        }
        for name, tensor in rows
    ]


def with_export(content: Mapping[str, Any], check: ExportCheck, latency: Sequence[Latency]) -> dict[str, Any]:
    """The report once the files are written: measured bytes, parity, latency."""
    size = {key: dict(value) for key, value in content["size"].items()}
    size["after"]["bytes"] = check.bytes
    size["compression_ratio"]["bytes"] = size["before"]["bytes"] / check.bytes
    rows = zip(content["inputs"], check.open_dims, strict=True)
    return {
        **content,
        "inputs": [row | {"any_size": list(dims)} if dims else row for row, dims in rows],
        "size": size,
        "latency": [asdict(row) for row in latency],
        "export": asdict(check),
        "files": ["model.onnx", "slim.safetensors", "report.json", "report.html"],
    }


def compression_ratio(before: Size, after: Size) -> dict[str, float]:
    """before / after of each field of Size; more than 1 where the network became smaller."""
    pairs = zip(asdict(before).items(), asdict(after).values(), strict=True)
    return {key: was / max(1, now) for (key, was), now in pairs}


def log_alpha_histogram(model: nn.Module) -> dict[str, Any]:
    """Counts of log_alpha for each posterior in a converted network; what lies outside counts at the edge."""
    edges = np.array(HISTOGRAM_EDGES)
    layers = []
    for posterior in find_posteriors(model):
        values = posterior.log_alpha().detach().cpu().numpy().ravel()
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        layers.append({"name": posterior.name, "kind": posterior.kind, "counts": counts.tolist()})
    return {"edges": edges.tolist(), "layers": layers}


def describe_environment(device: str) -> dict[str, Any]:
    """Versions and machine, without anything that names a person or a path."""
    packages = ("vbdcompress", "torch", "torchvision", "onnx", "onnxruntime", "torch-pruning")
    return {
        **{package.replace("-", "_"): version_of(package) for package in packages},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
    }


def _error_table(errors: ErrorRecord) -> dict[str, Any]:
    test = None
    if errors.test_after is not None:
        test = {"before": errors.test_before, "after": errors.test_after}
    return {
        "validation": {"before": errors.validation_before, "after": errors.validation_after},
        "test": test,
    }


def _with_layers_of(slim: nn.Module, original: nn.Module) -> nn.Module:
    """The original with the slim network's layers: what holds others opened, computed weights stored."""
    opened = {name for name, module in slim.named_modules() if isinstance(module, Opened)}
    stored = list(stored_layers(original, slim))
    if opened or stored:  # its layers have other names
        original = copy.deepcopy(original)
        store_weights_(original, stored)
        open_layers_(original, opened)
    return original


def _layer_rows(original: nn.Module, slim: nn.Module, example: Inputs) -> list[dict[str, Any]]:
    after = {row.name: row for row in layer_sizes(slim, example)}
    return [
        {
            "name": row.name or "(its own code)",
            "kind": row.kind,
            "before": _layer_part(original, row),
            "after": _layer_part(slim, after.get(row.name, replace(row, parameters=0, nonzeros=0, macs=0))),
        }
        for row in layer_sizes(original, example)
    ]


def _layer_part(model: nn.Module, row: LayerSize) -> dict[str, Any]:
    weight = getattr(model.get_submodule(row.name), "weight", None)
    shape = list(weight.shape) if isinstance(weight, Tensor) else []
    return {"parameters": row.parameters, "nonzeros": row.nonzeros, "macs": row.macs, "shape": shape}


def _stage_content(stage: StageRecord) -> dict[str, Any]:
    return {
        "mode": stage.mode,
        "prior": stage.prior,
        "beta": stage.beta,
        "cost": stage.cost,
        "distillation": stage.distillation,
        "logged_at": stage.logged_at,
        "table": [asdict(row) for row in stage.table],
        "groups": [asdict(row) for row in stage.groups],
        "epochs": [asdict(row) for row in stage.epochs],
        "curve": [{**asdict(point), "threshold": finite(point.threshold)} for point in stage.curve],
        "selection": {**asdict(stage.selection), "threshold": finite(stage.selection.threshold)},
        "log_alpha": stage.log_alpha,
    }


def finite(value: float) -> float | None:
    """JSON has no infinity: a threshold that removes nothing is null."""
    return value if math.isfinite(value) else None

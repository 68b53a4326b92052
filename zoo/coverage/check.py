"""What the coverage table says of one network in one mode, found by doing it."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from networks import Network, randomise_
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from vbdcompress.compare import as_double, flatten_output, relative_difference
from vbdcompress.conversion import Converted, convert
from vbdcompress.count import layer_sizes, measure_size
from vbdcompress.errors import TRACE_ERRORS, VbdcompressError
from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.exporting.slim_file import SlimFile, load_slim, save_slim
from vbdcompress.linear import OpenLinear
from vbdcompress.records import InputSpec
from vbdcompress.slimming import slim
from vbdcompress.vbd.elbo import ELBO
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_

OFF_SHARE = 0.3
THRESHOLD = 50.0


def check(network: Network, mode: Any) -> dict[str, Any]:
    """Convert, step, slim, export and reload; figures for the table, and the reasons for what stays.

    A step that fails ends the row with what it raised: a row is never missing.
    """
    model = network.build()
    randomise_(model)
    example = network.example()
    row: dict[str, Any] = {"network": network.name, "mode": mode, "size": network.size}
    started = time.perf_counter()
    try:
        converted = convert(model, example, mode)
        row["convert_seconds"] = round(time.perf_counter() - started, 1)
        row |= _coverage(model, converted, example)
        del model  # the largest networks leave room for few copies
        row["posteriors"] = sum(p.theta.numel() for p in find_posteriors(converted.model))
        row["step"] = _step(converted.model, example)
        # From here on in float64: what is left out must be left out exactly
        converted = replace(converted, model=converted.model.double(), example=as_double(example))
        switch_off_(converted.model)
        started = time.perf_counter()
        slimmed = slim(converted, THRESHOLD)
        row["slim_seconds"] = round(time.perf_counter() - started, 1)
        set_threshold_(converted.model, THRESHOLD)
        other = as_double(network.example(3))
        row["difference"] = _difference(converted.model.eval(), slimmed.model, other)
        after = measure_size(slimmed.model, as_double(example))
        row["parameters_left"], row["macs_left"] = after.parameters, after.macs
        plain = slimmed.model.float()
        with tempfile.TemporaryDirectory() as folder:
            check = export_onnx(plain, Path(folder) / "model.onnx", example, batch_sizes=(1, 3))
            row["onnx_difference"] = check.max_difference
            header = SlimFile((slimmed.plan,), None, {}, None, InputSpec(tuple(example.shape[1:])))
            save_slim(Path(folder) / "slim.safetensors", plain, header)
            again = load_slim(Path(folder) / "slim.safetensors", network.build())
            row["reload_difference"] = _difference(plain, again, example)
    except VbdcompressError as error:
        row["failed"] = str(error)
    return row


def switch_off_(model: nn.Module) -> None:
    """Raise the variance of a share of each posterior beyond any threshold, in place."""
    for posterior in find_posteriors(model):
        log_sigma2 = posterior.log_sigma2.detach().flatten()
        log_sigma2[torch.randperm(len(log_sigma2))[: max(1, round(OFF_SHARE * len(log_sigma2)))]] = 90.0
        posterior.log_sigma2.data = log_sigma2.view_as(posterior.log_sigma2)


def _coverage(model: nn.Module, converted: Converted, example: Tensor) -> dict[str, Any]:
    """How much of the network a posterior can remove, and why the rest stays."""
    layers = {row.name: row for row in layer_sizes(model, example)}
    kinds = nn.Linear | _ConvNd | nn.RNNBase
    undone = converted.undo()
    alike = {name for name, layer in undone.named_modules() if isinstance(layer, OpenLinear)}
    mixing = [name for name, layer in model.named_modules() if isinstance(layer, kinds) or name in alike]
    touched = {row.name for row in converted.table if row.action == "converted"}
    if converted.mode == "channels":
        for group in converted.scan.removable:
            members = (*group.writers, *group.readers, *group.between)
            touched |= {member.layer for member in members}
    else:
        touched |= {name.rpartition(".")[0] for name in touched}
    opened = set(layers) - {row.name for row in layer_sizes(undone, example)}
    whole = [name for name in opened if any(t.startswith(name.rpartition(".")[0] + ".") for t in touched)]
    touched |= set(whole) | {name for name in layers if any(t.startswith(name + ".") for t in touched)}
    macs = sum(row.macs for row in layers.values())
    count = sum(layers[name].parameters for name in mixing if name in layers)
    reasons = Counter(
        group.whole_because for group in converted.scan.groups if group.whole_because is not None
    )
    if converted.mode == "weights":
        reasons = Counter(row.reason for row in converted.table if row.action == "left")
    return {
        "parameters": sum(row.parameters for row in layers.values()),
        "macs": macs,
        "layers": len(mixing),
        "layers_touched": sum(name in touched for name in mixing),
        "parameter_share": sum(layers[n].parameters for n in mixing if n in touched and n in layers)
        / max(1, count),
        "mac_share": sum(row.macs for name, row in layers.items() if name in touched) / max(1, macs),
        "whole": [[reason, number] for reason, number in reasons.most_common()],
    }


def _step(model: nn.Module, example: Tensor) -> str:
    """One ELBO step in training mode: "ok", or what is wrong with it."""

    def loss(output: Any, target: Tensor) -> Tensor:
        return torch.stack([part.square().mean() for part in flatten_output(output)]).sum()

    model.train()
    terms = ELBO(model, loss, 100)(example, torch.zeros(len(example)), torch.tensor(1.0))
    terms.objective.backward()
    if not bool(terms.objective.isfinite()):
        return "the objective is not finite"
    for posterior in find_posteriors(model):
        for tensor in (posterior.theta, posterior.log_sigma2):
            if tensor.requires_grad and (tensor.grad is None or not bool(tensor.grad.isfinite().all())):
                return f"no finite gradient for {posterior.name}"
    model.zero_grad(set_to_none=True)
    return "ok"


@torch.no_grad()
def _difference(one: Callable[[Tensor], Any], other: Callable[[Tensor], Any], inputs: Tensor) -> float:
    return relative_difference(flatten_output(one(inputs)), flatten_output(other(inputs)))


def check_torch_pruning(network: Network) -> dict[str, Any]:
    """torch-pruning alone: its magnitude pruner takes 30 % of all channels but the classifier's."""
    model = network.build()
    randomise_(model)
    example = network.example()
    before = measure_size(model, example)
    last = [module for module in model.modules() if isinstance(module, nn.Linear | _ConvNd)][-1]
    started = time.perf_counter()
    row: dict[str, Any] = {"network": network.name, "mode": "torch-pruning"}
    try:
        pruner = tp.pruner.MagnitudePruner(
            model,
            example,
            tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=OFF_SHARE,
            ignored_layers=[last],
        )
        pruner.step()
        after = measure_size(model.eval(), example)
        row["parameters_left"] = after.parameters / before.parameters
        row["macs_left"] = after.macs / before.macs
    except TRACE_ERRORS as error:
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row

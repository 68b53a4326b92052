"""The network that a user gives: taken out of wrappers, copied, tried."""

import copy
import pickle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from vbdcompress.errors import ConvertError
from vbdcompress.evaluation import device_of, to_device
from vbdcompress.inputs import Inputs, call, in_eval_mode, shapes_of, tensors_of
from vbdcompress.surgery.groups import TRACE_ERRORS


def copy_of(model: nn.Module) -> nn.Module:
    """A copy. Raises ConvertError where it holds what can't be copied, such as tensors that were computed."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError, pickle.PickleError) as error:
        held = [
            f"{name}.{own}".lstrip(".")
            for name, module in model.named_modules()
            for own, value in vars(module).items()
            if any(map(_is_computed, tree_leaves(value)))
        ]
        told = f"it holds computed tensors: {', '.join(held)}" if held else str(error)
        raise ConvertError(
            "convert",
            f"the network can't be copied: {told}.",
            "Old-style weight_norm and spectral_norm: use those of torch.nn.utils.parametrizations; "
            "torch.nn.utils.prune: call prune.remove first; what forward keeps: detach it, or clear it; "
            "a lock, a file or a scripted function: make it where it is used.",
        ) from error


def forget_graph_(model: nn.Module) -> None:
    """Detach what forward kept of its last step, such as losses on the way: it can be copied then."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name not in ("_parameters", "_modules") and any(map(_is_computed, tree_leaves(value))):
                vars(module)[name] = tree_map(_detached, value)


def _detached(item: Any) -> Any:
    return item.detach() if _is_computed(item) else item


def _is_computed(item: Any) -> bool:
    return isinstance(item, Tensor) and item.grad_fn is not None


def unwrap(model: nn.Module) -> nn.Module:
    """The network itself, without torch.compile or a wrapper for several devices around it.

    Raises:
        ConvertError: it is TorchScript, whose layers can't be changed, or no network at all.
    """
    if not isinstance(model, nn.Module):
        raise ConvertError(
            "convert",
            f"the network is a {type(model).__name__}, allowed is an nn.Module.",
            "From a file: vbdcompress.load(path).model",
        )
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            raise ConvertError(
                "convert",
                "the network is TorchScript (torch.jit), whose layers can't be changed.",
                "Give the nn.Module that it was made from, or what torch.export makes of that.",
            )
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
            model = inner
        else:
            return model


def check_model(model: nn.Module, example: Inputs) -> set[str]:
    """Run a network on the example in eval mode; the names of the modules that were called.

    Raises:
        ConvertError: it has no weights yet, holds NaN, or fails on the example.
    """
    for name, module in model.named_modules():
        if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            raise ConvertError(
                "convert",
                f"layer '{name}' is {type(module).__name__}, which has no weights yet.",
                "Run one batch through the model first.",
            )
    if not any(True for _ in model.parameters()):
        raise ConvertError("convert", "nothing in the network can be converted: it has no parameters.")
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise ConvertError(
                "convert",
                f"parameter '{name}' is {parameter.dtype}, too coarse to learn a variance in.",
                "Call model.float() first; --precision bf16-mixed makes the fit itself fast.",
            )
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            bad = int((~parameter.isfinite()).sum())
            raise ConvertError("convert", f"parameter '{name}' holds {bad} NaN or infinite values.")
    called: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, module in model.named_modules()
    ]
    try:
        with in_eval_mode(model), torch.no_grad():
            call(model, to_device(example, device_of(model)))
    except TRACE_ERRORS as error:
        raise ConvertError(
            "convert",
            f"the network fails on a batch of shape {_shapes(example)}: {type(error).__name__}: {error}",
            _advice(model, example, error),
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _advice(model: nn.Module, example: Inputs, error: BaseException) -> str:
    tensors = (*model.parameters(), *tensors_of(example))
    kinds = sorted({str(tensor.dtype) for tensor in tensors if tensor.is_floating_point()})
    if len(kinds) > 1:
        return f"Parameters and inputs are of {' and '.join(kinds)}: make both float32, by .float()."
    if isinstance(error, TypeError) and "missing" in str(error):
        return "Several inputs go through Python, as the loader yields them: compress(model, loader)"
    return "Check the input's shape, and --data or --image-size; it must take batches of any size."


def _shapes(example: Inputs) -> str:
    return ", ".join(map(str, shapes_of(example)))

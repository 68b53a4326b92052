"""The network that a user gives: taken out of wrappers, copied, tried."""

import copy
import pickle
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from vbdcompress.compare import flatten_output, is_computed, relative_difference
from vbdcompress.errors import TRACE_ERRORS, ConfigError, ConvertError, words_of
from vbdcompress.evaluation import device_of, to_device
from vbdcompress.inputs import Inputs, call, first, in_eval_mode, noting_calls, shapes_of, tensors_of
from vbdcompress.surgery.influence import why_not_training
from vbdcompress.vbd.posterior import find_posteriors

# Largest difference of what is the same function, relative to the largest output, in float32
ALIKE = 1e-3
NO_NOISE = "Noise and dropout are for training: F.dropout(x, training=self.training), or an nn.Dropout."


def copy_of(model: nn.Module) -> nn.Module:
    """A copy. Raises ConvertError where it holds what can't be copied, such as tensors that were computed."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError, pickle.PickleError) as error:
        held = [
            f"{name}.{own}".lstrip(".")
            for name, module in model.named_modules()
            for own, value in vars(module).items()
            if any(map(is_computed, tree_leaves(value)))
        ]
        told = f"it holds computed tensors: {', '.join(held)}" if held else str(error)
        raise ConvertError(
            "convert",
            f"the network can't be copied: {told}.",
            "Old-style weight_norm and spectral_norm: use those of torch.nn.utils.parametrizations; "
            "torch.nn.utils.prune: call prune.remove first; what forward keeps: detach it, or clear it; "
            "a lock, a file or a scripted function: make it where it is used.",
        ) from error


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
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                called = f"module '{name}'" if name else "the network"
                raise ConvertError(
                    "convert",
                    f"{called} is TorchScript (torch.jit), whose layers can't be changed.",
                    "Give the nn.Module that it was made from, or what torch.export makes of that.",
                )
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
            model = inner
        else:
            return model


class _Noting(TorchFunctionMode):
    """Notes the names of tensors, or of views of them, that are computed with.

    Args:
        names: of the tensors by where they lie in memory.
        found: what is noted.
    """

    def __init__(self, names: dict[int, str], found: set[str]) -> None:
        super().__init__()
        self.names, self.found = names, found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # not where a dtype is asked for
            given = (_place_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            self.found.update(self.names[place] for place in given if place in self.names)
        return result


def _place_of(tensor: Tensor) -> int:
    """Where it lies in memory, the same for a view of it; 0 where that can't be said."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # sparse ones, and what torch.func wraps, have none of their own
        return 0


@contextmanager
def _used_of(model: nn.Module | None) -> Iterator[set[str]]:
    """Inside, gathers the layers of a network that are called, or whose tensors are computed with.

    Args:
        model: in eval mode meanwhile; None: there is none, and nothing to gather.
    """
    found = set[str]()
    if model is None:
        yield found
        return
    layers = list(model.named_modules())
    names = {
        _place_of(tensor): name or own_name
        for name, module in layers
        for own_name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }
    names.pop(0, None)
    with in_eval_mode(model), noting_calls(model) as called, _Noting(names, found):
        try:
            yield found
        finally:
            found |= {name or "the network" for name in called}


@torch.no_grad()
def check_model(model: nn.Module, example: Inputs, of: nn.Module | None = None) -> set[str]:
    """Run a network on the example in eval mode; the names of the modules that were called.

    Args:
        of: what it is a copy of: one that runs on the original's layers would be cut in vain, while those
            are trained.
    Raises:
        ConvertError: it has no weights yet, holds NaN, fails on the example, or runs on layers of `of`.
    """
    _check_parameters(model)
    if any(tensor.dim() and not len(tensor) for tensor in tensors_of(example)):
        raise ConvertError("convert", "the example is empty, allowed is a batch of at least one.")
    foreign = set[str]()
    try:
        with in_eval_mode(model), noting_calls(model) as called, _used_of(of) as foreign:
            call(model, to_device(example, device_of(model)))
    except TRACE_ERRORS as error:
        if not foreign:
            raise ConvertError(
                "convert",
                f"the network fails on a batch of shape {_shapes(example)}: {words_of(error)}",
                _advice(model, example, error),
            ) from error
    if foreign:
        names = sorted(foreign)
        told = ", ".join(f"'{name}'" for name in names[:5]) + (", ..." if len(names) > 5 else "")
        raise ConvertError(
            "convert",
            f"a copy of the network still runs on layers of the original, and would be cut in vain: {told}.",
            "Functions made in __init__, and a forward that was patched, keep what they close over "
            "(lambda x: self.layer(x)): make them methods, and call layers by self.",
        )
    return called


def _check_parameters(model: nn.Module) -> None:
    """Raise ConvertError where there are none, or they are no numbers that a posterior can be learned on.

    Or where they have posteriors already.
    """
    if find_posteriors(model):
        raise ConvertError(
            "convert",
            "the network is converted already: its weights or channels have posteriors.",
            "slim(converted).model cuts it, converted.undo() gives the plain network.",
        )
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


def check_storable(model: nn.Module, samples: Inputs, *, int8: bool, packed: bool) -> None:
    """Raise where the files that are asked for could not hold the network.

    Args:
        samples: some inputs.
        int8: a file that computes in 8-bit integers is asked for.
        packed: weights in few bits, or packed, are.
    Raises:
        ConvertError: its state is no plain tensors.
        ConfigError: an option is not for such a network.
    """
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):  # what a module's get_extra_state gives
            raise ConvertError(
                "convert",
                f"state_dict entry '{name}' is a {type(value).__name__}, allowed are tensors.",
                "Keep what get_extra_state gives in a buffer.",
            )
        if value.layout != torch.strided:
            raise ConvertError(
                "convert",
                f"state_dict entry '{name}' is {value.layout}, allowed are dense tensors.",
                "Keep its indices and values in buffers, or register it with persistent=False.",
            )
    with in_eval_mode(model), torch.no_grad():
        if int8 and not isinstance(call(model, to_device(first(samples, 2), device_of(model))), Tensor):
            raise ConfigError("int8", "is for networks with one output, a bare tensor.")
    if packed and any(parameter.dtype == torch.float64 for parameter in model.parameters()):
        raise ConfigError("bits, pack", "need single precision, this is torch.float64.", "model.float()")


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


def change_where_alike(
    model: nn.Module,
    names: Collection[str],
    change_: Callable[[nn.Module, Collection[str]], None],
    example: Inputs,
) -> tuple[nn.Module, list[str]]:
    """A copy with modules replaced, but for those that its code treats otherwise then; and their names.

    It may ask for a module's type, or for weights by their old names; in training mode too.

    Args:
        model: left as it was.
        names: of the modules.
        change_: replaces those of the names, in place: opens them, or stores their weights.
        example: a batch of inputs, to compare on.
    """
    expected, given = _outputs(copy.deepcopy(model), example), to_device(example, device_of(model))
    trains = why_not_training(copy.deepcopy(model), given) is None

    def goes(trial: nn.Module) -> bool:
        try:
            alike = relative_difference(expected, _outputs(copy.deepcopy(trial), example)) <= ALIKE
        except TRACE_ERRORS:
            return False
        return alike and (not trains or why_not_training(copy.deepcopy(trial), given) is None)

    every = copy.deepcopy(model)
    change_(every, names)
    if goes(every):
        return every, list(names)
    found, changed = copy.deepcopy(model), list[str]()
    change_(found, ())
    for name in names:
        one = copy.deepcopy(found)
        change_(one, [name])
        if type(one.get_submodule(name)) is not type(found.get_submodule(name)) and goes(one):
            found = one
            changed.append(name)
    return found, changed


def check_noise(model: nn.Module, example: Inputs) -> None:
    """Raise ConvertError where outputs depend on what is drawn: no cut could be proved. The model stays."""
    one, other = (_outputs(copy.deepcopy(model), example, seed) for seed in (0, 1))
    difference = relative_difference(one, other)
    if one and difference > ALIKE:
        raise ConvertError(
            "convert", f"in eval mode, outputs differ by {difference:.1g} with what is drawn.", NO_NOISE
        )


@torch.no_grad()
def _outputs(model: nn.Module, example: Inputs, seed: int = 0) -> list[Tensor]:
    with in_eval_mode(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return flatten_output(call(model, to_device(example, device_of(model))))

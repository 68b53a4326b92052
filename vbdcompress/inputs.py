"""What a network is given: one tensor, several in a tuple or list, or a dict of them by name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vbdcompress.errors import ConfigError, FitError

# Tensor, a tuple or list of inputs, or a mapping from names to them
Inputs = Any


def check_network(where: str, model: object) -> None:
    """Raise ConfigError where what is given is no network, as what `convert` gives is not by itself."""
    if not isinstance(model, nn.Module):
        inner = isinstance(getattr(model, "model", None), nn.Module)
        advice = "Its attribute `model` is one." if inner else ""
        raise ConfigError(where, f"is given a {type(model).__name__}, allowed is an nn.Module.", advice)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The network's output: model(x), model(*several) or model(**named)."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def names_of(inputs: Inputs, name: str) -> list[str]:
    """What an ONNX file calls them: a dict's own names, `name` for one, else `name` with a number."""
    if isinstance(inputs, Mapping) and all(
        isinstance(item, Tensor) or not tensors_of(item) for item in inputs.values()
    ):  # numbers beside them are part of the graph
        return [str(key) for key, item in inputs.items() if isinstance(item, Tensor)]
    count = len(tensors_of(inputs))
    return [name] if count == 1 else [f"{name}_{number}" for number in range(count)]


# What torch's layers call it
_GIVEN = ("input", "x")


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """What one of torch's layers is called with: its first argument, by place or by name."""
    given = args[0] if args else next(kwargs[name] for name in _GIVEN if name in kwargs)
    assert isinstance(given, Tensor)
    return given


def with_input(
    args: Sequence[Any], kwargs: Mapping[str, Any], given: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with another first one."""
    return (given, *args[1:]), {name: value for name, value in kwargs.items() if name not in _GIVEN}


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; afterwards each is back in its own, frozen norms too.

    Without torch's shortcut for transformers, which in eval mode reads weights past the layers, counts no
    MACs, and makes nested tensors.
    """
    modes = [(module, module.training) for module in model.modules()]
    shortcut = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(shortcut)
        for module, mode in modes:
            module.training = mode


@contextmanager
def noting_calls(model: nn.Module) -> Iterator[set[str]]:
    """Inside, gathers the names of the modules that are called; the network's own is empty."""
    called = set[str]()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, module in model.named_modules()
    ]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def named_batch_of_one(where: str) -> Iterator[None]:
    """Around a call in training mode. Raises FitError where batch norm was given a single value a channel."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):  # torch's batch norm
            raise
        raise FitError(
            where,
            f"batch norm can't train on a batch of one example: {error}",
            "Leave a last batch of one out: DataLoader(..., drop_last=True)",
        ) from error


def map_tensors(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The same inputs with each tensor changed."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {name: map_tensors(item, change) for name, item in inputs.items()}
    if isinstance(inputs, tuple) and hasattr(inputs, "_fields"):  # a named tuple takes its items one by one
        return type(inputs)(*(map_tensors(item, change) for item in inputs))
    if isinstance(inputs, tuple | list):
        return type(inputs)(map_tensors(item, change) for item in inputs)
    return inputs


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """All tensors in inputs, in order."""
    if isinstance(inputs, Tensor):
        return [inputs]
    items = inputs.values() if isinstance(inputs, Mapping) else inputs
    if not isinstance(inputs, Mapping | tuple | list):
        return []
    return [tensor for item in items for tensor in tensors_of(item)]


def holds_data(inputs: Inputs) -> Callable[[Tensor], bool]:
    """Tensor -> whether it is data, not a mask: one among several inputs that is 0 and 1 alone is a mask."""
    several = len(tensors_of(inputs)) > 1
    return lambda tensor: not (several and bool(((tensor == 0) | (tensor == 1)).all()))


def batch_size(inputs: Inputs) -> int:
    """Number of examples: the first dimension of the first tensor; a number beside them has none."""
    return next((len(tensor) for tensor in tensors_of(inputs) if tensor.dim()), 1)


def first(inputs: Inputs, count: int) -> Inputs:
    """The first examples; a number beside them as it is."""
    return map_tensors(inputs, lambda tensor: tensor[:count] if tensor.dim() else tensor)


def resize(inputs: Inputs, count: int) -> Inputs:
    """As many examples as asked for, the given ones over and over; a number beside them as it is."""

    def repeat(tensor: Tensor) -> Tensor:
        places = torch.arange(count, device=tensor.device) % len(tensor)
        return tensor[places].contiguous()

    return map_tensors(inputs, lambda tensor: repeat(tensor) if tensor.dim() else tensor)


def shapes_of(inputs: Inputs) -> list[tuple[int, ...]]:
    """The shape of each tensor."""
    return [tuple(tensor.shape) for tensor in tensors_of(inputs)]


def open_dims(shown: Sequence[Inputs]) -> list[list[int]]:
    """Of each tensor, the dimensions beside the batch whose size is not the same in all inputs shown."""
    shapes = [shapes_of(inputs) for inputs in shown]
    return [
        [dim for dim in range(1, len(sizes[0])) if len({size[dim] for size in sizes}) > 1]
        for sizes in zip(*shapes, strict=True)
    ]


def are_alike(shown: Sequence[Inputs]) -> bool:
    """Whether all inputs have as many tensors, of as many dimensions."""
    return len({tuple(map(len, shapes_of(inputs))) for inputs in shown}) == 1


def example_shape(inputs: Inputs) -> tuple[int, ...]:
    """Of one example of the first tensor, without the batch."""
    return shapes_of(inputs)[0][1:]

"""Parameters, nonzeros, multiply-accumulates and bytes of a network."""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from vbdcompress.compare import flatten_output
from vbdcompress.errors import TRACE_ERRORS
from vbdcompress.evaluation import device_of, to_device
from vbdcompress.inputs import Inputs, batch_size, call, in_eval_mode, resize
from vbdcompress.records import LayerSize, Size

FLOAT_BYTES = 4


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of attention's two products, as torch counts them on a GPU; shapes [batch, heads, tokens, width]."""
    batch, heads, queries, width = query
    return int(2 * batch * heads * queries * key[-2] * (width + value[-1]))


# What torch's own counter has no formula for
_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def measure_size(model: nn.Module, example: Inputs) -> Size:
    """Size of a plain network; its bytes are those of its parameters as float32.

    Args:
        example: a batch of inputs; MACs are of one example.
    """
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    nonzeros = sum(int(parameter.count_nonzero()) for parameter in parameters)
    macs = sum(_count_macs(model, example).values())
    return Size(count, nonzeros, macs, FLOAT_BYTES * count)


def layer_sizes(model: nn.Module, example: Inputs) -> tuple[LayerSize, ...]:
    """Each layer that owns parameters or multiplies by itself; MACs of one example.

    They add up: what two layers share counts for the first.
    """
    macs = _count_macs(model, example)
    rows, counted = [], set[int]()
    for name, module in model.named_modules():
        held = list(module.parameters(recurse=False))
        if held or macs.get(name):
            own = [parameter for parameter in held if id(parameter) not in counted]
            counted |= {id(parameter) for parameter in own}
            nonzeros = sum(int(parameter.count_nonzero()) for parameter in own)
            count = sum(parameter.numel() for parameter in own)
            rows.append(LayerSize(name, type(module).__name__, count, nonzeros, macs.get(name, 0)))
    return tuple(rows)


def unused_parameters(model: nn.Module, example: Inputs) -> frozenset[str]:
    """Names of parameters that no output depends on, such as an auxiliary head's: no ONNX file holds them."""
    # functional_call leaves plain tensors in a module that has two names
    model = copy.deepcopy(model)
    named = {name: tensor for name, tensor in model.named_parameters() if tensor.is_floating_point()}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in named.items()}
    given = to_device(example, device_of(model))
    named_inputs = dict(given) if isinstance(given, Mapping) else {}
    inputs = () if named_inputs else tuple(given) if isinstance(given, tuple | list) else (given,)
    with in_eval_mode(model), torch.enable_grad():
        outputs = flatten_output(torch.func.functional_call(model, leaves, inputs, named_inputs))
    sums = [output.sum() for output in outputs if output.requires_grad]
    if not sums:
        return frozenset()
    gradients = torch.autograd.grad(sums, list(leaves.values()), allow_unused=True)
    return frozenset(name for name, gradient in zip(leaves, gradients, strict=True) if gradient is None)


def _count_macs(model: nn.Module, example: Inputs) -> dict[str, int]:
    """Innermost module -> MACs of one example: half the FLOPs that torch counts.

    By what twice the batch takes more: a product of parameters alone is a constant in the file.
    """
    size = batch_size(example)
    once = _count_flops(model, example)
    try:
        twice = _count_flops(model, resize(example, 2 * size))
    except TRACE_ERRORS:  # a batch of a fixed size, as of all nodes of a graph
        return {name: flops // (2 * size) for name, flops in once.items()}
    return {name: (flops - once.get(name, 0)) // (2 * size) for name, flops in twice.items()}


def _count_flops(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Innermost module -> FLOPs of one call."""
    counter = _ByModule(model)
    with _in_the_open(model), counter.hooks(), counter.mode:
        call(model, to_device(inputs, device_of(model)))
    return counter.flops


@contextmanager
def _in_the_open(model: nn.Module) -> Iterator[None]:
    """In eval mode, without the libraries that run an LSTM as one operation, whose MACs nobody counts."""
    libraries: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    before = [library.enabled for library in libraries]
    # torch's counter hooks what modules are given, which it can't do to a view of a parameter
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for library in libraries:
            library.enabled = False
        with in_eval_mode(model), torch.no_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for library, enabled in zip(libraries, before, strict=True):
            library.enabled = enabled


class _ByModule:
    """Attributes FLOPs to the innermost running module, by the difference over its forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.mode = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
        self.flops: dict[str, int] = defaultdict(int)
        self._stack: list[list[int]] = []

    def hooks(self) -> "_Hooks":
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_: self._enter()))
            handles.append(module.register_forward_hook(lambda *_, name=name: self._leave(name)))
        return _Hooks(handles)

    def _enter(self) -> None:
        self._stack.append([self.mode.get_total_flops(), 0])

    def _leave(self, name: str) -> None:
        before, inner = self._stack.pop()
        all_of_it = self.mode.get_total_flops() - before
        self.flops[name] += all_of_it - inner
        if self._stack:
            self._stack[-1][1] += all_of_it


class _Hooks:
    """Removes its hooks at the end of a with block."""

    def __init__(self, handles: list[Any]) -> None:
        self.handles = handles

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


class _OpNames(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects operations that do arithmetic but have no FLOP formula in torch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        counted = packet in flop_registry or packet in _FORMULAS
        free = torch.Tag.pointwise in func.tags or func.is_view or counted
        if not free:
            self.names.add(str(packet))
        return func(*args, **(kwargs or {}))


def uncounted_ops(model: nn.Module, example: Inputs) -> tuple[str, ...]:
    """Names of the operations in one forward pass whose MACs are not counted, sorted.

    Pointwise operations and views are not named: they have no multiply-accumulates to speak of.
    """
    with _in_the_open(model), _OpNames() as seen:
        call(model, to_device(example, device_of(model)))
    return tuple(sorted(seen.names - _DATA_MOVES))


_DATA_MOVES = {
    f"aten.{name}"
    for name in (
        "cat",
        "clone",
        "copy_",
        "_to_copy",
        "embedding",
        "empty",
        "index_select",
        "constant_pad_nd",
        "stack",
        "transpose_",
        "unsafe_split",
        "_unsafe_view",
        "zeros",
        "ones",
    )
}

"""What decides the values that a layer reads, beside the layers that write them.

The probe follows derivatives, and sees no comparison, no index and no detached value: a padding mask
computed from the input, a choice by argmax. Here every operation passes on the names of what its inputs
were made of, one set for a tensor, so that nothing is overlooked.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vbdcompress.compare import forget_calls_
from vbdcompress.errors import TRACE_ERRORS, words_of
from vbdcompress.inputs import Inputs, call, noting_calls, tensors_of
from vbdcompress.surgery.groups import GroupScan
from vbdcompress.surgery.weights import Mixing, is_mixing, layer_widths

# No layer's name: the network's input, and what no derivative is taken through
INPUT, DECISION = "(input)", "(decision)"
_aten = torch.ops.aten
# Their derivative is 0,
_STEPS = {
    *(_aten.sign, _aten.sgn, _aten.round, _aten.floor, _aten.ceil, _aten.trunc, _aten.heaviside),
    *(_aten.floor_divide, _aten.bernoulli),
}
# or they end it; seen where the network's code says so: autograd itself detaches what it keeps
_ENDS = {torch.detach, torch.Tensor.detach, torch.Tensor.detach_, torch.Tensor.data.__get__}  # type: ignore[attr-defined]
# Take no more than the shape, type and place of what they are given
_FORMS = {
    *(_aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.new_empty, _aten.new_empty_strided),
    *(_aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.empty_like),
}
# With them a network's code can look at values, and go one way or another
_LOOKS = {
    *(_aten._local_scalar_dense, _aten.nonzero, _aten.equal, _aten.masked_select),
    *(_aten._unique2, _aten.unique_consecutive, _aten.unique_dim),
}


@dataclass
class Influences:
    """What one forward pass showed.

    Attributes:
        readers: mixing layer that ran -> the layers that its input was computed from, INPUT and DECISION
            among them.
        called: modules that ran.
        read_elsewhere: layers whose weight is used outside of their own call.
        branches: whether the network's code looked at values, so that other inputs may go another way.
    """

    readers: dict[str, set[str]] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    read_elsewhere: set[str] = field(default_factory=set)
    branches: bool = False


def find_influences(model: nn.Module, inputs: Inputs) -> Influences:
    """Run a network once and note what decides what.

    Args:
        model: plain, in eval mode; left as it was.
        inputs: a batch.
    """
    found = Influences()
    mode = _Names(model, found)
    mode.mark(tensors_of(inputs), {INPUT})
    with mode.hooks(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), mode, _Detached(mode):
        call(model, inputs)
    return found


def heed_influences(trial: nn.Module, inputs: Inputs, scan: GroupScan) -> GroupScan:
    """Note which groups' constants may be folded; leave whole what layers may touch that did not run.

    A network whose code looks at values may send other inputs to other layers, as a mixture of experts does.
    """
    try:
        found = find_influences(trial, inputs)
    except TRACE_ERRORS:  # nothing is known: every weight may be read elsewhere
        layers = frozenset(name for name, module in trial.named_modules() if is_mixing(module))
        groups = [replace(group, foldable=False) for group in scan.groups]
        return replace(scan, groups=tuple(groups), read_elsewhere=layers)
    finally:
        forget_calls_(trial)
    writers: dict[str, set[str]] = {}
    for group in scan.groups:
        for member in group.readers:
            writers.setdefault(member.layer, set()).update(writer.layer for writer in group.writers)
    idle = _idle_layers(trial, inputs, found.called) if found.branches else {}
    groups = []
    for group in scan.groups:
        decided = (found.readers.get(m.layer, {INPUT}) <= writers[m.layer] for m in group.readers)
        judged = replace(group, foldable=not found.branches and all(decided))
        widths = {len(member.index) for member in (*group.writers, *group.readers)}
        touching = [name for name, own in idle.items() if widths & own]
        if touching and group.whole_because is None:
            judged = judged.whole(
                f"'{touching[0]}', which did not run on the example, may be among its layers"
            )
        groups.append(judged)
    return replace(scan, groups=tuple(groups), read_elsewhere=frozenset(found.read_elsewhere))


def _idle_layers(trial: nn.Module, inputs: Inputs, called: set[str]) -> dict[str, set[int]]:
    """Experts that run neither on the example nor in training, with their numbers of channels."""
    training = copy.deepcopy(trial)
    training.train()
    with noting_calls(training) as in_training:
        why_not_training(training, inputs)  # what it raises is told of where groups are tried
    widths = {
        name: layer_widths(module) for name, module in trial.named_modules() if isinstance(module, Mixing)
    }
    ran = widths.keys() & (called | in_training)
    # a module that only holds a weight for others runs where they do
    tied = {id(trial.get_submodule(name).weight) for name in ran}
    ran |= {name for name in widths if id(trial.get_submodule(name).weight) in tied}
    # called like one that ran but for a number, or as wide; others are of no use to anybody
    kinds, sizes = {_kind(name) for name in ran}, {widths[name] for name in ran}
    return {
        name: set(own)
        for name, own in widths.items()
        if name not in ran and (_kind(name) in kinds or own in sizes)
    }


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def why_not_training(model: nn.Module, inputs: Inputs) -> str | None:
    """What running it in training mode raises, where other layers may be called: auxiliary heads."""
    model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            call(model, inputs)
    except TRACE_ERRORS as error:
        return words_of(error)
    return None


class _Names(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps for each storage what was written into it: views share one, and code may write in place."""

    def __init__(self, model: nn.Module, found: Influences) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.found = model, found
        self.names: dict[int, set[str]] = {}
        self.alive: list[StorageWeakRef | Tensor] = []  # whose numbers are not given to others
        self.running: list[str] = []
        self.looked = False
        self.weights: dict[int, str] = {}
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if isinstance(weight, Tensor):
                self.weights.setdefault(_number(weight), name)

    def mark(self, tensors: Iterable[Tensor], names: set[str], *, anew: bool = False) -> None:
        """Say what tensors were made of: `anew`, of nothing else."""
        for tensor in tensors:
            number = _number(tensor)
            if number not in self.names:
                plain = tensor.layout == torch.strided
                self.alive.append(StorageWeakRef(tensor.untyped_storage()) if plain else tensor)  # type: ignore[no-untyped-call]
            self.names[number] = names | (set() if anew else self.names.get(number, set()))

    def of(self, tensors: Iterable[Tensor]) -> set[str]:
        """What tensors were made of."""
        return {name for tensor in tensors for name in self.names.get(_number(tensor), ())}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Mixing layers end what came before them: their outputs are theirs."""
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name, module), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(name, module), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, module: nn.Module) -> Any:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.running.append(name)
            self.found.called.add(name)
            if is_mixing(module):
                self.found.branches |= self.looked  # a look behind the last layer changes none's input
                self.found.readers.setdefault(name, set()).update(self.of(_tensors((args, kwargs))))

        return enter

    def _leave(self, name: str, module: nn.Module) -> Any:
        def leave(_: nn.Module, args: Any, output: Any) -> None:
            self.running.pop()
            if is_mixing(module) and isinstance(output, Tensor):
                self.mark([output], {name}, anew=True)

        return leave

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, func._overloadpacket
        given = [] if packet in _FORMS else _tensors((args, kwargs))
        names = self.of(given)
        for tensor in given:
            owner = self.weights.get(_number(tensor))
            if owner is not None and owner not in self.running:
                self.found.read_elsewhere.add(owner)
        result = func(*args, **kwargs)
        if not names:
            return result
        self.looked |= packet in _LOOKS
        blind = packet in _STEPS or not torch.is_grad_enabled()
        written = _written(func, args, kwargs) if func._schema.is_mutable else []
        for tensor in [*_tensors(result), *written]:
            plain = tensor.is_floating_point() or tensor.is_complex()
            self.mark([tensor], names | (set() if plain and not blind else {DECISION}))
        return result


class _Detached(TorchFunctionMode):
    """Sees what ends derivatives."""

    def __init__(self, names: _Names) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ENDS and (names := self.names.of(_tensors(result))):
            self.names.mark(_tensors(result), names | {DECISION})
        return result


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation writes into."""
    known = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    changed = (
        known.get(argument.name)
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    return _tensors(list(changed))


def _number(tensor: Tensor) -> int:
    if tensor.layout != torch.strided:  # a sparse tensor has no storage of its own
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any) -> list[Tensor]:
    return [item for item in tree_leaves(value) if isinstance(item, Tensor)]

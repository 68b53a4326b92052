"""Where each position of a layer's input comes from, read off the network's own derivatives.

Every layer that mixes channels is cut out of the network: what it computes is replaced by a fresh
leaf, so that only what lies between such layers (norms, activations, sums, concatenations, reshapes,
attention) carries derivatives. What the input of a layer depends on is then local, and exact however
the network's code moves its channels about: nothing is said of operations by name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from vbdcompress.inputs import Inputs, call, input_of
from vbdcompress.layer_norm import ChannelNorm
from vbdcompress.surgery.flows import Source
from vbdcompress.surgery.reading import Recording, Role, is_of_parts, reading_of
from vbdcompress.surgery.smooth import Smooth
from vbdcompress.surgery.weights import Table, input_dim, shares


def record(
    model: nn.Module, example: Inputs, role_of: Callable[[nn.Module], Role | None], *, buffers: bool = True
) -> Recording:
    """Run the network once, with a leaf in the place of what each mixing layer computes.

    Args:
        model: float64, eval mode; left as it was.
        example: a batch of inputs.
        role_of: "mixing" layers write and read channels; "reading" ones write others, which can't be cut;
            those "between" keep them apart; "opaque" ones mix them in a way that can't be cut. None: its
            own code is followed.
        buffers: whether bare buffers are followed like parameters; some code can't work with such ones.
    """
    found = Recording()
    kept = []  # bare parameters, whose ids must stay theirs
    roles = {name: role_of(module) for name, module in model.named_modules()}
    bare = [
        (name, module)
        for name, module in model.named_modules()
        if roles[name] is None and not any(roles[above] == "opaque" for above in _above(name))
    ]
    for name, module in bare:
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and parameter.numel() > 1:
                found.bare[id(parameter)] = f"{name}.{own}".lstrip(".")
                kept.append(parameter)
    # what an operation keeps for its derivative is a copy: the tensor itself may become a leaf before that
    keep_copies = saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)
    traced = _patched(model, roles, found), sdpa_kernel(SDPBackend.MATH)
    with torch.enable_grad(), _leaf_buffers(bare if buffers else [], found), traced[0], traced[1]:
        with Smooth(), keep_copies:
            outputs = call(model, example)
        for tensor in _tensors(outputs):
            _read(found, "", "opaque", tensor, -1)
    return found


@contextmanager
def _leaf_buffers(bare: Sequence[tuple[str, nn.Module]], found: Recording) -> Iterator[None]:
    """Every bare buffer in the place of a leaf, without zeros: what one hides is to be seen."""
    before = []
    for name, module in bare:
        for own, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.numel() > 1:
                hidden = (buffer == 0) | ~buffer.isfinite()
                leaf = torch.where(hidden, 0.5 + torch.rand_like(buffer), buffer).requires_grad_()
                before.append((module, own, buffer, leaf))  # a leaf that is let go would free its id
                found.bare[id(leaf)] = f"{name}.{own}".lstrip(".")
                found.buffers.add(id(leaf))
                module._buffers[own] = leaf * 1.0  # no leaf itself: code may write to it
    try:
        yield
    finally:
        for module, own, buffer, _ in before:
            module._buffers[own] = buffer


def _above(name: str) -> Iterator[str]:
    parts = name.split(".") if name else []
    for count in range(len(parts)):
        yield ".".join(parts[:count])


@contextmanager
def _patched(model: nn.Module, roles: dict[str, Role | None], found: Recording) -> Iterator[None]:
    patched = []
    for name, module in list(model.named_modules()):
        role = roles[name]
        if role is not None and "forward" not in vars(module):
            module.forward = _wrap(name, module, role, found)
            patched.append(module)
    try:
        yield
    finally:
        for module in patched:
            del module.forward


def _wrap(name: str, module: nn.Module, role: Role, found: Recording) -> Callable[..., Any]:
    compute = module.forward
    last = input_dim(module)
    table = isinstance(module, Table)

    def between(*args: Any, **kwargs: Any) -> Any:
        norm = isinstance(module, ChannelNorm)
        if not _read(found, name, role, input_of(args, kwargs), last, whole=norm):
            return compute(*args, **kwargs)
        if not isinstance(module, _ConvNd | ChannelNorm):
            return compute(*args, **kwargs)
        with torch.no_grad():
            leaf = (0.5 + torch.rand_like(compute(*args, **kwargs))).requires_grad_()
        _, read, written = shares(module) if isinstance(module, _ConvNd) else (1, 1, 1)
        found.sources[id(leaf)] = Source("reads", name, leaf, last % leaf.dim(), (written, read))
        return leaf * 1.0

    def cut(*args: Any, **kwargs: Any) -> Any:
        channels = None if role == "opaque" or table else (args[0] if args else kwargs.get("input"))
        for tensor in _tensors((args, kwargs)):
            if tensor is channels and tensor.requires_grad:
                _read(found, name, "mixing", tensor, last)
            elif tensor.requires_grad:  # for others it is a state, or weights of a table's rows
                _read(found, name, "opaque", tensor, last, follow=role == "opaque")
        with torch.no_grad():
            computed = compute(*args, **kwargs)
        if role in ("opaque", "reading") or isinstance(computed[0], PackedSequence):
            return tree_map(lambda item: item.detach() if isinstance(item, Tensor) else item, computed)
        output = computed if isinstance(computed, Tensor) else computed[0]
        found.written[name] = output.shape[last % output.dim()]
        return tree_map(written, computed)  # of recurrent layers the last state, too

    def written(computed: Tensor) -> Tensor:
        # positive, so that roots and logarithms stay defined
        leaf = (0.5 + torch.rand_like(computed)).requires_grad_()
        found.sources[id(leaf)] = Source("writes", name, leaf, last % computed.dim())
        return leaf * 1.0  # no leaf itself: what follows may work in place

    return between if role == "between" else cut


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            yield from _tensors(getattr(value, item.name))
    elif hasattr(value, "__iter__") and not isinstance(value, str | bytes):
        for item in value:
            yield from _tensors(item)


def _read(
    found: Recording,
    layer: str,
    role: Role,
    tensor: Tensor,
    dim: int,
    *,
    follow: bool = True,
    whole: bool = False,
) -> bool:
    """Note where a layer's input comes from.

    Args:
        follow: what follows is followed from there. So each stretch between two layers is looked at once, and
            the cost grows with the network's length.
        whole: only of a layer over all channels, not over parts of them.
    Returns:
        whether it was noted.
    """
    with torch._C.DisableTorchFunction():  # the network is smoothed, not what is worked out here
        if tensor.dim():
            return _read_plainly(found, layer, role, tensor, dim % tensor.dim(), follow=follow, whole=whole)
        # a loss, or a temperature, beside the outputs
        return _read_plainly(found, layer, "opaque", tensor[None], 0, follow=False, whole=False)


def _read_plainly(
    found: Recording, layer: str, role: Role, tensor: Tensor, dim: int, *, follow: bool, whole: bool
) -> bool:
    reading, reached = reading_of(found, layer, role, tensor, dim)
    if whole and is_of_parts(found, reading, tensor, dim):
        return False
    found.readings.append(reading)
    if follow and reached and layer and not tensor.is_leaf and not tensor._is_view():
        tensor.detach_().requires_grad_()
        found.sources[id(tensor)] = Source("reads", layer, tensor, None if role == "opaque" else dim)
        if role == "opaque" and reading.places:
            reading.positions.append(([0], reading.places))
    return True

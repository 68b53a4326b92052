"""Where each position of a layer's input comes from, read off the network's own derivatives.

Every layer that mixes channels is cut out of the network: what it computes is replaced by a fresh
leaf, so that only what lies between such layers (norms, activations, sums, concatenations, reshapes,
attention) carries derivatives. What the input of a layer depends on is then local, and exact however
the network's code moves its channels about: nothing is said of operations by name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from vbdcompress.inputs import Inputs, call, input_of
from vbdcompress.layer_norm import ChannelNorm
from vbdcompress.surgery.match import Flow, Place, Source, match, match_parameter, reaching_channels
from vbdcompress.surgery.smooth import Smooth
from vbdcompress.surgery.weights import Table, input_dim, shares

Role = Literal["mixing", "reading", "between", "opaque"]
# What torch says of operations without a derivative, or without a second one
_NO_DERIVATIVE = ("derivative for", "double backward", "differentiate twice")
NO_DERIVATIVE = "what lies behind it has no second derivative, from which its channels could be told"


@dataclass(frozen=True)
class Reading:
    """What a layer was given, or what the network gave, and where it comes from.

    Attributes:
        layer: dotted name; empty for the network's output.
        role: of the layer; "opaque" for the output.
        width: size of its channel dimension; 1 where the role is "opaque".
        positions: for each set of positions that can't be told apart, the places that they come
            from: ([positions], [places]).
        places: all that reach it.
        bare: names of bare parameters that work on the way, not channel by channel.
        spread: places of channels that work on many of its positions at once.
        blocked: why it can't be told which positions come from which places; empty where it can.
    """

    layer: str
    role: Role
    width: int
    positions: list[tuple[list[int], list[Place]]]
    places: list[Place]
    bare: list[str]
    spread: list[Place]
    blocked: str = ""


@dataclass
class Recording:
    """One forward pass.

    Attributes:
        written: mixing layer -> number of its outputs.
        readings: what each layer was given, in order.
        bare: id -> name of the parameters and buffers of no layer known by its type.
        buffers: ids of those that are buffers.
        sources: id of a leaf -> what it stands for.
    """

    written: dict[str, int] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)
    bare: dict[int, str] = field(default_factory=dict)
    buffers: set[int] = field(default_factory=set)
    sources: dict[int, Source] = field(default_factory=dict)


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
        _read(found, name, role, input_of(args, kwargs), last)
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


def _read(found: Recording, layer: str, role: Role, tensor: Tensor, dim: int, *, follow: bool = True) -> None:
    """Note where a layer's input comes from; `follow`: what follows is followed from there.

    So each stretch between two layers is looked at once, and the cost grows with the network's length.
    """
    with torch._C.DisableTorchFunction():  # the network is smoothed, not what is worked out here
        if tensor.dim():
            _read_plainly(found, layer, role, tensor, dim % tensor.dim(), follow=follow)
        else:  # a loss, or a temperature, beside the outputs
            _read_plainly(found, layer, "opaque", tensor[None], 0, follow=False)


def _read_plainly(
    found: Recording, layer: str, role: Role, tensor: Tensor, dim: int, *, follow: bool
) -> None:
    width = 1 if role == "opaque" else tensor.shape[dim]
    leaves = _leaves_of(tensor) if tensor.requires_grad else []
    sources = [found.sources[id(leaf)] for leaf in leaves if id(leaf) in found.sources]
    bare = [leaf for leaf in leaves if id(leaf) in found.bare]
    reading = Reading(layer, role, width, [], [], [], [])
    if sources or bare:
        try:
            _trace_positions(found, reading, tensor, dim, sources, bare)
        except RuntimeError as error:
            if not any(words in str(error) for words in _NO_DERIVATIVE):
                raise
            every = [source.place(channel) for source in sources for channel in range(source.count)]
            reading = Reading(layer, role, width, [], every, [], [], NO_DERIVATIVE)
        told = reading.positions or reading.spread or reading.bare or reading.blocked
        if role == "mixing" and reading.places and not told:
            reading = replace(reading, blocked=NO_DERIVATIVE)
    found.readings.append(reading)
    if follow and (sources or bare) and layer and not tensor.is_leaf and not tensor._is_view():
        tensor.detach_().requires_grad_()
        found.sources[id(tensor)] = Source("reads", layer, tensor, None if role == "opaque" else dim)
        if role == "opaque" and reading.places:
            reading.positions.append(([0], reading.places))


def _trace_positions(
    found: Recording,
    reading: Reading,
    tensor: Tensor,
    dim: int,
    sources: Sequence[Source],
    bare: Sequence[Tensor],
) -> None:
    """Fill in where a reading comes from. Raises RuntimeError where derivatives are wanting."""
    cotangent = torch.randn_like(tensor).requires_grad_()
    wanted = [*(source.values for source in sources), *bare]
    slopes = torch.autograd.grad(tensor, wanted, cotangent, create_graph=True, allow_unused=True)
    for leaf, slope in zip(bare, slopes[len(sources) :], strict=True):
        if slope is not None and bool(slope.any()):
            name = found.bare[id(leaf)]
            opaque = reading.role == "opaque"
            held = None if opaque else match_parameter(name, leaf, slope, cotangent, dim)
            if held is None and id(leaf) not in found.buffers:
                reading.bare.append(name)
            elif held is not None:
                reading.positions.extend(held)
                reading.places.extend(place for _, places in held for place in places)
    flows = []
    for source, slope in zip(sources, slopes[: len(sources)], strict=True):
        reaching = [] if slope is None else reaching_channels(source, slope)
        reading.places.extend(source.place(channel) for channel in reaching)
        if slope is not None and reaching:
            flows.append(Flow(source, slope))
    if reading.role != "opaque":
        matched, spread = match(tensor, dim, flows, cotangent)
        reading.positions.extend(matched)
        reading.spread.extend(spread)


def _leaves_of(tensor: Tensor) -> list[Tensor]:
    """The leaves that a tensor was computed from, by its graph."""
    if tensor.grad_fn is None:
        return [tensor]
    seen, queue, leaves = {tensor.grad_fn}, [tensor.grad_fn], dict[int, Tensor]()
    while queue:
        node = queue.pop()
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            leaves[id(leaf)] = leaf
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                queue.append(after)
    return list(leaves.values())

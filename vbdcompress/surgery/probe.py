"""Where each position of a layer's input comes from, read off the network's own derivatives.

Every layer that mixes channels is cut out of the network: what it computes is replaced by a fresh
leaf, so that only what lies between such layers (norms, activations, sums, concatenations, reshapes,
attention) carries derivatives. What the input of a layer depends on is then local, and exact however
the network's code moves its channels about: nothing is said of operations by name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

Role = Literal["mixing", "between", "opaque"]
Node = tuple[str, int]  # layer, channel of its output
# A derivative below this share of the largest is none, in float64
NONE = 1e-9
RELATIVE = 1e-6
# Their derivative is 0 on half of their range, or beyond a bound
_CLIPPING = {
    *(torch.relu, torch.Tensor.relu, nn.functional.relu, nn.functional.relu6, nn.functional.hardtanh),
    *(nn.functional.hardswish, nn.functional.hardsigmoid, nn.functional.threshold),
    *(torch.clamp, torch.Tensor.clamp, torch.clamp_min, torch.Tensor.clamp_min),
}
_CLIPPING_ = {torch.relu_, torch.Tensor.relu_, torch.Tensor.clamp_, torch.Tensor.clamp_min_}


@dataclass(frozen=True)
class Sink:
    """What some layer is given, or what the network gives.

    Attributes:
        layer: dotted name; empty for the network's output.
        role: of the layer; "opaque" for the output.
        tensor: the input, with its graph back to the leaves.
        dim: its channel dimension.
    """

    layer: str
    role: Role
    tensor: Tensor
    dim: int


@dataclass(frozen=True)
class Source:
    """A leaf in the place of what a layer computed."""

    layer: str
    values: Tensor
    dim: int


@dataclass
class Recording:
    """One forward pass: leaves, inputs, and parameters that belong to no layer known by its type."""

    sources: list[Source] = field(default_factory=list)
    sinks: list[Sink] = field(default_factory=list)
    bare: dict[str, nn.Parameter] = field(default_factory=dict)


class _Smooth(TorchFunctionMode):
    """Activations that clip become a scaling: which channel goes where stays the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CLIPPING_ or (func in _CLIPPING and (kwargs or {}).get("inplace")):
            return args[0].mul_(0.9)
        if func in _CLIPPING:
            return args[0] * 0.9
        return func(*args, **(kwargs or {}))


def record(model: nn.Module, example: Any, role_of: Callable[[nn.Module], Role | None]) -> Recording:
    """Run the network once, with a leaf in the place of what each mixing layer computes.

    Args:
        model: float64, eval mode; left as it was.
        example: a batch of inputs.
        role_of: "mixing" layers write and read channels; those "between" keep them apart; "opaque"
            ones mix them in a way that can't be cut. None: its own code is followed.
    """
    found = Recording()
    roles = {name: role_of(module) for name, module in model.named_modules()}
    for name, module in model.named_modules():
        inside_opaque = any(roles[above] == "opaque" for above in _above(name))
        if roles[name] is None and not inside_opaque:
            found.bare |= {
                f"{name}.{own}".lstrip("."): parameter
                for own, parameter in module.named_parameters(recurse=False)
                if parameter.is_floating_point() and parameter.numel() > 1
            }
    with torch.enable_grad(), _patched(model, roles, found), _Smooth(), sdpa_kernel(SDPBackend.MATH):
        outputs = model(example)
    for tensor in _tensors(outputs):
        found.sinks.append(Sink("", "opaque", tensor, -1))
    return found


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
    linear = isinstance(module, nn.Linear)

    def between(*args: Any, **kwargs: Any) -> Any:
        found.sinks.append(Sink(name, role, args[0], 1))
        return compute(*args, **kwargs)

    def cut(*args: Any, **kwargs: Any) -> Any:
        given = [tensor for tensor in _tensors((args, kwargs)) if tensor.requires_grad]
        for tensor in given[:1] if role == "mixing" else given:
            found.sinks.append(Sink(name, role, tensor, -1 if linear else 1))
        with torch.no_grad():
            computed = compute(*args, **kwargs)
        if role == "opaque":
            return tree_map(lambda item: item.detach() if isinstance(item, Tensor) else item, computed)
        # positive, so that roots and logarithms stay defined
        leaf = (0.5 + torch.rand_like(computed)).requires_grad_()
        found.sources.append(Source(name, leaf, computed.dim() - 1 if linear else 1))
        return leaf * 1.0  # no leaf itself: what follows may work in place

    return between if role == "between" else cut


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif hasattr(value, "__iter__") and not isinstance(value, str | bytes):
        for item in value:
            yield from _tensors(item)


@dataclass(frozen=True)
class Dependence:
    """What a sink depends on.

    Attributes:
        positions: for each set of positions that can't be told apart, and the channels they come
            from: ([positions], [nodes]).
        nodes: all channels that reach it.
        bare: names of bare parameters that work on the way.
    """

    positions: list[tuple[list[int], list[Node]]]
    nodes: list[Node]
    bare: list[str]


def depend(sink: Sink, recording: Recording) -> Dependence:
    """Which channels of which sources each position of a sink's channel dimension depends on."""
    if not sink.tensor.requires_grad:
        return Dependence([], [], [])
    cotangent = torch.randn_like(sink.tensor).requires_grad_()
    leaves = [source.values for source in recording.sources]
    slopes = torch.autograd.grad(
        sink.tensor,
        [*leaves, *recording.bare.values()],
        cotangent,
        create_graph=True,
        allow_unused=True,
    )
    positions: list[tuple[list[int], list[Node]]] = []
    nodes: list[Node] = []
    for source, slope in zip(recording.sources, slopes[: len(leaves)], strict=True):
        if slope is None:
            continue
        reaching = _nonzero(slope.detach(), source.dim)
        nodes += [(source.layer, channel) for channel in reaching]
        if sink.role != "opaque" and reaching:
            positions += _match(sink, source, slope, cotangent)
    touched = [
        name
        for (name, _), slope in zip(recording.bare.items(), slopes[len(leaves) :], strict=True)
        if slope is not None and bool(slope.any())
    ]
    return Dependence(positions, nodes, touched)


def _nonzero(tensor: Tensor, dim: int) -> list[int]:
    """Positions along a dimension at which a tensor of derivatives is not 0."""
    sizes = tensor.abs().movedim(dim, 0).flatten(1).amax(1)
    return torch.nonzero(sizes > NONE * sizes.max()).flatten().tolist()


def _match(
    sink: Sink, source: Source, slope: Tensor, cotangent: Tensor
) -> Iterator[tuple[list[int], list[Node]]]:
    """(positions, nodes) of one sink and one source, by three directional derivatives where that is enough.

    With the channel's number, and again a random number of its own, as the size of the step, the
    ratio to unit steps names the one channel that a position depends on, or no channel.
    """
    count = source.values.shape[source.dim]
    shape = [1] * source.values.dim()
    shape[source.dim] = count
    step = torch.randn_like(source.values)
    numbers = torch.arange(1, count + 1, dtype=step.dtype)
    marks = 1 + torch.rand(count, dtype=step.dtype)

    def along(size: Tensor) -> Tensor:
        (moved,) = torch.autograd.grad(
            slope, cotangent, step * size.view(shape), retain_graph=True, allow_unused=True
        )
        moved = torch.zeros_like(cotangent) if moved is None else moved
        return moved.movedim(sink.dim, 0).flatten(1)

    plain, numbered, marked = (along(size) for size in (torch.ones(count, dtype=step.dtype), numbers, marks))
    strongest = plain.abs().argmax(1, keepdim=True)
    largest = float(plain.abs().max())
    present = plain.abs() > NONE * largest
    safe = torch.where(present, plain, torch.ones_like(plain))
    number = (numbered / safe).gather(1, strongest)
    nearest = number.round().clamp(1, count)
    channel = nearest.long() - 1
    of_one = (numbered - nearest * plain).abs() <= RELATIVE * count * plain.abs()
    of_one &= (marked - marks[channel] * plain).abs() <= RELATIVE * plain.abs()
    depends = present.any(1) | (numbered.abs() > NONE * count * largest).any(1)
    single = (of_one | ~present).all(1) & present.any(1)
    for position in torch.nonzero(depends & single).flatten().tolist():
        yield [position], [(source.layer, int(channel[position]))]
    rest = torch.nonzero(depends & ~single).flatten().tolist()
    yield from _components(sink, source, rest, along)


def _components(
    sink: Sink, source: Source, positions: Sequence[int], along: Callable[[Tensor], Tensor]
) -> Iterator[tuple[list[int], list[Node]]]:
    """Positions that depend on several channels, each set with all the channels that meet in it."""
    left = set(positions)
    size = source.values.shape[source.dim]
    while left:
        members, channels = {min(left)}, set[int]()
        while True:
            picked = torch.zeros_like(sink.tensor)
            index = torch.tensor(sorted(members))
            picked.index_copy_(
                sink.dim, index, torch.randn_like(sink.tensor.detach().index_select(sink.dim, index))
            )
            (slope,) = torch.autograd.grad(sink.tensor, source.values, picked, retain_graph=True)
            found = set(_nonzero(slope, source.dim))
            steps = torch.zeros(size, dtype=picked.dtype)
            steps[sorted(found)] = 1 + torch.rand(len(found), dtype=picked.dtype)
            moved = along(steps).abs().amax(1)
            reached = set(torch.nonzero(moved > NONE * moved.max()).flatten().tolist()) | members
            if found == channels and reached == members:
                break
            members, channels = reached, found | channels
        left -= members
        yield sorted(members), [(source.layer, channel) for channel in sorted(channels)]

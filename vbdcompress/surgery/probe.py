"""Where each position of a layer's input comes from, read off the network's own derivatives.

Every layer that mixes channels is cut out of the network: what it computes is replaced by a fresh
leaf, so that only what lies between such layers (norms, activations, sums, concatenations, reshapes,
attention) carries derivatives. What the input of a layer depends on is then local, and exact however
the network's code moves its channels about: nothing is said of operations by name.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from vbdcompress.surgery.weights import shares

Role = Literal["mixing", "between", "opaque"]
# ("writes", layer, channel of its output) or ("reads", layer, position of its input)
Place = tuple[Literal["writes", "reads"], str, int]
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
class Reading:
    """What a layer was given, or what the network gave, and where it comes from.

    Attributes:
        layer: dotted name; empty for the network's output.
        role: of the layer; "opaque" for the output.
        width: size of its channel dimension; 1 where the role is "opaque".
        positions: for each set of positions that can't be told apart, the places that they come
            from: ([positions], [places]).
        places: all that reach it.
        bare: names of bare parameters that work on the way.
    """

    layer: str
    role: Role
    width: int
    positions: list[tuple[list[int], list[Place]]]
    places: list[Place]
    bare: list[str]


@dataclass(frozen=True)
class Source:
    """A leaf: what a layer computed, or what one was given, from which the network is followed anew.

    Attributes:
        side, layer: "writes" for an output, "reads" for an input.
        values: the leaf.
        dim: its channel dimension; None where its channels are one place, for they stay together.
        shares: (n, m) where each n channels stand for as many places that go together, m of them:
            behind a convolution whose groups go whole.
    """

    side: Literal["writes", "reads"]
    layer: str
    values: Tensor
    dim: int | None
    shares: tuple[int, int] = (1, 1)

    @property
    def count(self) -> int:
        """Number of its places."""
        return 1 if self.dim is None else self.values.shape[self.dim]

    def place(self, channel: int) -> Place:
        """The place of one channel."""
        here, there = self.shares
        return self.side, self.layer, channel // here * there


@dataclass
class Recording:
    """One forward pass.

    Attributes:
        written: mixing layer -> number of its outputs.
        readings: what each layer was given, in order.
        bare: id -> name of the parameters of no layer known by its type.
        sources: id of a leaf -> what it stands for.
    """

    written: dict[str, int] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)
    bare: dict[int, str] = field(default_factory=dict)
    sources: dict[int, Source] = field(default_factory=dict)


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
    kept = []  # bare parameters, whose ids must stay theirs
    roles = {name: role_of(module) for name, module in model.named_modules()}
    for name, module in model.named_modules():
        inside_opaque = any(roles[above] == "opaque" for above in _above(name))
        if roles[name] is None and not inside_opaque:
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.is_floating_point() and parameter.numel() > 1:
                    found.bare[id(parameter)] = f"{name}.{own}".lstrip(".")
                    kept.append(parameter)
    with torch.enable_grad(), _patched(model, roles, found), _Smooth(), sdpa_kernel(SDPBackend.MATH):
        outputs = model(example)
    for tensor in _tensors(outputs):
        _read(found, "", "opaque", tensor, -1)
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
        _read(found, name, role, args[0], 1)
        if not isinstance(module, _ConvNd):
            return compute(*args, **kwargs)
        with torch.no_grad():
            leaf = (0.5 + torch.rand_like(compute(*args, **kwargs))).requires_grad_()
        _, read, written = shares(module)
        found.sources[id(leaf)] = Source("reads", name, leaf, 1, (written, read))
        return leaf * 1.0

    def cut(*args: Any, **kwargs: Any) -> Any:
        given = [tensor for tensor in _tensors((args, kwargs)) if tensor.requires_grad]
        for tensor in given[:1] if role == "mixing" else given:
            _read(found, name, role, tensor, -1 if linear else 1)
        with torch.no_grad():
            computed = compute(*args, **kwargs)
        if role == "opaque":
            return tree_map(lambda item: item.detach() if isinstance(item, Tensor) else item, computed)
        # positive, so that roots and logarithms stay defined
        leaf = (0.5 + torch.rand_like(computed)).requires_grad_()
        dim = computed.dim() - 1 if linear else 1
        found.written[name] = computed.shape[dim]
        found.sources[id(leaf)] = Source("writes", name, leaf, dim)
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


def _read(found: Recording, layer: str, role: Role, tensor: Tensor, dim: int) -> None:
    """Note where a layer's input comes from; what follows is followed from there.

    So each stretch between two layers is looked at once, and the cost grows with the network's length.
    """
    with torch._C.DisableTorchFunction():  # the network is smoothed, not what is worked out here
        _read_plainly(found, layer, role, tensor, dim % tensor.dim())


def _read_plainly(found: Recording, layer: str, role: Role, tensor: Tensor, dim: int) -> None:
    width = 1 if role == "opaque" else tensor.shape[dim]
    leaves = _leaves_of(tensor) if tensor.requires_grad else []
    sources = [found.sources[id(leaf)] for leaf in leaves if id(leaf) in found.sources]
    bare = [leaf for leaf in leaves if id(leaf) in found.bare]
    reading = Reading(layer, role, width, [], [], [])
    found.readings.append(reading)
    if not sources and not bare:
        return
    cotangent = torch.randn_like(tensor).requires_grad_()
    wanted = [*(source.values for source in sources), *bare]
    slopes = torch.autograd.grad(tensor, wanted, cotangent, create_graph=True, allow_unused=True)
    touching = zip(bare, slopes[len(sources) :], strict=True)
    reading.bare.extend(
        found.bare[id(leaf)] for leaf, slope in touching if slope is not None and bool(slope.any())
    )
    flows = []
    for source, slope in zip(sources, slopes[: len(sources)], strict=True):
        reaching = [] if slope is None else _reaching(source, slope)
        reading.places.extend(source.place(channel) for channel in reaching)
        if slope is not None and reaching:
            flows.append(_Flow(source, slope))
    if role != "opaque":
        reading.positions.extend(_match(tensor, dim, flows, cotangent))
    if not tensor.is_leaf and not tensor._is_view():
        tensor.detach_().requires_grad_()
        found.sources[id(tensor)] = Source("reads", layer, tensor, None if role == "opaque" else dim)
        if role == "opaque" and reading.places:
            reading.positions.append(([0], reading.places))


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


@dataclass(frozen=True)
class _Flow:
    """A source and its slope: the derivative of a reading, against a cotangent, by the source's values."""

    source: Source
    slope: Tensor

    def steps(self, sizes: Tensor) -> Tensor:
        """Random steps of all values, of a size for each place."""
        step = torch.randn_like(self.source.values)
        if self.source.dim is None:
            return step * sizes
        shape = [1] * step.dim()
        shape[self.source.dim] = self.source.count
        return step * sizes.view(shape)


def _reaching(source: Source, slope: Tensor) -> list[int]:
    if source.dim is None:
        return [0] if bool(slope.detach().any()) else []
    return _nonzero(slope.detach(), source.dim)


def _nonzero(tensor: Tensor, dim: int) -> list[int]:
    """Positions along a dimension at which a tensor of derivatives is not 0."""
    sizes = tensor.abs().movedim(dim, 0).flatten(1).amax(1)
    return torch.nonzero(sizes > NONE * sizes.max()).flatten().tolist()


def _match(
    tensor: Tensor, dim: int, flows: Sequence[_Flow], cotangent: Tensor
) -> Iterator[tuple[list[int], list[Place]]]:
    """(positions, places) of one reading.

    First all sources at once: most positions come from one channel of one of them. What comes from
    several, as in a sum, is looked at source by source, and then channel by channel.
    """
    if not flows:
        return
    rest = yield from _match_single(flows, cotangent, dim, range(tensor.shape[dim]))
    if len(flows) > 1:
        for flow in flows:
            left = yield from _match_single([flow], cotangent, dim, rest)
            yield from _components(tensor, dim, flow, left, cotangent)
    else:
        yield from _components(tensor, dim, flows[0], rest, cotangent)


def _along(flows: Sequence[_Flow], sizes: Sequence[Tensor], cotangent: Tensor, dim: int) -> Tensor:
    """[positions, everything]: how a reading moves when its sources take steps of the given sizes."""
    # the same steps for all three sizes of a match
    (moved,) = torch.autograd.grad(
        [flow.slope for flow in flows],
        cotangent,
        [flow.steps(size) for flow, size in zip(flows, sizes, strict=True)],
        retain_graph=True,
        allow_unused=True,
    )
    moved = torch.zeros_like(cotangent) if moved is None else moved
    return moved.movedim(dim, 0).flatten(1)


def _match_single(
    flows: Sequence[_Flow], cotangent: Tensor, dim: int, among: Sequence[int]
) -> Generator[tuple[list[int], list[Place]], None, list[int]]:
    """Positions that come from one channel, by three directional derivatives; returns the others.

    With the channel's number, and again a random number of its own, as the size of the step, the
    ratio to unit steps names the one channel that a position depends on, or no channel.
    """
    counts = [flow.source.count for flow in flows]
    count = sum(counts)
    numbers = torch.arange(1, count + 1, dtype=cotangent.dtype)
    marks = 1 + torch.rand(count, dtype=cotangent.dtype)
    seed = int(torch.randint(2**31, ()))

    def along(sizes: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # each time the same directions
            return _along(flows, torch.split(sizes, counts), cotangent, dim)

    plain, numbered, marked = (along(sizes) for sizes in (torch.ones_like(numbers), numbers, marks))
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
    places = [flow.source.place(number) for flow in flows for number in range(flow.source.count)]
    rest = []
    for position in among:
        if bool(depends[position] & single[position]):
            yield [position], [places[int(channel[position])]]
        elif bool(depends[position]):
            rest.append(position)
    return rest


def _components(
    tensor: Tensor, dim: int, flow: _Flow, positions: Sequence[int], cotangent: Tensor
) -> Iterator[tuple[list[int], list[Place]]]:
    """Positions that depend on several channels, each set with all the channels that meet in it."""
    left, source = set(positions), flow.source
    while left:
        members, channels = {min(left)}, set[int]()
        while True:
            index = torch.tensor(sorted(members))
            picked = torch.zeros_like(tensor)
            picked.index_copy_(dim, index, torch.randn_like(tensor.detach().index_select(dim, index)))
            (slope,) = torch.autograd.grad(tensor, source.values, picked, retain_graph=True)
            found = set(_reaching(source, slope))
            steps = torch.zeros(source.count, dtype=picked.dtype)
            steps[sorted(found)] = 1 + torch.rand(len(found), dtype=picked.dtype)
            moved = _along([flow], [steps], cotangent, dim).abs().amax(1)
            reached = set(torch.nonzero(moved > NONE * moved.max()).flatten().tolist()) | members
            if found == channels and reached == members:
                break
            members, channels = reached, found | channels
        left -= members
        yield sorted(members), [source.place(channel) for channel in sorted(channels)]

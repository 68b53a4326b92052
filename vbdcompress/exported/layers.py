"""Which layer an operation of an exported program is: made anew around the tensors that it stored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

aten = torch.ops.aten
# (the operation's arguments, dimensions of its input) -> the layer; None: it is none
Build = Callable[[Sequence[Any], int], nn.Module | None]


@dataclass(frozen=True)
class StoredLayer:
    """An operation on stored tensors, as the layer that it was.

    Attributes:
        name: dotted name that its tensors stood under.
        layer: holds the very tensors of the program.
        input: place of what it is given among the operation's arguments.
    """

    name: str
    layer: nn.Module
    input: int


class MatrixLayer(nn.Module):
    """Multiplies by a matrix as it stands, [inputs, outputs], and may add a bias; `opening` knows it."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


def layer_of(program: nn.Module, node: fx.Node) -> StoredLayer | None:
    """The layer that an operation is; None where it is none, or works on computed tensors.

    Args:
        program: what the names of the graph's tensors are looked up in.
        node: of its graph, a call of a function.
    """
    if node.kwargs or node.target not in _OPERATIONS:
        return None
    build, place, naming = _OPERATIONS[node.target]
    name = next((found for n in naming if (found := _name_of(program, node, n)) is not None), None)
    given, arguments = node.args[place], list[Any]()
    for argument in (*node.args[:place], None, *node.args[place + 1 :]):
        computed = isinstance(argument, fx.Node) and argument.op != "get_attr"
        if computed:
            return None
        stored = isinstance(argument, fx.Node)
        arguments.append(attrgetter(str(argument.target))(program) if stored else argument)  # type: ignore[union-attr]
    if name is None or not isinstance(given, fx.Node):
        return None
    layer = build(arguments, given.meta["val"].dim())
    return None if layer is None else StoredLayer(name, layer, place)


def _name_of(program: nn.Module, node: fx.Node, place: int) -> str | None:
    """The name of the layer whose tensor stands at a place of the arguments."""
    tensor = node.args[place] if place < len(node.args) else None
    if not isinstance(tensor, fx.Node) or tensor.op != "get_attr":
        return None
    owner, _, own = str(tensor.target).rpartition(".")
    if owner and own in ("weight", "bias", "running_mean"):
        return owner
    # attention keeps the weights of its layers as its own: attn.in_proj_weight
    inner = own.removesuffix("_weight")
    if not owner or inner == own or node.target is not aten.linear.default:
        return None
    taken = hasattr(program.get_submodule(owner), inner)
    return f"{owner}.{own if taken else inner}"


def _with(layer: nn.Module, **tensors: Tensor | None) -> nn.Module | None:
    """The layer with these tensors; None where it keeps parameters and is given buffers, or the reverse."""
    for name, tensor in tensors.items():
        if tensor is not None:
            if isinstance(tensor, nn.Parameter) == (name in layer._buffers):
                return None
            setattr(layer, name, tensor)
    return layer


def _padded(arguments: Sequence[Any], defaults: Sequence[Any]) -> list[Any]:
    """All arguments, those that were left out by their defaults."""
    return [*arguments, *defaults[len(arguments) :]]


def _option(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _linear(arguments: Sequence[Any], _: int) -> nn.Module | None:
    _, weight, bias = _padded(arguments, [None] * 3)
    if weight.dim() != 2:  # a product with a row
        return None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return _with(layer, weight=weight, bias=bias)


def _matmul(arguments: Sequence[Any], _: int) -> nn.Module | None:
    weight = arguments[1]
    return _with(MatrixLayer(), weight=weight) if weight.dim() == 2 else None


def _addmm(arguments: Sequence[Any], _: int) -> nn.Module | None:
    bias, _, weight = arguments
    return _with(MatrixLayer(), weight=weight, bias=bias) if bias.dim() == 1 else None


def _convolution(kind: type[_ConvNd]) -> Build:
    def build(arguments: Sequence[Any], _: int) -> nn.Module | None:
        defaults = [None, None, None, 1, 0, 1, 1]
        _, weight, bias, *options, groups = _padded(arguments, defaults)
        stride, padding, dilation = map(_option, options)
        made: Any = kind
        layer = made(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias is not None,
            device="meta",
        )
        return _with(layer, weight=weight, bias=bias)

    return build


def _transposed(kind: type[_ConvNd]) -> Build:
    def build(arguments: Sequence[Any], _: int) -> nn.Module | None:
        defaults = [None, None, None, 1, 0, 0, 1, 1]
        _, weight, bias, stride, padding, output_padding, groups, dilation = _padded(arguments, defaults)
        made: Any = kind
        layer = made(
            weight.shape[0],
            weight.shape[1] * groups,
            tuple(weight.shape[2:]),
            stride=_option(stride),
            padding=_option(padding),
            output_padding=_option(output_padding),
            groups=groups,
            dilation=_option(dilation),
            bias=bias is not None,
            device="meta",
        )
        return _with(layer, weight=weight, bias=bias)

    return build


def _prelu(arguments: Sequence[Any], _: int) -> nn.Module | None:
    return _with(nn.PReLU(arguments[1].numel(), device="meta"), weight=arguments[1])


_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE_NORMS = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def _normalised(kinds: dict[int, Any]) -> Build:
    """Of batch or instance norm, by the number of dimensions of what it is given."""

    def build(arguments: Sequence[Any], dims: int) -> nn.Module | None:
        _, weight, bias, mean, variance, _, momentum, eps = arguments[:8]
        width = len(mean if weight is None else weight)
        layer = kinds[dims](
            width, eps, momentum, affine=weight is not None, track_running_stats=mean is not None
        )
        return _with(layer, weight=weight, bias=bias, running_mean=mean, running_var=variance)

    return build


def _group_norm(arguments: Sequence[Any], _: int) -> nn.Module | None:
    _, groups, weight, bias, eps = _padded(arguments, [None] * 4 + [1e-5])[:5]
    return _with(nn.GroupNorm(groups, len(weight), eps), weight=weight, bias=bias)


def _layer_norm(arguments: Sequence[Any], _: int) -> nn.Module | None:
    _, shape, weight, bias, eps = _padded(arguments, [None] * 4 + [1e-5])[:5]
    return _with(nn.LayerNorm(shape, eps, bias=bias is not None), weight=weight, bias=bias)


def _rms_norm(arguments: Sequence[Any], _: int) -> nn.Module | None:
    _, shape, weight, eps = _padded(arguments, [None] * 4)
    return _with(nn.RMSNorm(shape, eps), weight=weight)


def _embedding(arguments: Sequence[Any], _: int) -> nn.Module | None:
    weight, _, padding, scaled, sparse = _padded(arguments, [None, None, -1, False, False])
    padding_idx = None if padding < 0 else padding
    layer = nn.Embedding(
        weight.shape[0], weight.shape[1], padding_idx, scale_grad_by_freq=scaled, sparse=sparse, device="meta"
    )
    return _with(layer, weight=weight)


# operation -> how the layer is made, the place of its input, and those of the tensors that name it: a bias
# before a weight, which layers may share
_OPERATIONS: dict[Any, tuple[Build, int, tuple[int, ...]]] = {
    aten.linear.default: (_linear, 0, (2, 1)),
    aten.matmul.default: (_matmul, 0, (1,)),
    aten.mm.default: (_matmul, 0, (1,)),
    aten.addmm.default: (_addmm, 1, (0, 2)),
    aten.conv1d.default: (_convolution(nn.Conv1d), 0, (2, 1)),
    aten.conv1d.padding: (_convolution(nn.Conv1d), 0, (2, 1)),
    aten.conv2d.default: (_convolution(nn.Conv2d), 0, (2, 1)),
    aten.conv2d.padding: (_convolution(nn.Conv2d), 0, (2, 1)),
    aten.conv3d.default: (_convolution(nn.Conv3d), 0, (2, 1)),
    aten.conv3d.padding: (_convolution(nn.Conv3d), 0, (2, 1)),
    aten.conv_transpose1d.default: (_transposed(nn.ConvTranspose1d), 0, (2, 1)),
    aten.conv_transpose2d.input: (_transposed(nn.ConvTranspose2d), 0, (2, 1)),
    aten.conv_transpose3d.input: (_transposed(nn.ConvTranspose3d), 0, (2, 1)),
    aten.prelu.default: (_prelu, 0, (1,)),
    aten.batch_norm.default: (_normalised(_BATCH_NORMS), 0, (1, 3)),
    aten.instance_norm.default: (_normalised(_INSTANCE_NORMS), 0, (1, 3)),
    aten.group_norm.default: (_group_norm, 0, (2,)),
    aten.layer_norm.default: (_layer_norm, 0, (2,)),
    aten.rms_norm.default: (_rms_norm, 0, (2,)),
    aten.embedding.default: (_embedding, 1, (0,)),
}

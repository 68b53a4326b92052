"""Networks that torch.export wrote (.pt2): a graph of operations, given its layers back.

Linear, convolution and batch norm become modules under the names of their parameters; everything else stays
the operation that it is.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.modules.conv import _ConvNd

from vbdcompress.errors import LoadError

aten = torch.ops.aten
_CONVOLUTIONS: dict[Any, type[_ConvNd]] = {
    aten.conv1d.default: nn.Conv1d,
    aten.conv1d.padding: nn.Conv1d,
    aten.conv2d.default: nn.Conv2d,
    aten.conv2d.padding: nn.Conv2d,
    aten.conv3d.default: nn.Conv3d,
    aten.conv3d.padding: nn.Conv3d,
}
_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
# Operations that channels are followed through by what they are called in torch
_BY_NAME: dict[Any, Callable[..., Any]] = {
    aten.relu.default: torch.relu,
    aten.hardtanh.default: F.hardtanh,
    aten.hardswish.default: F.hardswish,
    aten.hardsigmoid.default: F.hardsigmoid,
    aten.clamp.default: torch.clamp,
    aten.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
}
_IN_PLACE: dict[Any, Callable[..., Any]] = {
    aten.relu_.default: torch.relu,
    aten.hardtanh_.default: F.hardtanh,
    aten.hardswish_.default: F.hardswish,
}


def from_exported(program: ExportedProgram) -> nn.Module:
    """A network with layers, in eval mode, that computes what the exported program does.

    Args:
        program: exported in eval mode, with a dynamic batch: `dynamic_shapes=({0: Dim("batch")},)`.
    Raises:
        LoadError: its batch is fixed, or no layer in it could be given back.
    """
    _check_batch(program)
    graph_module: Any = program.module()
    graph = graph_module.graph
    root = nn.Module()
    found: dict[str, Any] = {}  # layer's name -> the operation and its arguments but for the input
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)
        elif node.op == "call_function":
            _check_eval(node)
            layer, name = _layer_of(graph_module, node)
            told = (node.target, node.args[1:])
            # a weight that is used in two ways is no layer's
            if layer is not None and found.setdefault(name, told) == told:
                _place(root, name, layer)
                with graph.inserting_before(node):
                    called = graph.call_module(name, (node.args[0],))
                called.meta = dict(node.meta)
                node.replace_all_uses_with(called)
                graph.erase_node(node)
            else:
                node.target = _IN_PLACE.get(node.target, _BY_NAME.get(node.target, node.target))
    if not found:
        raise LoadError("exported program", "has no Linear or convolution with weights of its own.")
    _keep_tensors(graph_module, graph, root)
    graph.eliminate_dead_code()
    return fx.GraphModule(root, graph).eval()


def _check_eval(node: fx.Node) -> None:
    """Raise LoadError for what behaves otherwise in training, exported as it was there."""
    places: dict[Any, int] = {aten.dropout.default: 2, aten.batch_norm.default: 5}
    place = places.get(node.target)
    if place is not None and node.args[place] is True:
        raise LoadError(
            "exported program",
            f"was exported in training mode ('{node.name}' is active).",
            "Export it from model.eval().",
        )


def _check_batch(program: ExportedProgram) -> None:
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        batch = value.shape[0] if isinstance(value, Tensor) and value.dim() else None
        if node.name in inputs and isinstance(batch, int):
            raise LoadError(
                "exported program",
                f"takes batches of {batch} alone (input '{node.name}').",
                'Export it with a dynamic batch: dynamic_shapes=({0: torch.export.Dim("batch")},)',
            )


def _layer_of(module: nn.Module, node: fx.Node) -> tuple[nn.Module | None, str]:
    """The layer that an operation on stored parameters is, and the name it stood under; None for others."""
    target: Any = node.target
    arguments: list[Any] = list(node.args)
    weight = arguments[1] if len(arguments) > 1 else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or node.kwargs:
        return None, ""
    name = str(weight.target).rpartition(".")[0]
    if not name or str(weight.target) != f"{name}.weight":
        return None, ""

    def stored(place: int) -> Any:
        item = arguments[place] if len(arguments) > place else None
        return attrgetter(str(item.target))(module) if isinstance(item, fx.Node) else item

    if target is aten.linear.default:
        return _with(nn.Linear, stored(1), stored(2), stored(1).shape[1], stored(1).shape[0]), name
    if target in _CONVOLUTIONS:
        defaults = [None, None, None, 1, 0, 1, 1]
        stride, padding, dilation, groups = (arguments + defaults[len(arguments) :])[3:]
        shape = stored(1).shape
        options: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list | tuple) else value
            for key, value in (("stride", stride), ("padding", padding), ("dilation", dilation))
        }
        channels = (shape[1] * groups, shape[0], tuple(shape[2:]))
        return _with(_CONVOLUTIONS[target], stored(1), stored(2), *channels, groups=groups, **options), name
    if target is aten.batch_norm.default:
        first: Any = arguments[0]
        kind = _NORMS[first.meta["val"].dim()]
        norm = kind(len(stored(1)), eps=arguments[7], momentum=arguments[6])
        norm.weight, norm.bias = stored(1), stored(2)
        norm.running_mean, norm.running_var = stored(3), stored(4)
        return norm, name
    return None, ""


def _with(
    kind: Any, weight: nn.Parameter, bias: nn.Parameter | None, *shape: Any, **options: Any
) -> nn.Module:
    layer: nn.Module = kind(*shape, bias=bias is not None, device="meta", **options)
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def _place(root: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer under a dotted name; one that is there already, used twice, stays."""
    *above, own = name.split(".")
    for part in above:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if not hasattr(root, own):
        root.add_module(own, layer)


def _keep_tensors(module: nn.Module, graph: fx.Graph, root: nn.Module) -> None:
    """Parameters and buffers that no layer took keep their names, where the graph still uses them."""
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        if not node.users:
            graph.erase_node(node)
            continue
        *above, own = str(node.target).split(".")
        place = root
        for part in above:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        if not hasattr(place, own):
            tensor = attrgetter(str(node.target))(module)
            if isinstance(tensor, nn.Parameter):
                place.register_parameter(own, tensor)
            else:
                place.register_buffer(own, tensor)

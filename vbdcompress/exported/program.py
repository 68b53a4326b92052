"""A network of modules from an exported program.

Linear, convolutions, norms, PReLU and Embedding become modules under the names of their parameters;
everything else stays the operation that it is, and reshapes take the sizes that they are given.
"""

from collections.abc import Callable, Sequence
from itertools import count
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map_only

from vbdcompress.compare import flatten_output, relative_difference
from vbdcompress.errors import LoadError
from vbdcompress.exported.layers import layer_of
from vbdcompress.exported.shapes import free_sizes_

aten = torch.ops.aten
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
# Name of an empty buffer whose dtype is the network's
_DTYPE = "_of_dtype"
# Module of tensors whose place is taken, and of the root's own matrices: torch copies no graph whose root has
# parametrizations, which these may get
_STORED = "stored"
# Largest difference from the program, relative to its largest output: float32 sums in another order
_SAME = 1e-4


def from_exported(program: ExportedProgram) -> nn.Module:
    """A network with layers, in eval mode, that computes what the exported program does.

    Args:
        program: exported in eval mode, with a dynamic batch: `dynamic_shapes=({0: Dim("batch")},)`.
    Raises:
        LoadError: its batch is fixed, no layer in it could be given back, or the network with layers
            gives something else.
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
            stored = layer_of(graph_module, node)
            place = 0 if stored is None else stored.input
            told = (node.target, node.args[:place], node.args[place + 1 :])
            # a weight that is used in two ways is no layer's
            if (
                stored is not None
                and found.get(stored.name, told) == told
                and _place(root, stored.name, stored.layer)
            ):
                found[stored.name] = told
                with graph.inserting_before(node):  # not graph.call_module: it looks for the module already
                    called = graph.create_node("call_module", stored.name, (node.args[place],))
                called.meta = dict(node.meta)
                node.replace_all_uses_with(called)
                graph.erase_node(node)
            else:
                free_sizes_(node)
                node.target = _IN_PLACE.get(node.target, _BY_NAME.get(node.target, node.target))
    if not found:
        raise LoadError("exported program", "has no Linear or convolution with weights of its own.")
    _follow_dtype_(graph, root)
    _keep_tensors(graph_module, graph, root)
    network = fx.GraphModule(root, graph)
    network.graph.eliminate_dead_code()
    network.recompile()
    network.eval()
    _check_same(program, network)
    return network


def _check_eval(node: fx.Node) -> None:
    """Raise LoadError for what behaves otherwise in training, exported as it was there."""
    trains = node.target is aten.dropout.default and node.args[2] is True
    if node.target in (aten.batch_norm.default, aten.instance_norm.default):
        trains = node.args[5] is True and node.args[3] is not None  # without statistics: always the input's
    if trains:
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


def _follow_dtype_(graph: fx.Graph, root: nn.Module) -> None:
    """Let tensors that the program makes in float32 be in the dtype of the network, which may be float64."""
    root.register_buffer(_DTYPE, torch.zeros(()), persistent=False)
    for node in list(graph.nodes):
        value, given = node.meta.get("val"), (*node.args, *node.kwargs.values())
        if node.op == "call_function" and torch.float32 in given and isinstance(value, Tensor):
            with graph.inserting_after(node):
                like = graph.create_node("get_attr", _DTYPE)
            with graph.inserting_after(like):
                cast = graph.call_function(aten.type_as.default, (node, like))
            cast.meta = dict(node.meta)
            node.replace_all_uses_with(cast, lambda user, cast=cast: user is not cast)


def _place(root: nn.Module, name: str, layer: nn.Module) -> bool:
    """Put a layer under a dotted name; one that is there already, used twice, stays. False: no place."""
    *above, own = name.split(".")
    holder = _walk(root, above)
    if holder is None or (hasattr(holder, own) and own not in holder._modules):
        return False
    before = holder._modules.get(own)
    if before is None or type(before) is nn.Module:  # made for the layers below this one
        for below, module in () if before is None else before.named_children():
            layer.add_module(below, module)
        holder.add_module(own, layer)
    return True


def _walk(root: nn.Module, names: Sequence[str]) -> nn.Module | None:
    """The module under these names, made where there is none; None where something else stands there."""
    for name in names:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        if name not in root._modules:
            return None
        root = getattr(root, name)
    return root


def _keep_tensors(module: nn.Module, graph: fx.Graph, root: nn.Module) -> None:
    """Parameters and buffers that no layer took keep their names, or go apart where these are taken."""
    for node in list(graph.nodes):
        if node.op != "get_attr" or node.target == _DTYPE:
            continue
        if not node.users:
            graph.erase_node(node)
            continue
        tensor = attrgetter(str(node.target))(module)
        *above, own = str(node.target).split(".")
        holder = None if not above and tensor.dim() > 1 else _walk(root, above)
        if holder is None or (hasattr(holder, own) and getattr(holder, own) is not tensor):
            holder = _walk(root, [_STORED])
            assert holder is not None
            names = (f"{own}_{number}" if number else own for number in count())
            own = next(name for name in names if not hasattr(holder, name))
            node.target = f"{_STORED}.{own}"
        if not hasattr(holder, own):
            if isinstance(tensor, nn.Parameter):
                holder.register_parameter(own, tensor)
            else:
                holder.register_buffer(own, tensor)


@torch.no_grad()
def _check_same(program: ExportedProgram, network: nn.Module) -> None:
    """Raise LoadError where, on the input that it was traced with, the network gives something else."""
    if program.example_inputs is None:
        return
    given, named = tree_map_only(Tensor, Tensor.detach, program.example_inputs)
    outputs = []
    for each in (program.module(), network):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            copies, options = tree_map_only(Tensor, Tensor.clone, (given, named))
            outputs.append(flatten_output(each(*copies, **options)))
    difference = relative_difference(*outputs)
    if not difference <= _SAME:
        raise LoadError(
            "exported program",
            f"differs by {difference:.2g} of its largest output from the network that its layers make "
            f"(allowed is {_SAME:.0g}).",
            "Please report the program; pass the network that it was exported from instead.",
        )

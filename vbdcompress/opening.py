"""Layers that are others in disguise, or hold others inside, replaced by the same with those in the open."""

from collections import Counter
from collections.abc import Collection

from torch import nn

from vbdcompress.attention import HeadAttention, HeadWindowAttention, open_attention
from vbdcompress.layer_norm import NarrowLayerNorm, NarrowRMSNorm, open_norm
from vbdcompress.linear import OpenLinear, open_linear
from vbdcompress.recurrent import StackedRecurrent, open_recurrent

Opened = HeadAttention | HeadWindowAttention | StackedRecurrent | OpenLinear | NarrowLayerNorm | NarrowRMSNorm


def open_layers_(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Replace attention, norms, recurrent and linear layers that are known by their opened form, in place.

    Args:
        names: of the modules, "" for the network itself; None takes all. One that is opened already stays.
            One that stands under several names is opened under all of them.
    """
    replaced: dict[int, nn.Module | None] = {}
    modules = list(model.named_modules(remove_duplicate=False))
    wanted = {id(module) for name, module in modules if names is None or name in names}
    held = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    tied = {number for number, count in held.items() if count > 1}
    for name, module in modules:
        if id(module) in wanted:
            if id(module) not in replaced:
                hooked = module._forward_hooks or module._forward_pre_hooks  # they would be lost
                replaced[id(module)] = None if hooked else _open(module, tied)
            opened = replaced[id(module)]
            if opened is not None and name:
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, opened)
            elif opened is not None:  # who holds the network holds the opened one
                model.__class__, model.__dict__ = type(opened), vars(opened)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # its shortcut reads the weights past the layers


def _open(module: nn.Module, tied: Collection[int]) -> Opened | None:
    return open_attention(module) or open_recurrent(module) or open_linear(module, tied) or open_norm(module)

"""What part a module has among channels, by its type."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from vbdcompress.layer_norm import is_channel_norm
from vbdcompress.recurrent import Recurrent, writes_units
from vbdcompress.surgery.reading import Role
from vbdcompress.surgery.weights import is_mixing, keeps_groups_apart


def role_of(module: nn.Module) -> Role | None:
    """How the probe takes a module; None: its own code is followed."""
    if is_mixing(module):
        return "mixing"
    if isinstance(module, Recurrent):
        return "mixing" if writes_units(module) else "reading"
    if _is_per_channel(module):
        return "between"
    # those that hold parameters and compute nothing; of exported programs they are plain modules
    holds = type(module) is nn.Module or isinstance(module, nn.ParameterList | nn.ParameterDict | nn.PReLU)
    known = type(module).__module__.startswith("torch.nn.") and not holds
    if known and (any(True for _ in module.parameters(recurse=False)) or isinstance(module, nn.GroupNorm)):
        return "opaque"
    return None


def _is_per_channel(module: Any) -> bool:
    if isinstance(module, nn.PReLU):
        return module.num_parameters > 1
    if isinstance(module, nn.GroupNorm):  # each of its groups goes whole, the others don't notice
        return module.num_groups > 1
    # what goes from in front of the last is 0 by then, and counted on
    return (
        keeps_groups_apart(module)
        or isinstance(module, _BatchNorm | _InstanceNorm)
        or is_channel_norm(module)
    )

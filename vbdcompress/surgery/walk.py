"""Names of a network's layers and parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vbdcompress.errors import ConvertError


def matches_skip(name: str, skip: Sequence[str]) -> bool:
    """Whether a layer is one of, or lies below one of, the names to skip."""
    return any(name == entry or name.startswith(entry + ".") for entry in skip)


def check_skip(model: nn.Module, skip: Sequence[str]) -> None:
    """Raise ConvertError for a name to skip that nothing has, or a bare name instead of a list of them."""
    if isinstance(skip, str):
        raise ConvertError("skip", f"is {skip!r}, allowed is a list of names.", f"skip=[{skip!r}]")
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    for entry in skip:
        if entry not in names or not entry:
            raise ConvertError(
                "skip",
                f"no layer is named '{entry}'.",
                f"Layers: {', '.join(name for name in names if name)}",
            )


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its dotted name. Raises AttributeError where there is none."""
    owner, _, own = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), own)
    return tensor


def shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """id of each parameter that stands under more than one name -> its names."""
    names: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            names.setdefault(id(parameter), []).append(f"{module_name}.{parameter_name}".lstrip("."))
    return {key: found for key, found in names.items() if len(found) > 1}


@torch.no_grad()
def tie_again_(model: nn.Module, tied: Sequence[Sequence[str]]) -> None:
    """Let parameters that were one be one again, where they were cut alike, in place.

    Args:
        tied: the names of each.
    """
    for first, *others in tied:
        kept = tensor_of(model, first)
        for name in others:
            if torch.equal(tensor_of(model, name), kept):
                owner, _, own = name.rpartition(".")
                setattr(model.get_submodule(owner), own, kept)

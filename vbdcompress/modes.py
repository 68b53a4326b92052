"""Training and evaluation mode, of networks whose own `train` gives nothing back, too."""

from typing import TypeVar

from torch import nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def evaluated(model: AnyModule) -> AnyModule:
    """The network itself, in eval mode."""
    model.eval()
    return model

"""Networks looked at without gradient checkpointing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils import checkpoint

# What a checkpoint is made by: the one with hooks (up to torch 2.13, from 2.14 on), and the re-entrant one
_MAKERS = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")
_REENTRANT = "CheckpointFunction"


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """What torch.utils.checkpoint would compute a second time is computed once, as if it were called plainly.

    Each layer is cut out of the network while its channels are followed, and a second time it would be whole.
    """
    before = {name: getattr(checkpoint, name) for name in (*_MAKERS, _REENTRANT) if hasattr(checkpoint, name)}
    for name in before:
        setattr(checkpoint, name, _Plain if name == _REENTRANT else _nothing_beside)
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(checkpoint, name, own)


def _nothing_beside(*_: Any, **__: Any) -> Iterator[None]:
    """torch runs the function between two steps of this."""
    yield


class _Plain:
    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)

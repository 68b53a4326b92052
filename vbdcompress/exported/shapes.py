"""Sizes that an exported program wrote down as numbers, freed, so that channels and heads can go."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_Size = Any  # sympy's: a number, or an expression of the batch


def free_sizes_(node: fx.Node) -> None:
    """Let a reshape take its sizes from what it is given, in place; the program computes the same.

    A dimension that stays has the size that it had. Of those that change one is worked out from the rest:
    what several were merged to, or the heads where one was split into (heads, size of a head).
    """
    if node.target in _RESHAPES:
        _free_reshape_(node)
    elif node.target is aten.split.Tensor:
        cut: tuple[Any, ...] = node.args  # source, size of a part, perhaps the dimension
        whole = _sizes_of(cut[0])[cut[2] if len(cut) > 2 else 0]
        if whole.is_number and isinstance(cut[1], int) and whole % cut[1] == 0:
            node.target, node.args = aten.chunk.default, (cut[0], int(whole) // cut[1], *cut[2:])
    elif node.target is aten.unflatten.int:
        source, dim, sizes = node.args
        assert isinstance(sizes, list | tuple)
        if -1 not in sizes:
            node.args = (source, dim, [*sizes[:-1], -1])
    elif node.target is aten.expand.default:
        source, shape = node.args[:2]
        assert isinstance(shape, list | tuple)
        given, made = _sizes_of(source), _sizes_of(node)
        new = len(made) - len(given)
        stays = [place >= new and size == given[place - new] for place, size in enumerate(made)]
        sizes = [-1 if same else size for same, size in zip(stays, shape, strict=True)]
        node.args = (source, sizes, *node.args[2:])


def _free_reshape_(node: fx.Node) -> None:
    source, shape = node.args
    assert isinstance(shape, list | tuple)
    given, made = _sizes_of(source), _sizes_of(node)
    sizes = list(shape)
    open_places = []
    for segment in _segments(given, made):
        if len(segment.given) == len(segment.made) == 1:
            if made[segment.start].is_number or sizes[segment.start] == -1:
                with node.graph.inserting_before(node):
                    sizes[segment.start] = node.graph.call_function(
                        aten.sym_size.int, (source, segment.start_given)
                    )
        elif (place := _open_place(segment, len(made))) is not None:
            open_places.append(place)
    if open_places and -1 in sizes and made[sizes.index(-1)].is_number:
        own = sizes.index(-1)  # where the network's code left a size open, as that of a head
        sizes[own] = int(made[own])
    if open_places and -1 not in sizes:
        sizes[open_places[-1]] = -1
    # a view where the network was exported need be none where attention is computed otherwise
    node.target, node.args = aten.reshape.default, (source, sizes)


def _sizes_of(node: Any) -> list[_Size]:
    import sympy  # here, for it takes half a second and few networks come as programs

    shape = node.meta["val"].shape
    return [sympy.Integer(size) if isinstance(size, int) else size.node.expr for size in shape]


@dataclass(frozen=True)
class _Segment:
    """Dimensions that lie next to each other, and those that they became: as many numbers in all.

    Attributes:
        given, made: their sizes before and after.
        start_given, start: the first dimension before and after.
    """

    given: Sequence[_Size]
    made: Sequence[_Size]
    start_given: int
    start: int


def _segments(given: Sequence[_Size], made: Sequence[_Size]) -> Iterator[_Segment]:
    """The shortest segments from first to last; none where the shapes can't be compared."""
    import sympy

    here = there = 0
    while here < len(given) and there < len(made):
        ends = (
            (i, j)
            for total in range(2, len(given) - here + len(made) - there + 1)
            for i in range(here + 1, len(given) + 1)
            if there < (j := total - (i - here) + there) <= len(made)
            and sympy.expand(sympy.prod(given[here:i]) - sympy.prod(made[there:j])) == 0
        )
        i, j = next(ends, (here, there))
        if (i, j) == (here, there):
            return
        yield _Segment(given[here:i], made[there:j], here, there)
        here, there = i, j


def _open_place(segment: _Segment, dims: int) -> int | None:
    """The dimension that is worked out; None where all are the batch, or 1."""
    numbers = []
    for place, size in enumerate(segment.made, segment.start):
        factor, rest = size.as_coeff_Mul()
        if rest != 1 and factor != 1 and factor not in segment.given:
            return place  # heads beside the batch
        if rest == 1 and size != 1:
            numbers.append(place)
    is_split = len(segment.given) < len(segment.made) == dims - segment.start
    if len(numbers) > 1 and is_split:
        return numbers[-2]
    return numbers[-1] if numbers else None

"""Groups known to be exact: each is cut on a trial copy, and one that changes the output stays whole."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice

from torch import nn
from torch.nn.utils import parametrize

from vbdcompress.compare import as_double, forget_calls_, in_double
from vbdcompress.inputs import Inputs, map_tensors
from vbdcompress.surgery.attempt import CANT_TRAIN, leading_masks, random_masks, try_groups, uneven_masks
from vbdcompress.surgery.groups import ChannelGroup, GroupScan, trace_groups
from vbdcompress.surgery.influence import heed_influences
from vbdcompress.surgery.numbers import with_heads
from vbdcompress.surgery.partition import STAYS, Kind, Piece, beside_unread, divide, find_pieces, kind_of
from vbdcompress.surgery.plain import without_checkpointing
from vbdcompress.surgery.silence import heed_norms
from vbdcompress.surgery.tied import find_taker, with_other_takers
from vbdcompress.surgery.ties import UNREAD
from vbdcompress.surgery.trial import trial_copy
from vbdcompress.surgery.walk import shared_parameters, tensor_of
from vbdcompress.surgery.weights import Index


@without_checkpointing()
def find_groups(model: nn.Module, example: Inputs, *, features: bool = False, seed: int = 0) -> GroupScan:
    """The network's channel groups, each either proven exact or left whole with the reason.

    The proof: on a float64 copy with other weights (`trial_copy`), some channels of every group are masked
    and the others scaled, at the inputs of their readers; then that is done to the weights and the masked
    ones are cut, and both must give the same output. Where they do not, halving finds the groups at fault:
    three trials where all is well, however deep the network. What is at fault is tried once more in parts,
    see `partition`.

    Args:
        model: plain; left as it was.
        example: a batch of inputs.
        features: see `trace_groups`.
        seed: of the trial's weights and masks.
    """
    with in_double():
        inputs = map_tensors(example, as_double)
        return _find_groups(trial_copy(model, inputs, seed), inputs, model, features, seed)


def _find_groups(trial: nn.Module, inputs: Inputs, model: nn.Module, features: bool, seed: int) -> GroupScan:
    traced = _leave_entangled(model, trace_groups(trial, inputs, features=features, seed=seed))
    forget_calls_(trial)  # what its forward keeps of a call, it could not be copied with
    traced = heed_influences(trial, inputs, traced)
    traced = replace(traced, groups=tuple(with_heads(trial, group) for group in traced.groups))
    unread = [group for group in traced.groups if group.whole_because == UNREAD]
    search = _Search(trial, inputs, seed, unread)
    all_go = search.look_at_kinds(traced)
    slots = [search.as_known(group) for group in traced.groups]
    tried = replace(traced, groups=tuple(chain(*slots)))
    scan = _try_scan(trial, inputs, tried, seed, _DRAWS[1:] if all_go else _DRAWS)
    found, groups = iter(scan.groups), list[ChannelGroup]()
    for group, slot in zip(traced.groups, slots, strict=True):
        after = list(islice(found, len(slot)))
        failed = (now for before, now in zip(slot, after, strict=True) if before.whole_because is None)
        reason = next((now.whole_because for now in failed if now.whole_because is not None), None)
        groups += after if reason is None else search.help(group, reason)
    left = {group.name for group in search.unread}
    groups = [group for group in groups if group.whole_because != UNREAD or group.name in left]
    groups = [heed_norms(trial, inputs, group) for group in groups]
    proven = {id(group) for group in scan.groups}
    if all(id(group) in proven for group in groups):
        return scan
    return _try_scan(trial, inputs, replace(scan, groups=tuple(groups)), seed)


@dataclass
class _Search:
    """For groups that can't be cut as they were found: in which parts, and with what beside them, they can.

    Attributes:
        unread: groups that nothing is seen to read, but for those found to go with others.
        known: kinds of groups whose first one failed as it was -> how it goes.
    """

    trial: nn.Module
    inputs: Inputs
    seed: int
    unread: list[ChannelGroup]
    known: dict[Kind, tuple[Piece, ...]] = field(default_factory=dict)

    def why_not(self, group: ChannelGroup) -> str | None:
        """Why it can't be cut exactly, alone; None where it can."""
        return _try_scan(self.trial, self.inputs, GroupScan((group,)), self.seed).groups[0].whole_because

    def goes(self, group: ChannelGroup) -> bool:
        """Whether it can be cut exactly, alone."""
        return bool(group.readers) and group.size > 1 and self.why_not(group) is None

    def look_at_kinds(self, scan: GroupScan) -> bool:
        """Of groups in blocks that are alike, help the first, if any group fails: the others may be as it is.

        Returns:
            whether all go, as the first of the draws masks them.
        """
        masks = _DRAWS[0](scan.removable, self.seed)
        if not masks or try_groups(self.trial, self.inputs, scan.removable, masks, training=False) is None:
            return True
        kinds: dict[Kind, list[ChannelGroup]] = {}
        for group in scan.removable:
            kinds.setdefault(kind_of(self.trial, group), []).append(group)
        if len(kinds) == len(scan.removable):
            return False  # none is like another
        firsts = tuple(alike[0] for alike in kinds.values())
        tried = _try_scan(self.trial, self.inputs, GroupScan(firsts), self.seed)
        for (kind, alike), now in zip(kinds.items(), tried.groups, strict=True):
            if now.whole_because is None:
                continue
            pieces = self._pieces(alike[0], now.whole_because)
            # the first may be another one than the rest, so that nothing helps it alone
            if pieces == STAYS and len(alike) > 1 and not self.goes(alike[1]):
                pieces = self._pieces(alike[1], now.whole_because)
            self.known[kind] = pieces
        return False

    def as_known(self, group: ChannelGroup) -> list[ChannelGroup]:
        """As the first of its kind: in its pieces where all of them go, or whole where none does."""
        pieces = self.known.get(kind_of(self.trial, group), ()) if group.whole_because is None else ()
        if pieces == STAYS and (reason := self.why_not(group)):
            return self._otherwise(group) or [group.whole(reason)]
        return [group] if any(piece.stays for piece in pieces) else divide(self.trial, group, pieces)

    def help(self, group: ChannelGroup, reason: str) -> list[ChannelGroup]:
        """A group that failed, as it was or as the first of its kind, as it goes; or whole."""
        if self.goes(group):
            return [group]  # beside another one that stays whole by now
        met = self._otherwise(group)
        return met or divide(self.trial, group.whole(reason), self._pieces(group, reason))

    def _pieces(self, group: ChannelGroup, reason: str) -> tuple[Piece, ...]:
        """How a group that failed can go; where only training fails, it was cut right, and stays."""
        return STAYS if reason.startswith(CANT_TRAIN) else find_pieces(self.trial, group, self.goes)

    def _otherwise(self, group: ChannelGroup) -> list[ChannelGroup]:
        """The group with gates that go into another norm, or with a layer that adds to its channels in vain;
        empty where there is none.
        """
        taken = next(filter(self.goes, with_other_takers(self.trial, group)), None)
        if taken is not None:
            return [taken]
        met = beside_unread(group, self.unread, self.goes)
        names = set() if met is None else {member.layer for member in met.writers}
        self.unread = [group for group in self.unread if group.name not in names]
        return [] if met is None else [met]


_DRAWS = (random_masks, leading_masks, uneven_masks)


def _try_scan(
    trial: nn.Module,
    inputs: Inputs,
    scan: GroupScan,
    seed: int,
    draws: Sequence[Callable[[Sequence[ChannelGroup], int], dict[str, Index]]] = _DRAWS,
) -> GroupScan:
    """The same groups, those whole that can't be cut, as any of the draws masks them."""
    for draw in draws:
        trusted = scan.removable
        masks = draw(trusted, seed)
        last = draw is uneven_masks
        wrong = dict(_find_wrong(trial, inputs, trusted, masks, training=last)) if trusted else {}
        groups = (
            group.whole(group.suspect or wrong[group.name]) if group.name in wrong else group
            for group in scan.groups
        )
        scan = replace(scan, groups=tuple(groups))
    return scan


def _leave_entangled(model: nn.Module, scan: GroupScan) -> GroupScan:
    """Leave whole what touches a weight that is computed, or that stands elsewhere under another name."""
    tied = shared_parameters(model)
    groups = []
    for traced in scan.groups:
        found = {key: find_taker(model, traced, names) for key, names in tied.items()}
        takers = {key: taker for key, taker in found.items() if taker is not None}
        group, reason = replace(traced, takers=tuple(takers.values())), None
        for member in (*group.writers, *group.readers, *group.between):
            layer = model.get_submodule(member.layer)
            own = layer._parameters
            if parametrize.is_parametrized(layer) or ("weight" not in own and hasattr(layer, "weight")):
                reason = f"the weight of '{member.layer}' is computed from others, not stored"
            for parameter in own.values():
                if id(parameter) in tied.keys() - takers.keys():
                    reason = f"'{member.layer}' shares a parameter: {', '.join(tied[id(parameter)])}"
        for held in group.parameters:
            if id(tensor_of(model, held.layer)) in tied:
                reason = f"'{held.layer}' is a parameter under more than one name"
        groups.append(group.whole(reason) if reason and group.whole_because is None else group)
    return replace(scan, groups=tuple(groups))


def _find_wrong(
    model: nn.Module,
    inputs: Inputs,
    groups: Sequence[ChannelGroup],
    masks: dict[str, Index],
    *,
    training: bool,
) -> Iterator[tuple[str, str]]:
    """(name, reason) of each group that can't be cut without changing the output."""
    reason = try_groups(model, inputs, groups, masks, training=training)
    if reason is None:
        return
    if len(groups) == 1:
        yield groups[0].name, reason
        return
    middle = len(groups) // 2
    wrong: dict[str, str] = {}
    for half in (groups[:middle], groups[middle:]):
        wrong |= dict(_find_wrong(model, inputs, half, masks, training=training))
    rest = [group for group in groups if group.name not in wrong]
    together = try_groups(model, inputs, rest, masks, training=training) if rest else None
    if together is not None:
        # each half is right by itself: groups that only go together, found one by one
        kept: list[ChannelGroup] = []
        for group in rest:
            if try_groups(model, inputs, [*kept, group], masks, training=training) is None:
                kept.append(group)
            else:
                wrong[group.name] = together
    yield from wrong.items()

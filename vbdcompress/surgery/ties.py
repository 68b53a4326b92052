"""Which channels go together: those that meet at one position of anything; and what keeps them whole."""

from collections import Counter

from torch import nn
from torch.nn.modules.conv import _ConvNd

from vbdcompress.gather import GatherLinear
from vbdcompress.recurrent import Recurrent, writes_units
from vbdcompress.surgery.flows import Place
from vbdcompress.surgery.reading import Reading
from vbdcompress.surgery.weights import keeps_groups_apart, shares

OUTPUT = "no layer reads it: it is an output of the network"
UNREAD = "no layer is seen to read it: its result is not used, or no gradient follows it"
_SPREAD = "its one channel works on all channels of others"
_SHARED = "its channels work on all channels of others"


class Ties:
    """Places tied by what meets in them (a union-find), and what keeps any of them whole."""

    def __init__(self) -> None:
        self.parent: dict[Place, Place] = {}
        self.reasons: list[tuple[Place, str]] = []
        self.suspects: list[tuple[Place, str]] = []  # what is to blame where a trial fails
        self.from_network_input: dict[str, bool] = {}
        self.parameters: dict[tuple[str, int], None] = {}  # (name, dimension) of those tied to channels

    def find(self, place: Place) -> Place:
        """The place that stands for all that are tied to it."""
        self.parent.setdefault(place, place)
        while self.parent[place] != place:
            self.parent[place] = self.parent[self.parent[place]]
            place = self.parent[place]
        return place

    def tie(self, one: Place, other: Place) -> None:
        """Let two places, and all that are tied to either, go together."""
        first, second = sorted((self.find(one), self.find(other)))
        self.parent[second] = first

    def reads(self, model: nn.Module, reading: Reading) -> None:
        """What a layer, or the network's output, is given."""
        for positions, places in reading.positions:
            for position in positions:
                self.tie(("reads", reading.layer, position), places[0])
            for place in places:
                self.tie(place, places[0])
                if place[0] == "holds":
                    name, _, dim = place[1].rpartition(":")
                    self.parameters[name, int(dim)] = None
        reason = None
        if reading.role == "opaque":
            reason = _why_opaque(model.get_submodule(reading.layer)) if reading.layer else OUTPUT
        elif isinstance(model.get_submodule(reading.layer), GatherLinear):
            reason = "its reader picks single features of it by a gather"
        elif reading.blocked:
            reason = reading.blocked
        elif reading.bare:  # a cut may be exact all the same: the trial tells
            suspect = f"bare parameter '{reading.bare[0]}' works on its channels"
            self.suspects += [(place, suspect) for place in reading.places]
        if reason is not None:
            self.reasons += [(place, reason) for place in reading.places]
        together = Counter(place[:2] for place in reading.spread)
        self.reasons += [(p, _SPREAD if together[p[:2]] == 1 else _SHARED) for p in reading.spread]
        if reading.role == "mixing":
            before = self.from_network_input.get(reading.layer, True)
            self.from_network_input[reading.layer] = before and not reading.places and not reading.bare

    def shares(self, layer: str, module: nn.Module) -> None:
        """Tie what a layer must lose alike: groups of a convolution, or directions of a recurrent layer.

        A recurrent layer reads its hidden units again.
        """
        if isinstance(module, Recurrent) and writes_units(module):
            for unit in range(module.hidden_size):
                self.tie(("reads", layer, module.input_size + unit), ("writes", layer, unit))
                if module.bidirectional:
                    self.tie(("writes", layer, unit), ("writes", layer, module.hidden_size + unit))
        if isinstance(module, _ConvNd) and module.groups > 1:
            _, inputs, outputs = shares(module)
            apart = keeps_groups_apart(module)
            for group in range(module.groups):
                for number in range(inputs):
                    first = group * inputs if apart else number
                    self.tie(("reads", layer, first), ("reads", layer, group * inputs + number))
                for number in range(0 if apart else outputs):
                    self.tie(("writes", layer, number), ("writes", layer, group * outputs + number))


def _why_opaque(module: nn.Module) -> str:
    return f"{type(module).__name__} mixes its channels, so that none can go without changing the rest"

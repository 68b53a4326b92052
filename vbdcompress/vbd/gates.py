"""Channel gates: multiplicative noise on what a layer reads.

"Variational Bayesian Dropout", Eq. 19: B' = f(B) o W', and B' is the input of the following
layer. So a gate stands at the input of every layer that reads its channels, and removing a
channel whose gate is 0 at all its readers changes nothing, whatever lies between.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from vbdcompress.inputs import input_of, with_input
from vbdcompress.recurrent import Recurrent, restore_state, scale_state, writes_units
from vbdcompress.vbd.posterior import KEEP_ALL, HasPosterior


class ChannelGate(HasPosterior, nn.Module):
    """w' ~ N(theta, sigma^2) for each of `size` channels; theta starts at 1.

    Args:
        size: number of channels (or features, or groups of channels that must go together).
        log_sigma2: initial log variance.
        name: of the channels, in reports; empty takes the module's.
        cost: weight of its KL.
    """

    kind = "gate"

    def __init__(self, size: int, log_sigma2: float, name: str = "", cost: float = 1.0) -> None:
        super().__init__()
        self.name = name
        self.cost = cost
        self.theta = nn.Parameter(torch.ones(size))
        self.log_sigma2 = nn.Parameter(torch.full((size,), log_sigma2))
        self.threshold = KEEP_ALL

    def posterior(self) -> tuple[Tensor, Tensor]:
        return self.theta, self.log_sigma2

    def posterior_name(self, module_name: str) -> str:
        return self.name or module_name

    def values(self, batch: int) -> Tensor:
        """[batch, size] while training, a draw for each; in eval [1, size], masked.

        batch: the first dimension of what is multiplied: examples, or steps where a layer takes those first.
        """
        if not self.training:
            return self.masked_theta()[None]
        sigma = (0.5 * self.log_sigma2).exp()
        return self.theta + sigma * torch.randn(
            batch, self.theta.shape[0], dtype=sigma.dtype, device=sigma.device
        )


class InputGate(nn.Module):
    """Multiplies a layer's input by the gates of the channels it reads.

    Gates are shared by all readers of their channels; each reader makes a draw of its own.

    Args:
        gates: the gates whose channels the layer reads, in the order that `index` counts them.
        index: [in_features] integer; position in the concatenation of the gates' channels, or
            the total number of channels for an input that has no gate. [factors, in_features]
            where an input has several gates, say its channel's and its own: they multiply.
        dim: the input's channel dimension (1 for convolutions, -1 for Linear).
        picked: [in_features] positions of the input that the layer picks by a gather; None reads
            the input as it comes.
    """

    index: Tensor
    picked: Tensor | None

    def __init__(
        self, gates: Sequence[ChannelGate], index: Tensor, dim: int, picked: Tensor | None = None
    ) -> None:
        super().__init__()
        self.gates = nn.ModuleList(gates)
        self.dim = dim
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("picked", picked, persistent=False)
        sizes = [gate.theta.numel() for gate in gates]
        self._runs = [_find_run(row.cpu(), sizes) for row in index.view(-1, index.shape[-1])]

    def values(self, batch: int) -> Tensor:
        """[batch or 1, in_features]: what each input feature is multiplied by."""
        drawn = [gate.values(batch) for gate in self.gates if isinstance(gate, ChannelGate)]
        factors = []
        for row, run in zip(self.index.view(-1, self.index.shape[-1]), self._runs, strict=True):
            if run is None:
                ungated = drawn[0].new_ones(drawn[0].shape[0], 1)
                factors.append(torch.cat([*drawn, ungated], dim=1).index_select(1, row))
            else:  # a gather's gradient costs more than the layer's own on small layers
                factors.append(drawn[run[0]][..., None].expand(-1, -1, run[1]).flatten(1))
        return reduce(torch.mul, factors)

    def forward(self, input: Tensor) -> Tensor:
        # a Linear's input may be one example without a batch: [in_features]
        values = self.values(input.shape[0] if input.dim() > 1 else 1).to(input.dtype)
        if self.picked is not None:
            ungated = values.new_ones(len(values), input.shape[self.dim])
            values = ungated.index_copy(1, self.picked, values)
        shape = [1] * input.dim()
        shape[0], shape[self.dim] = values.shape
        return input * values.view(shape)

    def gate_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the reader. A bound method: a deep copy of the network gets its own."""
        return with_input(args, kwargs, self(input_of(args, kwargs)))


class RecurrentGate(InputGate):
    """Multiplies what a recurrent layer is given, and the weights that read its own hidden units.

    One draw of the latter serves all steps and examples of a batch, for torch runs a layer as a whole.

    Args:
        index: as of `InputGate`, of the layer's inputs, and of its hidden units behind them.
    """

    def forward(self, input: Tensor) -> Tensor:
        values = self.values(input.shape[0] if input.dim() > 1 else 1).to(input.dtype)
        shape = [len(values), *[1] * (input.dim() - 2), input.shape[-1]]
        return input * values[:, : input.shape[-1]].view(shape)

    def gate_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert isinstance(module, Recurrent)
        if writes_units(module):
            scale_state(module, self.values(1)[0, module.input_size :])
        return super().gate_input(module, args, kwargs)

    def let_go(self, module: nn.Module, _args: Any, _output: Any) -> None:
        """Forward hook of the layer."""
        assert isinstance(module, Recurrent)
        if writes_units(module):
            restore_state(module)


class NormGate(InputGate):
    """Keeps from a norm over channels those that are cut: it is to count them as zeros, as it will.

    The others pass as they are, and while training all do: their own gates stand at their readers.
    """

    def values(self, batch: int) -> Tensor:
        return (super().values(batch) != 0).float()

    def forward(self, input: Tensor) -> Tensor:
        return input if self.training else super().forward(input)


def _find_run(row: Tensor, sizes: Sequence[int]) -> tuple[int, int] | None:
    """The gate whose channels a row lists in order, and how often each; None where it is not so regular."""
    offset = 0
    for number, size in enumerate(sizes):
        repeats = max(1, len(row) // size)
        if torch.equal(row, torch.arange(offset, offset + size).repeat_interleave(repeats)):
            return number, repeats
        offset += size
    return None


def attach_gate_(layer: nn.Module, gate: InputGate) -> None:
    """Put the gate in front of the layer, in place."""
    layer.input_gate = gate
    layer.register_forward_pre_hook(gate.gate_input, with_kwargs=True)
    if isinstance(gate, RecurrentGate):
        layer.register_forward_hook(gate.let_go, always_call=True)


def detach_gate_(layer: nn.Module) -> InputGate:
    """Undo `attach_gate_`, in place, and return the gate that stood there."""
    gate = layer.input_gate
    assert isinstance(gate, InputGate)
    before, after = layer._forward_pre_hooks, layer._forward_hooks
    for hooks, marks in (
        (before, layer._forward_pre_hooks_with_kwargs),
        (after, layer._forward_hooks_always_called),
    ):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is gate]:
            del hooks[key]
            marks.pop(key, None)
    del layer.input_gate
    return gate

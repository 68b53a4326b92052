"""The objective: the negative evidence lower bound, per example."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from vbdcompress.errors import ConfigError, FitError
from vbdcompress.inputs import call, check_network
from vbdcompress.vbd.kl import PRIORS, kl_sum
from vbdcompress.vbd.posterior import find_posteriors, let_draw_


class ELBOTerms(NamedTuple):
    """Nats per example, each a scalar: `objective` = nll + beta * kl."""

    objective: Tensor
    nll: Tensor
    kl: Tensor


class ELBO(nn.Module):
    """Negative ELBO of a converted network as one module, so that DDP and compile see all of it.

        objective = NLL(batch) + beta * KL / num_data

    "Variational Bayesian Dropout", Eq. 18, divided by the number of training examples: NLL is the
    mean over the batch of -log p(y | x, w), w ~ q; KL the sum over every weight or gate. beta is
    warmed up from 0 while fitting; beta = 1 is the paper's bound, beta > 1 a tempered one. A
    network with no posterior has KL = 0: the objective is then the ordinary loss.

    Args:
        model: the network; its posteriors are found anew at each call.
        loss: (output, target) -> scalar, the mean negative log likelihood of the batch in nats. A module
            stays in its own mode: `train()` and `eval()` switch the network alone.
        num_data: number of training examples, over all processes.
        prior: "vbd" or "vd".
    Raises:
        ConfigError: there is no such prior, no training example, or the model is no network.
        FitError: at a call, where the loss is no single number, or in training has no gradient.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[[Any, Any], Tensor], num_data: int, prior: str = "vbd"
    ) -> None:
        super().__init__()
        if prior not in PRIORS:
            raise ConfigError("ELBO", f"prior = {prior!r}, allowed are {' and '.join(map(repr, PRIORS))}.")
        check_network("ELBO", model)
        if not num_data > 0:
            raise ConfigError("ELBO", f"num_data = {num_data}, allowed is the number of training examples.")
        self.model = model
        self.loss = loss
        self.num_data = num_data
        self.prior = prior

    def train(self, mode: bool = True) -> Self:
        """Switch the network, not a loss that is a network too."""
        self.training = mode
        self.model.train(mode)
        if mode:
            let_draw_(self.model)
        return self

    def kl(self) -> Tensor:
        """Sum of KL over all posteriors, each times its cost, over num_data: nats per example, a scalar."""
        parts = [p.cost * kl_sum(p.theta, p.log_sigma2, self.prior) for p in find_posteriors(self.model)]
        if not parts:
            return torch.zeros((), device=next(self.model.parameters()).device)
        return torch.stack(parts).sum() / self.num_data

    def forward(self, input: Any, target: Any, beta: Tensor) -> ELBOTerms:
        nll = self.loss(call(self.model, input), target)
        if not isinstance(nll, Tensor) or nll.numel() != 1:
            found = list(nll.shape) if isinstance(nll, Tensor) else f"a {type(nll).__name__}"
            raise FitError(
                "ELBO",
                f"the loss gives {found}, allowed is the mean over the batch, a tensor of one number.",
                "nll.mean(), or reduction='mean'; not nll.item()",
            )
        if self.training and torch.is_grad_enabled() and not nll.requires_grad:
            raise FitError(
                "ELBO",
                "no gradient comes through the loss: no weight would learn from the data.",
                "Compute it by torch from the output, without detach(), no_grad or numpy.",
            )
        kl = self.kl()
        return ELBOTerms(nll + beta * kl, nll, kl)


def beta_at(epoch: int, beta: float, warmup_epochs: int) -> float:
    """Weight of the KL in an epoch counted from 0: rises linearly from 0 to beta over the warm-up."""
    return beta * min(1.0, epoch / warmup_epochs) if warmup_epochs else beta

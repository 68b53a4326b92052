"""KL terms of one weight (or gate), pure functions of log_alpha = log(sigma^2 / theta^2)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Constants of the fit in Molchanov, Ashukha, Vetrov, "Variational Dropout Sparsifies Deep
# Neural Networks", ICML 2017, Eq. 14.
K1, K2, K3 = 0.63576, 1.87320, 1.48695
# |theta| below this counts as this: keeps log and its gradient finite at theta = 0, and its
# square is far below any sigma^2 that is learned (log_sigma2 of -10 is 4.5e-5).
THETA_MIN = 1e-8


def kl_vbd(log_alpha: Tensor) -> Tensor:
    """KL(q(w) || p(w | gamma*)) of each weight under the hierarchical prior.

    0.5 * log(1 + 1/alpha): "Variational Bayesian Dropout", Eq. 17. Falls from infinity
    (alpha -> 0) to 0 (alpha -> inf); at log_alpha = 3 it is 0.024.

    Args:
        log_alpha: any shape; log(sigma^2 / theta^2), dimensionless.
    Returns:
        same shape; nats for each weight, >= 0, not summed.
    """
    # softplus(-x) = log(1 + exp(-x)) without overflow as alpha -> 0
    return 0.5 * F.softplus(-log_alpha)


def kl_vd(log_alpha: Tensor) -> Tensor:
    """KL(q(w) || p(w)) of each weight under the improper log-uniform prior, up to a constant.

    0.5 * log(1 + 1/alpha) + k1 * (1 - sigmoid(k2 + k3 * log_alpha)): Molchanov et al. 2017,
    Eq. 14, shifted so that it falls to 0 as alpha -> inf. The rival that VBD is compared with.

    Args:
        log_alpha: any shape; log(sigma^2 / theta^2), dimensionless.
    Returns:
        same shape; nats for each weight, >= 0, not summed.
    """
    return kl_vbd(log_alpha) + K1 * torch.sigmoid(-(K2 + K3 * log_alpha))


PRIORS: dict[str, Callable[[Tensor], Tensor]] = {"vbd": kl_vbd, "vd": kl_vd}
"""KL term of each prior by the name that `--prior` takes."""


def kl_sum(theta: Tensor, log_sigma2: Tensor, prior: str = "vbd") -> Tensor:
    """Sum over a tensor of the KL of each weight, for training: its gradient is in closed form.

    The same as `PRIORS[prior](log_alpha_of(theta, log_sigma2)).sum()` in a third of the passes over
    memory, which are what a step spends beside its matrix products. With q = theta^2 + sigma^2,
    Eq. 17 is 0.5 * (log q - log_sigma2), d/dtheta = theta / q, d/dlog_sigma2 = -0.5 * theta^2 / q.

    Args:
        theta, log_sigma2: any shape, the same; computed at least in float32.
        prior: "vbd" or "vd".
    Returns:
        scalar, nats; differentiable once.
    """
    total: Tensor = _KLSum.apply(theta, log_sigma2, prior)
    return total


class _KLSum(torch.autograd.Function):
    """Keeps the two tensors only, and works in place: new memory costs more than computing anew."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, log_sigma2: Tensor, prior: str) -> Tensor:
        ctx.save_for_backward(theta, log_sigma2)
        ctx.prior = prior
        mean, log_variance = _precise(theta), _precise(log_sigma2)
        # not below 0 where exp overflows
        each = _second_moment(mean, log_variance).log_().sub_(log_variance).clamp_min_(0)
        total = 0.5 * each.sum()
        return total + K1 * _lost(mean, log_variance).sum() if prior == "vd" else total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        theta, log_sigma2 = ctx.saved_tensors
        mean, log_variance = _precise(theta), _precise(log_sigma2)
        slope_mean = _second_moment(mean, log_variance).reciprocal_().mul_(mean)
        slope_log = (mean * slope_mean).mul_(-0.5)
        if ctx.prior == "vd":
            lost = _lost(mean, log_variance)
            slope = lost * (1 - lost) * (-K1 * K3)
            slope_log += slope
            slope_mean -= 2 * slope * mean.sign() / mean.abs().clamp_min_(THETA_MIN)
        return (
            slope_mean.mul_(grad).to(theta.dtype),
            slope_log.mul_(grad).to(log_sigma2.dtype),
            None,
        )


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _second_moment(mean: Tensor, log_variance: Tensor) -> Tensor:
    """theta^2 + sigma^2, a new tensor; within the type's positive numbers, so that its log is finite."""
    limits = torch.finfo(mean.dtype)
    return log_variance.exp().addcmul_(mean, mean).clamp_(limits.tiny, limits.max)


def _lost(mean: Tensor, log_variance: Tensor) -> Tensor:
    """1 - sigmoid(k2 + k3 * log_alpha): what the log-uniform prior adds, over k1."""
    log_alpha = torch.sub(log_variance, mean.abs().clamp_min_(THETA_MIN).log_(), alpha=2)
    return log_alpha.mul_(-K3).sub_(K2).sigmoid_()

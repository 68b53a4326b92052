"""The factorised Gaussian posterior q(w) = N(theta, sigma^2) of a tensor of weights or gates."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import ParametrizationList

from vbdcompress.vbd.kl import THETA_MIN

# Variance below this counts as this: sqrt has an infinite slope at 0.
VARIANCE_MIN = 1e-16
KEEP_ALL = float("inf")


def log_alpha_of(theta: Tensor, log_sigma2: Tensor) -> Tensor:
    """log(sigma^2 / theta^2), at least in float32 whatever autocast says.

    Args:
        theta, log_sigma2: any shape, the same.
    Returns:
        same shape; finite for every finite input, theta = 0 included.
    """
    precise = torch.promote_types(theta.dtype, torch.float32)
    # 2 log|theta|, not log(theta^2): the square of a large theta overflows
    return log_sigma2.to(precise) - 2 * theta.to(precise).abs().clamp_min(THETA_MIN).log()


def draw(mean: Tensor, variance: Tensor) -> Tensor:
    """One draw from N(mean, variance) for each element, differentiable once in both.

    The square root's slope is 0, not infinite, where there is no variance; a variance below 0, which
    a Winograd convolution of squares can yield, counts as none.

    Args:
        mean, variance: the same shape; the variance may be of a more precise type.
    Returns:
        shape and dtype of mean.
    """
    drawn: Tensor = _Draw.apply(mean, variance)
    return drawn


class _Draw(torch.autograd.Function):
    """mean + sqrt(variance) * noise in one node: what autograd would keep of it is three tensors more."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, variance: Tensor) -> Tensor:
        noise = _noise_like(variance)
        std = variance.clamp_min(VARIANCE_MIN).sqrt_()
        ctx.save_for_backward((0.5 * noise).div_(std).masked_fill_(variance <= VARIANCE_MIN, 0))
        return torch.addcmul(mean, std.to(mean.dtype), noise.to(mean.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (slope,) = ctx.saved_tensors
        return grad, (grad * slope).to(slope.dtype)


def sample(theta: Tensor, log_sigma2: Tensor) -> Tensor:
    """One draw from N(theta, sigma^2), differentiable in both; shape and dtype of theta."""
    sigma = (0.5 * log_sigma2).exp().to(theta.dtype)
    return theta + sigma * torch.randn_like(theta)


class HasPosterior:
    """What a module with a posterior shows: its parameters and the threshold that eval mode masks by.

    `threshold` is a plain attribute: in eval mode whatever has log_alpha >= threshold counts as 0.
    `cost` weighs its KL: what one of its elements saves when it goes, relative to the others'.
    """

    kind = "weight"
    log_sigma2: nn.Parameter
    threshold: float
    training: bool
    cost: float = 1.0

    def posterior(self) -> tuple[Tensor, Tensor]:
        """theta and log_sigma2, the same shape."""
        raise TypeError(f"{type(self).__name__} does not say what its posterior is")

    def posterior_name(self, module_name: str) -> str:
        """What the posterior is called in reports, given the dotted name of this module."""
        return f"{module_name}.weight".lstrip(".")

    def masked_theta(self) -> Tensor:
        """theta where log_alpha < threshold, 0 elsewhere."""
        return self.mask(*self.posterior())

    def mask(self, theta: Tensor, log_sigma2: Tensor) -> Tensor:
        """theta where log_alpha < threshold, 0 elsewhere."""
        if self.threshold == KEEP_ALL:
            return theta
        keep = log_alpha_of(theta, log_sigma2) < self.threshold
        return torch.where(keep, theta, torch.zeros_like(theta))


def _noise_like(tensor: Tensor) -> Tensor:
    """Standard normal noise of the tensor's shape, dtype and order in memory.

    Drawn as a contiguous tensor, because on a CPU torch draws others one number at a time (12 times
    slower for channels-last), and in float32 at least: lower precisions are slower and coarser in the tails.
    """
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    precise = torch.promote_types(tensor.dtype, torch.float32)
    drawn = torch.randn([tensor.shape[dim] for dim in order], dtype=precise, device=tensor.device)
    return drawn.permute([order.index(dim) for dim in range(tensor.dim())]).to(tensor.dtype)


@dataclass(frozen=True)
class Posterior:
    """The posterior of one tensor in a network.

    Attributes:
        name: dotted name of the tensor in the plain network ("features.0.weight"), or of the gate.
        kind: "weight" or "gate".
        holder: the module that owns it.
        theta, log_sigma2: parameters, the same shape.
    """

    name: str
    kind: str
    holder: HasPosterior
    theta: Tensor
    log_sigma2: Tensor

    @property
    def cost(self) -> float:
        """Weight of its KL in the objective."""
        return self.holder.cost

    def log_alpha(self) -> Tensor:
        """log(sigma^2 / theta^2), the shape of theta."""
        return log_alpha_of(self.theta, self.log_sigma2)


def find_posteriors(model: nn.Module) -> tuple[Posterior, ...]:
    """Every posterior in the network, each once however often its module is used."""
    return tuple(_walk(model))


def let_draw_(model: nn.Module) -> None:
    """Training mode for every posterior, in place, also in what the user's own `train` keeps in eval mode.

    Without noise sigma costs no likelihood, and the KL alone would call everything noise.
    """
    for posterior in find_posteriors(model):
        posterior.holder.training = True


def _walk(model: nn.Module) -> Iterator[Posterior]:
    for name, module in model.named_modules():
        if isinstance(module, ParametrizationList):
            # "encoder.parametrizations.in_proj_weight" -> "encoder.in_proj_weight"
            plain = ".".join(part for part in name.split(".") if part != "parametrizations")
            for parametrization in module:
                if isinstance(parametrization, HasPosterior):
                    log_sigma2 = parametrization.log_sigma2
                    yield Posterior(plain, "weight", parametrization, module.original, log_sigma2)
        elif isinstance(module, HasPosterior) and not _is_parametrization(name):
            yield Posterior(module.posterior_name(name), module.kind, module, *module.posterior())


def _is_parametrization(name: str) -> bool:
    return "parametrizations" in name.split(".")


def set_threshold_(model: nn.Module, threshold: float, round_to: int = 1) -> None:
    """Let eval mode mask everything with log_alpha >= threshold; inf masks nothing.

    Args:
        round_to: of each set of gates as many more stay, those with the smallest log_alpha first, as make
            their number a multiple of this.
    """
    for posterior in find_posteriors(model):
        gates = posterior.kind == "gate" and round_to > 1
        posterior.holder.threshold = _rounded(posterior, threshold, round_to) if gates else threshold


def _rounded(posterior: Posterior, threshold: float, round_to: int) -> float:
    """The threshold at or above the given one that keeps a multiple of `round_to`, or all."""
    log_alpha = posterior.log_alpha().detach().sort().values
    kept = max(1, int((log_alpha < threshold).sum()))
    for wanted in range(-(-kept // round_to) * round_to, len(log_alpha), round_to):
        if log_alpha[wanted - 1] < log_alpha[wanted]:  # no threshold tells equal ones apart
            return float(log_alpha[wanted])
    return KEEP_ALL

"""Learning rates and the weight of the KL, by what a parameter is."""

from typing import Any

import torch
from torch import Tensor, nn

from vbdcompress.config import FitConfig
from vbdcompress.errors import FitError
from vbdcompress.vbd.posterior import find_posteriors

# Gates are few beside the examples: their KL at beta = 1 removes little, and 6 of it costs no accuracy
BETA = {"weight": 1.0, "gate": 6.0}


def default_beta(model: nn.Module) -> float:
    """Weight of the KL where none is asked for: 1, the ELBO, for weights; a tempered ELBO for gates."""
    kinds = {posterior.kind for posterior in find_posteriors(model)}
    return BETA["gate"] if kinds == {"gate"} else BETA["weight"]


def parameter_groups(model: nn.Module, config: FitConfig | None = None) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: gates and log variances need larger rates than weights.

    A plain weight of two or more dimensions decays; what has a posterior has its prior instead.

    Args:
        model: a converted network, or a plain one.
        config: `lr`, `lr_log_sigma2`, `lr_gates` and `weight_decay`; None takes the defaults.
    Raises:
        FitError: nothing in the network can be trained.
    Example:
        optimizer = torch.optim.AdamW(parameter_groups(converted.model))
    """
    config = config or FitConfig()
    roles: dict[str, list[Tensor]] = {"weights": [], "log_sigma2": [], "gates": [], "decayed": []}
    posterior_roles = _posterior_roles(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            plain = "decayed" if config.weight_decay and parameter.dim() >= 2 else "weights"
            roles[posterior_roles.get(id(parameter), plain)].append(parameter)
    if not any(roles.values()):
        raise FitError("fit", "the network has no parameter that can be trained.")
    rates = {"log_sigma2": config.lr_log_sigma2, "gates": config.lr_gates}
    return [
        {
            "params": tensors,
            "lr": rates.get(role, config.lr),
            "weight_decay": config.weight_decay if role == "decayed" else 0.0,
        }
        for role, tensors in roles.items()
        if tensors
    ]


def _posterior_roles(model: nn.Module) -> dict[int, str]:
    """Role of each tensor of a posterior, by its id."""
    roles = {}
    for posterior in find_posteriors(model):
        gate = posterior.kind == "gate"
        roles[id(posterior.theta)] = "gates" if gate else "weights"
        roles[id(posterior.log_sigma2)] = "gates" if gate else "log_sigma2"
    return roles


def make_optimizer(model: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """Adam or gradient descent with a rate for each role; fused where that is safe."""
    # a fused step unscales float16's gradients itself, too late to clip them
    clips_scaled = config.precision == "16-mixed" and config.clip_norm is not None
    can_fuse = all(
        tensor.device.type in ("cpu", "cuda") and tensor.is_floating_point() for tensor in model.parameters()
    )
    groups, fused = parameter_groups(model, config), can_fuse and not clips_scaled
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True, fused=fused)
    return torch.optim.AdamW(groups, fused=fused)

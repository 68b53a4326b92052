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

    Args:
        model: a converted network, or a plain one.
        config: `lr`, `lr_log_sigma2` and `lr_gates`; None takes the defaults.
    Raises:
        FitError: nothing in the network can be trained.
    Example:
        optimizer = torch.optim.Adam(parameter_groups(converted.model))
    """
    config = config or FitConfig()
    posteriors = find_posteriors(model)
    gates = {id(tensor) for p in posteriors if p.kind == "gate" for tensor in (p.theta, p.log_sigma2)}
    variances = {id(p.log_sigma2) for p in posteriors if p.kind == "weight"}
    roles: dict[str, list[Tensor]] = {"weights": [], "log_sigma2": [], "gates": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = id(parameter)
            role = "gates" if key in gates else "log_sigma2" if key in variances else "weights"
            roles[role].append(parameter)
    if not any(roles.values()):
        raise FitError("fit", "the network has no parameter that can be trained.")
    rates = {"weights": config.lr, "log_sigma2": config.lr_log_sigma2, "gates": config.lr_gates}
    return [{"params": tensors, "lr": rates[role]} for role, tensors in roles.items() if tensors]


def make_optimizer(model: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """Adam with a rate for each role; fused where that is safe."""
    # a fused step unscales float16's gradients itself, too late to clip them
    clips_scaled = config.precision == "16-mixed" and config.clip_norm is not None
    on_known = all(tensor.device.type in ("cpu", "cuda") for tensor in model.parameters())
    return torch.optim.Adam(parameter_groups(model, config), fused=on_known and not clips_scaled)

"""KL terms of one weight (or gate), pure functions of log_alpha = log(sigma^2 / theta^2)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Constants of the fit in Molchanov, Ashukha, Vetrov, "Variational Dropout Sparsifies Deep
# Neural Networks", ICML 2017, Eq. 14.
K1, K2, K3 = 0.63576, 1.87320, 1.48695


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

"""Thresholds of log_alpha between two that are known, one of which a limit lies at."""

import torch

from vbdcompress.compare import as_double
from vbdcompress.conversion import Converted
from vbdcompress.vbd.posterior import find_posteriors, log_alpha_of

# Networks that are tried next to a limit, each time that more is known of what files weigh
REFINEMENTS = 10


class Thresholds:
    """The log_alphas between two thresholds, halved by their number: each takes one more weight or gate.

    Args:
        low, high: thresholds that are known already.
    """

    def __init__(self, converted: Converted, low: float, high: float) -> None:
        each = [
            log_alpha_of(as_double(posterior.theta), as_double(posterior.log_sigma2)).flatten()
            for posterior in find_posteriors(converted.model)
        ]
        values = torch.cat(each)
        self.values = values[(values > low) & (values < high)].sort().values
        self.steps = 0

    def smallest(self) -> float | None:
        """Where all that has a posterior goes; None where that was tried."""
        return float(self.values[0]) if len(self.values) else None

    def middle(self) -> float | None:
        """The next to try; None where there is none, or enough were tried."""
        if not len(self.values) or self.steps == REFINEMENTS:
            return None
        self.steps += 1
        return float(self.values[len(self.values) // 2])

    def raise_to(self, threshold: float) -> None:
        """Only larger ones from now on."""
        self.values = self.values[self.values > threshold]

    def lower_to(self, threshold: float) -> None:
        """Only smaller ones from now on."""
        self.values = self.values[self.values < threshold]

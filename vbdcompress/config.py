"""One frozen, validated configuration for a run, from keywords, the command line, or TOML."""

import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vbdcompress.errors import ConfigError

Mode = Literal["weights", "channels", "both"]
Prior = Literal["vbd", "vd"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "64-true"]


class FitConfig(BaseModel):
    """How the posterior is fitted. The same fields train a plain network (`vbdcompress train`).

    Attributes:
        prior: "vbd" (the paper's hierarchical prior) or "vd" (log-uniform).
        epochs: passes over the training set.
        lr: Adam's rate for theta and every ordinary parameter; falls by `schedule`.
        lr_log_sigma2: for the log variances of weights.
        lr_gates: for theta and log variance of channel gates.
        schedule: of all three rates, over the epochs.
        beta: weight of the KL after the warm-up; 1 is the ELBO, more is a tempered ELBO.
        warmup_epochs: beta rises linearly from 0 over these; at most half of `epochs` is used.
        clip_norm: largest norm of the gradient; None clips nothing.
        seed: of shuffling, noise and the split.
        device: "auto", "cpu", "cuda", "mps".
        devices: processes on this machine, one device each; None takes what torchrun started, or 1.
        precision: of the forward pass.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prior: Prior = "vbd"
    epochs: int = Field(100, ge=0)
    lr: float = Field(1e-3, gt=0)
    lr_log_sigma2: float = Field(3e-3, gt=0)
    lr_gates: float = Field(3e-2, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    beta: float = Field(1.0, ge=0)
    warmup_epochs: int = Field(5, ge=0)
    clip_norm: float | None = Field(None, gt=0)
    seed: int = Field(0, ge=0)
    device: str = "auto"
    devices: int | None = Field(None, ge=1)
    precision: Precision = "32-true"


def parse_limit(text: str | int, total: int) -> int:
    """A limit as an absolute number or as a share of the original: "10%" of total."""
    share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", str(text))
    return int(float(share[1]) / 100 * total) if share else int(text)


class RunConfig(FitConfig):
    """Everything that `vbdcompress run` and `compress` can be told.

    Attributes:
        mode: "weights", "channels", or "both": channels, then weights of what is left.
        threshold: remove where log_alpha >= threshold; None takes the mode's default, unless a
            budget chooses the point on the curve.
        max_error_increase: points of validation error above the original's.
        max_params, max_macs, max_bytes: absolute, or a share of the original such as "10%".
            Parameters count where they are not zero; bytes are the ONNX file's.
        log_sigma2: initial log variance; None takes the mode's default.
        batch_size: of named data sets, over all processes.
        finetune_epochs: of ordinary training of the slim network; zeros stay zero.
        lr_finetune: Adam's rate there, falling linearly to 0.
        skip: names of layers to leave whole; "features.3" covers all below it.
        prune_inputs: also remove input features and single flattened features of Linear layers.
        augment: "auto" is crop and flip for CIFAR and SVHN's crop, none for the rest.
        validation_fraction: of the training data, held out by `seed` unless the file says.
    """

    mode: Mode = "weights"
    threshold: float | None = None
    max_error_increase: float | None = Field(None, ge=0)
    max_params: int | str | None = None
    max_macs: int | str | None = None
    max_bytes: int | str | None = None
    log_sigma2: float | None = None
    batch_size: int = Field(100, ge=1)
    finetune_epochs: int = Field(10, ge=0)
    lr_finetune: float = Field(5e-4, gt=0)
    skip: tuple[str, ...] = ()
    prune_inputs: bool = False
    augment: Literal["auto", "none", "crop", "crop-flip"] = "auto"
    validation_fraction: float = Field(0.1, gt=0, lt=1)

    @property
    def limits(self) -> dict[str, int | str]:
        """The size budgets that were given, by the field of `Size` that they bound."""
        given = {"nonzeros": self.max_params, "macs": self.max_macs, "bytes": self.max_bytes}
        return {key: value for key, value in given.items() if value is not None}

    @property
    def has_budget(self) -> bool:
        """Whether a budget, not a threshold, chooses how much is removed."""
        return bool(self.limits) or self.max_error_increase is not None

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.threshold is not None and self.has_budget:
            raise ValueError("a threshold and a budget both say how much to remove; give one of them")
        for value in self.limits.values():
            if not re.fullmatch(r"\d+(\.\d+)?\s*%|\d+", str(value)):
                raise ValueError(f"limit {value!r} is neither a whole number nor a share such as '10%'")
        return self


def make_config(values: Mapping[str, Any], where: str = "configuration") -> RunConfig:
    """A validated RunConfig. Raises ConfigError naming the option, its value and what is allowed."""
    try:
        return RunConfig(**values)
    except ValidationError as error:
        raise ConfigError(where, "; ".join(_sentence(item) for item in error.errors())) from error


def _sentence(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = get_close_matches(name, RunConfig.model_fields, n=1)
        return f"option '{name}' is unknown" + (f"; did you mean '{near[0]}'?" if near else "")
    message = item["msg"].removeprefix("Value error, ")
    return f"option '{name}' = {item['input']!r}: {message}" if name else message


def read_toml(path: Path) -> dict[str, Any]:
    """The options in a TOML file. Raises ConfigError where it is missing or malformed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file '{path}'", str(error)) from error

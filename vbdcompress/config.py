"""One frozen, validated configuration for a run, from keywords, the command line, or TOML."""

import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vbdcompress.errors import ConfigError

Mode = Literal["weights", "channels", "both"]
Prior = Literal["vbd", "vd"]
Bits = Literal["32", "16", "8", "4", "auto"]
TrackerName = Literal["tensorboard", "wandb", "mlflow"]
Cost = Literal["none", "params", "macs", "params+macs"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "64-true"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]

# Fields that say how a machine computes, not what: a run may go on with others
MACHINE = frozenset({"device", "devices", "precision", "compile", "cuda_graphs"})


class FitConfig(BaseModel):
    """How the posterior is fitted. The same fields train a plain network (`vbdcompress train`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prior: Prior = Field("vbd", description="Prior: the paper's hierarchical one, or log-uniform (vd).")
    epochs: int = Field(100, ge=0, description="Passes over the training set.")
    optimizer: Literal["adam", "sgd"] = Field("adam", description="sgd has Nesterov's momentum of 0.9.")
    lr: float = Field(2e-3, gt=0, description="Learning rate of weights (theta).")
    lr_log_sigma2: float = Field(3e-3, gt=0, description="Rate for log variances of weights.")
    lr_gates: float = Field(3e-2, gt=0, description="Rate for channel gates.")
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="Of weights that have no prior: not of biases, norms and what has a posterior; "
        "decoupled from the gradient's scale in Adam.",
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="How all rates fall over the epochs."
    )
    beta: float | None = Field(
        None,
        ge=0,
        description="Weight of the KL: 1 is the ELBO, more a tempered ELBO that removes more; "
        "without it 1 for weights, 6 for channel gates.",
    )
    warmup_epochs: int = Field(
        10, ge=0, description="Epochs over which beta rises from 0; at most half of all."
    )
    distill: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the loss that follows the original's outputs, not the labels; "
        "without it 1, and 0 where the loss is your own.",
    )
    temperature: float = Field(2.0, gt=0, description="That softens both outputs there.")
    dropout: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the rates of the network's own dropout and stochastic depth that stays while "
        "it is fitted and fine-tuned; without it 0 where it follows the original, else 1.",
    )
    clip_norm: float | None = Field(None, gt=0, description="Largest norm of the gradient.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of shuffling and noise.")
    device: DeviceName = Field("auto", description="Where to fit; auto: a GPU where there is one.")
    devices: int | None = Field(
        None,
        ge=1,
        description="Processes on this machine, one device each; torchrun's own where it started them.",
    )
    precision: Precision = Field("32-true", description="Of the forward pass while training.")
    compile: bool = Field(
        False,
        description="Let torch.compile fuse the training step: compiling takes a minute or so, steps less.",
    )
    cuda_graphs: bool = Field(
        False,
        description="With compile, on an NVIDIA GPU: replay the step as CUDA graphs (mode reduce-overhead), "
        "for networks so small that launching kernels takes longer than running them; takes more memory.",
    )

    @property
    def distill_share(self) -> float:
        """`distill`, 1 where it was not given."""
        return 1.0 if self.distill is None else self.distill

    @model_validator(mode="after")
    def _graphs_are_of_compiled_code(self) -> Self:
        if self.cuda_graphs and not self.compile:
            raise ValueError("cuda_graphs replays what compile made: give both")
        return self


# A first round takes what is surely gone: the literature's threshold, not the lower one of the last cut
SURELY_GONE = 3.0


class FirstRound(BaseModel):
    """A round before the last: its mode, and options of its own, None where they are the run's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mode: Literal["weights", "channels"] | None = None
    epochs: int | None = Field(None, ge=0)
    lr: float | None = Field(None, gt=0)
    lr_gates: float | None = Field(None, gt=0)
    beta: float | None = Field(None, ge=0)
    warmup_epochs: int | None = Field(None, ge=0)
    threshold: float | None = None
    log_sigma2: float | None = None
    cost: Cost | None = None


class RunConfig(FitConfig):
    """Everything that `vbdcompress run` and `compress` can be told."""

    mode: Mode = Field(
        "channels", description="What is removed: single weights, channels, or channels then weights."
    )
    first: FirstRound = Field(
        FirstRound(),
        description="A round of its own before the last: after it the network is cut, and the epochs "
        "that follow are cheap. In mode both it is the round of channels.",
    )
    threshold: float | None = Field(
        None,
        description="Remove where log_alpha >= this; without it 0, or a budget chooses.",
    )
    max_error_increase: float | None = Field(
        None, ge=0, description="Budget: points of validation error above the original's."
    )
    max_params: int | str | None = Field(
        None, description="Budget: parameters that are not zero, a number or a share such as 10%."
    )
    max_macs: int | str | None = Field(None, description="Budget: multiply-accumulates, a number or a share.")
    max_bytes: int | str | None = Field(
        None, description="Budget: bytes of the ONNX file, a number or a share."
    )
    log_sigma2: float | None = Field(
        None, description="Initial log variance; without it -10 for weights, -4 for channels."
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description="Examples in a step, over all processes; without it a 25th of the set, at most 200.",
    )
    finetune_epochs: int = Field(
        10, ge=0, description="Last epochs of ordinary training of the slim network; zeros stay zero."
    )
    lr_finetune: float = Field(5e-4, gt=0, description="Rate there, falling linearly to 0.")
    skip: tuple[str, ...] = Field((), description="Layer to leave whole, with all below it; may be repeated.")
    cost: Cost = Field(
        "none", description="Weigh the KL of each channel by what its removal saves: a tempered ELBO."
    )
    round_to: int = Field(
        1,
        ge=1,
        description="Keep a multiple of this many channels of each group: some runtimes and devices are "
        "slow at odd numbers.",
    )
    bits: Bits = Field(
        "32",
        description="Of each weight in the files: auto takes as few as the posterior allows, layer by layer "
        "(weights mode).",
    )
    pack: bool | None = Field(
        None,
        description="Store weights in model.onnx as gaps and codes that standard operators turn into weights "
        "when a session is made; without it in weights mode, and where bits are not 32.",
    )
    embed_preprocessing: bool = Field(
        False, description="Let model.onnx normalise by itself: it takes pixels, uint8 from 0 to 255."
    )
    int8: bool = Field(
        False,
        description="Also write model_int8.onnx, which computes in 8-bit integers (onnxruntime's static "
        "quantisation), with its error and latency in the report.",
    )
    prune_inputs: bool = Field(
        False, description="Also remove input features and single flattened features of Linear layers."
    )
    augment: Literal["auto", "none", "crop", "crop-flip"] = Field(
        "auto", description="Of training images; auto is crop-flip for cifar10 and cifar100, none else."
    )
    augment_pixels: int = Field(4, ge=0, le=4, description="Largest shift of a training image by crop.")
    validation_fraction: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Of the training data, held out; `run` takes the split that its file names instead.",
    )

    def examples_a_step(self, num_data: int) -> int:
        """The batch size; a small set gets small ones: the fit needs steps more than exact gradients.

        At least 2: batch norm can't train on one.
        """
        return self.batch_size or min(200, max(2, num_data // 25), num_data)

    @property
    def rounds(self) -> "tuple[RunConfig, ...]":
        """The options of each round, in order; in each, `mode` is "weights" or "channels"."""
        last = self.model_copy(update={"mode": "weights"}) if self.mode == "both" else self
        mode = self.first.mode or ("channels" if self.mode == "both" else None)
        if mode is None:
            return (last,)
        own = self.first.model_dump(exclude_none=True) | {"mode": mode}
        if mode == "weights" and self.first.threshold is None:
            own["threshold"] = SURELY_GONE
        return self.model_copy(update=own), last

    @property
    def packs(self) -> bool:
        """`pack`, or where nothing was said whether it makes the file smaller."""
        return (self.mode != "channels" or self.bits != "32") if self.pack is None else self.pack

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
    def _has_a_first_round(self) -> Self:
        if self.mode == "both" and self.first.mode == "weights":
            raise ValueError("mode both is channels, then weights: its first round can't be of weights")
        if self.mode != "both" and self.first.mode is None and self.first != FirstRound():
            raise ValueError("a first round needs a mode: weights or channels")
        if self.first.mode == "weights" and self.first.cost not in (None, "none"):
            raise ValueError("first.cost acts on channel gates, a first round of weights has none")
        return self

    @model_validator(mode="after")
    def _options_act(self) -> Self:
        if self.threshold is not None and self.has_budget:
            raise ValueError("a threshold and a budget both say how much to remove; give one of them")
        if self.mode == "weights" and self.first.mode != "channels":
            for name, acts in (("round_to", self.round_to != 1), ("cost", self.cost != "none")):
                if acts:
                    raise ValueError(f"{name} acts on channel gates, mode weights has none")
        if self.bits == "auto" and self.mode == "channels":
            raise ValueError(
                "bits auto asks a posterior on each weight: mode weights or both, or bits 16, 8 or 4"
            )
        return self

    @field_validator("bits", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("max_params", "max_macs", "max_bytes", mode="before")
    @classmethod
    def _is_limit(cls, value: Any) -> Any:
        whole = isinstance(value, int | str) and not isinstance(value, bool)
        if value is None or (whole and re.fullmatch(r"(\d{1,2}(\.\d+)?|100)\s*%|\d+", str(value))):
            return value
        raise ValueError("is neither a whole number nor a share, at most 100%, such as '10%'")


def make_config(values: Mapping[str, Any], where: str = "configuration") -> RunConfig:
    """A validated RunConfig. Raises ConfigError naming the option, its value and what is allowed."""
    try:
        return RunConfig(**values)
    except ValidationError as error:
        raise ConfigError(where, "; ".join(_sentence(item) for item in error.errors())) from error


def _sentence(item: Any) -> str:
    within = 2 if item["loc"][:1] == ("first",) else 1  # deeper parts name an item, or a type of a union
    name = ".".join(str(part) for part in item["loc"][:within])
    if item["type"] == "extra_forbidden":
        known = FirstRound.model_fields if within == 2 else RunConfig.model_fields
        near = get_close_matches(name.removeprefix("first."), known, n=1)
        return f"option '{name}' is unknown" + (f"; did you mean '{near[0]}'?" if near else "")
    in_toml = {"tuple_type": "must be a list, as ['fc1']", "model_type": "must be a table"}
    message = in_toml.get(item["type"]) or item["msg"].removeprefix("Value error, ")
    return f"option '{name}' = {item['input']!r}: {message}" if name else message


def read_toml(path: Path) -> dict[str, Any]:
    """The options in a TOML file. Raises ConfigError where it is missing or malformed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file '{path}'", str(error)) from error

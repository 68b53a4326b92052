"""What a run does stage by stage, between the data that it is given and the report."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vbdcompress.budget import make_budget, round_budget
from vbdcompress.choices import Choice, describe_judgement
from vbdcompress.choosing import Candidates, FileSize, check_limits, choose
from vbdcompress.config import RunConfig
from vbdcompress.conversion import Converted, convert
from vbdcompress.data.loaders import drawn_from, seed_generators
from vbdcompress.devices import of_main, start_fabric
from vbdcompress.errors import DataError, SlimError
from vbdcompress.evaluation import Judge, measure_error
from vbdcompress.exporting.preprocessing import as_served
from vbdcompress.fitting import FitResult, fit
from vbdcompress.inputs import Inputs, first
from vbdcompress.norms import CURVE_EXAMPLES, STATISTICS_EXAMPLES, reestimate_batch_norm_
from vbdcompress.optimization import default_beta
from vbdcompress.precision import Rounding, round_model_
from vbdcompress.records import TIE, CurvePoint, EpochRow, Size
from vbdcompress.reporting.build import ErrorRecord, StageRecord, log_alpha_histogram
from vbdcompress.slimming import Slim, measure_curve, or_default, posterior_sigma, slim
from vbdcompress.sources import Sources, first_batch
from vbdcompress.surgery.slice import RemovalPlan
from vbdcompress.workplace import WRITING, Workplace, cut_options


@dataclass(frozen=True)
class Origin:
    """Where the network came from, for the files: architecture and arguments where it has a name.

    Attributes:
        plans: what had been removed from what the architecture builds.
    """

    name: str
    source: str | None = None
    architecture: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    plans: tuple[RemovalPlan, ...] = ()


@dataclass(frozen=True)
class StageResult:
    """What a stage made.

    Attributes:
        model: slim.
        plan: what of each layer stayed.
        sigma: parameter -> standard deviation of each weight that has a posterior.
        record: for the report.
    """

    model: nn.Module
    plan: RemovalPlan
    sigma: dict[str, Tensor]
    record: StageRecord


class StageRunner:
    """Runs the stages of one run; holds what is the same for all of them.

    Args:
        sources: the data.
        teacher: the network that came in, which the others are distilled from.
        config: the options.
        judge: loss and metric.
        workplace: where checkpoints are kept.
        original: size of the network that came in.
        files: bytes of what is written.
        device: to train and measure on.
    """

    def __init__(
        self,
        sources: Sources,
        teacher: nn.Module,
        config: RunConfig,
        judge: Judge,
        workplace: Workplace,
        original: Size,
        files: FileSize,
        device: torch.device,
    ) -> None:
        self.sources, self.config, self.judge = sources.on(device), config, judge
        self.teacher = teacher if judge.follows(config) else None
        self.workplace, self.original, self.files, self.device = workplace, original, files, device
        with drawn_from(config.seed):  # a loader that shuffles draws its first batch
            seed_generators(self.sources.validation, config.seed)
            _, target = first_batch(self.sources.validation, "validation")
        self.judged = describe_judgement(judge.metric, target)
        self.told, self.earlier = list[str](), 0.0  # warnings; seconds of epochs that a checkpoint held

    def error(self, model: nn.Module, batches: Iterable[Any], *, bounded: bool = False) -> float:
        """Error in percent, measured on the run's device."""
        return measure_error(model.to(self.device), batches, self.judge.metric, bounded=bounded)

    def baseline(self, original: nn.Module) -> float:
        """Error of the network that came in on the validation set in percent. Raises: see `measure_error`."""
        return self.error(original, self.sources.validation, bounded=True)

    def validate(self, model: nn.Module) -> float:
        """Error on the validation set in percent."""
        return self.error(model, self.sources.validation)

    def prepare(self, model: nn.Module, examples: int = CURVE_EXAMPLES) -> None:
        """Take batch norm's statistics anew on training data, without noise, in place."""
        reestimate_batch_norm_(model.to(self.device), self.sources.train, examples, self.config.seed)

    def rounds(self, model: nn.Module, samples: Inputs, baseline: float) -> list[StageResult]:
        """All rounds, one after the other; the last one's network is the run's."""
        done: list[StageResult] = []
        for number in range(len(self.config.rounds)):
            done.append(self._stage(done[-1].model if done else model, samples, number, baseline))
        return done

    def _stage(self, model: nn.Module, samples: Inputs, number: int, baseline: float) -> StageResult:
        """Convert, fit, choose and slim once."""
        config = self.config.rounds[number]
        mode = config.mode
        assert mode != "both"  # a round is of one kind
        converted = convert(
            model,
            first(samples, 2),
            mode,
            skip=config.skip,
            prune_inputs=config.prune_inputs,
            log_sigma2=config.log_sigma2,
            cost=config.cost if mode == "channels" else "none",
        )
        check_limits(converted, self.files, round_budget(self.config, number, self.original), config.round_to)
        step, told = f"{number + 1}-{mode}", or_default(config.threshold)
        gone = mode == "channels" and self.config.rounds[0].mode == "weights"  # what the first round took
        fitted = self._fit(converted.model, config, step, threshold=told, keep_zeros=gone)
        choice, slimmed = self._choose(converted, fitted, number, step, baseline)
        self.prepare(slimmed.model, STATISTICS_EXAMPLES)
        record = self._record(converted, slimmed, number, fitted.epochs, choice)
        return StageResult(slimmed.model, slimmed.plan, posterior_sigma(converted, slimmed), record)

    def _choose(
        self, converted: Converted, fitted: FitResult, number: int, step: str, baseline: float
    ) -> tuple[Choice, Slim]:
        """Cut where the options ask, or where a run was cut before; each process where the main one does."""
        config, file = self.config.rounds[number], self.workplace.choice(step)
        of, storage = self._choice_of(fitted), self.config.model_dump(mode="json", include=WRITING)
        fabric = start_fabric(config)
        choice = of_main(fabric, file.restore(of) if file is not None and fitted.is_main else None)
        if choice is None:
            choice = of_main(fabric, self._decide(converted, fitted, number, baseline))
            assert choice is not None
            if file is not None and fitted.is_main:
                file.keep(of, choice)
        elif choice.storage != storage:
            choice = replace(choice, curve=self._measure_again(converted, choice.curve), storage=storage)
        return choice, slim(converted, choice.selection.threshold, round_to=config.round_to)

    def _decide(self, converted: Converted, fitted: FitResult, number: int, baseline: float) -> Choice | None:
        """What this process would cut; None where it finds nothing, and is not the one that decides."""
        config = self.config.rounds[number]
        curve = measure_curve(
            converted,
            self.validate,
            prepare=self.prepare,
            size_of=self.files.measure,
            asked=or_default(config.threshold),
            round_to=config.round_to,
            tell=self.workplace.on_cut if fitted.is_main else None,
        )
        candidates = Candidates(converted, curve, config.round_to, self.prepare, self.validate, self.files)
        try:
            chosen = choose(candidates, round_budget(self.config, number, self.original), baseline)
        except SlimError:
            if fitted.is_main:
                raise
            return None
        return Choice(*chosen, self.config.model_dump(mode="json", include=WRITING))

    def _measure_again(self, converted: Converted, curve: tuple[CurvePoint, ...]) -> tuple[CurvePoint, ...]:
        """The same errors, with sizes in files that are written otherwise."""
        cut = (slim(converted, point.threshold, round_to=self.config.round_to).model for point in curve)
        return tuple(
            replace(point, size=self.files.measure(model)) for point, model in zip(curve, cut, strict=True)
        )

    def _choice_of(self, fitted: FitResult) -> dict[str, Any]:
        """What makes a choice this one: the fit, the options, and by what networks are judged."""
        return {
            "fit": asdict(fitted.epochs[-1]) if fitted.epochs else None,
            "options": self.config.model_dump(mode="json", include=cut_options(self.config.max_bytes)),
            "judged": self.judged,
        }

    def _record(
        self,
        converted: Converted,
        slimmed: Slim,
        number: int,
        epochs: tuple[EpochRow, ...],
        choice: Choice,
    ) -> StageRecord:
        config = self.config.rounds[number]
        assert config.mode != "both"  # a round is of one kind
        return StageRecord(
            config.mode,
            config.prior,
            default_beta(converted.model) if config.beta is None else config.beta,
            converted.table,
            slimmed.groups,
            epochs,
            choice.curve,
            choice.selection,
            log_alpha_histogram(converted.model),
            config.cost if config.mode == "channels" else "none",
            self._distillation(),
            or_default(config.threshold),
        )

    def _fit(self, model: nn.Module, config: RunConfig, step: str, **options: Any) -> FitResult:
        """Fit a network, in place, on the run's data and teacher; `step` names its checkpoint."""
        fitted = fit(
            model,
            self.sources.train,
            config,
            validation=self.sources.validation,
            loss=self.judge.loss,
            metric=self.judge.metric,
            teacher=self.teacher,
            num_data=self.sources.record.train,
            checkpoint=self.workplace.checkpoint(step),
            listener=self.workplace.listener,
            **options,
        )
        self.earlier += sum(row.seconds for row in fitted.epochs[: fitted.restored])
        return fitted

    def _distillation(self) -> dict[str, float] | None:
        if self.teacher is None:
            return None
        return {"share": self.config.distill_share, "temperature": self.config.temperature}

    def finetune(self, model: nn.Module) -> tuple[EpochRow, ...]:
        """Ordinary training of the slim network, in place; zeros stay 0, and what is frozen as it is."""
        if not self.config.finetune_epochs or not any(each.requires_grad for each in model.parameters()):
            return ()
        epochs, lr = self.config.finetune_epochs, self.config.lr_finetune
        config = self.config.model_copy(update={"epochs": epochs, "lr": lr, "schedule": "linear"})
        return self._fit(model, config, "finetune", keep_zeros=True).epochs

    def round(self, model: nn.Module, sigma: dict[str, Tensor], baseline: float) -> Rounding | None:
        """Round the slim network's weights, in place, as the options ask; None where they do not."""
        config, points = self.config, self.config.max_error_increase
        if config.bits == "32":
            return None
        allowed = None if points is None else baseline + points
        bound = self._most("bytes")
        fits = None if bound is None else lambda codes: self.files.write(model, codes) <= bound
        return round_model_(model, config.bits, sigma, self.validate, allowed, fits)

    def excess(self, model: nn.Module, rounding: Rounding | None, errors: ErrorRecord) -> list[str]:
        """Warnings where the file is larger than asked for after all, or the network worse."""
        found, bound, points = [], self._most("bytes"), self.config.max_error_increase
        written = 0 if bound is None else self.files.write(model, {} if rounding is None else rounding.codes)
        if bound is not None and written > bound:
            told = f"model.onnx has {written:,} bytes, {bound:,} were allowed"
            found.append(f"{told}: fine-tuning moved weights between codes. Allow a little less.")
        most, left = self._most("nonzeros"), sum(int(each.count_nonzero()) for each in model.parameters())
        if most is not None and left > most:
            told = f"{left:,} parameters are not zero, {most:,} were allowed"
            found.append(f"{told}: biases that were 0 were fine-tuned. Allow a little less.")
        if points is not None and errors.validation_after > errors.validation_before + points + TIE:
            told = f"The validation error is {errors.validation_after:.2f} %, {points:g} points above "
            told += f"{errors.validation_before:.2f} % were allowed: the cut network kept to that, "
            what = "fine-tuning" if rounding is None else "fine-tuning or rounding"
            found.append(f"{told}{what} did not. Fine-tune longer or slower, or keep more bits.")
        return found

    def _most(self, field: str) -> int | None:
        return make_budget(self.config, self.original).limits.get(field)

    def final_errors(self, original: nn.Module, slimmed: nn.Module, baseline: float) -> ErrorRecord:
        """Validation and, for the first and only time, test error of both networks."""
        spec, validation, test = self.sources.input, self.sources.validation, self.sources.test
        after = self.error(slimmed, as_served(validation, spec))
        if test is None:
            return ErrorRecord(baseline, after)
        try:
            before = self.error(original, test, bounded=True)
        except DataError as error:
            self.told.append(f"The test set, {error}")
            before = self.error(original, test)
        return ErrorRecord(baseline, after, before, self.error(slimmed, as_served(test, spec)))

"""Where a run keeps its checkpoints, and how it knows that they are its own."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vbdcompress.checkpoints import START_ANEW, FitCheckpoint
from vbdcompress.choices import ChoiceFile
from vbdcompress.compare import as_real, flatten_output
from vbdcompress.config import MACHINE, RunConfig
from vbdcompress.errors import TRACE_ERRORS, FitError
from vbdcompress.evaluation import name_of
from vbdcompress.files import write_text
from vbdcompress.inputs import Inputs, call, example_shape, first, in_eval_mode, map_tensors
from vbdcompress.training import CutListener, Listener

IDENTITY_FILE = "run.json"
TRAINING = "training"
FIRST_STEPS = ["1-channels", "1-weights", TRAINING]
SECOND_STEPS = ["2-channels", "2-weights"]
FINETUNE = "finetune"
# Options that a run may go on with changed: they act once the first posterior is fitted,
CUT = {"threshold", "round_to", "max_error_increase", "max_params", "max_macs", "max_bytes"}
# once the last one is,
FINETUNING = {"finetune_epochs", "lr_finetune"}
# or once all training is done
WRITING = {"bits", "pack", "embed_preprocessing", "int8"}
# The network's on made-up inputs: so many of each, the same to so much of the largest
OUTPUTS, SHOWN, OUTPUTS_TOLERANCE = "outputs", 16, 1e-3


def identify_run(
    model: nn.Module,
    data: Sequence[Any],
    config: RunConfig,
    samples: Inputs,
    loss: Callable[..., Any] | None = None,
    metric: Callable[..., Any] | None = None,
    digests: Sequence[str] = (),
) -> dict[str, Any]:
    """What makes a run this run: its network, its data and its options but for the machine's.

    Args:
        data: name, number of training and of validation examples, mean and deviation of the inputs.
        samples: some inputs, for the shape of one.
        loss, metric: by their names; None where they are cross entropy and the top-1 error.
        digests: of the data that are in memory.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    options = config.model_dump(mode="json", exclude=set(MACHINE))
    return {
        "network": digest.hexdigest()[:16],
        "data": [*data, list(example_shape(samples))],
        "loss": None if loss is None else name_of(loss),
        "metric": None if metric is None else name_of(metric),
        "digests": list(digests),
        OUTPUTS: _outputs_of(model, samples),
        **options,
    }


def _outputs_of(model: nn.Module, samples: Inputs) -> list[float | None] | None:
    """Some numbers that the network gives for made-up inputs: its code is no part of its state.

    None where it takes no such inputs; in the list where they are not finite.
    """

    def made_up(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.ones_like(tensor) if tensor.dtype is torch.bool else torch.zeros_like(tensor)
        return torch.linspace(-1, 1, tensor.numel()).view(tensor.shape).to(tensor)

    try:
        with torch.no_grad(), in_eval_mode(model):
            outputs = flatten_output(call(model, map_tensors(first(samples, 2), made_up)))
    except TRACE_ERRORS:
        return None
    numbers = [number for output in outputs for number in as_real(output).flatten()[:SHOWN].tolist()]
    return [float(number) if math.isfinite(number) else None for number in numbers]


def _change(key: str, before: Any, now: Any) -> str:
    if key == OUTPUTS:
        return "the network, of the same weights, gives other outputs"
    return f"{key} was {before}, is {now}"


def _same(key: str, one: Any, other: Any) -> bool:
    """Whether an entry of two identities is the same; outputs to the rounding of other machines."""
    if key != OUTPUTS or not one or not other:
        return bool(one == other)
    scale = max((abs(number) for number in one if number is not None), default=0.0)
    return len(one) == len(other) and all(
        a == b if a is None or b is None else abs(a - b) <= OUTPUTS_TOLERANCE * scale
        for a, b in zip(one, other, strict=True)
    )


@dataclass(frozen=True)
class Workplace:
    """Where a run keeps its checkpoints, whether it goes on from them, and who is told of it."""

    folder: Path | None = None
    resume: bool = False
    listener: Listener | None = None

    def claim(self, identity: dict[str, Any]) -> None:
        """Note what run the checkpoints are of; with resume, refuse those of another.

        Another threshold, budget or fine-tuning keeps the fits before it and drops what came after.

        Raises:
            FitError: network, data or another option differ from the run that is to go on, or the folder
                holds files of such names that no run left there.
        """
        if self.folder is None:
            return
        path = self.folder / IDENTITY_FILE
        before = self._identity_of_last(path)
        if self.resume and before is not None:
            differing = sorted(
                key for key, value in identity.items() if not _same(key, value, before.get(key))
            )
            fatal = [key for key in differing if key not in CUT | FINETUNING | WRITING]
            if fatal:
                changes = ", ".join(_change(key, before.get(key), identity[key]) for key in fatal)
                raise FitError(
                    "resume", f"the run that '{self.folder}' keeps is another: {changes}.", START_ANEW
                )
            stale = _steps_after(set(differing), identity)
        else:
            stale = [*FIRST_STEPS, *SECOND_STEPS, FINETUNE]
        # by name: the folder may hold other files of the user's own
        for step in stale:
            for name in (f"{step}.ckpt", f"{step}.choice.json"):
                (self.folder / name).unlink(missing_ok=True)
        for step in (*FIRST_STEPS, *SECOND_STEPS, FINETUNE):
            for half in self.folder.glob(f"{step}.*.part"):  # of a run that was killed as it wrote
                half.unlink(missing_ok=True)
        write_text(path, json.dumps(identity))

    def _identity_of_last(self, path: Path) -> dict[str, Any] | None:
        """Of the run that left its checkpoints here; None where none did. Raises FitError: see `claim`."""
        assert self.folder is not None
        steps = [*FIRST_STEPS, *SECOND_STEPS, FINETUNE]
        foreign = [f"{step}.ckpt" for step in steps if (self.folder / f"{step}.ckpt").exists()]
        if path.exists():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError):
                before = None
            if isinstance(before, dict) and {"network", "data"} <= before.keys():
                return before
            foreign = [IDENTITY_FILE]
        if foreign:
            raise FitError(
                "checkpoints",
                f"'{self.folder}' holds {foreign[0]}, which no run of vbdcompress left there.",
                "Give a folder of its own.",
            )
        return None

    def on_cut(self, done: int, cuts: int) -> None:
        """Tell a listener that wants to know."""
        if isinstance(self.listener, CutListener):
            self.listener.on_cut(done, cuts)

    def checkpoint(self, step: str) -> FitCheckpoint | None:
        """The checkpoint of one step of the run; None where nothing is kept."""
        return None if self.folder is None else FitCheckpoint(self.folder / f"{step}.ckpt", self.resume)

    def choice(self, step: str) -> ChoiceFile | None:
        """The cut that was chosen after one step of the run; None where nothing is kept."""
        return None if self.folder is None else ChoiceFile(self.folder / f"{step}.choice.json", self.resume)

    def remove_if_empty(self) -> None:
        """Leave no trace of a run that failed before it had anything to keep."""
        if self.folder is not None and self.folder.is_dir() and not any(self.folder.glob("*.ckpt")):
            self.remove()

    def remove(self) -> None:
        """Remove the folder of a run that is done, and the one around it if nothing else is in it."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
                self.folder.parent.rmdir()


def cut_options(max_bytes: int | str | None) -> set[str]:
    """Options that the last cut depends on: where bytes are bounded, how weights are stored, too."""
    return CUT if max_bytes is None else CUT | WRITING


def _steps_after(changed: set[str], options: Mapping[str, Any]) -> list[str]:
    """The steps that an option acts on, of those that may have changed.

    Args:
        options: of the run, as they are now.
    """
    first = options["first"]
    # A first round that has its own threshold, or the one of rounds of weights, is cut as before
    of_last_cut = {"threshold"} if first["threshold"] is not None or first["mode"] == "weights" else set()
    if changed & (CUT - of_last_cut):
        return [*SECOND_STEPS, FINETUNE]
    return [FINETUNE] if changed & (FINETUNING | cut_options(options.get("max_bytes"))) else []

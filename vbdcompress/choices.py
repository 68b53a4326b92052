"""The cut that a round chose, on disk: a run that goes on is cut there again, whatever machine measures."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vbdcompress.checkpoints import START_ANEW
from vbdcompress.errors import FitError
from vbdcompress.evaluation import name_of
from vbdcompress.files import write_text
from vbdcompress.inputs import tensors_of
from vbdcompress.records import CurvePoint, Selection, Size


@dataclass(frozen=True)
class Choice:
    """The curve of a fitted network, and the point on it that was chosen.

    Attributes:
        curve: from the whole network down.
        selection: how the point was chosen.
        storage: options of the file that the curve's bytes are of.
    """

    curve: tuple[CurvePoint, ...]
    selection: Selection
    storage: dict[str, Any]


@dataclass(frozen=True)
class ChoiceFile:
    """Where a round keeps its choice, and whether it goes on from what is there.

    Another machine, or another number of threads, may judge a few images of the validation set otherwise
    and so choose another network, which a checkpoint of the fine-tuning would not fit.
    """

    path: Path
    resume: bool = False

    def keep(self, of: dict[str, Any], choice: Choice) -> None:
        """Write the choice of a fit that `of` names."""
        write_text(self.path, json.dumps({"of": of, **asdict(choice)}))

    def restore(self, of: dict[str, Any]) -> Choice | None:
        """The choice that was made of the same fit under the same options; None where there is none.

        Raises:
            FitError: the file holds no choice.
        """
        if not self.resume or not self.path.exists():
            return None
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["of"] != of:
                return None
            curve = [CurvePoint(**point | {"size": Size(**point["size"])}) for point in content["curve"]]
            return Choice(tuple(curve), Selection(**content["selection"]), dict(content["storage"]))
        except (ValueError, KeyError, TypeError) as error:
            raise FitError(f"file '{self.path}'", "holds no choice of a run.", START_ANEW) from error


def describe_judgement(metric: Callable[..., Any], target: Any) -> dict[str, str]:
    """By what a choice was judged: the metric's name, and a digest of the first targets of validation.

    Not of its inputs: what normalises them may round otherwise on another machine.
    """
    digest = hashlib.sha256()
    for tensor in tensors_of(target):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {"metric": f"{metric.__module__}.{name_of(metric)}", "targets": digest.hexdigest()[:16]}

"""README's examples run as they stand there, on small networks."""

import functools
import re
import shutil
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vbdcompress
from vbdcompress.config import make_config

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


class Masked(nn.Module):
    """The mean of embedded tokens, by the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        mean = (self.table(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        output: Tensor = self.head(self.hidden(mean).relu())
        return output


class Loader(list[Any]):
    """Batches, and how many examples they are."""

    @property
    def dataset(self) -> range:
        return range(48)


def batches(make: Callable[[], Any]) -> Loader:
    torch.manual_seed(0)
    return Loader(make() for _ in range(4))


def classified() -> tuple[Tensor, Tensor]:
    return torch.randn(12, 5), torch.randint(0, 3, (12,))


def named() -> dict[str, Tensor]:
    return {
        "ids": torch.randint(0, 9, (12, 4)),
        "mask": torch.ones(12, 4),
        "answer": torch.randint(0, 2, (12,)),
    }


def measured() -> tuple[Tensor, Tensor]:
    return torch.randn(12, 5), torch.randn(12, 2)


def pixels() -> tuple[Tensor, Tensor]:
    return torch.randn(12, 1, 6, 6), torch.randint(0, 3, (12, 6, 6))


def dense(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, outputs))


# What the example says -> a network and its batches
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "# any nn.Module": (lambda: dense(3), classified),
    "unpack=": (Masked, named),
    "# regression": (lambda: dense(2), measured),
    "# segmentation": (
        lambda: nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 1)),
        pixels,
    ),
    "vbd.convert": (lambda: dense(3), classified),
    "open_tracker": (lambda: dense(3), classified),
}


@pytest.mark.parametrize("said", NETWORKS)
def test_an_example_runs(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (block for block in BLOCKS if said in block)
    build, make = NETWORKS[said]
    monkeypatch.chdir(tmp_path)
    quick = functools.partial(vbdcompress.compress, epochs=1, finetune_epochs=1, device="cpu")
    monkeypatch.setattr(vbdcompress, "compress", quick)
    model, loader = build(), batches(make)
    names = {"model": model, "loader": loader, "compress": quick, "example": loader[0]}
    if isinstance(loader[0], tuple):
        names["example"] = loader[0][0]
    if said == "# any nn.Module":
        names["loader"] = DataLoader(
            TensorDataset(*map(torch.cat, zip(*loader, strict=True))), 6, shuffle=True
        )
    else:
        quick.keywords["validation"] = loader
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # there is no test set
        exec(code, names)
    made = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    if "exports/mine" in code or "vbd.export" in code:
        assert {"model.onnx", "slim.safetensors"} <= made
    if "open_tracker" in code:
        events = EventAccumulator(str(tmp_path / "tracking"))
        events.Reload()
        assert {"stage1/nll", "finetune/nll", "size/macs"} <= set(events.Tags()["scalars"])
    if "result" in names:
        assert isinstance(names["result"], vbdcompress.Result)


def test_the_code_that_serves_the_first_command_s_file_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = (block for block in BLOCKS if "onnxruntime.InferenceSession" in block)
    shutil.copytree(
        Path(__file__).parents[1] / "exports" / "digits_channels", tmp_path / "exports" / "digits"
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["logits"].shape == (1, 10)


def test_every_example_is_tried() -> None:
    tried = [*NETWORKS, "onnxruntime.InferenceSession"]
    assert all(any(said in block for said in tried) for block in BLOCKS)


def test_the_example_of_a_file_of_options_is_one() -> None:
    (text,) = re.findall(r"^```toml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    config = make_config(tomllib.loads(text))
    assert (config.mode, config.first.mode, config.max_bytes) == ("weights", "channels", "2%")

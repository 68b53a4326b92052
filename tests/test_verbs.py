"""The verbs in a wrong order, twice, or on what they are not for say so, before anything is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vbdcompress as vbd
from vbdcompress.errors import ConfigError, ConvertError, ExportError, VbdcompressError

EXAMPLE = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
BATCHES = [(EXAMPLE, torch.arange(4) % 3)]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("again", ["weights", "channels"])
@pytest.mark.parametrize("mode", ["weights", "channels"])
def test_a_converted_network_is_not_converted_again(mode: Any, again: Any) -> None:
    converted = vbd.convert(network(), EXAMPLE, mode=mode)
    with pytest.raises(ConvertError, match=r"(?s)converted already.*slim\(converted\).model"):
        vbd.convert(converted.model, EXAMPLE, mode=again)
    with pytest.raises(ConvertError, match="converted already"):
        vbd.compress(converted.model, BATCHES, validation=BATCHES, mode=again)
    assert vbd.convert(converted.undo(), EXAMPLE, mode=again).table


@pytest.mark.parametrize("mode", ["weights", "channels"])
def test_a_converted_network_is_not_exported(mode: Any, tmp_path: Path) -> None:
    converted = vbd.convert(network(), EXAMPLE, mode=mode)
    with pytest.raises(ExportError, match=r"(?s)nothing was removed.*slim\(converted\).model"):
        vbd.export(converted.model, tmp_path / "out", EXAMPLE)
    assert not (tmp_path / "out").exists()


def nll(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output, target)


MISTAKES: dict[str, tuple[Callable[[Any], Any], type[VbdcompressError], str]] = {
    "fit": (lambda c: vbd.fit(c, BATCHES), ConfigError, "(?s)given a Converted, .*`model` is one"),
    "config": (
        lambda c: vbd.fit(c.model, BATCHES, {"epochs": 1}),
        ConfigError,
        "config is a dict, allowed is a FitConfig",
    ),
    "slim": (lambda c: vbd.slim(c.model), ConfigError, r"slim\(converted\), not slim\(converted.model\)"),
    "elbo": (lambda c: vbd.ELBO(c, nll, 4), ConfigError, "(?s)given a Converted, .*`model` is one"),
    "none": (lambda c: vbd.ELBO(c.model, nll, 0), ConfigError, "num_data = 0"),
    "cost": (
        lambda c: vbd.convert(network(), EXAMPLE, "weights", cost="macs"),
        ConfigError,
        "'weights' has none",
    ),
    "skip": (lambda c: vbd.convert(network(), EXAMPLE, skip="0"), ConvertError, r"skip=\['0'\]"),
    "empty": (lambda c: vbd.convert(network(), EXAMPLE[:0]), ConvertError, "the example is empty"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_a_verb_is_not_for_is_named(mistake: str) -> None:
    make, kind, told = MISTAKES[mistake]
    converted = vbd.convert(network(), EXAMPLE)
    with pytest.raises(kind, match=told):
        make(converted)


def test_the_example_of_the_package_runs(tmp_path: Path, zoo: Path) -> None:
    digits = vbd.load_data("digits")
    inputs, labels = digits.train.inputs[:200], digits.train.labels[:200]
    batches = list(zip(inputs.split(50), labels.split(50), strict=True))
    names = {"vbdcompress": vbd, "example": inputs[:9], "loader": batches}
    lines = [line.strip() for line in (vbd.__doc__ or "").splitlines()]
    code = "\n".join(lines[2 : lines.index("", 2)]).replace("zoo/", f"{zoo}/").replace('"out"', "out")
    assert code.count("\n") == 6
    told = "content = vbdcompress.report(...)"
    exec(code.replace(told, ""), names | {"out": tmp_path / "out"})
    assert told in code
    cut = vbd.load_slim(tmp_path / "out" / "slim.safetensors", vbd.load(zoo / "digits.pt").model)
    assert (tmp_path / "out" / "model.onnx").exists()
    assert cut(inputs[:9]).shape == (9, 10)

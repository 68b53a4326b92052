"""Networks by name: the paper's sizes, others' libraries, the user's own code, and refusals."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vbdcompress.architectures import ARCHITECTURES, build_architecture
from vbdcompress.conversion import convert
from vbdcompress.errors import LoadError


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        # weights and biases by hand; the literature has 430,500 weights of LeNet-5, 266,200 of 300-100
        ("lenet5", (1, 28, 28), 430_500 + 580),
        ("lenet_300_100", (1, 28, 28), 266_200 + 410),
        ("lenet_500_300", (784,), 784 * 500 + 500 * 300 + 3000 + 810),
        # VGG-16's 14,714,688 of convolutions with biases, two numbers a channel of batch norm, 512 and 10
        ("vgg_cifar", (3, 32, 32), 14_714_688 + 2 * 4224 + 512 * 513 + 2 * 512 + 5130),
        # He et al.: 0.27 M and 0.85 M with identity shortcuts; two 1 x 1 convolutions with batch norm more
        ("resnet20", (3, 32, 32), 269_722 + 16 * 32 + 32 * 64 + 2 * 96),
        ("resnet56", (3, 32, 32), 853_018 + 16 * 32 + 32 * 64 + 2 * 96),
        ("digits", (1, 8, 8), 9 * 16 + 9 * 16 * 32 + 2 * 48 + 128 * 64 + 64 + 640 + 10),
    ],
)
def test_build_architecture_gives_the_papers_sizes(
    name: str, shape: tuple[int, ...], parameters: int
) -> None:
    model = build_architecture(name)
    assert count(model) == parameters
    assert model(torch.randn(2, *shape)).shape == (2, 10)
    assert name in ARCHITECTURES


def test_build_architecture_passes_arguments() -> None:
    model = build_architecture("lenet5", {"channels": (3, 4), "hidden": 6, "classes": 7, "size": 20})
    assert model(torch.randn(2, 1, 20, 20)).shape == (2, 7)
    assert build_architecture("lenet_300_100", {"classes": 4})(torch.randn(1, 784)).shape == (1, 4)


def test_build_architecture_gives_fresh_random_weights() -> None:
    first, second = build_architecture("digits"), build_architecture("digits")
    assert not torch.equal(first.get_parameter("fc1.weight"), second.get_parameter("fc1.weight"))


@pytest.mark.parametrize("name", ["vgg_cifar", "resnet20"])
def test_every_channel_of_the_cifar_networks_can_go(name: str) -> None:
    narrow = {"vgg_cifar": {"width": 0.05}, "resnet20": {"channels": (4, 6, 8)}}[name]
    model = build_architecture(name, narrow)
    converted = convert(model, torch.randn(2, 3, 32, 32))
    left = [row for row in converted.table if row.action == "left" and row.kind in ("Conv2d", "Linear")]
    assert [row.reason for row in left] == [
        "reads the input, or channels that something mixed, such as a softmax"
    ]
    whole = [group for group in converted.scan.groups if group.whole_because is not None]
    assert len(whole) == 1  # the logits


def test_build_architecture_takes_torchvisions() -> None:
    model = build_architecture("torchvision:squeezenet1_1", {"num_classes": 5})
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_build_architecture_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked for a download")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    model = build_architecture("torchvision:lraspp_mobilenet_v3_large", {"num_classes": 2})
    assert count(model) > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lenet", "did you mean 'lenet5'"),
        ("lenet300_100", "did you mean 'lenet_300_100'"),
        ("zzz", "is unknown"),
        ("torchvision:resnet19", "near: .*resnet18"),
        ("torchvision:zzz", "is not among torchvision's models"),
    ],
)
def test_build_architecture_suggests_the_nearest_name(name: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        build_architecture(name)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("lenet5", {"chanels": 3}), ("torchvision:resnet18", {"num_classes": "x"}), ("lenet5", {"hidden": -1})],
)
def test_build_architecture_names_arguments_that_do_not_fit(name: str, arguments: dict[str, object]) -> None:
    with pytest.raises(LoadError, match="refused the arguments") as caught:
        build_architecture(name, arguments)
    assert str(arguments) in str(caught.value)


CODE = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn

@dataclass
class Widths:
    hidden: int = 3
    names: ClassVar[int] = 1  # the dataclass looks its module up for this one

def make(classes=2):
    return nn.Sequential(nn.Linear(4, Widths().hidden), nn.Linear(3, classes))

def give_number():
    return 7

constant = 3
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE, encoding="utf-8")
    return path


def test_build_architecture_runs_the_users_file(user_file: Path) -> None:
    model = build_architecture(f"{user_file}:make", {"classes": 6}, trusted=True)
    assert model(torch.randn(1, 4)).shape == (1, 6)


def test_build_architecture_imports_the_users_module(
    user_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(user_file.parent)
    assert count(build_architecture("mine:make", trusted=True)) == 4 * 3 + 3 + 3 * 2 + 2


@pytest.mark.parametrize(
    "reference", ["mine.py:make", "os:system", "torch.nn:Linear", "timm:hf-hub:any/model"]
)
def test_build_architecture_runs_no_code_that_a_file_names(
    user_file: Path, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(user_file.parent)
    user_file.write_text("raise SystemExit('this code was run')", encoding="utf-8")
    with pytest.raises(LoadError, match="file's choosing") as caught:
        build_architecture(reference, {"classes": 2})
    assert f"--arch {reference}" in str(caught.value)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("give_number", "gave a int, not a torch.nn.Module"),
        ("constant", "no callable 'constant'"),
        ("mak", r"no callable 'mak'(.|\n)*It has: .*make"),
    ],
)
def test_build_architecture_says_what_the_users_file_lacks(
    user_file: Path, member: str, message: str
) -> None:
    with pytest.raises(LoadError, match=message):
        build_architecture(f"{user_file}:{member}", trusted=True)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nowhere/net.py:make", "there is no file 'nowhere/net.py'"),
        ("no.such.package:make", "could not be imported"),
        (":make", "could not be imported"),
    ],
)
def test_build_architecture_says_what_is_not_there(reference: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        build_architecture(reference, trusted=True)


def test_build_architecture_says_when_the_users_file_does_not_parse(user_file: Path) -> None:
    user_file.write_text("def make(:", encoding="utf-8")
    with pytest.raises(LoadError, match="could not be imported"):
        build_architecture(f"{user_file}:make", trusted=True)


def test_build_architecture_without_timm_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(LoadError, match="pip install timm"):
        build_architecture("timm:resnet18")


def test_build_architecture_refuses_a_file_s_arguments_that_open_others():
    with pytest.raises(LoadError, match="make it read or download others: checkpoint_path"):
        build_architecture("timm:resnet18", {"checkpoint_path": "/etc/passwd"})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("build = undefined", "could not be imported: NameError: .*line 1"),
        ("import sys\nsys.exit('no data')", r"(?s)could not be imported: SystemExit: no data.*__main__"),
        ("import argparse\nargparse.ArgumentParser().parse_args(['x'])", r"SystemExit: 2 \(mine.py, line 2"),
        ("def build():\n    return {}['width']", "refused the arguments.*KeyError: 'width' .*line 2"),
        ("def build():\n    assert False, 'no'", "refused the arguments.*AssertionError: no"),
    ],
)
def test_whatever_the_user_s_code_raises_is_told_with_its_line(tmp_path, text, told):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(LoadError, match=told):
        build_architecture(f"{file}:build", trusted=True)


@pytest.mark.parametrize(("name", "arguments"), [(["lenet5"], {}), ("lenet5", [1])])
def test_names_and_arguments_of_another_kind_are_refused(name, arguments):
    with pytest.raises(LoadError, match="allowed are a name and a dict"):
        build_architecture(name, arguments)

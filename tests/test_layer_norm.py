"""Norms that lose channels count them as zeros; modules that compute the same are opened, others are not."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdcompress.conversion import convert
from vbdcompress.layer_norm import NarrowLayerNorm, NarrowRMSNorm, narrow_norm_, open_norm

WIDTH, KEPT = 7, [0, 2, 3, 6]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_narrow_norm_gives_what_the_whole_one_gives_of_zeros(kind: Any, dtype: torch.dtype) -> None:
    norm = kind(WIDTH).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = 0.01 * torch.randn(5, 3, WIDTH, dtype=dtype) + 0.02
    x[..., [1, 4, 5]] = 0
    expected = norm(x)[..., KEPT]
    for name, parameter in norm.named_parameters():
        norm.register_parameter(name, nn.Parameter(parameter[KEPT]))
    narrow_norm_(norm, len(KEPT))
    found = norm(x[..., KEPT])
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=0, rtol=3e-2 if dtype == torch.bfloat16 else 1e-5)


class Own(nn.Module):
    """A weight, perhaps a bias, and a function of the input and them."""

    def __init__(self, of: Callable[[Any, Tensor], Tensor], bias: bool = False, eps: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.bias = nn.Parameter(torch.randn(WIDTH)) if bias else None
        self.of, self.added = of, eps

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self, x)


class OverChannels(nn.LayerNorm):
    """The channels of images, as ConvNeXt normalises them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def root(own: Any, x: Tensor) -> Tensor:
    wide = x.to(torch.float32)  # as language models do it
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + own.added)
    return own.weight * scaled.to(x.dtype)


def by_hand(own: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return own.weight[:, None, None] * scaled + own.bias[:, None, None]


def of_series(own: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return own.weight[:, None] * scaled + own.bias[:, None]


NORMS: dict[str, tuple[Callable[[], nn.Module], type, int, float]] = {
    "of a language model": (lambda: Own(root, eps=3e-4), NarrowRMSNorm, -1, 3e-4),
    "without a bias": (
        lambda: Own(lambda own, x: F.layer_norm(x, own.weight.shape, own.weight, None, 1e-5)),
        NarrowLayerNorm,
        -1,
        1e-5,
    ),
    "of images by hand": (lambda: Own(by_hand, bias=True), NarrowLayerNorm, 1, 1e-6),
    "of images by a subclass": (lambda: OverChannels(WIDTH, eps=1e-3), NarrowLayerNorm, 1, 1e-3),
}
IMAGES = 0.001 * torch.randn(2, WIDTH, 3, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("name", NORMS)
def test_what_normalises_channels_is_opened(name: str) -> None:
    build, kind, dim, eps = NORMS[name]
    own = build().double().eval()
    own.get_parameter("weight").requires_grad_(False)
    opened = open_norm(own)
    assert type(opened) is kind
    assert (opened.dim, opened.eps, opened.training, opened.weight.requires_grad) == (dim, eps, False, False)
    assert opened.weight is own.weight
    torch.testing.assert_close(opened(IMAGES), own(IMAGES).double(), atol=0, rtol=1e-5)


def test_what_normalises_channels_of_series_alone_is_opened() -> None:
    own = Own(of_series, bias=True).double().eval()
    opened, x = open_norm(own), torch.randn(2, WIDTH, 5, dtype=torch.float64)
    assert isinstance(opened, NarrowLayerNorm)
    assert (opened.dim, opened.eps) == (1, 1e-6)
    torch.testing.assert_close(opened(x), own(x), atol=0, rtol=1e-12)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "torch's own": lambda: nn.LayerNorm(WIDTH),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "a scale": lambda: Own(lambda own, x: x * own.weight),
    "about one": lambda: Own(lambda own, x: F.rms_norm(x, own.weight.shape, own.weight + 1, 1e-6)),
    "by sums of absolutes": lambda: Own(lambda own, x: own.weight * x / x.abs().mean(-1, keepdim=True)),
    "of two dimensions": lambda: Own(lambda own, x: own.weight * F.layer_norm(x, x.shape[-2:]), bias=False),
    "noisy in training": lambda: Own(
        lambda own, x: F.dropout(F.rms_norm(x, own.weight.shape, own.weight, 1e-6), 0.5, own.training)
    ),
    "of one kind of input": lambda: Own(lambda own, x: F.rms_norm(x, (99,))),
    "clamped": lambda: Own(lambda own, x: F.rms_norm(x.clamp(-9, 9), own.weight.shape, own.weight, 1e-6)),
    "with a layer inside": lambda: nn.Sequential(nn.LayerNorm(WIDTH)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_another_function_is_not_opened(name: str) -> None:
    module = OTHERS[name]()
    before = copy.deepcopy(module.state_dict())
    assert open_norm(module) is None
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_an_opened_norm_of_images_gives_its_input_s_layout() -> None:
    opened = open_norm(Own(by_hand, bias=True))
    assert opened is not None
    x = torch.randn(2, WIDTH, 3, 4)
    assert opened(x).is_contiguous()
    assert opened(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


class Watched(nn.Module):
    """Training asks the norm for what only its own class has."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, WIDTH), norm, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        if self.training:
            x = x + self.norm.of(self.norm, x)
        return self.head(x)


def test_a_norm_whose_class_training_needs_is_not_opened() -> None:
    converted = convert(Watched(Own(root, eps=1e-6)).eval(), torch.randn(2, 4), "weights")
    assert type(converted.model.get_submodule("norm")) is Own
    converted.model.train()(torch.randn(2, 4))

"""Small networks to cut: a forward function over named layers, and what must hold of each."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import densenet, vgg

from vbdcompress.compare import EXACT, flatten_output, relative_difference
from vbdcompress.conversion import convert
from vbdcompress.slimming import slim
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
# Group of the layer -> its number of channels that can go one by one, or why it stays whole
Groups = Mapping[str, int | str]


class Pattern(nn.Module):
    """A forward function over named layers."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.of = forward

    def forward(self, x: Tensor) -> Any:
        return self.of(self, x)


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def stream_layers(width: int) -> dict[str, nn.Module]:
    """What writes a stream and reads it: of inputs of 4, with a branch of 12, to 3 outputs."""
    words, wide, narrow = nn.Linear(4, width), nn.Linear(width, 12), nn.Linear(12, width)
    return {"words": words, "wide": wide, "narrow": narrow, "head": nn.Linear(width, 3)}


def pool(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """The network with the same weights at each call, in float64."""
    torch.manual_seed(1)
    return build().double().eval()


def switch_off_(model: nn.Module) -> int:
    """Raise the variance of 30 % of each posterior beyond any threshold; how many went."""
    gone = 0
    for posterior in find_posteriors(model):
        log_sigma2 = posterior.log_sigma2.detach().flatten()
        chosen = torch.randperm(len(log_sigma2))[: max(1, round(0.3 * len(log_sigma2)))]
        log_sigma2[chosen] = 60.0
        gone += len(chosen)
    return gone


@torch.no_grad()
def assert_cut_exactly(model: nn.Module, mode: Any) -> None:
    """Cut, it computes what it does masked, on other inputs too; in channels mode it is smaller."""
    converted = convert(model, EXAMPLE.double(), mode)
    assert switch_off_(converted.model) > 0
    slimmed = slim(converted, 50.0).model
    set_threshold_(converted.model, 50.0)
    other = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    expected = flatten_output(converted.model.eval()(other))
    found = flatten_output(slimmed(other))
    assert relative_difference(expected, found) <= EXACT
    before = sum(parameter.numel() for parameter in converted.undo().parameters())
    if mode == "channels":
        assert sum(parameter.numel() for parameter in slimmed.parameters()) < before


def assert_groups(model: nn.Module, expected: Groups) -> None:
    """What can go is what is expected, and what stays whole says why."""
    groups = {group.name: group for group in convert(model, EXAMPLE.double()).scan.groups}
    for layer, told in expected.items():
        if isinstance(told, int):
            assert (groups[layer].size, groups[layer].whole_because) == (told, None)
        else:
            assert told in (groups[layer].whole_because or "")


def small_vgg() -> nn.Module:
    """torchvision's VGG with batch norm, narrow: its classifier reads a flattened map of 7x7."""
    widths = [16, "M", 32, "M", 48, 48, "M", 64, 64, "M", 64, "M"]
    model = vgg.VGG(vgg.make_layers(widths, batch_norm=True), num_classes=10, init_weights=False)
    hidden = (nn.Linear(64 * 49, 48), nn.ReLU(), nn.Dropout(), nn.Linear(48, 32), nn.ReLU())
    model.classifier = nn.Sequential(*hidden, nn.Linear(32, 10))
    return model


def small_densenet() -> nn.Module:
    """torchvision's DenseNet, narrow and shallow: each layer reads all that came before it in its block."""
    return densenet.DenseNet(8, (3, 4, 3), 16, num_classes=10)

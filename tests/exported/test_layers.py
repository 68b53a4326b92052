"""Every kind of layer comes back from an exported program, and the network is cut exactly."""

import io
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.parametrizations import weight_norm

from vbdcompress.compare import EXACT, flatten_output, relative_difference
from vbdcompress.conversion import convert
from vbdcompress.exported import from_exported
from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.slimming import slim
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_


class Scale(nn.Module):
    """An operation on a parameter that no layer has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Upscaling(nn.Module):
    """Transposed convolutions, PReLU, and norms by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.each, self.one = nn.Conv2d(1, 8, 3), nn.PReLU(8), nn.PReLU()
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1, dilation=2)
        self.apart = nn.ConvTranspose2d(6, 6, 2, groups=6, bias=False)
        self.plain, self.own = nn.BatchNorm2d(6, affine=False), nn.InstanceNorm2d(6, affine=True)
        self.scale = Scale(6)
        self.around = nn.Conv2d(6, 5, 3, padding=1, padding_mode="circular")
        self.running = nn.InstanceNorm2d(5, track_running_stats=True)
        self.up1, self.up3 = nn.ConvTranspose1d(5, 4, 2, stride=2), nn.ConvTranspose3d(4, 3, (1, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.plain(self.apart(self.up(self.one(self.each(self.stem(x))))))
        y = self.running(self.around(self.scale(self.own(y)).relu())).flatten(2)
        return self.up3(self.up1(y).relu()[:, :, None, None]).flatten(1)


class Sequences(nn.Module):
    """Embedding, norms over channels, attention of two kinds, a GRU and a computed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.rms = nn.Embedding(9, 8, padding_idx=0), nn.LayerNorm(8), nn.RMSNorm(8)
        self.block = nn.TransformerEncoderLayer(8, 4, 10, batch_first=True)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.fused, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.group = nn.GroupNorm(2, 8)
        self.gru = nn.GRU(8, 6, batch_first=True)
        self.normed, self.head = weight_norm(nn.Linear(6, 5)), nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.block(self.rms(self.norm(self.words(ids))))
        n, length, _ = x.shape
        q, k, v = (layer(x).view(n, length, 4, 2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, 8))
        q, k, v = self.fused(x).reshape(n, length, 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).reshape(n, length, 8))
        y, _ = self.gru(self.group(x.transpose(1, 2)).transpose(1, 2))
        return self.head(self.normed(y[:, -1]).relu())


GRU_WARNING = "ignore:The tensor attributes self.gru"  # torch says so whenever it exports one
EXAMPLES = {Upscaling: torch.randn(2, 1, 6, 6), Sequences: torch.randint(0, 9, (2, 5))}


@cache
def program_of(kind: Any) -> tuple[nn.Module, bytes]:
    """The network, and its program as a file: once, for torch exports a GRU otherwise after an ONNX file."""
    torch.manual_seed(0)
    model = kind().eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    program = torch.export.export(model, (EXAMPLES[kind],), dynamic_shapes=({0: Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    return model, file.getvalue()


def exported(kind: Any) -> tuple[nn.Module, nn.Module]:
    """The network, and what comes back of it."""
    model, content = program_of(kind)
    return model, from_exported(torch.export.load(io.BytesIO(content)))


@torch.no_grad()
@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.filterwarnings(GRU_WARNING)
def test_layers_come_back_as_they_were(kind: Any) -> None:
    model, found = exported(kind)
    x = torch.cat([EXAMPLES[kind]] * 3)
    torch.testing.assert_close(found(x), model(x))
    layers = dict(found.named_modules())
    for name, module in model.named_modules():
        kind_of = type(module).__module__
        parametrized = any("parametrizations" in other for other, _ in module.named_modules())
        own = any(True for _ in module.buffers(recurse=False)) or any(
            True for _ in module.parameters(recurse=False)
        )
        if own and kind_of.startswith("torch.nn.modules") and not parametrized:
            if isinstance(module, nn.GRU | nn.MultiheadAttention):  # stays an operation, or becomes several
                continue
            assert isinstance(module, type(layers[name]))
            assert layers[name].extra_repr() == module.extra_repr().replace(*CIRCULAR)


# what torch.export writes as an operation of its own before the convolution
CIRCULAR = (", padding=(1, 1), padding_mode=circular", "")
# Group of the layer -> how many can go one by one, or why it stays whole
EXPECTED: dict[Any, dict[str, int | str]] = {
    Upscaling: {"stem": 8, "up": 6, "around": 5, "up1": 4},
    Sequences: {
        "block.self_attn.in_proj": 4,
        "block.linear1": 10,
        "q": 4,
        "fused": 4,
        "words": "bare parameter 'gru.",  # norms are no bar
    },
}


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.filterwarnings(GRU_WARNING)
def test_channels_and_heads_of_a_program_can_go(kind: Any) -> None:
    _, found = exported(kind)
    groups = {group.name: group for group in convert(found, EXAMPLES[kind]).scan.groups}
    for layer, told in EXPECTED[kind].items():
        if isinstance(told, int):
            assert (groups[layer].size, groups[layer].whole_because) == (told, None)
        else:
            assert told in (groups[layer].whole_because or "")


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        (Sequences, "channels"),
        (Upscaling, "weights"),
        pytest.param(Sequences, "weights", marks=pytest.mark.slow),
        pytest.param(Upscaling, "channels", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings(GRU_WARNING)
def test_a_program_is_cut_exactly(kind: Any, mode: Any, tmp_path: Path) -> None:
    _, found = exported(kind)
    example = EXAMPLES[kind].double() if EXAMPLES[kind].is_floating_point() else EXAMPLES[kind]
    converted = convert(found.double(), example, mode)
    for posterior in find_posteriors(converted.model):
        posterior.log_sigma2.data.flatten()[::3] = 60.0
    slimmed = slim(converted, 50.0).model
    set_threshold_(converted.model, 50.0)
    with torch.no_grad():
        expected, cut = converted.model.eval()(example), slimmed(example)
    assert relative_difference(flatten_output(expected), flatten_output(cut)) <= EXACT
    before = sum(parameter.numel() for parameter in converted.undo().parameters())
    assert mode == "weights" or sum(parameter.numel() for parameter in slimmed.parameters()) < before
    check = export_onnx(slimmed.float(), tmp_path / "model.onnx", EXAMPLES[kind])
    assert check.max_difference <= check.tolerance


@torch.no_grad()
def test_what_works_on_computed_tensors_stays_an_operation() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(self.a(x).relu(), self.b.weight, self.b.bias * 2)
            return self.head(F.linear(y, self.b.weight.t()))

    torch.manual_seed(0)
    model, x = Computed().eval(), torch.randn(2, 4)
    found = from_exported(torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch")},)))
    torch.testing.assert_close(found(x), model(x))
    assert [name for name, module in found.named_modules() if isinstance(module, nn.Linear)] == ["a", "head"]


@torch.no_grad()
def test_a_layer_that_holds_others_comes_back_with_them() -> None:
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 5)
            self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x).relu()) + super().forward(x)

    torch.manual_seed(0)
    model, x = nn.Sequential(Adapted(), nn.ReLU(), nn.Linear(5, 3)).eval(), torch.randn(2, 4)
    found = from_exported(torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch")},)))
    torch.testing.assert_close(found(x), model(x))
    assert dict(found.named_parameters()).keys() == dict(model.named_parameters()).keys()
    groups = {group.name: group.size for group in convert(found, x).scan.removable}
    assert groups == {"0.down": 2, "0.up": 5}


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 8), nn.Linear(2, 2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        one, two, three, four = self.a(x).relu().chunk(4, 1)  # of 6 channels it makes three parts
        two = self.b(one + two).relu()
        output: Tensor = self.head(torch.cat([one, two, three, four], 1))
        return output


def test_a_trial_that_fails_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    program = torch.export.export(
        Parts().eval(), (torch.randn(4, 3),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    capfd.readouterr()
    convert(from_exported(program), torch.randn(4, 3))
    assert capfd.readouterr() == ("", "")


class TakesItsWidth(nn.Module):
    """Attention whose heads are as wide as what is given divided by their number, as PVT's and XCiT's."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.embed, self.qkv = 4, nn.Conv2d(3, 8, 2, stride=2), nn.Linear(8, 24)
        self.proj, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        n, positions, width = x.shape
        q, k, v = self.qkv(x).reshape(n, positions, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(n, positions, width)
        logits: Tensor = self.head(self.proj(y).mean(1))
        return logits


def test_heads_as_wide_as_what_is_given_go_from_a_program() -> None:
    model, example = TakesItsWidth().eval(), torch.randn(2, 3, 6, 6)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: Dim("batch")},))
    stays, goes = (
        {group.name: group for group in convert(each, example).scan.groups}["qkv"]
        for each in (model, from_exported(program))
    )
    assert "or taken from what it is given; in what torch.export makes" in (stays.whole_because or "")
    assert (goes.size, goes.whole_because) == (4, None)

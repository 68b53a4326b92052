"""Opened attention is the original's function, to the last bits, with masks and padding."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from vbdcompress import compress
from vbdcompress.attention import HeadAttention, HeadWindowAttention
from vbdcompress.conversion import convert
from vbdcompress.errors import ConvertError
from vbdcompress.exporting.onnx_file import TOLERANCE, export_onnx
from vbdcompress.exporting.slim_file import SlimFile, load_slim, save_slim
from vbdcompress.opening import open_layers_
from vbdcompress.records import InputSpec
from vbdcompress.slimming import slim
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_


@torch.no_grad()
def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))
    return module.double().eval()


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize(
    "options", [{"batch_first": True}, {}, {"kdim": 10, "vdim": 12}, {"bias": False}], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_head_attention_equals_torchs(options: dict[str, Any], masked: bool, need_weights: bool) -> None:
    original = randomised(nn.MultiheadAttention(16, 4, **options))
    opened = nn.Sequential(original)
    open_layers_(opened)
    assert isinstance(opened[0], HeadAttention)
    for told in ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "batch_first"):
        assert getattr(opened[0], told) == getattr(original, told)
    first = options.get("batch_first")
    inputs = [torch.randn(3, 5, 16), torch.randn(3, 7, options.get("kdim", 16))]
    inputs.append(torch.randn(3, 7, options.get("vdim", 16)))
    inputs = [(x if first else x.transpose(0, 1)).double() for x in inputs]
    masks: dict[str, Any] = {"need_weights": need_weights}
    if masked:
        masks["key_padding_mask"] = torch.arange(7) > torch.tensor([[6], [3], [5]])
        masks["attn_mask"] = torch.rand(12, 5, 7) < 0.3
        masks["attn_mask"][..., 0] = False  # or a position might see none
    found, weights = opened[0](*inputs, **masks)
    expected, expected_weights = original(*inputs, **masks)
    assert_equal(found, expected)
    assert (weights is None) is (expected_weights is None)
    if weights is not None:
        assert_equal(weights, expected_weights)


def test_head_attention_takes_one_example_without_a_batch() -> None:
    original = randomised(nn.MultiheadAttention(8, 2))
    x = torch.randn(5, 8, dtype=torch.float64)
    assert_equal(HeadAttention(original)(x, x, x)[0], original(x, x, x)[0])


# Attention, size of its windows, their shifts, and sizes of inputs: whole windows, padded, smaller than one
WINDOWS: list[tuple[Any, list[int], list[list[int]], list[tuple[int, ...]]]] = [
    (kind, [4, 4], [[0, 0], [2, 2], [2, 0]], [(8, 8), (9, 14), (4, 12), (3, 9)])
    for kind in (ShiftedWindowAttention, ShiftedWindowAttentionV2)
]
WINDOWS.append(
    (
        ShiftedWindowAttention3d,
        [2, 4, 3],
        [[0, 0, 0], [1, 2, 1], [0, 2, 1]],
        [(4, 8, 6), (5, 9, 7), (1, 12, 6), (3, 2, 5), (2, 3, 1)],
    )
)
CASES = [
    (kind, window, shift, size)
    for kind, window, shifts, sizes in WINDOWS
    for shift in shifts
    for size in sizes
]


@pytest.mark.parametrize(("kind", "window", "shift", "size"), CASES, ids=str)
def test_head_window_attention_equals_torchvisions(
    kind: Any, window: list[int], shift: list[int], size: tuple[int, ...]
) -> None:
    original = randomised(kind(12, window, shift, 3))
    opened = nn.Sequential(original)
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    expected = original(x)
    open_layers_(opened)
    assert isinstance(opened[0], HeadWindowAttention)
    assert_equal(opened[0](x), expected)
    assert list(opened[0].state_dict()) == list(original.state_dict())


class WindowsOfVideos(nn.Module):
    """Attention in shifted windows of a video between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 12), nn.Linear(12, 4)
        self.attention = ShiftedWindowAttention3d(12, [2, 4, 4], [1, 2, 2], 4)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, height, width, 3] -> [batch, 4]."""
        logits: Tensor = self.head(self.attention(self.stem(x)).relu().mean((1, 2, 3)))
        return logits


def test_windows_of_videos_lose_heads_and_export(tmp_path: Path) -> None:
    model, x = randomised(WindowsOfVideos()), torch.randn(2, 3, 6, 4, 3, dtype=torch.float64)
    converted = convert(model, x)
    sizes = {group.name: group.size for group in converted.scan.removable}
    assert sizes == {"stem": 12, "attention.qkv": 4, "attention.proj": 12}
    for posterior in find_posteriors(converted.model):
        posterior.log_sigma2.data[1] = 60.0
    slimmed = slim(converted, 50.0)
    assert slimmed.model.attention.qkv.out_features == 27
    set_threshold_(converted.model, 50.0)
    other = torch.randn(5, 3, 6, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        assert_equal(slimmed.model(other), converted.model.eval()(other))
    check = export_onnx(slimmed.model.float(), tmp_path / "model.onnx", x.float(), batch_sizes=(1, 5))
    assert check.max_difference <= TOLERANCE


def test_attention_with_extras_is_left() -> None:
    model = nn.Sequential(
        nn.MultiheadAttention(8, 2, add_bias_kv=True), nn.MultiheadAttention(8, 2, add_zero_attn=True)
    )
    open_layers_(model)
    assert all(type(module) is nn.MultiheadAttention for module in model)


def test_attention_under_two_names_stays_one() -> None:
    one = nn.MultiheadAttention(8, 2)
    for parameter in one.parameters():
        parameter.requires_grad_(False)
    model = nn.ModuleList([one, one])
    open_layers_(model)
    assert isinstance(model[0], HeadAttention)
    assert model[0] is model[1]
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kdim", [8, 6])
def test_opened_attention_leaves_frozen_what_was(kdim: int) -> None:
    module = nn.MultiheadAttention(8, 2, kdim=kdim)
    given = [name for name, _ in module.named_parameters() if name.endswith("weight") and "in_" in name]
    given += ["q_proj_weight"] if kdim != 8 else []
    for name in (*given, "out_proj.bias"):
        module.get_parameter(name).requires_grad_(False)
    opened = HeadAttention(module)
    frozen = {name for name, each in opened.named_parameters() if not each.requires_grad}
    queries = {"q.weight", "k.weight", "v.weight"} if kdim == 8 else {"q.weight"}
    assert frozen == queries | {"out.bias"}


@pytest.mark.parametrize("mode", ["channels", "weights"])
def test_attention_that_is_the_whole_network_loses_heads(mode: Any, tmp_path: Path) -> None:
    original = randomised(nn.MultiheadAttention(12, 4, batch_first=True))
    names = ("query", "key", "value")
    inputs: dict[str, Any] = {name: torch.randn(2, 5, 12, dtype=torch.float64) for name in names}
    inputs["need_weights"] = False
    converted = convert(original, inputs, mode)
    assert type(original) is nn.MultiheadAttention
    assert converted.scan.removable[0].size == 4
    for posterior in find_posteriors(converted.model):
        posterior.log_sigma2.data[1] = 60.0
        if mode == "weights":  # of a whole head nothing is written
            posterior.log_sigma2.data[:3] = 60.0
    slimmed = slim(converted, 50.0)
    set_threshold_(converted.model, 50.0)
    with torch.no_grad():
        assert_equal(slimmed.model(**inputs)[0], converted.model.eval()(**inputs)[0])
    assert slimmed.model.num_heads == 3
    spec = InputSpec((5, 12))
    save_slim(tmp_path / "slim.safetensors", slimmed.model, SlimFile((slimmed.plan,), None, {}, None, spec))
    loaded = load_slim(tmp_path / "slim.safetensors", copy.deepcopy(original))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], slimmed.model(**inputs)[0])


def test_weights_of_attention_that_are_an_output_keep_the_heads() -> None:
    x = torch.randn(2, 5, 12)
    with pytest.raises(ConvertError, match="'q' stays whole: no layer reads it: it is an output"):
        convert(nn.MultiheadAttention(12, 4, batch_first=True), (x, x, x))


def test_attention_that_is_skipped_in_part_keeps_its_layers() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attn, self.head = nn.Linear(5, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 6)
            self.last = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last(self.head(self.attn(y, y, y)[0]).relu())

    converted = convert(Network(), torch.randn(2, 4, 5), skip=["attn.out_proj"])
    assert type(converted.model.attn) is nn.MultiheadAttention
    assert isinstance(convert(Network(), torch.randn(2, 4, 5)).model.attn, HeadAttention)
    alone, x = nn.MultiheadAttention(8, 2), torch.randn(2, 4, 8)
    assert isinstance(convert(alone, (x, x, x), "weights").model, HeadAttention)
    kept = convert(alone, (x, x, x), "weights", skip=["out_proj"]).model
    assert type(kept).__name__ != "HeadAttention"
    assert hasattr(kept, "in_proj_weight")


class ReadPastItsCall(nn.Module):
    """Attention whose weights the network's own code hands to torch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(5, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, positions, 5] -> [batch, 3]."""
        h, own = self.stem(x).transpose(0, 1), self.attention
        attended, _ = F.multi_head_attention_forward(
            *(h, h, h, 8, 2, own.in_proj_weight, own.in_proj_bias, None, None, False, 0.0),
            *(own.out_proj.weight, own.out_proj.bias),
            training=self.training,
        )
        logits: Tensor = self.head(attended.mean(0))
        return logits


def test_attention_that_is_not_called_is_not_opened() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(20, 6, 5), torch.randint(0, 3, (20,)))]
    given = {"validation": batches, "test": batches}
    options = {"mode": "weights", "epochs": 1, "finetune_epochs": 1, "device": "cpu"}
    result = compress(ReadPastItsCall(), batches, **given, **options)
    assert isinstance(result.model.attention, nn.MultiheadAttention)
    assert result.report["errors"]["validation"]["after"] is not None

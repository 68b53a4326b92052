"""Networks that take several inputs, a dict, or token ids, the whole way: fit, cut, ONNX, reload."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from vbdcompress import compress, load_slim
from vbdcompress.conversion import convert
from vbdcompress.count import measure_size
from vbdcompress.errors import DataError
from vbdcompress.inputs import call, first, resize, shapes_of, tensors_of
from vbdcompress.reporting.html import write_snippet
from vbdcompress.slimming import slim
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_

FAST: dict[str, Any] = {"epochs": 2, "finetune_epochs": 1, "device": "cpu", "lr_gates": 0.3, "beta": 200.0}


class TwoInputs(nn.Module):
    """An image and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.side = nn.Linear(5, 7)
        self.mix = nn.Linear(13, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        both = torch.cat([self.conv(image).relu().mean((2, 3)), self.side(vector).relu()], 1)
        return self.head(self.mix(both).relu())


class Tokens(nn.Module):
    """Token ids and a mask of those that count, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        layer = nn.TransformerEncoderLayer(12, 4, 16, batch_first=True, dropout=0.0)
        self.block = nn.TransformerEncoder(layer, 1)  # its shortcut past the layers takes even heads
        self.head = nn.Linear(12, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        y = self.block(self.embed(ids), src_key_padding_mask=mask == 0)
        return self.head((y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class Loader:
    """Batches of its own kind."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def pairs() -> list[Any]:
    torch.manual_seed(0)
    labels = torch.arange(40) % 3
    return [((torch.randn(10, 1, 6, 6), torch.randn(10, 5)), labels[10 * n : 10 * n + 10]) for n in range(4)]


def dicts() -> list[Any]:
    torch.manual_seed(0)
    mask = (torch.arange(7) < torch.randint(3, 8, (10, 1))).float()
    labels = torch.arange(40) % 3
    return [
        {"ids": torch.randint(0, 20, (10, 7)), "mask": mask, "label": labels[10 * n : 10 * n + 10]}
        for n in range(4)
    ]


def of_dict(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    return {"mask": batch["mask"], "ids": batch["ids"]}, batch["label"]  # not in the order of forward


CASES: dict[str, tuple[type[nn.Module], Any, Any, Any]] = {
    "two inputs": (TwoInputs, pairs, None, {"input_0", "input_1"}),
    "dict": (Tokens, dicts, of_dict, {"ids", "mask"}),
}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("two inputs", "channels"),
        ("dict", "weights"),
        pytest.param("two inputs", "weights", marks=pytest.mark.slow),
        pytest.param("dict", "channels", marks=pytest.mark.slow),
    ],
)
def test_several_inputs_go_the_whole_way(
    name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, batches, unpack, names = CASES[name]
    loader = Loader(batches())
    model = build().eval()
    result = compress(
        model,
        loader,
        validation=Loader(batches()),
        test=Loader(batches()),
        unpack=unpack,
        mode=mode,
        threshold=-2.0 if mode == "channels" else -9.0,
        **FAST,
    )
    result.export(tmp_path)
    assert result.report["size"]["after"]["nonzeros"] < result.report["size"]["before"]["nonzeros"]
    batch = next(iter(loader))
    inputs = unpack(batch)[0] if unpack else batch[0]
    with torch.no_grad():
        expected = call(result.model, inputs)
        again = call(load_slim(tmp_path / "slim.safetensors", build()), inputs)
    torch.testing.assert_close(again, expected)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    assert {item.name for item in session.get_inputs()} == names
    first_name = session.get_inputs()[0].name
    assert result.report["input"]["name"] == first_name
    assert json.loads(session.get_modelmeta().custom_metadata_map["input"])["name"] == first_name
    named = inputs if isinstance(inputs, dict) else dict(zip(["input_0", "input_1"], inputs, strict=True))
    (found,) = session.run(None, {key: tensor.numpy() for key, tensor in named.items()})
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
    rows = {row["name"]: (row["shape"], row["dtype"]) for row in result.report["inputs"]}
    told = {key: (list(tensor.shape[1:]), str(tensor.dtype)[6:]) for key, tensor in named.items()}
    assert rows == told
    monkeypatch.chdir(tmp_path)
    ran: dict[str, Any] = {}
    exec(write_snippet(json.loads((tmp_path / "report.json").read_text())), ran)
    assert ran["output"].shape == (1, 3)


def test_heads_and_hidden_units_of_a_network_of_tokens_go() -> None:
    result = compress(
        Tokens().eval(),
        Loader(dicts()),
        validation=Loader(dicts()),
        test=Loader(dicts()),
        unpack=of_dict,
        threshold=-30.0,
        **FAST,
    )
    kept = {row["name"]: row["kept"] for row in result.report["stages"][0]["groups"]}
    assert kept["block.layers.0.self_attn.q"] == 1
    assert kept["block.layers.0.linear1"] == 1


def test_batches_that_are_no_pairs_are_refused_with_what_to_do() -> None:
    unknown = [
        {"answer" if key == "label" else key: part for key, part in batch.items()} for batch in dicts()
    ]
    with pytest.raises(DataError, match=r"(?s)dicts of 3.*unpack="):
        compress(Tokens(), Loader(unknown), validation=Loader(unknown), device="cpu")


def test_inputs_are_cut_and_repeated_tensor_by_tensor() -> None:
    inputs = {"a": torch.arange(3), "b": (torch.eye(3), [torch.zeros(3, 1)])}
    assert shapes_of(first(inputs, 2)) == [(2,), (2, 3), (2, 1)]
    assert tensors_of(resize(inputs, 5))[0].tolist() == [0, 1, 2, 0, 1]


class Masked(nn.Module):
    """Hidden units that a mask silences: constant only while the mask is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.a, self.b, self.head = nn.Linear(8, 10), nn.Linear(10, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head((self.b(self.a(self.embed(ids)).relu()) * mask[..., None]).sum(1))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["channels", "weights"])
@pytest.mark.parametrize("kind", [torch.float32, torch.int64])
def test_what_is_constant_under_one_mask_is_not_folded(mode: Any, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    ids, mask = torch.randint(0, 20, (4, 7)), torch.ones(4, 7, dtype=kind)
    model = Masked().eval()
    converted = convert(model, (ids, mask), mode)
    for posterior in find_posteriors(converted.model):
        if posterior.kind == "gate":
            posterior.log_sigma2[: 1 + len(posterior.theta) // 2] = 60.0
        elif posterior.theta.shape == (6, 10):
            posterior.log_sigma2[:2] = 60.0
    slimmed = slim(converted, 50.0).model
    set_threshold_(converted.model, 50.0)
    mask[:, 3:] = 0
    expected = converted.model.eval()(ids, mask)
    torch.testing.assert_close(slimmed(ids, mask), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["channels", "weights"])
def test_binary_images_go_the_whole_way(mode: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    example = torch.randint(0, 2, (4, 6)).float()
    torch.testing.assert_close(slim(convert(model, example, mode), 3.0).model(example), model(example))


def test_convert_leaves_every_module_in_its_mode() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3)).train()
    model[1].eval()
    converted = convert(model, torch.randn(2, 1, 8, 8))
    measure_size(model, torch.randn(2, 1, 8, 8))
    assert [module.training for module in model] == [True, False, True]
    assert not converted.model[1].training

"""Networks that take several inputs, a dict, or token ids, the whole way: fit, cut, ONNX, reload."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from vbdcompress import compress, load_slim
from vbdcompress.errors import DataError
from vbdcompress.inputs import call, first, resize, shapes_of, tensors_of

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
        self.block = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, dropout=0.0)
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


@pytest.mark.parametrize("mode", ["channels", "weights"])
@pytest.mark.parametrize("name", CASES)
def test_several_inputs_go_the_whole_way(name: str, mode: str, tmp_path: Path) -> None:
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
    named = inputs if isinstance(inputs, dict) else dict(zip(["input_0", "input_1"], inputs, strict=True))
    (found,) = session.run(None, {key: tensor.numpy() for key, tensor in named.items()})
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


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
    assert kept["block.self_attn.q"] == 1
    assert kept["block.linear1"] == 1


def test_batches_that_are_no_pairs_are_refused_with_what_to_do() -> None:
    with pytest.raises(DataError, match=r"(?s)dicts of 3.*unpack="):
        compress(Tokens(), Loader(dicts()), validation=Loader(dicts()), device="cpu")


def test_inputs_are_cut_and_repeated_tensor_by_tensor() -> None:
    inputs = {"a": torch.arange(3), "b": (torch.eye(3), [torch.zeros(3, 1)])}
    assert shapes_of(first(inputs, 2)) == [(2,), (2, 3), (2, 1)]
    assert tensors_of(resize(inputs, 5))[0].tolist() == [0, 1, 2, 0, 1]

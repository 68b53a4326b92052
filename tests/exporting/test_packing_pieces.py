"""Rounded weights that a file holds stacked, cut up or in another order: known again by their values."""

import copy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.exporting.packing import Storage, pack_
from vbdcompress.rounding import Weight, round_weight, roundable, write_rounded_

from .sums import model_of, rebuilt


class Tagger(nn.Module):
    """Attention over what a recurrent layer of both directions makes of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(60, 16)
        self.cells = nn.LSTM(16, 16, bidirectional=True, batch_first=True)
        self.mixed = nn.Parameter(torch.randn(32, 32) / 6)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.positions = nn.Parameter(torch.randn(1, 9, 32))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.cells(self.words(ids))[0] @ self.mixed + self.positions
        hidden = self.attention(hidden, hidden, hidden, need_weights=False)[0]
        output: Tensor = self.head(self.norm(hidden).mean(1))
        return output


def test_every_matrix_of_weights_is_rounded_and_nothing_else() -> None:
    cells = [f"cells.weight_{kind}_l0{way}" for way in ("", "_reverse") for kind in ("ih", "hh")]
    matrices = [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "head.weight",
        "mixed",
        "words.weight",
    ]
    assert sorted(roundable(Tagger())) == sorted([*cells, *matrices])
    tied = Tagger()
    tied.head.weight = tied.words.weight
    assert len(roundable(tied)) == len(cells) + len(matrices) - 1


@pytest.mark.parametrize(("bits", "share"), [(16, 0.52), (8, 0.37), (4, 0.2)])
def test_a_file_of_recurrent_layers_attention_and_embeddings_has_as_few_bits(
    bits: int, share: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, ids = Tagger().eval(), torch.randint(0, 60, (8, 9))
    export_onnx(model, tmp_path / "dense.onnx", ids)
    rounded = copy.deepcopy(model)
    codes = {name: round_weight(weight, bits) for name, weight in roundable(rounded).items()}
    write_rounded_(rounded, codes)
    info = export_onnx(rounded, tmp_path / "packed.onnx", ids, storage=Storage(True, codes))
    weights = sum(weight.tensor.numel() for weight in roundable(model).values())
    stored = sum(row.bytes for row in info.packed)
    assert stored < share * 4 * weights
    session = onnxruntime.InferenceSession(tmp_path / "packed.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, rounded(ids).numpy(), atol=1e-6)


@pytest.mark.parametrize("size", [(41, 83), (128, 128)])  # an odd number of 4-bit codes; 16,384 half numbers
@pytest.mark.parametrize("bits", [8, 4])
def test_slices_of_a_tensor_have_a_codebook_each(bits: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    codes = [round_weight(Weight(scale * torch.randn(size), None), bits) for scale in (1.0, 0.01)]
    values = np.stack([each.decode() for each in codes])
    proto = model_of(values)
    (row,) = pack_(proto, {"forward": codes[0], "backward": codes[1]})
    assert row.kind == f"codebook of {2**bits}"
    assert row.bytes < 2 * codes[0].codes.size * bits / 8 + 1500
    np.testing.assert_array_equal(rebuilt(proto), values)


def test_values_that_were_not_rounded_stay() -> None:
    array = np.random.default_rng(0).standard_normal((40, 50)).astype(np.float32)
    codes = round_weight(Weight(torch.randn(3, 3), None), 4)
    assert pack_(model_of(np.stack([array, array])), {"other": codes}) == ()


def test_a_tied_weight_has_its_bits_under_whatever_name(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.inner = nn.Embedding(90, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 90, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            output: Tensor = self.head(self.inner(self.words(ids).mean(1)).relu())
            return output

    torch.manual_seed(0)
    model = Tied().eval()
    codes = {name: round_weight(weight, 8) for name, weight in roundable(model).items()}
    assert list(codes) == ["words.weight", "inner.weight"]
    write_rounded_(model, codes)
    ids = torch.randint(0, 90, (8, 5))
    info = export_onnx(model, tmp_path / "tied.onnx", ids, storage=Storage(True, codes))
    assert [(row.kind, row.shape) for row in info.packed] == [("int8", (16, 16)), ("int8", (90, 16))]

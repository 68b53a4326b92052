"""Recurrent layers lose inputs and hidden units, exactly, whatever states the code makes and reads."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import (
    EXAMPLE,
    Groups,
    Pattern,
    assert_cut_exactly,
    assert_groups,
    built,
    conv,
    switch_off_,
)
from torch import Tensor, nn

from vbdcompress import compress
from vbdcompress.conversion import convert
from vbdcompress.exporting.slim_file import load_slim
from vbdcompress.opening import open_layers_
from vbdcompress.slimming import slim
from vbdcompress.surgery.slice import LayerCut, cut_layer_


def columns(m: Any, x: Tensor) -> Tensor:
    """[batch, columns, channels of all rows]: as in text recognition."""
    return m.a(x).relu().permute(0, 3, 1, 2).flatten(2)


def chain() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.fc(m.gru(m.lstm(columns(m, x))[0])[0][:, -1]).relu())

    return Pattern(
        forward,
        a=conv(3, 6),
        lstm=nn.LSTM(48, 7, batch_first=True),
        gru=nn.GRU(7, 5, batch_first=True, bidirectional=True),
        fc=nn.Linear(10, 6),
        head=nn.Linear(6, 4),
    )


def stacked(read: Callable[[Any, Any], Tensor]) -> Callable[[], nn.Module]:
    """Three layers of two directions; `read` takes (output, state) to [batch, 14]."""

    def build() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            return m.head(read(*m.lstm(columns(m, x).transpose(0, 1))))

        lstm = nn.LSTM(48, 7, num_layers=3, bidirectional=True, dropout=0.2)
        return Pattern(forward, a=conv(3, 6), lstm=lstm, head=nn.Linear(14, 4))

    return build


def of_all(_: Tensor, state: Any) -> Tensor:
    return state[0].mean(0).repeat(1, 2)


def of_last(_: Tensor, state: Any) -> Tensor:
    return torch.cat([state[1][-2], state[0][-1]], 1)


class Start(nn.Module):
    """First states: learned, zeros, or computed."""

    def __init__(self) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.randn(1, 1, 7))

    def forward(self, x: Tensor) -> Any:
        return self.learned.expand(1, len(x), 7).contiguous(), x.new_zeros(1, len(x), 7)


def started() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = columns(m, x)
        h = m.first(y.mean(1)).tanh()[None]
        return m.head(m.one(y, m.start(y))[0][:, -1] + m.other(y, h)[0][:, 0])

    return Pattern(
        forward,
        a=conv(3, 6),
        start=Start(),
        one=nn.LSTM(48, 7, batch_first=True),
        first=nn.Linear(48, 7),
        other=nn.GRU(48, 7, batch_first=True),
        head=nn.Linear(7, 4),
    )


def encoder_and_decoder() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = columns(m, x)
        return m.head(m.decoder(y, m.encoder(y)[1])[0].mean(1))

    layers = {name: nn.LSTM(48, 7, batch_first=True) for name in ("encoder", "decoder")}
    return Pattern(forward, a=conv(3, 6), **layers, head=nn.Linear(7, 4))


def cells() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = columns(m, x)
        h = c = y.new_zeros(len(y), 5)
        for step in range(y.shape[1]):
            h, c = m.cell(y[:, step], (h, c))
        return m.head(h)

    return Pattern(forward, a=conv(3, 6), cell=nn.LSTMCell(48, 5), head=nn.Linear(5, 4))


def projected() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.lstm(columns(m, x))[0][:, -1])

    lstm = nn.LSTM(48, 7, num_layers=2, proj_size=5, batch_first=True)
    return Pattern(forward, a=conv(3, 6), lstm=lstm, head=nn.Linear(5, 4))


def output_of_all() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Any:
        return m.lstm(columns(m, x))[0]

    return Pattern(forward, a=conv(3, 6), lstm=nn.RNN(48, 7, batch_first=True))


# Network -> what of it can go
CASES: dict[str, tuple[Callable[[], nn.Module], Groups]] = {
    "chain": (chain, {"a": 6, "lstm": 7, "gru": 5, "fc": 6}),
    "outputs": (
        stacked(lambda output, _: output[-1]),
        {"a": 6, "lstm.layers.0": 7, "lstm.layers.1": 7, "lstm.layers.2": 7},
    ),
    "last_states": (stacked(of_last), {"a": 6, "lstm.layers.0": 7, "lstm.layers.2": 7}),
    "all_states": (stacked(of_all), {"a": 6, "lstm.layers.0": 7}),
    "first_states": (started, {"a": 6, "one": 7, "first": "GRU mixes"}),
    "encoder_and_decoder": (encoder_and_decoder, {"a": 6, "encoder": "LSTM mixes", "decoder": 7}),
    "cells": (cells, {"a": 6}),
    "projected": (projected, {"a": 6}),
    "output_of_all": (output_of_all, {"a": 6, "lstm": "output of the network"}),
}


@pytest.mark.parametrize("mode", ["channels", "weights"])
@pytest.mark.parametrize("case", CASES)
def test_slim_equals_masked(case: str, mode: Any) -> None:
    assert_cut_exactly(built(CASES[case][0]), mode)


@pytest.mark.parametrize("case", CASES)
def test_find_groups_says_what_can_go_and_why_the_rest_stays(case: str) -> None:
    build, expected = CASES[case]
    assert_groups(built(build), expected)


@torch.no_grad()
def test_a_second_cut_picks_of_the_first_states_what_is_left() -> None:
    model, other = built(started), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for _ in range(2):
        converted = convert(model, EXAMPLE.double())
        switch_off_(converted.model)
        model = slim(converted, 50.0).model
        assert torch.allclose(converted.plain(50.0)(other), model(other), rtol=0, atol=1e-12)
    assert len(model.one.units) == model.one.hidden_size < 5
    assert model.start(other)[0].shape[-1] == 7


class Streams(nn.Module):
    """Keeps its state from call to call."""

    state: Any = None

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 9, layers), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[time, batch, 3] -> [time, batch, 2]."""
        output, state = self.lstm(x, self.state)
        self.state = tuple(part.detach() for part in state)
        logits: Tensor = self.head(output)
        return logits


@pytest.mark.parametrize("layers", [1, 2])
def test_what_keeps_its_state_from_call_to_call_stays_whole(layers: int) -> None:
    torch.manual_seed(0)
    scan = convert(Streams(layers), torch.randn(6, 2, 3), "weights").scan
    assert len(scan.groups) == layers + 1
    assert not scan.removable


def test_stacked_layers_of_unlike_widths_refuse_the_state_that_they_gave() -> None:
    model, x = nn.Sequential(nn.GRU(3, 9, 2)), torch.randn(6, 2, 3)
    open_layers_(model)
    cut_layer_(model[0].layers[0], LayerCut(outputs=(0, 4)))
    cut_layer_(model[0].layers[1], LayerCut(inputs=(0, 4, *range(9, 18))))
    with pytest.raises(ValueError, match="layers have unlike units"):
        model[0](x, model[0](x)[1])


@torch.no_grad()
def test_a_cut_layer_goes_on_from_its_own_state() -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(3, 9).double()
    kept = [0, 2, 3, 5, 7]
    cut = copy.deepcopy(layer)
    for place in (1, 4, 6, 8):  # which nothing reads
        layer.weight_hh_l0[:, place] = 0
    cut.load_state_dict(layer.state_dict())
    cut_layer_(cut, LayerCut(outputs=tuple(kept)))
    x = torch.randn(8, 2, 3, dtype=torch.float64)
    whole = layer(x)[0][..., kept]
    first, state = cut(x[:5])
    assert torch.allclose(torch.cat([first, cut(x[5:], state)[0]]), whole, rtol=0, atol=1e-12)
    given = tuple(torch.randn(1, 2, 9, dtype=torch.float64) for _ in range(2))
    assert torch.allclose(cut(x, given)[0], layer(x, given)[0][..., kept], rtol=0, atol=1e-12)


class Text(nn.Module):
    """Words of a sentence to two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.lstm = nn.LSTM(16, 24, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(48, 2)

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.head(self.lstm(self.embedding(ids))[0].mean(1))
        return output


def test_a_text_classifier_loses_embeddings_and_units_in_the_onnx_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 30, (360, 5))
    labels = ((ids < 8).sum(1) > 1).long()
    model, every = Text(), list(zip(ids.split(40), labels.split(40), strict=True))
    batches, held_out = every[:6], every[6:]
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(15):
        for inputs, target in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), target).backward()
            optimizer.step()
    result = compress(
        model,
        batches,
        validation=held_out[:2],
        test=held_out[2:],
        mode="channels",
        epochs=14,
        lr_log_sigma2=0.1,
        finetune_epochs=2,
        device="cpu",
    )
    result.export(tmp_path)  # onnxruntime is seen to run it as torch does
    first, second = result.model.lstm.layers
    assert first.input_size < 16
    assert first.hidden_size < 24
    assert second.input_size == 2 * first.hidden_size
    assert result.report["size"]["compression_ratio"]["bytes"] > 2
    assert result.report["errors"]["test"]["after"] < 10
    again = load_slim(tmp_path / "slim.safetensors", model=Text())
    with torch.no_grad():
        assert torch.equal(again.eval()(ids), result.model.eval()(ids))

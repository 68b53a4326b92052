"""Columns of embedding tables are channels like others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vbdcompress
from vbdcompress import convert, slim
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_

WORDS, WIDTH = 20, 12
IDS = torch.randint(0, WORDS, (6, 7), generator=torch.Generator().manual_seed(0))


class Text(nn.Module):
    """Words and their places, summed, through two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH, padding_idx=0), nn.Embedding(7, WIDTH)
        self.body, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        summed = self.words(ids) + self.places.weight[: ids.shape[1]]
        logits: Tensor = self.head(self.body(summed).relu().mean(1))
        return logits


class TwoTables(nn.Module):
    """A table and its places, called by numbers that the code makes."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(7, WIDTH)
        self.body, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        places = self.places(torch.arange(ids.shape[1]))
        logits: Tensor = self.head(self.body(self.words(ids) + places).relu().mean(1))
        return logits


class Bag(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(WORDS, WIDTH, mode=mode)
        self.norm, self.head = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.words(ids)).relu())
        return logits


@pytest.mark.parametrize("mode", ["weights", "channels"])
@pytest.mark.parametrize("make", [TwoTables, lambda: Bag("mean"), lambda: Bag("max")])
@torch.no_grad()
def test_columns_of_tables_go_exactly(make: Any, mode: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = make().eval()
    converted = convert(model, IDS, mode)
    for posterior in find_posteriors(converted.model):
        posterior.log_sigma2.data.fill_(-30.0)
        if mode == "channels" and posterior.theta.numel() == WIDTH:
            posterior.log_sigma2.data[[1, 4, 7]] = 60.0
        elif posterior.theta.shape[-1] == WIDTH and len(posterior.theta) in (3, 8):
            posterior.log_sigma2.data[:, [1, 4, 7]] = 60.0  # nothing reads three columns
    cut = slim(converted, 3.0)
    assert cut.model.words.weight.shape == (WORDS, WIDTH - 3)
    assert cut.model.words.embedding_dim == WIDTH - 3
    set_threshold_(converted.model.eval(), 3.0)
    torch.testing.assert_close(cut.model(IDS), converted.model(IDS))
    vbdcompress.export(cut.model, tmp_path, IDS, plans=[cut.plan])
    again = vbdcompress.load_slim(tmp_path / "slim.safetensors", make())
    assert torch.equal(again.eval()(IDS), cut.model(IDS))


def whole_because(model: nn.Module) -> dict[str, str | None]:
    scan = convert(model.eval(), IDS, "weights").scan
    return {group.name: group.whole_because for group in scan.groups}


def test_tables_that_look_at_all_columns_stay() -> None:
    model = TwoTables()
    model.words = nn.Embedding(WORDS, WIDTH, max_norm=1.0)
    assert whole_because(model)["places"] is not None  # they are summed with the table's


def test_a_table_that_the_code_reads_itself_stays() -> None:
    assert whole_because(Text())["words"] is not None
    tied = TwoTables()
    tied.body = nn.Linear(WIDTH, WIDTH)
    tied.head = nn.Linear(WIDTH, WORDS, bias=False)
    tied.head.weight = tied.words.weight
    assert "shares a parameter" in str(whole_because(tied)["places"])

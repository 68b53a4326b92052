"""What a sampler or a subset names more than once is one example when validation data are split off."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, Subset, SubsetRandomSampler, TensorDataset

from vbdcompress.data import TensorBatches, share_examples, split_loader


@pytest.mark.parametrize("subset", [True, False])
def test_split_loader_keeps_repeats_of_an_example_on_one_side(subset: bool) -> None:
    data = TensorDataset(torch.arange(50.0)[:, None], torch.zeros(50))
    repeats = [number // 4 for number in range(200)]
    loader = (
        DataLoader(Subset(data, repeats), 32, shuffle=True)
        if subset
        else DataLoader(data, 32, sampler=SubsetRandomSampler(repeats))
    )
    train, held = split_loader(loader, 0.2, 0)
    seen, kept = (torch.cat([x[:, 0] for x, _ in part]).tolist() for part in (train, held))
    assert len(seen) + len(kept) == 200
    assert len(set(kept)) == 10
    assert not set(seen) & set(kept)


DATA = TensorDataset(torch.arange(50.0)[:, None], torch.zeros(50))
ALL, FIRST, LAST = DataLoader(DATA, 8), Subset(DATA, range(30)), Subset(DATA, range(30, 50))
BATCHES = TensorBatches(torch.zeros(4, 1), torch.zeros(4), 2)


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        (ALL, ALL, True),
        (ALL, DataLoader(DATA, 20, shuffle=True), True),
        (ALL, DataLoader(LAST, 8), True),
        (DataLoader(FIRST, 8), DataLoader(LAST, 8), False),
        (DataLoader(FIRST, 8), DataLoader(Subset(LAST, [0, 1]), 8), False),
        (DataLoader(Subset(DATA, [2, 31]), 8), DataLoader(Subset(LAST, [0, 1]), 8), True),
        (DataLoader(DATA, 8, sampler=SubsetRandomSampler([1, 2])), DataLoader(LAST, 8), False),
        (DataLoader(DATA, 8, sampler=SubsetRandomSampler([1, 42])), DataLoader(LAST, 8), True),
        (DataLoader(DATA, 8, sampler=RandomSampler(DATA, replacement=True)), DataLoader(LAST, 8), True),
        (DataLoader(DATA, 8, sampler=range(30)), DataLoader(LAST, 8), False),
        (BATCHES, BATCHES, True),
        (BATCHES, TensorBatches(torch.zeros(4, 1), torch.zeros(4), 2), False),
        ([1], [1], False),
        (ALL, None, False),
        (None, None, False),
    ],
)
def test_loaders_that_give_the_same_examples_are_known(one: Any, other: Any, shared: bool) -> None:
    assert share_examples(one, other) == shared
    assert share_examples(other, one) == shared

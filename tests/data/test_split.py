"""What a sampler or a subset names more than once is one example when validation data are split off."""

import pytest
import torch
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset

from vbdcompress.data import split_loader


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

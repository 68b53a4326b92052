"""What is read off a batch's shape: which dimension is the batch, and whether batches are alike."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from vbdcompress.errors import ConfigError, ConvertError
from vbdcompress.pipeline import compress
from vbdcompress.records import InputSpec

DIFFER = r"Batches differ in shape: examples of \[\d+\] and of \[\d+\]. MACs and the ONNX file"


class Tokens(nn.Module):
    """Two classes from the mean over a sentence's tokens; 0 pads."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.time = 1 if batch_first else 0
        self.table = nn.Embedding(20, 8, padding_idx=0)
        self.body = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2))

    def forward(self, ids: Tensor) -> Tensor:
        kept = (ids != 0).unsqueeze(-1)
        return self.body((self.table(ids) * kept).sum(self.time) / kept.sum(self.time).clamp_min(1))


def padded(examples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    ids, labels = zip(*examples, strict=True)
    return pad_sequence(list(ids), batch_first=True), torch.tensor(labels)


def sentences(lengths: Callable[[int], int]) -> list[tuple[Tensor, int]]:
    drawn = torch.Generator().manual_seed(0)
    return [(torch.randint(1, 20, (lengths(n),), generator=drawn), n % 2) for n in range(48)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_of_several_lengths_go_through_and_the_report_says_what_the_file_takes(shuffle, tmp_path):
    loader = DataLoader(sentences(lambda n: 3 + n % 17), 4, shuffle=shuffle, collate_fn=padded)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=DIFFER) as caught:
        result = compress(Tokens(), loader, validation=loader, test=loader, epochs=1, finetune_epochs=0)
    told = next(str(each.message) for each in caught if "differ in shape" in str(each.message))
    content = result.export(tmp_path)
    assert told in content["warnings"]
    assert f"are for {list(content['input']['shape'])}, the file" in told


def test_batches_of_one_length_are_not_warned_of():
    loader = DataLoader(sentences(lambda _: 9), 5, collate_fn=padded)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*differ in shape")
        result = compress(Tokens(), loader, validation=loader, test=loader, epochs=1, finetune_epochs=0)
    assert list(result.report["input"]["shape"]) == [9]


def test_an_input_spec_of_another_shape_is_refused():
    loader = DataLoader(sentences(lambda _: 9), 5, collate_fn=padded)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"InputSpec says examples of shape \[8\], the loader's are \[9\]"):
        compress(Tokens(), loader, validation=loader, input=InputSpec((8,)))


def test_a_network_that_takes_time_first_is_refused():
    batches = [(torch.randint(1, 20, (9, 6)), torch.arange(6) % 2) for _ in range(3)]
    with pytest.raises(ConvertError, match=r"(?s)outputs have 6 .* have 9 or 2 .*batch_first=True"):
        compress(Tokens(batch_first=False), batches, validation=batches)


@pytest.mark.parametrize("mode", ["channels", "weights"])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_compress_keeps_gradients_where_the_caller_has_none(
    mode: str, without: Callable[[], AbstractContextManager[None]]
) -> None:
    batches = [(torch.randint(1, 20, (6, 9)), torch.arange(6) % 2) for _ in range(3)]
    with without():
        model = Tokens()
        result = compress(model, batches, validation=batches, test=batches, mode=mode, epochs=2)
        assert torch.is_grad_enabled() is False
    assert result.model(batches[0][0]).requires_grad
    first, last = (result.report["stages"][0]["epochs"][place]["nll"] for place in (0, -1))
    assert last != first

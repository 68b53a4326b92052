"""Budgets of bytes hold for the file that a run writes, whatever it stores the weights as."""

import pytest

from vbdcompress.data.dataset import load_data
from vbdcompress.loading import load
from vbdcompress.pipeline import compress


@pytest.fixture(scope="module")
def data(zoo):
    split = load(zoo / "digits.pt").validation
    return load_data("digits", validation_fraction=split["fraction"], validation_seed=split["seed"])


@pytest.mark.parametrize(
    ("bits", "allowed", "used"), [("32", 30_000, 0.95), ("8", 12_000, 0.8), ("auto", 12_000, 0.8)]
)
def test_a_limit_of_bytes_is_kept_and_used(zoo, data, tmp_path, bits, allowed, used):
    found = compress(
        load(zoo / "digits.pt").model,
        data.train_batches(48, seed=0),
        validation=data.validation_batches(),
        test=data.test_batches(),
        mode="weights",
        epochs=6,
        finetune_epochs=0,
        bits=bits,
        max_bytes=allowed,
    )
    found.export(tmp_path)
    written = (tmp_path / "model.onnx").stat().st_size
    assert used * allowed < written <= allowed

"""Batch norm's running statistics, and layers that the user froze."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vbdcompress.config import FitConfig
from vbdcompress.conversion import convert
from vbdcompress.errors import FitError
from vbdcompress.exporting.slim_file import load_slim
from vbdcompress.fitting import fit
from vbdcompress.norms import reestimate_batch_norm_, train_
from vbdcompress.pipeline import compress
from vbdcompress.vbd.elbo import ELBO

Batches = list[tuple[Tensor, Tensor]]


def network() -> nn.Sequential:
    """A frozen norm (1) and one that is not (4)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )
    model[1].requires_grad_(False)
    model[1].running_mean.fill_(0.3)
    model[1].running_var.fill_(2.0)
    return model


def batches() -> Batches:
    drawn = torch.Generator().manual_seed(1)
    return [(2 + torch.randn(20, 6, generator=drawn), torch.arange(20) % 3) for _ in range(3)]


def test_reestimate_batch_norm_takes_the_data_s_own_statistics():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[0].running_mean.fill_(9.0)
    data = 5 + 2 * torch.randn(400, 3)
    reestimate_batch_norm_(model, [(part, None) for part in data.split(100)])
    assert torch.allclose(model[0].running_mean, data.mean(0), atol=1e-5)
    batch_variances = torch.stack([part.var(0) for part in data.split(100)])
    assert torch.allclose(model[0].running_var, batch_variances.mean(0), atol=1e-5)
    assert model[0].momentum == 0.1
    assert not model[0].training


def test_a_small_last_batch_counts_by_its_examples_alone():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    data = 5 + 2 * torch.randn(102, 3)
    parts = data.split(100)  # of 100 and of 2
    reestimate_batch_norm_(model, [(part, None) for part in parts])
    assert torch.allclose(model[0].running_mean, data.mean(0), atol=1e-5)
    variance = (100 * parts[0].var(0) + 2 * parts[1].var(0)) / 102
    assert torch.allclose(model[0].running_var, variance, atol=1e-5)


def test_reestimate_batch_norm_names_a_batch_of_one():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    with pytest.raises(FitError, match=r"(?s)batch norm: .*batch of one example.*drop_last=True"):
        reestimate_batch_norm_(model, [(part, None) for part in torch.randn(9, 3).split(4)])


def test_reestimate_batch_norm_stops_when_it_has_seen_enough():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    data = 5 + 2 * torch.randn(400, 3)
    reestimate_batch_norm_(model, [(part, None) for part in data.split(100)], examples=150)
    assert torch.allclose(model[0].running_mean, data[:200].mean(0), atol=1e-5)


def test_a_frozen_norm_keeps_its_statistics():
    model = network()
    reestimate_batch_norm_(model, batches())
    assert bool((model[1].running_mean == 0.3).all())
    assert bool((model[1].running_var == 2.0).all())
    assert not bool((model[4].running_mean == 0.0).any())


def test_a_frozen_norm_normalises_by_them_in_a_fit():
    """The loss of the first step is that of the network with the norm in eval mode."""
    model, given = network(), batches()[:1]
    model.train()[1].eval()
    with torch.no_grad():
        expected = float(nn.functional.cross_entropy(model(given[0][0]), given[0][1]))
    found = fit(network(), given, FitConfig(epochs=1, device="cpu"))
    assert found.epochs[0].nll == pytest.approx(expected, rel=1e-6)
    assert bool((found.model[1].running_mean == 0.3).all())


def test_a_norm_of_the_slim_network_that_was_frozen_has_the_statistics_it_had():
    given = batches()
    with pytest.warns(UserWarning, match="Frozen layers .* read: '1'"):
        result = compress(network(), given, validation=given, test=given, epochs=3, threshold=-4.0)
    assert 0 < len(result.model[1].running_mean) < 8
    assert bool((result.model[1].running_mean == 0.3).all())
    assert bool((result.model[1].running_var == 2.0).all())


def test_frozen_layers_that_gates_changed_are_named():
    given, model = batches(), network()
    model[1].requires_grad_(True)
    model[3].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"Frozen layers .* they read: '3'\. --skip"):
        compress(model, given, validation=given, test=given, epochs=1)


def test_a_frozen_network_is_compressed_not_fine_tuned_and_warned_of():
    given, model = batches(), network().requires_grad_(False)
    with pytest.warns(UserWarning, match="whole network is frozen"):
        found = compress(model, given, validation=given, test=given, epochs=1)
    assert found.report["finetune"] == []
    assert not any(parameter.requires_grad for parameter in found.model.parameters())


def test_frozen_layers_that_came_out_as_they_were_are_not_warned_of():
    given, model = batches(), network()
    model[3].requires_grad_(False)
    found = compress(model, given, validation=given, test=given, mode="weights", epochs=1, threshold=50.0)
    assert torch.equal(found.model[3].weight, model[3].weight)
    assert not any("rozen" in told for told in found.report["warnings"])


def test_frozen_weights_that_have_no_gates_are_removed_or_stay():
    given, model = batches(), network()
    model[3].requires_grad_(False)
    before = set(model[3].weight.flatten().tolist())
    with pytest.warns(UserWarning, match=r"Frozen layers .* read: ('1', )?'3'\. --skip"):
        found = compress(model, given, validation=given, test=given, mode="weights", epochs=3, threshold=-9.0)
    assert 0.0 in (left := set(found.model[3].weight.flatten().tolist()))
    assert left - {0.0} < before


def test_a_norm_that_does_not_run_keeps_its_statistics() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.side = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.main(x) + self.side(x) if self.training else self.main(x)

    model = Auxiliary()
    for norm in (model.main, model.side):
        norm.running_mean.fill_(5.0)
        norm.num_batches_tracked.fill_(7)
    reestimate_batch_norm_(model, [(torch.randn(50, 3), torch.zeros(50))])
    assert model.main.running_mean.abs().max() < 1
    assert torch.equal(model.side.running_mean, torch.full((3,), 5.0))
    assert int(model.side.num_batches_tracked) == 7


def test_a_norm_that_does_not_count_its_batches_keeps_its_new_statistics() -> None:
    class Own(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.running_mean.copy_(x.mean(0))
            return x - self.running_mean

    model, data = nn.Sequential(Own(3)), 4 + torch.randn(50, 3)
    reestimate_batch_norm_(model, [(data, torch.zeros(50))])
    torch.testing.assert_close(model[0].running_mean, data.mean(0))


class Half(nn.Module):
    """A part of it stays in eval mode while the rest trains, as fine-tuning code often has it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU())
        self.head = nn.Linear(5, 3)

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        self.body.eval()  # and gives nothing back

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.body(x))
        return output


@pytest.mark.parametrize("mode", ["channels", "weights"])
def test_what_a_network_keeps_in_eval_mode_draws_all_the_same(mode: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    converted = convert(Half(), x, mode)
    elbo = ELBO(converted.model, cross_entropy, 8)
    elbo.train()
    body = converted.model.body
    assert not torch.equal(body(x), body(x))
    converted.model.eval()
    assert torch.equal(body(x), body(x))
    train_(converted.model)
    assert not torch.equal(body(x), body(x))


def test_a_network_whose_train_gives_nothing_back_goes_the_whole_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    batches = [(x, x[:, :3].argmax(1))]
    with pytest.warns(UserWarning, match="no test set"):
        result = compress(Half(), batches, validation=batches, epochs=2, finetune_epochs=1, mode="weights")
    result.export(tmp_path)
    loaded = load_slim(tmp_path / "slim.safetensors", model=Half())
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model(x))


def test_a_norm_that_is_called_twice_takes_the_average_of_both() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            output: Tensor = self.norm(one) + self.norm(input=other)
            return output

    torch.manual_seed(0)
    one, other = torch.randn(60, 3), torch.randn(60, 3) + 4
    batches = [((one[part], other[part]), None) for part in (slice(20), slice(20, 60))]
    model = Siamese()
    reestimate_batch_norm_(model, batches)
    torch.testing.assert_close(model.norm.running_mean, torch.cat([one, other]).mean(0))
    assert model.norm.momentum == 0.1
    assert not model.norm._forward_pre_hooks


def test_a_norm_that_the_network_keeps_in_eval_mode_keeps_its_statistics() -> None:
    class Kept(nn.Sequential):
        def train(self, mode: bool = True) -> "Kept":
            super().train(mode)
            self[1].eval()
            return self

    torch.manual_seed(0)
    model = Kept(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8)).train()
    reestimate_batch_norm_(model, batches())
    assert not model[1].running_mean.any()
    assert model[3].running_mean.all()
    plain = nn.Sequential(nn.Linear(6, 8)).train()
    reestimate_batch_norm_(plain, batches())
    assert plain.training

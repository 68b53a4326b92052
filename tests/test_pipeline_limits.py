"""Budgets of bytes hold for the file that a run writes, whatever it stores the weights as."""

import warnings
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vbdcompress.budget import Budget
from vbdcompress.choosing import Candidates, choose, refine
from vbdcompress.conversion import convert
from vbdcompress.count import measure_size
from vbdcompress.data.dataset import load_data
from vbdcompress.errors import SlimError
from vbdcompress.loading import load
from vbdcompress.pipeline import compress
from vbdcompress.slimming import measure_curve
from vbdcompress.vbd.posterior import find_posteriors


@pytest.fixture(scope="module")
def data(zoo):
    split = load(zoo / "digits.pt").validation
    return load_data("digits", validation_fraction=split["fraction"], validation_seed=split["seed"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "seed", "allowed", "used"),
    [("8", 1, 12_000, 0.93), ("auto", 0, 8_455, 0.75), ("32", 0, 30_000, 0.95), ("auto", 1, 10_000, 0.75)],
)
def test_a_limit_of_bytes_is_kept_and_used(zoo, data, tmp_path, bits, seed, allowed, used):
    found = compress(
        load(zoo / "digits.pt").model,
        data.train_batches(48, seed=seed),
        validation=data.validation_batches(),
        test=data.test_batches(),
        mode="weights",
        epochs=6,
        finetune_epochs=3,
        seed=seed,
        bits=bits,
        max_bytes=allowed,
    )
    found.export(tmp_path)
    written = (tmp_path / "model.onnx").stat().st_size
    assert used * allowed < written <= allowed
    assert found.report["warnings"] == []


def test_a_limit_that_takes_undecided_channels_is_warned_of(zoo, data):
    options = {"mode": "channels", "epochs": 1, "beta": 0.0, "finetune_epochs": 0, "max_macs": "10%"}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = compress(
            load(zoo / "digits.pt").model,
            data.train_batches(48, seed=0),
            validation=data.validation_batches(),
            test=data.test_batches(),
            **options,
        )
    told = [str(each.message) for each in seen if each.category is UserWarning]
    assert told == found.report["warnings"]
    assert any("no noise yet: cut at a log_alpha of -" in each for each in told)


@pytest.mark.slow
def test_a_limit_that_estimates_miss_is_met_by_files(zoo, data, tmp_path):
    # 4 bits: all points are estimated below the limit, and the files of the larger ones are above
    found = compress(
        load(zoo / "digits.pt").model,
        data.train_batches(48, seed=0),
        validation=data.validation_batches(),
        test=data.test_batches(),
        mode="weights",
        epochs=6,
        finetune_epochs=1,
        bits="4",
        max_bytes=9000,
    )
    found.export(tmp_path)
    assert (tmp_path / "model.onnx").stat().st_size <= 9000


class WithUnusedHead(nn.Module):
    """The file holds 5.6 thousand of its 26 thousand parameters."""

    def __init__(self, body):
        super().__init__()
        self.body, self.unused = body, nn.Linear(64, 320)

    def forward(self, x):
        return self.body(x)


def test_a_limit_of_bytes_leaves_out_what_the_file_does_not_hold(data, tmp_path):
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 75), nn.ReLU(), nn.Linear(75, 10))
    found = compress(
        WithUnusedHead(body),
        data.train_batches(48, seed=0),
        validation=data.validation_batches(),
        test=data.test_batches(),
        mode="weights",
        distill=0.0,  # nobody trained it
        epochs=8,
        finetune_epochs=0,
        max_bytes=6_700,
    )
    found.export(tmp_path)
    assert (tmp_path / "model.onnx").stat().st_size <= 6_700
    sizes = [point["size"] for point in found.report["stages"][0]["curve"]]
    by_nonzeros = sorted(sizes, key=lambda size: size["nonzeros"])
    assert all(one["bytes"] <= 1.1 * other["bytes"] for one, other in pairwise(by_nonzeros))


def test_a_network_that_rounding_makes_worse_than_allowed_is_warned_of(zoo, data):
    with pytest.warns(UserWarning, match="fine-tuning or rounding did not"):
        found = compress(
            load(zoo / "digits.pt").model,
            data.train_batches(48, seed=0),
            validation=data.validation_batches(),
            test=data.test_batches(),
            mode="channels",
            epochs=3,
            finetune_epochs=0,
            max_error_increase=0.0,
            bits="4",
        )
    errors = found.report["errors"]["validation"]
    assert errors["after"] > errors["before"]


def test_refine_finds_the_limit_where_the_curve_has_a_gap():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    converted = convert(model, torch.randn(2, 20), "weights")
    for posterior in find_posteriors(
        converted.model
    ):  # all log_alpha between 0.1 and 0.6: one step of the curve
        alpha = torch.rand_like(posterior.theta) * 0.5 + 0.1
        posterior.log_sigma2.data = alpha + 2 * posterior.theta.detach().abs().log()

    def nothing(network):
        return None

    def error(network):
        return 0.0

    files = SimpleNamespace(measure=lambda network: measure_size(network, torch.randn(2, 20)))
    curve = measure_curve(converted, error, prepare=nothing)
    sizes = [point.size.nonzeros for point in curve]
    limit = 500
    assert max(size for size in sizes if size <= limit) < 250
    candidates = Candidates(converted, curve, 1, nothing, error, files)
    found = refine(candidates, curve, Budget(limits={"nonzeros": limit}), {})
    thresholds = [point.threshold for point in found]
    assert thresholds == sorted(thresholds, reverse=True)
    assert 0.85 * limit < max(one.size.nonzeros for one in found if one.size.nonzeros <= limit) <= limit


def test_a_limit_below_the_curve_is_met_all_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    converted = convert(model, torch.randn(2, 20), "weights")  # log_alpha from -10: below any of the curve
    measured = SimpleNamespace(measure=lambda network: measure_size(network, torch.randn(2, 20)))
    curve = measure_curve(converted, lambda _: 0.0, prepare=lambda _: None)
    limit = 300
    assert min(point.size.nonzeros for point in curve) > limit
    candidates = Candidates(converted, curve, 1, lambda _: None, lambda _: 0.0, measured)
    _, selection = choose(candidates, Budget(limits={"nonzeros": limit}), 0.0)
    slimmed = candidates.cut(selection.threshold)
    assert selection.threshold < -4
    assert 0.6 * limit < sum(int(each.count_nonzero()) for each in slimmed.model.parameters()) <= limit


def test_biases_that_grow_past_a_limit_are_warned_of(data):
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 75), nn.ReLU(), nn.Linear(75, 10))
    for layer in (body[1], body[3]):
        nn.init.zeros_(layer.bias)

    def run(most, finetune_epochs):
        given = {"validation": data.validation_batches(), "test": data.test_batches(), "mode": "weights"}
        options = {"epochs": 0, "distill": 0.0, "max_params": most, "finetune_epochs": finetune_epochs}
        return compress(body, data.train_batches(48, seed=0), **given, **options)

    left = run(4_000, 0).report["size"]["after"]["nonzeros"]
    with pytest.warns(UserWarning, match=f"{left:,} were allowed: biases that were 0"):
        run(left, 1)


def test_weights_that_a_first_round_took_stay_away_in_a_round_of_channels(zoo, data):
    found = compress(
        load(zoo / "digits.pt").model,
        data.train_batches(48, seed=0),
        validation=data.validation_batches(),
        test=data.test_batches(),
        epochs=2,
        finetune_epochs=1,
        threshold=50.0,  # no channel goes
        first={"mode": "weights", "epochs": 8, "beta": 3.0, "warmup_epochs": 1},
    )
    first = found.report["stages"][0]
    chosen = first["selection"]["threshold"]
    left = next(p["size"]["nonzeros"] for p in first["curve"] if p["threshold"] == chosen)
    before, after = (found.report["size"][when]["nonzeros"] for when in ("before", "after"))
    assert after <= left < 0.8 * before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_macs": 10}, r"no cut keeps it: .* MACs [\d,]+ \(limit 10\)"),
        ({"max_params": "0%"}, r"parameters that are not zero [1-9]\d+ \(limit 0\)"),
        ({"max_params": "20%", "round_to": 16}, "ask for less than round_to = 16"),
    ],
)
def test_limits_that_no_fit_keeps_are_refused_before_it(zoo, data, options, told):
    epochs = []

    class Told:
        def on_start(self, *_):
            pass

        on_step = on_start

        def on_epoch(self, row, _):
            epochs.append(row)

    with pytest.raises(SlimError, match=told):
        compress(
            load(zoo / "digits.pt").model,
            data.train_batches(48, seed=0),
            validation=data.validation_batches(),
            listener=Told(),
            epochs=1,
            **options,
        )
    assert epochs == []

"""The point that limits ask for, however the log_alphas lie and whatever files weigh beside an estimate."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vbdcompress import choosing
from vbdcompress.budget import Budget
from vbdcompress.choosing import Candidates, choose
from vbdcompress.conversion import Converted, convert
from vbdcompress.count import measure_size
from vbdcompress.errors import SlimError
from vbdcompress.records import Size
from vbdcompress.slimming import measure_curve
from vbdcompress.vbd.posterior import find_posteriors


def fitted(low: float, high: float) -> Converted:
    """900 weights whose log_alphas lie evenly between two numbers; 40 biases."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    converted = convert(model, torch.randn(2, 20), "weights")
    for posterior in find_posteriors(converted.model):
        alpha = low + (high - low) * torch.rand_like(posterior.theta)
        posterior.log_sigma2.data = alpha + 2 * posterior.theta.detach().abs().log()
    return converted


def count(model: nn.Module) -> int:
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


def candidates_of(
    converted: Converted,
    weight: Callable[[int], int] = lambda nonzeros: 4 * nonzeros,
    error: Callable[[nn.Module], float] = lambda model: 0.0,
) -> tuple[Candidates, list[int]]:
    """What choose is given, and the bytes of the files that it writes."""
    written: list[int] = []

    def write(model: nn.Module, codes: object) -> int:
        written.append(weight(count(model)))
        return written[-1]

    def measure(model: nn.Module) -> Size:
        return measure_size(model, torch.randn(2, 20))

    files = SimpleNamespace(measure=measure, write=write, config=SimpleNamespace(bits="32"))
    curve = measure_curve(converted, error, prepare=lambda _: None)
    return Candidates(converted, curve, 1, lambda _: None, error, files), written


@pytest.mark.parametrize("width", [0.3, 1e-3, 1e-5])
@pytest.mark.parametrize("limit", [800, 300, 80])
def test_a_limit_is_used_however_close_the_log_alphas_lie(limit: int, width: float) -> None:
    candidates, _ = candidates_of(fitted(0.1, 0.1 + width))
    assert not [point for point in candidates.curve if 100 < point.size.nonzeros < 900]
    _, selection = choose(candidates, Budget(limits={"nonzeros": limit}), 0.0)
    assert 0.9 * limit < count(candidates.cut(selection.threshold).model) <= limit


@pytest.mark.parametrize("limit", range(900, 4500, 350))
@pytest.mark.parametrize(
    "weight",
    [
        lambda nonzeros: 700 + 5 * nonzeros,
        lambda nonzeros: 800 + round(0.6 * nonzeros**1.2),
        lambda nonzeros: 750 + 4 * nonzeros + 7 * (nonzeros % 13),  # a larger network's file may be smaller
    ],
)
def test_a_limit_of_bytes_is_used_whatever_files_weigh(weight: Callable[[int], int], limit: int) -> None:
    candidates, written = candidates_of(fitted(-3.0, 3.0), weight)
    _, selection = choose(candidates, Budget(limits={"bytes": limit}), 0.0)
    kept = count(candidates.cut(selection.threshold).model)
    assert weight(kept) <= limit
    assert weight(kept) > 0.85 * limit or kept > 900
    assert len(written) <= 16


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_file_is_chosen_that_was_not_seen_to_fit(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "MOST_FILES", most)
    candidates, written = candidates_of(fitted(-3.0, 3.0), lambda nonzeros: 700 + round(nonzeros**1.4))
    try:
        _, selection = choose(candidates, Budget(limits={"bytes": 2500}), 0.0)
    except SlimError:  # none of those that were tried does
        assert min(written) > 2500
    else:
        size = candidates.files.write(candidates.cut(selection.threshold).model, {})
        assert size <= 2500
        assert size in written[:-1]


def test_a_limit_that_no_file_keeps_is_refused_with_the_smallest() -> None:
    candidates, written = candidates_of(fitted(-3.0, 3.0), lambda nonzeros: 700 + 5 * nonzeros)
    with pytest.raises(SlimError, match="the nearest on the curve has bytes about 750"):
        choose(candidates, Budget(limits={"bytes": 720}), 0.0)
    assert min(written) == 750


def test_an_error_budget_is_used_between_the_points_of_the_curve() -> None:
    def error(model: nn.Module) -> float:
        return max(0.0, (500 - count(model)) / 100)

    candidates, _ = candidates_of(fitted(0.1, 0.4), error=error)
    curve, selection = choose(candidates, Budget(max_error_increase=2.0), 0.0)
    assert 300 <= count(candidates.cut(selection.threshold).model) < 310
    assert [point.threshold for point in curve] == sorted((p.threshold for p in curve), reverse=True)

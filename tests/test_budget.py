"""The choice of the threshold, on curves written by hand."""

from types import SimpleNamespace

import pytest

from vbdcompress.budget import Budget, make_budget, round_budget, select_threshold, warn_of_undecided
from vbdcompress.config import make_config
from vbdcompress.errors import SlimError
from vbdcompress.records import CurvePoint, Size

INF = float("inf")
#        threshold, error, nonzeros, macs
CURVE = tuple(
    CurvePoint(t, error, Size(1000, nonzeros, macs, 4 * nonzeros))
    for t, error, nonzeros, macs in [
        (INF, 1.0, 1000, 900),
        (4.0, 0.9, 500, 800),
        (2.0, 1.1, 200, 700),
        (0.0, 1.4, 100, 300),
        (-1.0, 5.0, 10, 50),
    ]
)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Budget(max_error_increase=0.3), 2.0),
        (Budget(max_error_increase=0.4), 0.0),
        (Budget(max_error_increase=0.0), 4.0),
        (Budget(limits={"nonzeros": 200}), 2.0),
        (Budget(limits={"nonzeros": 999}), 4.0),
        (Budget(limits={"macs": 300}), 0.0),
        (Budget(limits={"bytes": 500, "macs": 850}), 0.0),
        (Budget(max_error_increase=9.0, limits={"nonzeros": 500}), -1.0),
        (Budget(threshold=2.5), 2.5),
        (Budget(), 0.0),
    ],
)
def test_select_threshold_keeps_the_budget(budget, expected):
    assert select_threshold(CURVE, budget, "weights", 1.0).threshold == expected


def test_select_threshold_says_how_close_it_comes():
    with pytest.raises(SlimError, match=r"parameters that are not zero 10 \(limit 5\)"):
        select_threshold(CURVE, Budget(limits={"nonzeros": 5}), "weights", 1.0)
    with pytest.raises(SlimError, match=r"best within the limits has 1\.40 %"):
        select_threshold(CURVE, Budget(max_error_increase=0.1, limits={"macs": 300}), "channels", 1.0)


def test_make_budget_resolves_shares_against_the_original():
    config = make_config({"max_params": "10%", "max_macs": 77, "max_bytes": "2.5 %"})
    assert make_budget(config, Size(900, 1000, 800, 400)).limits == {"nonzeros": 100, "macs": 77, "bytes": 10}


def test_an_early_round_leaves_half_of_the_error_and_the_bytes_to_the_last():
    config = make_config(
        {"mode": "both", "max_error_increase": 1.0, "max_macs": 77, "max_bytes": 9, "max_params": 5}
    )
    original = Size(900, 1000, 800, 400)
    early, last = (round_budget(config, number, original) for number in (0, 1))
    assert (early.max_error_increase, early.limits) == (0.5, {"macs": 77})
    assert (last.max_error_increase, last.limits) == (1.0, {"nonzeros": 5, "macs": 77, "bytes": 9})


def test_a_first_round_keeps_to_its_own_threshold():
    told = {"mode": "channels", "max_macs": "50%", "first": {"mode": "channels", "threshold": 2.0}}
    early, last = (round_budget(make_config(told), number, Size(900, 1000, 800, 400)) for number in (0, 1))
    assert (early.threshold, early.limits, early.source) == (2.0, {}, "asked for")
    assert (last.threshold, last.limits) == (None, {"macs": 400})


def test_a_network_that_meets_an_error_budget_exactly_is_taken():
    # 7 and 8 of 1,000 examples wrong: as floats 0.7 + 0.1 is less than 0.8
    curve = [CurvePoint(float("inf"), 0.7, Size(9, 9, 9, 9)), CurvePoint(1.0, 0.8, Size(4, 4, 4, 4))]
    assert select_threshold(curve, Budget(max_error_increase=0.1), "weights", 0.7).threshold == 1.0


ROUNDS = {"mode": "both", "first": {"beta": 0.5}}


@pytest.mark.parametrize(
    ("limits", "options", "number", "warned"),
    [
        ({"nonzeros": 10}, {}, 0, ["1.40 % where it is cut at 0. Fit with a larger --beta than 3,"]),
        ({"nonzeros": 10}, {"max_error_increase": 9.0}, 0, []),
        ({"nonzeros": 100}, {}, 0, []),
        ({}, {}, 0, []),
        ({"nonzeros": 10}, ROUNDS, 0, ["Fit with a larger first.beta than 3,"]),
        ({"nonzeros": 10}, ROUNDS, 1, ["no noise yet in round 2: cut", "larger --beta than 3,"]),
    ],
)
def test_limits_that_take_what_is_no_noise_yet_are_told_of(limits, options, number, warned):
    config = make_config(options | ({"max_params": limits["nonzeros"]} if limits else {}))
    budget = Budget(max_error_increase=config.max_error_increase, limits=limits)
    selection = select_threshold(CURVE, budget, "channels", 1.0)
    told = warn_of_undecided(SimpleNamespace(curve=CURVE, selection=selection, beta=3.0), config, number)
    assert len(told) == bool(warned)
    for part in warned:
        assert part in told[0]
        assert "cut at a log_alpha of -1, the network had 5.00 % validation error" in told[0]


def test_the_warning_of_a_curve_without_noise_compares_with_the_whole_network():
    curve = (CURVE[0], CURVE[-1])
    selection = select_threshold(curve, Budget(limits={"nonzeros": 10}), "channels", 1.0)
    stage = SimpleNamespace(curve=curve, selection=selection, beta=3.0)
    (told,) = warn_of_undecided(stage, make_config({"max_params": 10}), 0)
    assert "before fine-tuning, 1.00 % whole. Fit" in told

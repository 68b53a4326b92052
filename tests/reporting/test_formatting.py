"""Numbers as the report shows them; expected texts are written by hand."""

import pytest

from vbdcompress.reporting import formatting


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (60.21, "60.2\N{MULTIPLICATION SIGN}"),
        (7.1, "7.1\N{MULTIPLICATION SIGN}"),
        (1.0, "1.00\N{MULTIPLICATION SIGN}"),
        (1.042, "1.04\N{MULTIPLICATION SIGN}"),
        (157.4, "157\N{MULTIPLICATION SIGN}"),
        (1234.5, "1,234\N{MULTIPLICATION SIGN}"),
    ],
)
def test_format_ratio_keeps_sensible_digits(value, text):
    assert formatting.format_ratio(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (99.97, "100\N{MULTIPLICATION SIGN}"),
        (1.996, "2.0\N{MULTIPLICATION SIGN}"),
        (None, formatting.MISSING),
    ],
)
def test_format_ratio_rounds_before_it_chooses(value, text):
    assert formatting.format_ratio(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5.5, "5.5\N{MULTIPLICATION SIGN} smaller"),
        (0.5, "2.0\N{MULTIPLICATION SIGN} larger"),
        (1, "unchanged"),
        (1.004, "under 1% smaller"),
        (0.996, "under 1% larger"),
        (0, formatting.MISSING),
        (None, formatting.MISSING),
    ],
)
def test_format_change_says_which_way(value, text):
    assert formatting.format_change(value, "smaller", "larger") == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (999, "999 B"),
        (1_066_743, "1.07 MB"),
        (44_761, "44.8 kB"),
        (100_700_000, "101 MB"),
        (None, formatting.MISSING),
    ],
)
def test_format_bytes_uses_decimal_units(value, text):
    assert formatting.format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(3e-7, "3e-7"), (3.44e-7, "3.4e-7"), (1e-4, "1e-4"), (0.0, "0"), (None, formatting.MISSING)],
)
def test_format_difference_does_not_round_away_a_digit(value, text):
    assert formatting.format_difference(value) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (0.89, 1.34, "+0.45 points"),
        (1.34, 0.89, "-0.45 points"),
        (1, 1.001, "unchanged"),
        (None, 1, formatting.MISSING),
    ],
)
def test_format_points_is_signed(before, after, text):
    assert formatting.format_points(before, after) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.21, "3.2 s"),
        (59.97, "1 min 0 s"),
        (71.3, "1 min 11 s"),
        (5000, "1 h 23 min"),
        (None, formatting.MISSING),
    ],
)
def test_format_seconds_uses_two_units_at_most(value, text):
    assert formatting.format_seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123 ms"), (1.2143, "1.21 ms"), (312.4, "312 ms"), (0, "0 ms")]
)
def test_format_ms_keeps_three_digits(value, text):
    assert formatting.format_ms(value) == text


@pytest.mark.parametrize(("value", "text"), [(1500, "1.5k"), (2e6, "2M"), (0.03, "0.03"), (30, "30")])
def test_format_short_fits_an_axis(value, text):
    assert formatting.format_short(value) == text


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ({"beta": 1.0}, "ELBO"),
        ({"beta": 6.0, "cost": "none", "distillation": None}, "tempered ELBO, beta 6"),
        ({"beta": 0.5}, "tempered ELBO, beta 0.5"),
        ({"beta": 1.0, "cost": "macs"}, "tempered ELBO, beta 1, KL weighed by macs"),
        (
            {"beta": 1.0, "distillation": {"share": 1.0, "temperature": 2.0}},
            "ELBO, on the original's outputs at temperature 2",
        ),
        (
            {"beta": 2.0, "distillation": {"share": 0.7, "temperature": 4.0}},
            "tempered ELBO, beta 2, 70 % on the original's outputs at temperature 4",
        ),
    ],
)
def test_describe_objective_names_what_was_fitted(stage, told):
    assert formatting.describe_objective(stage) == told

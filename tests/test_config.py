"""Options: their defaults, what is refused, and what the message says."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vbdcompress.budget import parse_limit
from vbdcompress.config import FitConfig, RunConfig, make_config, read_toml
from vbdcompress.errors import ConfigError


def test_make_config_keeps_what_it_is_given() -> None:
    config = make_config({"epochs": 3, "prior": "vd", "skip": ["head"], "max_params": "10%", "devices": 2})
    assert (config.epochs, config.prior, config.skip, config.devices) == (3, "vd", ("head",), 2)
    assert config.limits == {"nonzeros": "10%"}
    assert make_config({}) == RunConfig()


@pytest.mark.parametrize(
    ("name", "near"), [("epoch", "epochs"), ("treshold", "threshold"), ("lr_gate", "lr_gates")]
)
def test_make_config_suggests_the_nearest_option(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"option '{name}' is unknown; did you mean '{near}'"):
        make_config({name: 1})


def test_make_config_says_where_and_everything_that_is_wrong() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"qqqq": 1, "epochs": -1, "beta": "x"}, "config file 'run.toml'")
    message = str(caught.value)
    assert message.startswith("config file 'run.toml': ")
    assert "option 'qqqq' is unknown" in message
    assert "did you mean" not in message
    assert "option 'epochs' = -1: Input should be greater than or equal to 0" in message
    assert "option 'beta' = 'x': Input should be a valid number" in message


BAD_VALUES: list[dict[str, Any]] = [
    {"epochs": 1.5},
    {"lr": 0},
    {"lr": float("nan")},
    {"lr": float("inf")},
    {"lr_log_sigma2": -1},
    {"beta": -0.1},
    {"warmup_epochs": -1},
    {"clip_norm": 0},
    {"seed": -1},
    {"seed": 2**40},
    {"devices": 0},
    {"device": "gpu"},
    {"prior": "ard"},
    {"precision": "8-true"},
    {"schedule": "step"},
    {"mode": "units"},
    {"batch_size": 0},
    {"validation_fraction": 0},
    {"validation_fraction": 1.0},
    {"augment": "flip"},
    {"threshold": float("nan")},
    {"max_error_increase": -1},
    {"max_params": 1.5},
    {"max_params": True},
    {"max_params": "ten"},
    {"max_params": "10 %%"},
    {"max_params": -5},
    {"max_params": "-5"},
    {"max_macs": "1e6"},
    {"max_bytes": "10.5"},
    {"max_bytes": ""},
]


@pytest.mark.parametrize("values", BAD_VALUES, ids=str)
def test_make_config_refuses_and_names_the_value(values: dict[str, Any]) -> None:
    ((name, value),) = values.items()
    with pytest.raises(ConfigError) as caught:
        make_config(values)
    message = str(caught.value)
    assert repr(value) in message
    assert message.count(name) == 1


def test_make_config_names_the_option_of_a_union_once() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"max_params": 1.5, "skip": [3]})
    message = str(caught.value)
    assert "option 'max_params' = 1.5" in message
    assert "max_params." not in message
    assert "skip.0" not in message


@pytest.mark.parametrize(
    "budget", [{"max_error_increase": 0.5}, {"max_params": 10}, {"max_macs": "5%"}, {"max_bytes": 1}]
)
def test_make_config_refuses_a_threshold_beside_a_budget(budget: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        make_config({"threshold": 3.0} | budget)
    assert make_config(budget).has_budget
    assert not make_config({"threshold": 3.0}).has_budget
    assert not make_config({}).has_budget


@pytest.mark.parametrize("limit", [1, 0, "1", "10%", "10 %", "0.5%", "12.25 %"])
def test_make_config_takes_limits(limit: int | str) -> None:
    assert make_config({"max_params": limit, "max_macs": limit, "max_bytes": limit}).limits == {
        "nonzeros": limit,
        "macs": limit,
        "bytes": limit,
    }


@pytest.mark.parametrize(
    ("limit", "total", "expected"),
    [
        (1500, 10, 1500),
        ("1500", 10, 1500),
        ("10%", 266_200, 26_620),
        ("10 %", 99, 9),
        ("0.5%", 1000, 5),
        ("100%", 7, 7),
        # as floats 0.29 * 100 and 0.07 * 100 fall just short of 29, lie just above 7
        ("29%", 100, 29),
        ("7%", 100, 7),
        ("1.1%", 1000, 11),
    ],
)
def test_parse_limit_is_exact(limit: int | str, total: int, expected: int) -> None:
    assert parse_limit(limit, total) == expected


def test_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        FitConfig().epochs = 3


def test_read_toml_gives_the_options(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('epochs = 3\nskip = ["a", "b"]\nmax_params = "10%"\n', encoding="utf-8")
    config = make_config(read_toml(path))
    assert (config.epochs, config.skip, config.max_params) == (3, ("a", "b"), "10%")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"epochs = ", "Invalid value"),
        (b"a = 1\nb 2\n", "line 2"),
        (b"a = '\xff\xfe'", "utf-8"),
        (None, "No such file"),
    ],
)
def test_read_toml_says_what_is_wrong(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_toml(path)
    assert "config file" in str(caught.value)
    assert "run.toml" in str(caught.value)


def test_rounds_of_both_are_channels_then_weights_with_options_of_their_own() -> None:
    config = make_config({"mode": "both", "epochs": 50, "beta": 2.0, "first": {"epochs": 5, "beta": 12.0}})
    first, last = config.rounds
    assert (first.mode, first.epochs, first.beta, first.lr) == ("channels", 5, 12.0, config.lr)
    assert (last.mode, last.epochs, last.beta) == ("weights", 50, 2.0)


def test_a_first_round_of_weights_takes_what_is_surely_gone() -> None:
    config = make_config({"mode": "weights", "threshold": 1.0, "first": {"mode": "weights"}})
    assert [(one.mode, one.threshold) for one in config.rounds] == [("weights", 3.0), ("weights", 1.0)]
    config = make_config({"mode": "channels", "first": {"mode": "weights", "threshold": 2.0}})
    assert [(one.mode, one.threshold) for one in config.rounds] == [("weights", 2.0), ("channels", None)]


@pytest.mark.parametrize("mode", ["weights", "channels"])
def test_without_a_first_round_there_is_one(mode: str) -> None:
    assert [one.mode for one in make_config({"mode": mode}).rounds] == [mode]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "both", "first": {"epocs": 5}}, "option 'first.epocs' is unknown; did you mean 'epochs'"),
        ({"mode": "both", "first": {"finetune_epoch": 5}}, "option 'first.finetune_epoch' is unknown$"),
        ({"mode": "both", "first": {"epochs": -5}}, "first.epochs"),
        ({"mode": "weights", "first": {"epochs": 5}}, "a first round needs a mode"),
        ({"mode": "both", "first": {"mode": "weights"}}, "can't be of weights"),
        ({"first": {"mode": "weights", "cost": "macs"}}, "first.cost acts on channel gates"),
    ],
)
def test_make_config_checks_the_first_round(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(values)


def test_bits_auto_needs_a_posterior_on_each_weight():
    with pytest.raises(ConfigError, match="bits auto asks a posterior on each weight"):
        make_config({"bits": "auto"})
    assert make_config({"bits": "auto", "mode": "both"}).packs


def test_bits_may_be_a_number() -> None:
    assert make_config({"bits": 8}).bits == "8"
    with pytest.raises(ConfigError, match="option 'bits' = True"):
        make_config({"bits": True})


@pytest.mark.parametrize("values", [{"cost": "macs"}, {"round_to": 8}], ids=str)
def test_options_of_channel_gates_are_refused_where_there_are_none(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(ConfigError, match=f"{name} acts on channel gates, mode weights has none"):
        make_config(values | {"mode": "weights"})
    assert make_config(values | {"mode": "both"})
    assert make_config(values | {"mode": "weights", "first": {"mode": "channels"}})


@pytest.mark.parametrize(
    ("options", "packs"),
    [
        ({}, False),
        ({"mode": "weights"}, True),
        ({"bits": "8"}, True),
        ({"mode": "weights", "pack": False}, False),
        ({"pack": True}, True),
    ],
)
def test_files_are_packed_where_that_makes_them_smaller_or_as_asked(options, packs):
    assert make_config(options).packs is packs


@pytest.mark.parametrize(("num_data", "examples"), [(1, 1), (2, 2), (30, 2), (1000, 40), (60_000, 200)])
def test_small_sets_get_small_batches_but_never_of_one(num_data: int, examples: int) -> None:
    assert RunConfig().examples_a_step(num_data) == examples
    assert RunConfig(batch_size=7).examples_a_step(num_data) == 7

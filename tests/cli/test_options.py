"""Options from a file and from the command line: who is told to be at fault."""

import pytest

from vbdcompress.cli.options import parse_normalisation, read_config, told_normalisation
from vbdcompress.errors import ConfigError
from vbdcompress.records import InputSpec


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("threshold = 1.0\nepochs = 7\n")
    return path


def test_the_command_line_goes_before_the_file(file):
    config = read_config("run", file, {"epochs": 3})
    assert (config.epochs, config.threshold) == (3, 1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": -1}, "run: option 'epochs' = -1"),
        ({"max_macs": "50%"}, r"run with config file '.*run\.toml': a threshold and a budget both say"),
    ],
)
def test_a_file_that_is_right_is_not_said_to_be_wrong(file, given, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        read_config("run", file, given)


def test_a_file_that_is_wrong_is_named_alone(file):
    file.write_text("epoch = 3")
    with pytest.raises(ConfigError, match=r"^config file '.*run\.toml': option 'epoch' is unknown"):
        read_config("run", file, {"lr": 1e-3})


def spec(mean=(), shape=(3, 16, 16)):
    return InputSpec(shape, mean, mean)


@pytest.mark.parametrize(
    ("given", "of_file", "told"),
    [
        (None, None, None),
        (spec((0.5,), ()), None, spec((0.5,), ())),
        (None, spec((0.4,)), spec((0.4,))),
        (None, spec(), spec()),
        (spec((0.5,), ()), spec((0.4,)), spec((0.5,))),
        (spec((0.5,), ()), spec(), spec((0.5,))),
    ],
)
def test_told_normalisation_keeps_the_shape_of_the_file(given, of_file, told):
    assert told_normalisation(given, of_file) == told


@pytest.mark.parametrize(("mean", "std"), [("nan", "1"), ("0", "inf"), ("0", "0"), ("0,0", "1")])
def test_parse_normalisation_refuses_what_is_no_scale(mean, std):
    with pytest.raises(ConfigError, match=f"--mean {mean} and --std {std} must be as many finite numbers"):
        parse_normalisation(mean, std)

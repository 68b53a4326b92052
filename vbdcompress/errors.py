"""The errors that vbdcompress raises on purpose.

A message says where, what was found with its value, what is allowed, and what to do:

    convert: layer 'features.3' is LazyConv2d, which has no weights yet.
    Run one batch through the model first.
"""

from traceback import extract_tb

# What running somebody's network is known to raise; each becomes a reason.
TRACE_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    ArithmeticError,
)


def words_of(error: BaseException) -> str:
    """What an error of somebody's code says, with its kind; the line of code itself where it says nothing."""
    told = str(error)
    if not told and (steps := extract_tb(error.__traceback__)):
        told = f"{steps[-1].line} ({steps[-1].name})"  # such as an assert
    return f"{type(error).__name__}: {told}"


class VbdcompressError(Exception):
    """Base of every error that a user can mend; anything else is a defect of ours.

    Args:
        where: the stage and, where there is one, the file or layer.
        found: what was found, with its value, and what is allowed.
        advice: what to do about it; may be empty.
    """

    def __init__(self, where: str, found: str, advice: str = "") -> None:
        self.where, self.found, self.advice = where, found, advice
        super().__init__(f"{where}: {found}" + (f"\n{advice}" if advice else ""))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.where, self.found, self.advice)


class ConfigError(VbdcompressError):
    """An option that is unknown, of the wrong type, or contradicts another."""


class LoadError(VbdcompressError):
    """A model file that can't be read, is not safe to read, or does not fit its architecture."""


class DataError(VbdcompressError):
    """A data set that is missing, malformed, or does not fit the network."""


class ConvertError(VbdcompressError):
    """A network that can't be given a posterior."""


class FitError(VbdcompressError):
    """Training that can't start or can't go on (a loss that is NaN, a wrong world size)."""


class SlimError(VbdcompressError):
    """A removal plan that does not fit the network, or a budget that no threshold meets."""


class ExportError(VbdcompressError):
    """An ONNX file that is not the network that it should be."""

"""From the name of an architecture to a freshly initialised network."""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from vbdcompress.architectures.cifar import VGGCifar, resnet20, resnet56
from vbdcompress.architectures.lenet import DigitsNet, LeNet5, lenet_300_100, lenet_500_300
from vbdcompress.errors import LoadError

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "digits": DigitsNet,
    "lenet5": LeNet5,
    "lenet_300_100": lenet_300_100,
    "lenet_500_300": lenet_500_300,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "vgg_cifar": VGGCifar,
}

# Arguments by which torchvision's and timm's builders open files or the network
REACHING_OUT = {
    *(
        "checkpoint_path",
        "cache_dir",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_path",
    ),
    *("weights", "weights_backbone"),
}

_TRUST = (
    "If you trust it, say so yourself: --arch {name}, from Python load(path, arch={name!r}); "
    "or build the original: load_slim(path, model=MyNetwork())"
)


def build_architecture(
    name: str, arguments: Mapping[str, Any] | None = None, *, trusted: bool = False
) -> nn.Module:
    """A network by name, with fresh random weights.

    Args:
        name: a key of ARCHITECTURES, "torchvision:NAME", "timm:NAME", "package.module:function"
            or "path/file.py:function".
        arguments: keyword arguments of the builder.
        trusted: whether the name comes from the user rather than from inside a file. The last
            two forms run code of the name's choosing, so a file's own word is not enough.
    Raises:
        LoadError: the name is unknown, not trusted, or the builder refuses the arguments.
    """
    if not isinstance(name, str) or not isinstance(arguments or {}, Mapping):
        raise LoadError(
            "architecture", f"is named {name!r} with arguments {arguments!r}; allowed are a name and a dict."
        )
    reaching_out = sorted(REACHING_OUT & set(arguments or {}))
    if reaching_out and not trusted:
        raise LoadError(
            f"architecture '{name}'",
            f"has arguments in the file that make it read or download others: {', '.join(reaching_out)}.",
            _TRUST.format(name=name),
        )
    builder = _find_builder(name, trusted)
    try:
        model = builder(**dict(arguments or {}))
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise LoadError(
            f"architecture '{name}'",
            f"refused the arguments {dict(arguments or {})}: {_told(error)}",
        ) from error
    if not isinstance(model, nn.Module):
        raise LoadError(f"architecture '{name}'", f"gave a {type(model).__name__}, not a torch.nn.Module.")
    return model


def _find_builder(name: str, trusted: bool) -> Callable[..., nn.Module]:
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    source, colon, member = name.rpartition(":")
    if source == "torchvision":
        return _torchvision_builder(member)
    if source == "timm":
        return _timm_builder(member)
    if colon and not trusted:
        raise LoadError(
            f"architecture '{name}'",
            "is named inside the file, and to build it would run code of the file's choosing.",
            _TRUST.format(name=name),
        )
    if colon:
        return _user_builder(source, member)
    near = get_close_matches(name, ARCHITECTURES, n=1)
    raise LoadError(
        f"architecture '{name}'",
        "is unknown" + (f"; did you mean '{near[0]}'?" if near else "."),
        f"Known: {', '.join(sorted(ARCHITECTURES))}, torchvision:NAME, timm:NAME, "
        "package.module:function, file.py:function.",
    )


def _torchvision_builder(member: str) -> Callable[..., nn.Module]:
    from torchvision import models

    known = models.list_models()
    if member not in known:
        near = get_close_matches(member, known, n=3)
        raise LoadError(
            f"architecture 'torchvision:{member}'",
            "is not among torchvision's models" + (f"; near: {', '.join(near)}." if near else "."),
        )
    fixed: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(member)).parameters:
        fixed["weights_backbone"] = None  # its default is a download
    return lambda **arguments: models.get_model(member, **fixed, **arguments)


def _timm_builder(member: str) -> Callable[..., nn.Module]:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise LoadError(f"architecture 'timm:{member}'", "needs timm.", "pip install timm") from error
    if not timm.is_model(member):
        near = get_close_matches(member, timm.list_models(), n=3)
        raise LoadError(
            f"architecture 'timm:{member}'",
            "is not among timm's models" + (f"; near: {', '.join(near)}." if near else "."),
        )
    return lambda **arguments: timm.create_model(member, pretrained=False, **arguments)


def _told(error: BaseException) -> str:
    """An error of the user's code by its kind, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [each for each in frames if not each.filename.startswith((sys.base_prefix, sys.prefix, "<"))]
    at = own[-1] if own else frames[-1]
    return f"{type(error).__name__}: {error} ({Path(at.filename).name}, line {at.lineno})"


def _user_builder(source: str, member: str) -> Callable[..., nn.Module]:
    where = f"architecture '{source}:{member}'"
    folder = str(Path(source).resolve().parent if source.endswith(".py") else Path.cwd())
    sys.path.insert(0, folder)  # its neighbours, as if Python had been started on the file
    try:
        if source.endswith(".py"):
            # a name of its own: a user's "random.py" must not stand in for another module
            name = f"vbdcompress_user_{Path(source).stem}"
            spec = importlib.util.spec_from_file_location(name, source)
            if spec is None or spec.loader is None or not Path(source).is_file():
                raise LoadError(where, f"there is no file '{source}'.")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses in it look their module up
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except LoadError:
        raise
    except (Exception, SystemExit) as error:  # as above
        ends = isinstance(error, SystemExit)
        advice = (
            "What a script does when it is started belongs under: if __name__ == '__main__':" if ends else ""
        )
        raise LoadError(where, f"could not be imported: {_told(error)}", advice) from error
    finally:
        sys.path.remove(folder)
    builder = getattr(module, member, None)
    if not callable(builder):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise LoadError(where, f"'{source}' has no callable '{member}'.", f"It has: {', '.join(names)}")
    found: Callable[..., nn.Module] = builder
    return found

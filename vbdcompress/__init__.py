"""vbdcompress: make a trained PyTorch network small, and prove that what comes out is right.

    loaded = vbdcompress.load("zoo/digits.pt")                          # a network from a file
    converted = vbdcompress.convert(loaded.model, example)              # a gate on every channel
    vbdcompress.fit(converted.model, loader)                            # variational Bayesian dropout
    slimmed = vbdcompress.slim(converted, threshold=3.0)                # cut out what is noise
    plans = (*loaded.plans, slimmed.plan)
    check = vbdcompress.export(slimmed.model, "out", example, plans)    # ONNX, compared with torch
    content = vbdcompress.report(...)                                   # what happened, as JSON

or all of it, on your own network and data:

    result = vbdcompress.compress(model, loader)
    result.export("out")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vbdcompress.checkpoints import FitCheckpoint
    from vbdcompress.config import FitConfig, RunConfig
    from vbdcompress.conversion import Converted, convert
    from vbdcompress.data import DataSet, load_data
    from vbdcompress.errors import VbdcompressError
    from vbdcompress.exporting.export import export
    from vbdcompress.exporting.slim_file import SlimFile, load_slim
    from vbdcompress.fitting import fit
    from vbdcompress.loading import Loaded, load
    from vbdcompress.optimization import parameter_groups
    from vbdcompress.pipeline import compress
    from vbdcompress.records import InputSpec
    from vbdcompress.reporting.build import ReportContext, report
    from vbdcompress.result import Result
    from vbdcompress.slimming import Slim, slim
    from vbdcompress.vbd.elbo import ELBO

# Read when first asked for: torch takes seconds to import, `vbdcompress --help` must not.
_HOME = {
    "ELBO": "vbdcompress.vbd.elbo",
    "Converted": "vbdcompress.conversion",
    "DataSet": "vbdcompress.data",
    "FitCheckpoint": "vbdcompress.checkpoints",
    "FitConfig": "vbdcompress.config",
    "InputSpec": "vbdcompress.records",
    "Loaded": "vbdcompress.loading",
    "ReportContext": "vbdcompress.reporting.build",
    "Result": "vbdcompress.result",
    "RunConfig": "vbdcompress.config",
    "Slim": "vbdcompress.slimming",
    "SlimFile": "vbdcompress.exporting.slim_file",
    "VbdcompressError": "vbdcompress.errors",
    "compress": "vbdcompress.pipeline",
    "convert": "vbdcompress.conversion",
    "export": "vbdcompress.exporting.export",
    "fit": "vbdcompress.fitting",
    "load": "vbdcompress.loading",
    "load_data": "vbdcompress.data",
    "load_slim": "vbdcompress.exporting.slim_file",
    "parameter_groups": "vbdcompress.optimization",
    "report": "vbdcompress.reporting.build",
    "slim": "vbdcompress.slimming",
}

__version__ = "0.1.0"
__all__ = [
    "ELBO",
    "Converted",
    "DataSet",
    "FitCheckpoint",
    "FitConfig",
    "InputSpec",
    "Loaded",
    "ReportContext",
    "Result",
    "RunConfig",
    "Slim",
    "SlimFile",
    "VbdcompressError",
    "compress",
    "convert",
    "export",
    "fit",
    "load",
    "load_data",
    "load_slim",
    "parameter_groups",
    "report",
    "slim",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vbdcompress' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value

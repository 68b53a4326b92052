"""The rows of the paper's Tables 4 and 5 that are redone here, and the figures beside them.

Source: "Variational Bayesian Dropout with a Hierarchical Prior", Tables 4 and 5; the goals are the best
that is known of any method.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

ZOO = Path(__file__).resolve().parents[1]
ROOT = ZOO.parent
RESULTS = ZOO / "paper" / "results"
METHODS = ("vbd", "vd", "magnitude")
METHOD_NAMES = {"vbd": "VBD", "vd": "VD (log-uniform prior)", "magnitude": "magnitude pruning, fine-tuned"}


@dataclass(frozen=True)
class Row:
    """One network in one mode.

    Attributes:
        name: of the recipe, the results and the folder under exports.
        network: checkpoint in the zoo.
        mode: "weights" or "channels", the table that it belongs to.
        title: in the table.
        seeds: how many runs the mean is of.
        paper: what the paper reports.
        goal: the best known, of any method.
    """

    name: str
    network: str
    mode: str
    title: str
    seeds: int
    paper: str
    goal: str

    @property
    def checkpoint(self) -> Path:
        """The dense network."""
        return ZOO / f"{self.network}.pt"

    def recipe(self, method: str) -> Path:
        """Options of a method; magnitude pruning takes VBD's."""
        return ZOO / "recipes" / f"{self.name}{'_vd' if method == 'vd' else ''}.toml"


ROWS = {
    row.name: row
    for row in (
        Row(
            "lenet_300_100_weights",
            "lenet_300_100",
            "weights",
            "LeNet-300-100",
            5,
            "66x at 1.67 %, 81x at 1.76 %",
            "120x at 1.57 %",
        ),
        Row(
            "lenet5_weights",
            "lenet5",
            "weights",
            "LeNet-5-Caffe",
            3,
            "198x at 0.74 %, 290x at 0.81 %",
            "400x at 0.75 %",
        ),
        Row(
            "lenet_500_300_channels",
            "lenet_500_300",
            "channels",
            "LeNet-500-300",
            5,
            "179-160-60 (14x) at 1.35 %",
            "30x parameters at 1.35 %",
        ),
        Row(
            "lenet5_channels",
            "lenet5",
            "channels",
            "LeNet-5-Caffe",
            3,
            "16-34-123-62 (19x parameters, 2.1x MACs) at 0.66 %",
            "20x parameters and 8x MACs at 0.66 %",
        ),
        Row(
            "lenet5_channels_small",
            "lenet5",
            "channels",
            "LeNet-5-Caffe, smaller",
            3,
            "-",
            "160x parameters and 16x MACs at 1.0 %",
        ),
    )
}


def count_weights(model: nn.Module) -> int:
    """Weights that are not zero, the paper's |W != 0|: it counts no biases."""
    return sum(int(tensor.count_nonzero()) for tensor in model.parameters() if tensor.dim() > 1)

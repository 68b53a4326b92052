"""The networks and rows of the CIFAR-10 tables, and the figures beside them.

Sources: "Variational Bayesian Dropout with a Hierarchical Prior", supplement, Table 1 (VGG); DECORE (Alwani
et al. 2022), CORING (Pham et al. 2024) and DepGraph (Fang et al. 2023) as their papers report them.
"""

from dataclasses import dataclass
from pathlib import Path

ZOO = Path(__file__).resolve().parents[1]
ROOT = ZOO.parent
RESULTS = ZOO / "cifar" / "results"
METHOD_NAMES = {
    "vbd": "VBD",
    "vd": "VD (log-uniform prior)",
    "magnitude": "torch-pruning, magnitude",
    "taylor": "torch-pruning, Taylor",
}
# torch-pruning cuts channels; it has no single weights to offer
METHODS = {"channels": ("vbd", "vd", "magnitude", "taylor"), "weights": ("vbd", "vd")}


@dataclass(frozen=True)
class Network:
    """A dense network: its name among the architectures, and the test error aimed at, in percent."""

    name: str
    title: str
    error: float


@dataclass(frozen=True)
class Row:
    """One network in one mode.

    Attributes:
        network: among NETWORKS.
        mode: "weights" or "channels".
        elsewhere: what others report.
        goal: what is aimed at here.
        remark: what who reads the row's figures must know.
        magnitude: of torch-pruning's magnitude pruning, the scope that --scope of prune.py takes.
        size: tells rows of one network and mode apart; empty for the first.
        seeds: how many runs the mean is of.
        before: commit of the dense network that the runs started from, where it was another than today's: no
            more of them are made.
    """

    network: str
    mode: str
    elsewhere: str
    goal: str
    remark: str = ""
    magnitude: str = "network"
    size: str = ""
    seeds: int = 1
    before: str = ""

    @property
    def name(self) -> str:
        """Of the results and the folder under exports."""
        return "_".join(filter(None, (self.network, self.mode, self.size, self.before and "before")))

    @property
    def methods(self) -> tuple[str, ...]:
        """VBD first: the others are brought to its size."""
        return METHODS[self.mode]

    def recipe(self, method: str) -> str:
        """File of a method's options in zoo/recipes; torch-pruning's methods train by VBD's."""
        parts = (self.network, self.mode, self.size, "vd" if method == "vd" else "")
        return f"{'_'.join(filter(None, parts))}.toml"


# the one that takes longest first
NETWORKS = {
    network.name: network
    for network in (
        Network("resnet56", "ResNet-56", 6.6),
        Network("vgg_cifar", "VGG", 7.2),
        Network("resnet20", "ResNet-20", 8.3),
    )
}
ROWS = {
    row.name: row
    for row in (
        Row(
            "vgg_cifar",
            "channels",
            "the paper 8.8 % at 1.10M parameters and 132M MACs; CORING 6.17 % at 1.90M and 67M",
            "better than each of them",
            "A beta of 3 was too low for these limits: after 25 epochs VBD's gates were undecided, and the "
            "cut fell at a log alpha of -2.6, where the validation error was 20 % before fine-tuning (6.5 % "
            "at 0.99M parameters and 120M MACs, at -1). VD's fell at -3.9, which left one hidden unit. "
            "Magnitude pruning, over all layers at once, took all but 2 to 4 channels of each of the first "
            "four layers (4, 3, 2, 3 of them); with the same share of each layer it leaves 29, 29, 58, "
            "58. The next run takes that (`--scope layer`), and should take a beta of about 12.",
            magnitude="layer",
            seeds=3,
        ),
        Row(
            "vgg_cifar",
            "channels",
            "DECORE 8.32 % at 0.26M and 37M",
            "better",
            magnitude="layer",
            size="small",
            seeds=3,
        ),
        Row(
            "resnet56",
            "channels",
            "DepGraph 6.36 % at 2.57x; CORING 5.78 % at 1.90x",
            "6.3 % at 3x fewer MACs",
            seeds=3,
        ),
        Row(
            "resnet20",
            "channels",
            "-",
            "no worse than torch-pruning's own at the same MACs",
            "A beta of 30 was low for twelve epochs: VBD's cuts fell at a log alpha of -2.5, where the "
            "validation error was 18 to 20 % before fine-tuning (8 % at 0). Runs of the second and third "
            "seed, and VBD's first, paused or ran slowly while tests ran: their minutes are too many.",
            seeds=3,
        ),
        Row(
            "resnet20",
            "channels",
            "-",
            "-",
            "These runs started from an earlier dense network, of forty epochs and 9.27 % (zoo/resnet20.pt "
            "at commit c2d1fea), by the same commands. They tell how far seeds differ.",
            seeds=0,
            before="c2d1fea",
        ),
        Row("vgg_cifar", "weights", "-", "no worse than VD at as many nonzeros"),
    )
}


def training_recipe(network: str) -> str:
    """File of a dense network's training options in zoo/recipes."""
    return f"{network}_train.toml"

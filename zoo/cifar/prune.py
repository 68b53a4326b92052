"""The rivals: torch-pruning's own pruners, brought to the MACs that VBD reached with the same seed.

The channels of least importance go, over all layers at once or each layer's for themselves, in small steps
with importance taken anew, until no more MACs are left than VBD left. Then the network trains as many epochs
as VBD's run took in all, on the same data, batches and teacher.

    python zoo/cifar/prune.py vgg_cifar_channels --method taylor --dense zoo/vgg_cifar.pt \
        --recipe zoo/recipes/vgg_cifar_channels.toml --like report.json --out RUN --data-root DATA
"""

import copy
import json
import shutil
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from vbdcompress.checkpoints import FitCheckpoint
from vbdcompress.config import RunConfig, make_config, read_toml
from vbdcompress.count import measure_size
from vbdcompress.data import DataSet, TensorBatches, load_data
from vbdcompress.devices import start_fabric
from vbdcompress.evaluation import measure_error
from vbdcompress.files import write_text
from vbdcompress.fitting import fit
from vbdcompress.loading import Loaded, load
from vbdcompress.reporting.build import describe_environment

STEPS = 100
LARGEST_SHARE = 0.95
SCOPES = ("network", "layer")
SCOPE_HELP = "The least important channels of the network go, or the same share of each layer's."
IMPORTANCE = {
    "magnitude": tp.importance.GroupMagnitudeImportance,
    "taylor": tp.importance.GroupTaylorImportance,
}


@click.command()
@click.argument("row")
@click.option("--method", type=click.Choice(list(IMPORTANCE)), required=True)
@click.option("--dense", type=click.Path(path_type=Path), required=True, help="Network to prune.")
@click.option("--recipe", type=click.Path(path_type=Path), required=True, help="VBD's options.")
@click.option("--like", type=click.Path(path_type=Path), required=True, help="report.json of VBD's run.")
@click.option("--seed", default=0, show_default=True)
@click.option("--scope", type=click.Choice(SCOPES), default=SCOPES[0], show_default=True, help=SCOPE_HELP)
@click.option("--data", help="Data set, where it is not the one that the network names.")
@click.option("--data-root", envvar="VBDCOMPRESS_DATA", type=click.Path(path_type=Path))
@click.option("--precision", default="32-true", show_default=True)
@click.option("--compile/--no-compile", "compiled", default=False)
@click.option("--cuda-graphs/--no-cuda-graphs", default=False)
@click.option("--device", default="auto", show_default=True)
@click.option("--resume", is_flag=True, help="Go on from where an unfinished run stopped.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
def main(
    row: str,
    method: str,
    dense: Path,
    recipe: Path,
    like: Path,
    seed: int,
    scope: str,
    data: str | None,
    data_root: Path | None,
    precision: str,
    compiled: bool,
    cuda_graphs: bool,
    device: str,
    resume: bool,
    out: Path,
) -> None:
    """Prune, train and write report.json."""
    machine = {"seed": seed, "precision": precision, "compile": compiled, "cuda_graphs": cuda_graphs}
    config = make_config(read_toml(recipe) | machine | {"device": device})
    loaded = load(dense)
    assert loaded.validation is not None
    dataset = load_data(
        data or str(loaded.data),
        data_root,
        normalisation=loaded.input,
        validation_fraction=loaded.validation["fraction"],
        validation_seed=loaded.validation["seed"],
    )
    (out / ".state").mkdir(parents=True, exist_ok=True)
    macs = json.loads(like.read_text(encoding="utf-8"))["size"]["after"]["macs"]
    started = time.perf_counter()
    torch.manual_seed(seed)
    model = prune(loaded.model, training_batches(dataset, config), method, macs, scope)
    _train(model, loaded.model, dataset, config, FitCheckpoint(out / ".state" / "training.ckpt", resume))
    report = _report(row, loaded, model, dataset, config)
    report["seconds"] = time.perf_counter() - started
    write_text(out / "report.json", json.dumps(report))
    shutil.rmtree(out / ".state")


def training_batches(dataset: DataSet, config: RunConfig) -> TensorBatches:
    """As `vbdcompress run` makes them."""
    size = config.examples_a_step(len(dataset.train))
    return dataset.train_batches(size, config.seed, config.augment, config.augment_pixels)


def epochs_of(config: RunConfig) -> int:
    """As many passes over the training set as VBD's run makes, over all its rounds."""
    return sum(one.epochs for one in config.rounds) + config.finetune_epochs


def prune(
    dense: nn.Module, batches: TensorBatches, method: str, macs: int, scope: str = SCOPES[0]
) -> nn.Module:
    """A copy cut by torch-pruning until it has at most so many MACs an example."""
    model, example = copy.deepcopy(dense), batches.inputs[:2]
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=IMPORTANCE[method](),
        global_pruning=scope == "network",
        pruning_ratio=LARGEST_SHARE,
        max_pruning_ratio=0.98,
        iterative_steps=STEPS,
        ignored_layers=[last],
    )
    supply = _forever(batches)
    for _ in range(STEPS):
        if measure_size(model, example).macs <= macs:
            break
        if method == "taylor":
            model.zero_grad()
            inputs, labels = next(supply)
            F.cross_entropy(model.eval()(inputs), labels).backward()
        pruner.step()
    else:
        raise SystemExit(f"{method} pruning reaches no network of {macs:,} MACs")
    model.zero_grad()
    return model.eval()


def _forever(batches: TensorBatches) -> Iterator[tuple[Tensor, Any]]:
    for epoch in cycle(range(1000)):
        batches.set_epoch(epoch)
        yield from batches


def _train(
    model: nn.Module, teacher: nn.Module, dataset: DataSet, config: RunConfig, checkpoint: FitCheckpoint
) -> None:
    """At the rate of VBD's longest round, falling to 0."""
    fit(
        model,
        training_batches(dataset, config),
        config.model_copy(update={"epochs": epochs_of(config)}),
        validation=dataset.validation_batches(),
        teacher=teacher if config.distill_share else None,
        num_data=len(dataset.train),
        keep_zeros=True,
        checkpoint=checkpoint,
    )


def _report(
    row: str, loaded: Loaded, model: nn.Module, dataset: DataSet, config: RunConfig
) -> dict[str, Any]:
    dense, device = loaded.model, start_fabric(config).device
    example = dataset.train.inputs[:2]
    before, after = (measure_size(network.cpu(), example) for network in (dense, model))
    sets = {"validation": dataset.validation_batches(), "test": dataset.test_batches()}
    errors = {
        part: {
            "before": measure_error(dense.to(device), batches.on(device, 0, 1)),
            "after": measure_error(model.to(device), batches.on(device, 0, 1)),
        }
        for part, batches in sets.items()
        if batches is not None
    }
    return {
        "name": row,
        "size": {"before": vars(before), "after": vars(after)},
        "errors": errors,
        "stages": [],
        "finetune": [None] * epochs_of(config),
        "environment": describe_environment(str(device)),
    }


if __name__ == "__main__":
    main()

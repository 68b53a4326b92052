"""The rival: magnitude pruning with fine-tuning, to as many weights or parameters as VBD has, seed by seed.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015: prune the
smallest, train what is left, and again, ROUNDS times. The same dense network, data, batches, teacher
and number of epochs as VBD's run. Single weights: torch.nn.utils.prune, over all layers at once, by
the score of Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", 2021: by bare
magnitudes whole layers go empty at such sizes. Channels: torch-pruning's MagnitudePruner, over all
layers at once; it cannot remove inputs.

    python zoo/paper/magnitude.py lenet_300_100_weights --seed 0 --out RUN --data-root DATA
"""

import copy
import json
import time
from pathlib import Path
from typing import Any

import click
import torch
import torch_pruning as tp
from rich.console import Console
from rows import RESULTS, ROWS, Row, count_weights
from torch import Tensor, nn
from torch.nn.utils import prune

from vbdcompress.checkpoints import FitCheckpoint
from vbdcompress.config import RunConfig, make_config, read_toml
from vbdcompress.count import measure_size
from vbdcompress.data import DataSet, load_data
from vbdcompress.evaluation import measure_error
from vbdcompress.files import write_text
from vbdcompress.fitting import fit
from vbdcompress.loading import load
from vbdcompress.progress import FitProgress
from vbdcompress.training import Listener

ROUNDS = 10
RATE = 1e-3


@click.command()
@click.argument("row", type=click.Choice(list(ROWS)))
@click.option("--seed", default=0, show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--data-root", required=True, envvar="VBDCOMPRESS_DATA", type=click.Path(path_type=Path))
@click.option("--resume", is_flag=True, help="Go on from where an unfinished run stopped.")
def main(row: str, seed: int, out: Path, data_root: Path, resume: bool) -> None:
    """Prune by magnitude and write report.json."""
    asked = ROWS[row]
    config = make_config(read_toml(asked.recipe("vbd")) | {"seed": seed})
    loaded = load(asked.checkpoint)
    assert loaded.validation is not None
    data = load_data(
        str(loaded.data),
        data_root,
        normalisation=loaded.input,
        validation_fraction=loaded.validation["fraction"],
        validation_seed=loaded.validation["seed"],
    )
    (out / ".state").mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    dense = loaded.model.eval()
    torch.manual_seed(seed)
    with FitProgress(Console(), every=20) as progress:
        model = _prune_in_rounds(dense, data, config, asked, out / ".state", resume, progress)
    before, after = (measure_size(network, data.train.inputs[:2]) for network in (dense, model))
    errors = {
        part: {"before": measure_error(dense, batches), "after": measure_error(model, batches)}
        for part, batches in (("validation", data.validation_batches()), ("test", data.test_batches()))
        if batches is not None
    }
    report = {
        "size": {"before": vars(before), "after": vars(after)},
        "weights": count_weights(model),
        "errors": errors,
        "stages": [],
        "finetune": [None] * _epochs(config),
        "seconds": time.perf_counter() - started,
        "environment": {"device": "cpu"},
    }
    write_text(out / "report.json", json.dumps(report))


def _epochs(config: RunConfig) -> int:
    """As many passes over the training set as VBD's run makes, over all its rounds."""
    return sum(one.epochs for one in config.rounds) + config.finetune_epochs


def _prune_in_rounds(
    dense: nn.Module,
    data: DataSet,
    config: RunConfig,
    row: Row,
    state: Path,
    resume: bool,
    listener: Listener | None = None,
) -> nn.Module:
    """Prune a like share in each round, train after each."""
    reached = json.loads((RESULTS / row.name / f"vbd-{config.seed}.json").read_text(encoding="utf-8"))
    example, model = data.train.inputs[:2], copy.deepcopy(dense)
    if row.mode == "weights":
        # Of weights alone: it keeps the biases of neurons that VBD removes. Older files count biases, too,
        # which leaves it a few more
        whole, target = count_weights(dense), reached.get("weights", reached["size"]["nonzeros"])
    else:
        whole, target = measure_size(dense, example).parameters, reached["size"]["parameters"]
    for number in range(ROUNDS):
        allowed = round(whole * (target / whole) ** ((number + 1) / ROUNDS))
        if row.mode == "weights":
            _prune_weights_(model, allowed)
        else:
            model = _prune_channels(model, example, allowed)
        share = _epochs(config) * (number + 1) // ROUNDS - _epochs(config) * number // ROUNDS
        fit(
            model,
            data.train_batches(
                config.examples_a_step(len(data.train)), config.seed, config.augment, config.augment_pixels
            ),
            config.model_copy(update={"epochs": share, "lr": RATE, "seed": config.seed * ROUNDS + number}),
            teacher=dense,
            num_data=len(data.train),
            keep_zeros=True,
            checkpoint=FitCheckpoint(state / f"{number}.ckpt", resume),
            listener=listener,
        )
    return model


def _prune_weights_(model: nn.Module, allowed: int) -> None:
    """Zero the smallest weights of all layers together until `allowed` are not 0."""
    layers = [(module, "weight") for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    count = sum(module.weight.numel() for module, _ in layers)
    scores = {layer: _adapted(layer[0].weight.detach()) for layer in layers}
    prune.global_unstructured(layers, prune.L1Unstructured, importance_scores=scores, amount=count - allowed)
    for module, name in layers:
        prune.remove(module, name)


def _adapted(weight: Tensor) -> Tensor:
    """Each weight's square over the sum of its layer's squares that are no smaller."""
    squares, order = weight.flatten().square().sort(descending=True)
    scores = torch.empty_like(squares)
    scores[order] = squares / squares.cumsum(0)
    return scores.view_as(weight)


def _prune_channels(model: nn.Module, example: Tensor, allowed: int) -> nn.Module:
    """A copy without the weakest channels: the largest one of at most `allowed` parameters."""
    low, high, best = 0.0, 1.0, None
    for _ in range(12):
        ratio = (low + high) / 2
        candidate = copy.deepcopy(model)
        last = [module for module in candidate.modules() if isinstance(module, nn.Linear)][-1]
        options: dict[str, Any] = {
            "ignored_layers": [last],
            "global_pruning": True,
            "max_pruning_ratio": 0.98,
        }
        tp.pruner.MagnitudePruner(
            candidate, example, tp.importance.GroupMagnitudeImportance(), pruning_ratio=ratio, **options
        ).step()
        if sum(parameter.numel() for parameter in candidate.parameters()) <= allowed:
            best, high = candidate, ratio
        else:
            low = ratio
    if best is None:
        raise SystemExit(f"magnitude pruning reaches no network of {allowed} parameters")
    return best


if __name__ == "__main__":
    main()

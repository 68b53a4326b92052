"""What is to be done for the CIFAR-10 tables, step by step, each a command of its own."""

import sys
from dataclasses import dataclass
from pathlib import Path

from cifar_rows import NETWORKS, ROOT, ROWS, Row, training_recipe


@dataclass(frozen=True)
class Options:
    """What the steps are told.

    Attributes:
        work: folder of all that is made.
        zoo: folder of dense networks that are there already, and of `recipes`.
        data: name or file of the data set.
        data_root: where named sets lie.
        arch_args: of VGG's builder, KEY=VALUE.
        machine: flags that say how this machine computes.
    """

    work: Path
    zoo: Path
    data: str
    data_root: Path | None
    arch_args: tuple[str, ...] = ()
    machine: tuple[str, ...] = ()

    def dense(self, network: str) -> Path:
        """The dense network: the committed one, or the one that is made here."""
        committed = self.zoo / f"{network}.pt"
        return committed if committed.exists() else self.work / "zoo" / committed.name

    @property
    def reading(self) -> tuple[str, ...]:
        """How a command finds its data."""
        root = ("--data-root", str(self.data_root)) if self.data_root else ()
        return ("--data", self.data, *root)


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of the step, and of its log.
        command: the program and its arguments, without --resume.
        made: there when the step is done.
        state: there when the step was cut off; then it goes on with --resume. None: it starts anew.
        needs: files that must be there before.
        result: of which row, method and seed `made` is the report; None where it is no run.
        gpu: only where there is one.
        alone: nothing else beside it: it measures times.
    """

    name: str
    command: tuple[str, ...]
    made: Path
    state: Path | None = None
    needs: tuple[Path, ...] = ()
    result: tuple[Row, str, int] | None = None
    gpu: bool = False
    alone: bool = False


VBDCOMPRESS = (sys.executable, "-m", "vbdcompress")


def all_steps(options: Options) -> list[Step]:
    """Everything, in order: benchmarks, dense networks, then seed by seed VBD and its rivals."""
    steps = _benchmark_steps(options)
    steps += [step for network in NETWORKS for step in _dense_steps(network, options)]
    for seed in range(max(row.seeds for row in ROWS.values())):
        rows = [row for row in ROWS.values() if seed < row.seeds]
        steps += [_run_step(row, "vbd", seed, options) for row in rows]
        rivals = [(row, method) for row in rows for method in row.methods if method != "vbd"]
        steps += [_run_step(row, method, seed, options) for row, method in rivals]
    return steps


def _dense_steps(network: str, options: Options) -> list[Step]:
    """Train and store, where the network is not there yet."""
    stored = options.dense(network)
    if stored.parent == options.zoo:
        return []
    trained = options.work / "dense" / stored.name
    recipe = options.zoo / "recipes" / training_recipe(network)
    arguments = (
        [part for pair in options.arch_args for part in ("--arch-arg", pair)]
        if network == "vgg_cifar"
        else []
    )
    train = [*VBDCOMPRESS, "train", network, *arguments, "--config", str(recipe), "--out", str(trained)]
    store = [sys.executable, str(ROOT / "zoo" / "cifar" / "store.py"), str(trained), str(stored)]
    return [
        Step(
            f"train-{network}",
            (*train, *options.machine, *options.reading),
            trained if not stored.exists() else stored,
            trained.parent / ".training" / trained.name,
        ),
        Step(f"store-{network}", (*store, *options.reading), stored, needs=(trained,)),
    ]


def _run_step(row: Row, method: str, seed: int, options: Options) -> Step:
    name = f"{row.name}-{method}-{seed}"
    out, dense = options.work / "runs" / name, options.dense(row.network)
    recipe = options.zoo / "recipes" / row.recipe(method)
    needs: tuple[Path, ...] = (dense,)
    if method in ("vbd", "vd"):
        command = [*VBDCOMPRESS, "run", str(dense), "--config", str(recipe)]
    else:
        like = options.work / "runs" / f"{row.name}-vbd-{seed}" / "report.json"
        needs = (dense, like)
        command = [sys.executable, str(ROOT / "zoo" / "cifar" / "prune.py"), row.name, "--method", method]
        command += ["--dense", str(dense), "--recipe", str(recipe), "--like", str(like)]
        if method == "magnitude":
            command += ["--scope", row.magnitude]
    command += ["--seed", str(seed), "--out", str(out), *options.machine, *options.reading]
    return Step(name, tuple(command), out / "report.json", out / ".state", needs, (row, method, seed))


def _benchmark_steps(options: Options) -> list[Step]:
    commands = {
        "step_cost": "--device cuda --precision bfloat16 --networks vgg_cifar --cuda-graphs --turns 20",
        "epoch_cost": "--device cuda --precision bf16-mixed --networks vgg_cifar --ways graphs",
    }
    steps = []
    for name, flags in commands.items():
        out = options.work / "results" / f"{name}_cuda.json"
        command = (sys.executable, str(ROOT / "zoo" / "benchmarks" / f"{name}.py"), *flags.split())
        steps.append(Step(name.replace("_", "-"), (*command, "--out", str(out)), out, gpu=True, alone=True))
    return steps

"""Take the work of slice.py from one machine to another in small files, and into the zoo.

    python zoo/cifar/carry.py pack WORK OUT          # OUT/carry.00, .01, ... of at most 15 MB each
    python zoo/cifar/carry.py unpack OUT WORK
    python zoo/cifar/carry.py install WORK           # what is finished, into zoo/ and exports/

What is finished goes first, then the state of what is not, as far as it fits. A state of more than 16 MB
is rounded: weights in bfloat16, without the optimizer's moments, which it gathers again in a few hundred
steps; a smaller one goes on as if it had not been cut off.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from cifar_rows import RESULTS, ROOT, ZOO

PART = 15_000_000
LIMIT = 60_000_000
EXACT = 16_000_000
CARRIED = ".carried.json"
KINDS = (
    "results/**/*.json",
    "logs/*.log",
    "runs/*/report.*",
    "runs/*/*.safetensors",
    "runs/*/*.onnx",
    "zoo/*.pt",
)
STATES = ("**/.state/**/*", "**/.training/**/*", "dense/*.pt")


@click.group()
def main() -> None:
    """Pack, unpack, install."""


@main.command("pack")
@click.argument("work", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--limit", default=LIMIT, show_default=True, help="Bytes in all.")
@click.option(
    "--all", "everything", is_flag=True, help="Also what was unpacked here and has not changed since."
)
def pack_command(work: Path, out: Path, limit: int, everything: bool) -> None:
    """Write WORK to parts in OUT; --all for a machine that has nothing yet."""
    for line in pack(work, out, limit, everything=everything):
        click.echo(line)


@main.command("unpack")
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.argument("work", type=click.Path(path_type=Path))
def unpack_command(folder: Path, work: Path) -> None:
    """Read the parts in FOLDER into WORK."""
    unpack(folder, work)


@main.command("install")
@click.argument("work", type=click.Path(path_type=Path, exists=True))
def install_command(work: Path) -> None:
    """Copy what is finished into the zoo and exports."""
    for path in sorted((work / "zoo").glob("*.pt")):
        shutil.copy(path, ZOO / path.name)
    for path in sorted((work / "results").glob("*/*.json")):
        (RESULTS / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, RESULTS / path.parent.name / path.name)
    for path in sorted((work / "results").glob("*_cost_*.json")):
        shutil.copy(path, ZOO / "benchmarks" / path.name)
    for run in sorted((work / "runs").glob("*-vbd-0")):
        if (run / "model.onnx").exists():
            target = ROOT / "exports" / run.name.removesuffix("-vbd-0")
            shutil.copytree(run, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".state"))


def pack(work: Path, out: Path, limit: int = LIMIT, *, everything: bool = False) -> Iterator[str]:
    """Write what is new in `work` to parts in `out`; tells what did not fit.

    Args:
        out: where `work` was unpacked from: all is written again, for the parts there are replaced.
        limit: bytes of all parts together.
        everything: not only what is new since it was unpacked here.
    """
    folders, marks = _carried(work)
    known = {} if everything or str(out.resolve()) in folders else marks
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in _files(work):
            name = str(path.relative_to(work))
            try:
                if known.get(name) == _mark(path):
                    continue
                content = (
                    _state_bytes(path) if name.startswith("dense") or ".state" in name else path.read_bytes()
                )
            except FileNotFoundError:
                continue  # of a step that runs beside: its state goes when it is done
            if buffer.tell() + len(content) + 20_000 > limit:  # the archive's own blocks beside it
                yield f"left behind: {name} ({len(content):,} bytes)"
                continue
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    out.mkdir(parents=True, exist_ok=True)
    whole, before = buffer.getbuffer(), set(out.glob("carry.[0-9][0-9]"))
    parts = {}
    for number, start in enumerate(range(0, len(whole), PART)):
        written = out / f"carry.{number:02}.part"
        written.write_bytes(whole[start : start + PART])
        parts[written] = out / f"carry.{number:02}"
    for written, part in parts.items():  # all at once, as nearly as can be: a machine may be taken away
        written.replace(part)
    for old in before - set(parts.values()):
        old.unlink()


def unpack(folder: Path, work: Path) -> None:
    """Read parts into `work`, and note what they held: the next pack leaves it out where it is unchanged."""
    whole = io.BytesIO(b"".join(part.read_bytes() for part in sorted(folder.glob("carry.[0-9][0-9]"))))
    work.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=whole) as archive:
        names = archive.getnames()
        archive.extractall(work, filter="data")
    folders, marks = _carried(work)
    marks |= {name: _mark(work / name) for name in names}
    told = {"folders": [*folders, str(folder.resolve())], "marks": marks}
    (work / CARRIED).write_text(json.dumps(told), encoding="utf-8")


def _files(work: Path) -> Iterator[Path]:
    for pattern in (*KINDS, *STATES):
        for path in _found(work, pattern):
            stored = path.parent.name == "dense" and (work / "zoo" / path.name).exists()
            if path.is_file() and path.suffix != ".part" and not stored:
                yield path


def _found(work: Path, pattern: str) -> list[Path]:
    """What a pattern names; looked up again where a step that runs beside takes a folder away meanwhile."""
    while True:
        try:
            return sorted(work.glob(pattern))
        except FileNotFoundError:
            continue


def _mark(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _carried(work: Path) -> tuple[list[str], dict[str, list[int]]]:
    """The folders that `work` was unpacked from, and what lay there: name -> mark."""
    path = work / CARRIED
    if not path.exists():
        return [], {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["folders"], found["marks"]


def _state_bytes(path: Path) -> bytes:
    """A file of a run's state; a large checkpoint, or a large network that is not stored yet, rounded."""
    if path.suffix not in (".ckpt", ".pt") or path.stat().st_size <= EXACT:
        return path.read_bytes()
    import torch  # takes seconds, and most states are small

    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    where = "model" if "model" in content else "state_dict"
    content[where] = {
        name: tensor.bfloat16() if tensor.is_floating_point() and tensor.dim() >= 2 else tensor
        for name, tensor in content[where].items()
    }
    if "optimizer" in content:
        content["optimizer"] |= {"state": {}}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


if __name__ == "__main__":
    main()

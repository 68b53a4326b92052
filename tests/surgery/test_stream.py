"""Channels of a stream that norms are over go exactly: the norms count them as the zeros that they are."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from small_networks import Pattern, built, conv, pool, stream_layers
from torch import Tensor, nn

from vbdcompress.compare import EXACT, relative_difference
from vbdcompress.conversion import Converted, convert
from vbdcompress.exporting.export import export
from vbdcompress.exporting.slim_file import load_slim
from vbdcompress.slimming import slim
from vbdcompress.surgery.liveness import plan_removal_
from vbdcompress.surgery.slice import apply_plan_
from vbdcompress.surgery.verify import find_groups
from vbdcompress.vbd.gates import ChannelGate
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_

WIDTH, GONE = 8, [1, 2, 6]


class OwnNorm(nn.LayerNorm):
    """Over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


def in_front() -> nn.Module:
    """Norms in front of what reads a stream, to which a table and a first token are added."""

    def run(n: Any, x: Tensor) -> Tensor:
        x = torch.cat([n.first.expand(len(x), 1, -1), n.words(x)], 1) + n.places
        y = n.one(x)
        x = x + n.out(attend(n.q(y), n.k(y), n.v(y)))
        x = x + n.narrow(n.wide(n.two(x)).relu())
        return n.head(n.last(x)[:, 0])

    q, k, v, out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
    layers = {"q": q, "k": k, "v": v, "out": out, **stream_layers(WIDTH)}
    norms = {"one": nn.LayerNorm(WIDTH), "two": nn.RMSNorm(WIDTH), "last": nn.LayerNorm(WIDTH, bias=False)}
    model = Pattern(run, **layers, **norms)
    model.first = nn.Parameter(torch.randn(1, 1, WIDTH))
    model.register_buffer("places", torch.randn(1, 6, WIDTH))
    return model


def behind() -> nn.Module:
    """Norms behind the sums, so that they write the stream, and one without weights in front of the head."""

    def run(n: Any, x: Tensor) -> Tensor:
        x = n.one(n.words(x))
        x = n.two(x + n.narrow(F.gelu(n.wide(x))))
        return n.head(n.bare(x).mean(1))

    bare = nn.LayerNorm(WIDTH, elementwise_affine=False)
    return Pattern(run, one=nn.LayerNorm(WIDTH), two=nn.LayerNorm(WIDTH), bare=bare, **stream_layers(WIDTH))


def of_images() -> nn.Module:
    """In the manner of ConvNeXt: depthwise convolutions with a bias, a scale for each channel of a branch."""

    def run(n: Any, x: Tensor) -> Tensor:
        x = n.first(n.stem(x[:, None]))
        y = n.each(x).permute(0, 2, 3, 1)
        x = x + (n.scale * n.narrow(F.gelu(n.wide(n.one(y))))).permute(0, 3, 1, 2)
        return n.head(n.last(pool(x)))

    model = Pattern(
        run,
        stem=conv(1, WIDTH),
        first=OwnNorm(WIDTH),
        each=conv(WIDTH, WIDTH, groups=WIDTH),
        one=nn.LayerNorm(WIDTH),
        wide=nn.Linear(WIDTH, 12),
        narrow=nn.Linear(12, WIDTH),
        last=nn.LayerNorm(WIDTH),
        head=nn.Linear(WIDTH, 3),
    )
    model.scale = nn.Parameter(torch.randn(WIDTH))
    return model


def merged() -> nn.Module:
    """A norm over several copies of the channels side by side, as Swin merges patches."""

    def run(n: Any, x: Tensor) -> Tensor:
        x = n.words(x)[:, :4]
        return n.head(n.norm(torch.cat([x[:, ::2], x[:, 1::2]], -1)).relu()).mean(1)

    return Pattern(run, words=nn.Linear(4, WIDTH), norm=nn.LayerNorm(2 * WIDTH), head=nn.Linear(2 * WIDTH, 3))


@dataclass(frozen=True)
class Case:
    """A network of inputs [n, 5, 4], who writes its stream first, its norms, and the layers that read it."""

    build: Callable[[], nn.Module]
    stream: str
    norms: Sequence[str]
    readers: Sequence[str]


CASES = [
    Case(in_front, "words", ["one", "two", "last"], ["q", "k", "v", "wide", "head"]),
    Case(behind, "words", ["one", "two", "bare"], ["wide", "head"]),
    Case(of_images, "stem", ["first", "one", "last"], ["wide", "head"]),
    Case(merged, "words", ["norm"], ["head"]),
]
each_case = pytest.mark.parametrize("case", CASES, ids=[case.build.__name__ for case in CASES])


def batch(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def without(case: Case) -> Converted:
    """Converted, with the gates of the channels that go far beyond any threshold."""
    converted = convert(built(case.build), batch(2))
    (gate,) = (m for m in converted.model.modules() if isinstance(m, ChannelGate) and m.name == case.stream)
    with torch.no_grad():
        gate.log_sigma2[GONE] = 60.0
    return converted


@contextmanager
def zeros_in_front_of(model: nn.Module, case: Case) -> Iterator[None]:
    """What norms and readers are given, with zeros for the channels that go."""

    def zero(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        x = args[0].clone()
        dim = 1 if isinstance(module, OwnNorm) else -1
        for start in range(0, x.shape[dim], WIDTH):
            x.index_fill_(dim, torch.tensor(GONE) + start, 0.0)
        return x

    hooks = [model.get_submodule(n).register_forward_pre_hook(zero) for n in (*case.norms, *case.readers)]
    yield
    for hook in hooks:
        hook.remove()


@each_case
def test_a_cut_gives_what_zeros_in_front_of_norms_and_readers_give(case: Case) -> None:
    slimmed = slim(without(case), 50.0)
    row = next(row for row in slimmed.groups if row.name == case.stream)
    assert (row.size, row.kept, row.whole_because) == (WIDTH, WIDTH - len(GONE), None)
    original, x = built(case.build), batch(5, 1)
    with torch.no_grad(), zeros_in_front_of(original, case):
        assert relative_difference([original(x)], [slimmed.model(x)]) <= EXACT


@each_case
def test_masked_in_eval_mode_it_is_the_cut_one_and_whole_while_training(case: Case) -> None:
    converted = without(case)
    slimmed, x = slim(converted, 50.0), batch(5, 1)
    set_threshold_(converted.model, 50.0)
    gate = next(m for m in converted.model.modules() if isinstance(m, ChannelGate) and m.name == case.stream)
    with torch.no_grad():
        masked = converted.model.eval()(x)
        assert relative_difference([masked], [slimmed.model(x)]) <= EXACT
        gate.log_sigma2.fill_(-200.0)  # no noise
        gate.theta[GONE] = 0.0
        norm, reader = (converted.model.get_submodule(names[0]) for names in (case.norms, case.readers))
        given: list[Tensor] = []
        hooks = [m.register_forward_hook(lambda m, args, _: given.append(args[0])) for m in (norm, reader)]
        for posterior in find_posteriors(converted.model):
            posterior.log_sigma2.fill_(-200.0)
        converted.model.train()(x)
        for hook in hooks:
            hook.remove()
    at_norm, at_reader = given[:2]
    assert at_norm.movedim(1 if at_norm.dim() == 4 and case.build is of_images else -1, 0)[GONE].any()
    assert at_reader[..., GONE].abs().max() < 1e-30


@each_case
def test_nothing_else_changes(case: Case) -> None:
    converted, x = convert(built(case.build), batch(2)), batch(5, 1)
    original = built(case.build)
    with torch.no_grad():
        assert relative_difference([original(x)], [converted.undo()(x)]) <= EXACT
        assert relative_difference([original(x)], [slim(converted, 50.0).model(x)]) <= EXACT


@each_case
def test_the_files_hold_the_cut_network(case: Case, tmp_path: Path) -> None:
    slimmed = slim(without(case), 50.0)
    again = convert(slimmed.model, batch(2))  # a second round
    gate = next(m for m in again.model.modules() if isinstance(m, ChannelGate) and m.name == case.stream)
    with torch.no_grad():
        gate.log_sigma2[0] = 60.0
    twice = slim(again, 50.0)
    model, x = twice.model.float(), batch(3, 2).float()
    export(model, tmp_path, x, plans=[slimmed.plan, twice.plan])
    loaded = load_slim(tmp_path / "slim.safetensors", model=built(case.build).float())
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(loaded.eval()(x), expected)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert found == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-5)
    assert next(row for row in twice.groups if row.name == case.stream).kept == WIDTH - len(GONE) - 1


def test_what_nothing_reads_stays_while_a_norm_counts_it() -> None:
    model, x = built(in_front), batch(4)
    for name in CASES[0].readers:
        model.get_submodule(name).weight.data[:, GONE] = 0
    groups = find_groups(model, x).removable
    with torch.no_grad():
        expected = model(x)
        plan = plan_removal_(model, groups, x)
        apply_plan_(model, plan)
        assert relative_difference([expected], [model(x)]) <= EXACT
    assert model.get_submodule("words").out_features == WIDTH

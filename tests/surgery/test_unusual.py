"""Networks whose code does what few do: what can't be followed is left whole, and the rest still goes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.ops import roi_align

from vbdcompress.conversion import Converted, convert
from vbdcompress.count import measure_size
from vbdcompress.errors import ConvertError
from vbdcompress.inputs import call
from vbdcompress.slimming import slim
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_


class Keeping(nn.Module):
    """Keeps its attention map, as many a tutorial's transformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        self.kept = hidden.softmax(-1)
        logits: Tensor = self.head(self.b(hidden).relu())
        return logits


class Queries(nn.Module):
    """Learned queries through a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(1, 4, 6))
        self.query, self.key, self.value = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(5, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys = self.query(self.latent.expand(len(x), -1, -1)), self.key(x)
        logits: Tensor = self.head((queries @ keys.transpose(1, 2)).softmax(-1) @ self.value(x))
        return logits


class Mixture(nn.Module):
    """Four experts, all of them weighed by a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate = nn.Linear(6, 10), nn.Linear(10, 4)
        self.experts = nn.ModuleList([nn.Linear(10, 12) for _ in range(4)])
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        weights = self.gate(x).softmax(-1)[..., None]
        logits: Tensor = self.head((weights * torch.stack([e(x) for e in self.experts], 1)).sum(1).relu())
        return logits


class Regions(nn.Module):
    """An operation of a library's own, without a second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 10, 3, padding=1)
        self.c, self.d = nn.Linear(40, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        features = roi_align(self.b(self.a(x).relu()).relu(), list(boxes), (2, 2))
        logits: Tensor = self.d(self.c(features.flatten(1)).relu())
        return logits


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.sigmoid() + x * x.sigmoid() * (1 - x.sigmoid()))


class OwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(*pair) for pair in ((6, 8), (8, 9), (9, 7), (7, 3)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.d(self.c(Swish.apply(self.b(self.a(x).relu()))).relu())
        return logits


class Graph(nn.Module):
    """A sparse matrix of neighbours, and a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)
        self.register_buffer("near", torch.eye(4).roll(1, 0).to_sparse(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.sparse.mm(self.near.to(x.dtype), self.a(x)).relu()
        return F.linear(self.b(hidden).relu(), self.a.weight) + F.linear(hidden, self.b.weight).sum(1, True)


class Bag(nn.Module):
    """A sum over as many elements as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(*pair) for pair in ((3, 10), (10, 12), (12, 8), (8, 2)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.d(self.c(self.b(self.a(x).relu()).relu().sum(1)).relu())
        return logits


BOXES = torch.tensor([[[0.0, 0, 4, 4], [1, 1, 6, 6]], [[2, 2, 7, 7], [0, 1, 5, 6]]])


def switched_off(model: nn.Module, inputs: Any, mode: Any) -> tuple[Converted, nn.Module, int]:
    """Converted with a third of every posterior switched off; cut; parameters left."""
    torch.manual_seed(1)
    converted = convert(model.eval(), inputs, mode)
    for posterior in find_posteriors(converted.model):
        off = torch.rand_like(posterior.theta) < 0.35
        posterior.log_sigma2.data = torch.where(off, 60.0, -30.0)
    cut = slim(converted, 3.0).model
    set_threshold_(converted.model.eval(), 3.0)
    return converted, cut, sum(int(each.count_nonzero()) for each in cut.parameters())


@pytest.mark.parametrize("mode", ["weights", "channels"])
@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (Keeping, torch.randn(3, 6)),
        (Queries, torch.randn(2, 7, 5)),
        (Mixture, torch.randn(3, 6)),
        (Regions, (torch.randn(2, 3, 8, 8), BOXES)),
        (OwnFunction, torch.randn(3, 6)),
        (Graph, torch.randn(4, 6)),
    ],
)
@torch.no_grad()
def test_what_few_networks_do_is_cut_exactly(make: Any, inputs: Any, mode: str) -> None:
    model = make()
    if (make, mode) == (Graph, "channels"):
        with pytest.raises(ConvertError, match="nothing in the network can be converted in channels mode"):
            convert(model, inputs, mode)
        return
    before = sum(each.numel() for each in model.parameters())
    converted, cut, left = switched_off(model, inputs, mode)
    assert left < 0.95 * before
    torch.testing.assert_close(call(cut, inputs), call(converted.model, inputs), rtol=1e-4, atol=1e-5)
    assert measure_size(cut, inputs).nonzeros == left
    assert all(each.requires_grad for each in cut.parameters())


def groups_of(model: nn.Module, inputs: Any) -> dict[str, str | None]:
    return {group.name: group.whole_because for group in convert(model.eval(), inputs).scan.groups}


def test_experts_of_a_mixture_lose_channels_and_its_gate_stays() -> None:
    found = groups_of(Mixture(), torch.randn(3, 6))
    assert found["experts.0"] is None
    assert found["gate"] == "its channels work on all channels of others"


def test_what_has_no_second_derivative_keeps_what_is_before_it_alone() -> None:
    told = "what lies behind it has no second derivative, from which its channels could be told"
    regions = groups_of(Regions(), (torch.randn(2, 3, 8, 8), BOXES))
    assert (regions["a"], regions["b"], regions["c"]) == (None, told, None)
    own = groups_of(OwnFunction(), torch.randn(3, 6))
    assert (own["a"], own["b"], own["c"]) == (None, told, None)


@pytest.mark.parametrize("elements", [7, 9, 2])
@torch.no_grad()
def test_a_constant_that_depends_on_the_input_s_size_is_not_folded(elements: int) -> None:
    torch.manual_seed(0)
    model = Bag().eval().double()
    model.b.bias.fill_(0.5)
    converted = convert(model, torch.randn(3, 7, 3).double(), "weights")
    for posterior in find_posteriors(converted.model):
        posterior.log_sigma2.fill_(-30.0)
        if posterior.name == "b.weight":
            posterior.log_sigma2[3] = 60.0  # a neuron without inputs: a constant before the sum
    cut = slim(converted, 3.0).model
    set_threshold_(converted.model.eval(), 3.0)
    inputs = torch.randn(2, elements, 3).double()
    torch.testing.assert_close(cut(inputs), converted.model(inputs), rtol=1e-10, atol=1e-10)


def test_a_transform_of_many_dimensions_is_no_table_of_positions() -> None:
    class Capsules(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transform = nn.Parameter(torch.randn(1, 6, 3, 4, 4))
            self.transpose_weight = nn.Parameter(torch.randn(4, 5))

        def forward(self, x: Tensor) -> Tensor:
            return (x[:, :, None, None, :] @ self.transform).sum((1, 2, 3)) @ self.transpose_weight

    rows = convert(Capsules().eval(), torch.randn(2, 6, 4), "weights").table
    assert [row.action for row in rows] == ["converted", "converted"]


@pytest.mark.filterwarnings("ignore:.*jit.script:FutureWarning")
def test_a_scripted_part_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 3), torch.jit.script(nn.ReLU()))
    with pytest.raises(ConvertError, match=r"(?s)module '1' is TorchScript .*torch\.export"):
        convert(model, torch.randn(2, 4))


class Positive(nn.Module):
    """Takes logarithms of weights, which random ones have none of; perhaps weighs channels by their mean."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.a, self.b, self.pooled = nn.Linear(6, 8), nn.Linear(8, 3), pooled
        self.spread = nn.Parameter(torch.rand(3, 3) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        if self.pooled:
            hidden = hidden * hidden.data.mean(1, keepdim=True).sigmoid()  # which no derivative shows
        output: Tensor = self.b(hidden) * self.spread.log().mean().exp()
        return output


def test_a_cut_is_seen_where_random_weights_give_no_numbers() -> None:
    torch.manual_seed(0)
    converted = convert(Positive(False).eval(), torch.randn(2, 6), mode="channels")
    assert [group.readers[0].layer for group in converted.scan.removable] == ["b"]
    with pytest.raises(ConvertError, match="cutting its channels changes the output"):
        convert(Positive(True).eval(), torch.randn(2, 6), mode="channels")


def test_nothing_is_proven_by_outputs_that_are_no_numbers() -> None:
    class Alike(Positive):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (0.01 - self.a.weight.std()).log()

    torch.manual_seed(0)
    model = Alike(True).eval()
    model.a.weight.data = 1.0 + 1e-3 * torch.randn(8, 6)
    with pytest.raises(ConvertError, match="gives no numbers, and nothing shows what a cut does"):
        convert(model, torch.randn(2, 6), mode="channels")


class Statistics(nn.Module):
    """Pools means and deviations of what a norm over each channel and a clipping activation left."""

    def __init__(self, norm: nn.Module, clip: nn.Module) -> None:
        super().__init__()
        self.a, self.c, self.norm, self.clip = nn.Conv1d(3, 6, 3), nn.Conv1d(6, 6, 3), norm, clip
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.clip(self.norm(self.a(x)))
        hidden = self.clip(self.norm(self.c(hidden)) + hidden[..., 2:])
        logits: Tensor = self.head(torch.cat([hidden.mean(2), hidden.std(2)], 1))
        return logits


@pytest.mark.parametrize("norm", [nn.InstanceNorm1d(6, affine=True), nn.GroupNorm(6, 6)])
@pytest.mark.parametrize("clip", [nn.ReLU(), nn.ReLU(inplace=True), nn.Hardswish()])
def test_channels_are_followed_through_norms_of_their_own_and_clipping(
    norm: nn.Module, clip: nn.Module
) -> None:
    converted = convert(Statistics(norm, clip), torch.randn(2, 3, 20), mode="channels")
    (group,) = converted.scan.removable
    assert sorted(member.layer for member in group.writers) == ["a", "c"]
    assert [member.layer for member in group.readers] == ["c", "head"]


def test_channels_are_followed_past_where_gradients_stop() -> None:
    class Probed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head, self.probe = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.a(x).relu()
            return self.head(hidden), self.probe(hidden.detach())

    converted = convert(Probed(), torch.randn(2, 6), mode="channels")
    (group,) = converted.scan.removable
    assert [member.layer for member in group.readers] == ["head", "probe"]

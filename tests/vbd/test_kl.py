"""The KL terms against numerical integrals (scipy) and against cplxmodule's penalties."""

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

from vbdcompress.vbd.kl import PRIORS, kl_sum, kl_vbd, kl_vd
from vbdcompress.vbd.posterior import log_alpha_of

LOG_ALPHAS = [-8.0, -5.0, -3.0, -2.0, -1.0, -0.3, 0.0, 0.7, 1.0, 2.0, 3.0, 5.0, 8.0]
Term = Callable[[Tensor], Tensor]
TERMS = list(PRIORS.values())
finite32 = st.floats(allow_nan=False, allow_infinity=False, width=32)


def integrate_kl_hierarchical(log_alpha: float, theta: float = 0.7) -> float:
    """KL(N(theta, sigma^2) || N(0, theta^2 + sigma^2)) by quadrature."""
    sigma = math.sqrt(math.exp(log_alpha)) * theta
    q, p = norm(theta, sigma), norm(0, math.hypot(theta, sigma))
    span = (theta - 12 * sigma, theta + 12 * sigma)
    value, _ = quad(lambda w: q.pdf(w) * (q.logpdf(w) - p.logpdf(w)), *span, epsabs=1e-12, limit=200)
    return float(value)


def integrate_kl_log_uniform(log_alpha: float) -> float:
    """E log|eps| - log(alpha) / 2 + (gamma + log 2) / 2 with eps ~ N(1, alpha): 0 as alpha -> inf."""
    scale = math.exp(0.5 * log_alpha)
    pole = -1.0 / scale  # where eps = 1 + scale * z is 0
    cuts = sorted({-12.0, 12.0, min(max(pole, -12.0), 12.0)})
    parts = [
        quad(lambda z: norm.pdf(z) * math.log(abs(1 + scale * z)), low, high, limit=400)[0]
        for low, high in pairwise(cuts)
    ]
    euler_gamma = 0.5772156649015329
    return float(sum(parts)) - 0.5 * log_alpha + 0.5 * (euler_gamma + math.log(2))


@pytest.fixture(scope="module")
def relevance() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own import, not of ours
        return pytest.importorskip("cplxmodule.nn.relevance", reason="cplxmodule does not import")


@pytest.mark.parametrize("log_alpha", LOG_ALPHAS)
def test_kl_vbd_equals_the_integral(log_alpha: float) -> None:
    found = kl_vbd(torch.tensor(log_alpha, dtype=torch.float64)).item()
    assert found == pytest.approx(integrate_kl_hierarchical(log_alpha), rel=1e-7, abs=1e-10)


@pytest.mark.parametrize("log_alpha", LOG_ALPHAS)
def test_kl_vd_is_near_the_integral(log_alpha: float) -> None:
    # The published fit is good to about 0.02 nats; a sign or constant off would be 0.1 and more.
    found = kl_vd(torch.tensor(log_alpha, dtype=torch.float64)).item()
    assert found == pytest.approx(integrate_kl_log_uniform(log_alpha), abs=0.02)


@pytest.mark.parametrize(("name", "term"), [("LinearARD", kl_vbd), ("LinearVD", kl_vd)])
def test_kl_equals_cplxmodule(relevance: ModuleType, name: str, term: Term) -> None:
    layer = getattr(relevance, name)(6, 5).double()
    torch.nn.init.normal_(layer.log_sigma2, -3.0, 4.0)
    log_alpha = log_alpha_of(layer.weight, layer.log_sigma2)
    torch.testing.assert_close(term(log_alpha), layer.penalty, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
def test_kl_gradient_equals_finite_differences(term: Term, log_alpha: float) -> None:
    value = torch.tensor([log_alpha], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(term, value)


@pytest.mark.parametrize("term", TERMS)
def test_kl_falls_to_zero(term: Term) -> None:
    values = term(torch.linspace(-30, 60, 500, dtype=torch.float64))
    assert (values.diff() < 0).all()
    assert values[-1].item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("log_alpha", [-1e4, 1e4])
def test_kl_is_finite_at_the_limits(term: Term, log_alpha: float) -> None:
    value = torch.tensor(log_alpha, requires_grad=True)
    kl = term(value)
    kl.backward()
    assert kl.dtype == torch.float32
    assert kl.item() == pytest.approx(5e3 if log_alpha < 0 else 0.0, rel=1e-3)
    assert value.grad is not None
    assert value.grad.item() == pytest.approx(-0.5 if log_alpha < 0 else 0.0)


@pytest.mark.parametrize("term", TERMS)
def test_kl_keeps_its_precision_under_autocast(term: Term) -> None:
    theta = torch.tensor([0.0, 1e-12, 0.3, -40.0], requires_grad=True)
    log_sigma2 = torch.tensor([-10.0, 5.0, -3.3, -30.0], requires_grad=True)
    expected = term(log_alpha_of(theta.detach().double(), log_sigma2.detach().double()))
    with torch.autocast("cpu", torch.bfloat16):
        kl = term(log_alpha_of(theta, log_sigma2))
    kl.sum().backward()
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-9)
    for tensor in (theta, log_sigma2):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("prior", list(PRIORS))
def test_kl_sum_is_the_sum_of_the_terms_with_its_gradient(prior: str) -> None:
    generator = torch.Generator().manual_seed(5)
    theta = torch.randn(40, 25, generator=generator, dtype=torch.float64)
    log_sigma2 = 6 * torch.randn(40, 25, generator=generator, dtype=torch.float64) - 4
    theta[0] *= 1e-4
    expected = [tensor.clone().requires_grad_() for tensor in (theta, log_sigma2)]
    found = [tensor.clone().requires_grad_() for tensor in (theta, log_sigma2)]
    by_hand = PRIORS[prior](log_alpha_of(*expected)).sum()
    total = kl_sum(found[0], found[1], prior)
    (3 * by_hand).backward()
    (3 * total).backward()
    torch.testing.assert_close(total, by_hand)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@given(theta=finite32, log_sigma2=st.floats(-1e4, 1e4, width=32))
@pytest.mark.parametrize("prior", list(PRIORS))
def test_kl_sum_is_finite_with_gradients(prior: str, theta: float, log_sigma2: float) -> None:
    tensors = [torch.tensor([value], requires_grad=True) for value in (theta, log_sigma2)]
    total = kl_sum(tensors[0], tensors[1], prior)
    total.backward()
    assert total.isfinite()
    assert total >= 0
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize("prior", list(PRIORS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kl_sum_is_computed_in_float32(prior: str, dtype: torch.dtype) -> None:
    # 2e-4 squared is 0 in float16
    theta = torch.tensor([2e-4], dtype=dtype, requires_grad=True)
    log_sigma2 = torch.tensor([-18.0], dtype=dtype)
    total = kl_sum(theta, log_sigma2, prior)
    total.backward()
    term = PRIORS[prior](log_alpha_of(theta.detach(), log_sigma2)).sum()
    torch.testing.assert_close(total, term, rtol=1e-3, atol=0)
    assert theta.grad is not None
    assert theta.grad.dtype == dtype
    assert theta.grad.item() > 0

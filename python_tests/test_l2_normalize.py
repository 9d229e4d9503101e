"""Row normalization: the value of F.normalize(x, dim=1), and its derivatives."""

import pytest
import torch
import torch.nn.functional as F
from cases import HALF, LAYOUTS, laid_out, powers, restrided, sizes_c
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import moco_ext
import moco_ext.reference


@given(data=st.data())
def test_matches_float64(device, data):
    """1e-6: a float32 sum of squares and a division; a 16-bit result is rounded once more."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    n, c, dtype = draw(st.integers(0, 50)), draw(sizes_c), draw(st.sampled_from([torch.float32, *HALF]))
    scale = draw(powers(-1, 3) if dtype == torch.float16 else powers(-4, 4))
    x = (torch.randn(n, c, device=device) / c**0.5 * scale).to(dtype)
    if n and draw(st.booleans()):
        x[draw(st.integers(0, n - 1))] = 0
    x = restrided(x, draw(st.sampled_from(LAYOUTS))).requires_grad_()
    upstream = torch.randn(n, c, device=device).to(dtype)

    wide = x.detach().double().requires_grad_()
    want = F.normalize(wide, dim=1)
    torch.testing.assert_close(moco_ext.reference.l2_normalize(wide), want, rtol=1e-12, atol=1e-12)
    (want_grad,) = torch.autograd.grad(want, wide, upstream.double())
    got = moco_ext.l2_normalize(x)
    (got_grad,) = torch.autograd.grad(got, x, upstream)

    rounding = torch.finfo(dtype).eps if dtype in HALF else 0.0
    assert got.dtype == dtype
    assert got_grad.dtype == dtype
    assert ((got.double() - want).abs() <= 1e-6 + rounding * want.abs()).all()
    if dtype == torch.float16:  # a zero row's gradient, 1e12 times the upstream one, is infinite there
        want_grad = want_grad.to(dtype).double()
    size = (upstream.double().norm(dim=1) / wide.detach().norm(dim=1).clamp_min(1e-12))[:, None]
    close = (got_grad.double() - want_grad).abs() <= (2e-6 + rounding) * size + 1e-7
    assert (close | (got_grad.double() == want_grad)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_stride_gives_the_same_bits(device, layout):
    x = laid_out(9, 33, layout, device=device)
    assert torch.equal(moco_ext.l2_normalize(x), moco_ext.l2_normalize(x.contiguous()))


@pytest.mark.parametrize("eps", [1e-12, 0.5, 3.0])
def test_rows_shorter_than_eps_are_divided_by_it(device, eps):
    x = torch.tensor([[0.6, 0.8], [0.0, 0.0], [3.0, 4.0]], device=device)
    want = torch.tensor([[0.6, 0.8], [0.0, 0.0], [3.0, 4.0]], device=device)
    want /= torch.tensor([[max(1.0, eps)], [1.0], [5.0]], device=device)
    torch.testing.assert_close(moco_ext.l2_normalize(x, eps), want, rtol=1e-6, atol=0)


def test_nan_stays_in_its_row(device):
    x = torch.ones(3, 4, device=device)
    x[1, 2] = torch.nan
    got = moco_ext.l2_normalize(x)
    assert got[1].isnan().all()
    assert (got[[0, 2]] == 0.5).all()


@pytest.mark.parametrize("huge_or_tiny", [2.0**80, 2.0**-80])
def test_the_gradient_of_rows_whose_squares_leave_the_range(device, huge_or_tiny):
    rows, upstream = torch.randn(5, 16, device=device), torch.randn(5, 16, device=device)
    grads = []
    for scale in (1.0, huge_or_tiny):
        x = (rows * scale).requires_grad_()
        grads.append(torch.autograd.grad(moco_ext.l2_normalize(x, eps=1e-30), x, upstream)[0] * scale)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eps", [1e-12, 2.0])
def test_gradcheck_twice(eps):
    """eps = 2 lies amid the norms: rows on both sides of the floor."""
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    norms = x.detach().norm(dim=1)
    assert eps < 1 or (norms.min() < eps < norms.max())
    assert gradcheck(lambda x: moco_ext.l2_normalize(x, eps), x)
    assert gradgradcheck(lambda x: moco_ext.l2_normalize(x, eps), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device, dtype):
    x = torch.randn(5, 7, device=device).to(dtype).requires_grad_()
    opcheck(torch.ops.moco_ext.l2_normalize_forward.default, (x, 1e-12))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(device, backend):
    def step(x):
        return (moco_ext.l2_normalize(x * 2) ** 3).sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
        x = torch.linspace(-1, 2, 35, device=device).view(5, 7).requires_grad_()
        y = run(x)
        y.backward()
        results.append((y.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)

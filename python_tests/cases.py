"""Tensors in every shape, dtype and stride the ops accept, and float64 copies to judge results by."""

import torch
from hypothesis import strategies as st
from torch import Tensor

import moco_ext
import moco_ext.reference

LAYOUTS = ("contiguous", "shifted", "transposed", "sliced", "expanded")
HALF = (torch.bfloat16, torch.float16)


def laid_out(n: int, c: int, layout: str, **kwargs) -> Tensor:
    """Random normal [n, c] whose strides are those of the layout's name."""
    if layout == "shifted":  # contiguous, but not aligned to more than an element
        return torch.randn(n * c + 1, **kwargs)[1:].view(n, c)
    if layout == "transposed":
        return torch.randn(c, n, **kwargs).t()
    if layout == "sliced":
        return torch.randn(2 * n, c + 3, **kwargs)[::2, 1 : c + 1]
    if layout == "expanded":
        return torch.randn(1, c, **kwargs).expand(n, c)
    return torch.randn(n, c, **kwargs)


def restrided(x: Tensor, layout: str) -> Tensor:
    """x's values in memory laid out by the layout's name ("expanded" keeps only the first row's values)."""
    y = laid_out(*x.shape, layout, dtype=x.dtype, device=x.device)
    if layout == "expanded":
        return x[:1].expand_as(x) if len(x) else y
    return y.copy_(x)


def unit_rows(k: int, c: int, dtype=torch.float32, device="cpu") -> Tensor:
    """[k, c] random rows of length 1, rounded to dtype."""
    rows = torch.randn(k, c, dtype=torch.float64, device=device)
    return (rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)).to(dtype)


def powers(low: float, high: float):
    """Floats spread evenly over the decades from 10**low to 10**high."""
    return st.floats(low, high).map(lambda e: 10.0**e)


sizes_c = st.one_of(st.sampled_from([1, 3, 64, 96, 128, 129, 520]), st.integers(1, 40))


def run_info_nce(info_nce, query, key, queue, temperature, upstream=None, **options):
    """One forward and backward pass: (loss, stats, gradients by name of all inputs that may have one)."""
    query = query.detach().requires_grad_()
    inputs = {"query": query}
    if key is not None and not (options.get("in_batch") and options.get("target") is not None):
        inputs["key"] = key = key.detach().requires_grad_()
    if isinstance(temperature, Tensor):
        inputs["temperature"] = temperature = temperature.detach().requires_grad_()
    loss, stats = info_nce(query, key, queue, temperature, return_stats=True, **options)
    grads = torch.autograd.grad(loss, list(inputs.values()), upstream)
    return loss.detach(), stats, dict(zip(inputs, grads, strict=True))


def double(x):
    return x.detach().double() if isinstance(x, Tensor) else x


def rel_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| over the whole tensor."""
    want = want.double()
    return ((got.double() - want).norm() / want.norm()).item()


def check_info_nce(query, key, queue, temperature, upstream=None, *, normalize=True, reduction="mean", **contrast):
    """Hold loss, stats and every gradient of moco_ext.info_nce to the reference in float64.

    Tolerance. A float32 logit of size L carries a rounding error of about 2^-24 L, and that error, absolute,
    becomes the relative error of each softmax weight. So errors are bounded by 1e-5 max(1, L / 20), with L
    the row's largest logit (14 at T = 0.07), of each gradient's largest possible size, which cancellation
    may undercut. Float64 scales the same bound down. A result returned in a 16-bit dtype is rounded once
    more; on CUDA a 16-bit queue or query also rounds the operands of the products. In-batch keys get a
    gradient from every row: their bound is the sum of the rows' bounds.
    """
    target = contrast.get("target")
    tensors = [x for x in (query, key, queue, target) if x is not None]
    wide = any(t.dtype == torch.float64 for t in tensors)
    options = {"normalize": normalize, "reduction": reduction} | contrast
    got_loss, got, got_grads = run_info_nce(moco_ext.info_nce, query, key, queue, temperature, upstream, **options)
    options["target"] = double(target)
    want_loss, want, want_grads = run_info_nce(
        moco_ext.reference.info_nce, *map(double, (query, key, queue, temperature, upstream)), **options
    )
    assert got_loss.dtype == (torch.float64 if wide else torch.float32)
    assert got_loss.shape == want_loss.shape
    N = len(query)
    if N == 0:
        torch.testing.assert_close(got_loss.double(), want_loss, rtol=0, atol=0, equal_nan=True)
        assert all(len(s) == 0 for s in got)
        assert got_grads["query"].shape == query.shape
        return

    T = (double(temperature) if isinstance(temperature, Tensor) else torch.tensor(temperature)).to(query.device)
    T = T.double().expand(N)
    in_batch = contrast.get("in_batch", False)
    q, k = double(query), double(query[:0] if key is None else key)
    q_norm, k_norm = (x.norm(dim=1).clamp_min(1e-12) if normalize else torch.ones(len(x)).to(x) for x in (q, k))
    q, k = q / q_norm[:, None], k / k_norm[:, None]
    has_own = key is not None and contrast.get("own_key") != "excluded"
    own = (
        k[contrast.get("key_offset", 0) :][:N] if has_own else torch.zeros_like(q) if target is None else double(target)
    )
    n = k[:0] if queue is None else double(queue)[: contrast.get("num_valid")]
    if in_batch:
        n = torch.cat([k, n])
    logits = torch.cat([(q * own).sum(1, keepdim=True), q @ n.t()], dim=1) / T[:, None]
    L = logits.abs().amax(1)
    if target is not None:
        L = torch.maximum(L, (q * double(target)).sum(1).abs() / T)
    unit = 1e-13 if wide else 1e-5
    if query.device.type == "cuda" and any(t.dtype in HALF for t in tensors):
        unit = max(4 * torch.finfo(t.dtype).eps for t in tensors if t.dtype in HALF)
    tol = unit * (L / 20).clamp_min(1)  # [N]

    # weight [N] of each row's loss in what is differentiated
    weight = {"mean": 1 / N, "sum": 1.0, "none": 1.0}[reduction] * (
        torch.ones(N).to(q) if upstream is None else double(upstream).abs().expand(N)
    )

    # the loss of a target distribution is the difference of lse and another logit, of any size up to L
    sizes = {"loss": L if contrast else want.loss.abs(), "lse": want.lse.abs(), "positive_logit": L}
    for name, size in sizes.items():
        value = getattr(want, name)
        assert (getattr(got, name).double() - value).abs().le(tol * size.clamp_min(1)).all(), name
        assert getattr(got, name).dtype == got_loss.dtype
        assert not getattr(got, name).requires_grad
    loss_tol = tol * sizes["loss"].clamp_min(1)
    loss_tol = {"mean": loss_tol.mean, "sum": loss_tol.sum, "none": lambda: loss_tol}[reduction]()
    assert (got_loss.double() - want_loss).abs().le(loss_tol).all()

    # scores closer to the positive's than rounding can tell apart may fall on either side of it
    assert got.rank.dtype == torch.int64
    near = (logits[:, 1:] - logits[:, :1]).abs() <= (tol * L.clamp_min(1))[:, None]
    assert has_own or target is not None or (got.rank == -1).all()
    assert ((got.rank - want.rank).abs() <= near.sum(1)).all()

    if target is not None:
        own = torch.where((own.norm(dim=1) > target.norm(dim=1))[:, None], own, double(target))
    longest = torch.maximum(own.norm(dim=1), n.norm(dim=1).amax() if len(n) else torch.zeros(()).to(n))
    bounds = {"query": tol * longest / q_norm * weight / T, "key": tol * q.norm(dim=1) * weight / T}
    if "key" in got_grads:
        bounds["key"] = (bounds["key"].sum() if in_batch else bounds["key"]) / k_norm
    for name, x in (("query", query), ("key", key)):
        if name not in got_grads:
            continue
        grad, value = got_grads[name], want_grads[name]
        assert grad.dtype == x.dtype
        assert grad.shape == x.shape
        rounding = 0.0
        if x.dtype in HALF:  # half an ulp, or half a step among fp16's subnormals
            rounding = value.abs() * torch.finfo(x.dtype).eps + torch.finfo(x.dtype).smallest_normal / 1000
        error = ((grad.double() - value).abs() - rounding).clamp_min(0).norm(dim=1)
        assert error.le(bounds[name]).all(), (name, error, bounds[name])
    if "temperature" in got_grads:
        assert got_grads["temperature"].shape == temperature.shape
        assert got_grads["temperature"].dtype == temperature.dtype
        error = (got_grads["temperature"].double() - want_grads["temperature"]).abs()
        bound = tol * 2 * L.clamp_min(1e-3) / T * weight
        assert (error <= (bound if temperature.dim() else bound.sum())).all()

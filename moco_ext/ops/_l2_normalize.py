"""l2_normalize: wrapper, fake kernel and autograd formula."""

import torch
from torch import Tensor

from .checks import check_tensors, native, refuse_forward_mode


def l2_normalize(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Scale each row to unit length: ``x / max(||x||₂, eps)``, the value of ``F.normalize(x, dim=1)``.

    Args:
        x: [N, C]; float32, bfloat16 or float16 (float64 on the CPU).
        eps: floor of the norm, so that a zero row stays zero.

    Returns:
        [N, C] of x's dtype, differentiable (twice too).

    Raises:
        ValueError: x is not a float matrix, or eps is negative or not finite.
    """
    check_tensors(x=x)
    refuse_forward_mode("l2_normalize", x)
    return native(torch.ops.moco_ext.l2_normalize_forward, x, eps)[0]


@torch.library.register_fake("moco_ext::l2_normalize_forward")
def _(x, eps):
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32),
    )


def _l2_normalize_setup_context(ctx, inputs, output):
    x, ctx.eps = inputs
    _, norm = output
    ctx.mark_non_differentiable(norm)
    ctx.save_for_backward(x)


def _l2_normalize_backward(ctx, grad, _):
    # From x in plain differentiable torch, so that a second derivative is right too.
    (x,) = ctx.saved_tensors
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = row_norms(wide)
    floored = norm.clamp_min(ctx.eps)
    unit = wide / floored
    along = torch.where(norm > ctx.eps, (grad.to(wide.dtype) * unit).sum(dim=1, keepdim=True), 0.0)
    return ((grad.to(wide.dtype) - along * unit) / floored).to(x.dtype), None


torch.library.register_autograd(
    "moco_ext::l2_normalize_forward", _l2_normalize_backward, setup_context=_l2_normalize_setup_context
)


def row_norms(rows: Tensor) -> Tensor:
    """The norms [N, 1] of float32 (float64) rows [N, C], differentiable."""
    # The squares of huge rows overflow, those of tiny rows underflow, and their norms do neither. Not in float64, which
    # MPS lacks.
    rough = rows.detach().norm(dim=1, keepdim=True)
    scale = torch.ones_like(rough).masked_fill(rough.isinf(), 2.0**-80).masked_fill(rough < 2.0**-40, 2.0**80)
    return (rows * scale).norm(dim=1, keepdim=True) / scale


def wide_rows(x: Tensor, normalize: bool) -> Tensor:
    """Float32 (float64) rows, unit rows if ``normalize``; differentiable."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return l2_normalize(wide.flatten(0, -2)).view(wide.shape) if normalize else wide

"""The native operators of info_nce: their arguments, results, gradient and fake kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_devices, native

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # the schema's numbers, which are torch's
NONE, MEAN = 0, 1
SAME_IDS = {"mask": 0, "positive": 1, "only": 2}
OWN_KEYS = {"positive": 0, "decoupled": 1, "excluded": 2}


@torch.compiler.assume_constant_result  # torch.compile guards on it, but cannot trace it
def _allow_tf32() -> bool:
    # Sees both of torch's switches, old and new; the old one raises where the new one has been set.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def current_precision(cuda: bool) -> int:
    """Of float32 rows in the products of CUDA kernels: 3 (float32), 2 (11 bits, as tf32 and float16), 1 (bfloat16)."""
    if not cuda:
        return 3
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        if dtype in (torch.bfloat16, torch.float16):
            return 1 if dtype == torch.bfloat16 else 2
    return 2 if _allow_tf32() else 3


class Arguments(NamedTuple):
    """The arguments of ``info_nce_forward``, in the order of its schema."""

    query: Tensor
    key: Tensor | None
    queue: Tensor | None
    temperature_tensor: Tensor | None
    temperature: float
    normalize: bool
    reduction: int
    query_grad: bool
    key_grad: bool
    temperature_grad: bool
    precision: int
    in_batch: bool
    key_offset: int
    num_valid_tensor: Tensor | None
    num_valid: int | None
    label_smoothing: float
    query_ids: Tensor | None
    queue_ids: Tensor | None
    same_id: int
    key_ids: Tensor | None
    target: Tensor | None
    own_key: int


_NO_TENSORS = dict.fromkeys(
    ("query", "key", "queue", "temperature_tensor", "num_valid_tensor", "query_ids", "queue_ids", "key_ids", "target")
)


class Results(NamedTuple):
    """The results of ``info_nce_forward``; a gradient that was not asked for is empty."""

    loss: Tensor
    losses: Tensor
    lse: Tensor
    positive_logit: Tensor
    rank: Tensor
    grad_query: Tensor
    grad_key: Tensor
    grad_temperature: Tensor
    weights: Tensor


def info_nce_rows(arguments: Arguments) -> tuple[Tensor, ...]:
    """The reduced loss, and the stats [N] without gradient."""
    if arguments.query_grad or arguments.key_grad or arguments.temperature_grad:
        function = _TransformedInfoNCE if torch._C._are_functorch_transforms_active() else _InfoNCE
        return function.apply(*arguments)[:5]
    return native(torch.ops.moco_ext.info_nce_forward.default, *arguments)[:5]


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad * scale``, rounded to dtype once; on CUDA in one kernel."""
    if grad.dtype == dtype or torch.is_grad_enabled():  # out= is not differentiable
        return (grad * scale).to(dtype)
    return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))


class _InfoNCE(torch.autograd.Function):
    """Backward only scales the gradients that forward has computed. Not registered with the operators, because
    torch.library's autograd takes three times as long, longer than the kernel for a small batch."""

    @staticmethod
    def forward(ctx, *arguments):
        results = native(torch.ops.moco_ext.info_nce_forward.default, *arguments)
        _InfoNCE.save(ctx, arguments, results)
        ctx.mark_non_differentiable(*results[1:5])
        return results[:5]

    @staticmethod
    def save(ctx, arguments, results):
        a, r = Arguments._make(arguments), Results._make(results)
        ctx.set_materialize_grads(False)
        ctx.arguments = a._replace(**_NO_TENSORS)
        ctx.in_batch_gradient = a.in_batch and a.key_grad
        rest = (r.weights, r.lse, a.query_ids, a.key_ids) if ctx.in_batch_gradient else ()
        ctx.save_for_backward(r.grad_query, r.grad_key, r.grad_temperature, a.query, a.key, a.temperature_tensor, *rest)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grads: list[Tensor | None] = [None] * len(Arguments._fields)
        if grad_loss is None:
            return tuple(grads)
        a = ctx.arguments
        grad_query, grad_key, grad_temperature, query, key, temperature, *rest = ctx.saved_tensors
        scale = grad_loss.unsqueeze(1) if a.reduction == NONE else grad_loss
        if a.query_grad:
            grads[0] = _scaled(grad_query, scale, query.dtype)
        if ctx.in_batch_gradient:  # each key gets a gradient from every row
            weights, lse, query_ids, key_ids = rest
            grad_losses = grad_loss / len(query) if a.reduction == MEAN else grad_loss
            grads[1] = native(
                torch.ops.moco_ext.info_nce_backward.default, query, key, temperature, a.temperature, a.normalize,
                a.precision, a.key_offset, query_ids, a.same_id, key_ids, lse, weights,
                grad_losses.expand(len(query)).to(lse.dtype),
            ).to(key.dtype)  # fmt: skip
        elif a.key_grad:
            grads[1] = _scaled(grad_key, scale, key.dtype)
        if a.temperature_grad:
            product = grad_loss * grad_temperature  # of a row without a positive, perhaps 0 times NaN
            total = torch.where(grad_loss == 0, 0, product).sum() if a.reduction == NONE else product
            grads[3] = total.to(temperature.dtype).view(temperature.shape)
        if torch.is_grad_enabled():  # create_graph=True, torch.func
            inputs = [x for x in (query, key, temperature) if x is not None]
            grads = [None if grad is None else NotTwice.apply(grad, *inputs) for grad in grads]
        return tuple(grads)


class _TransformedInfoNCE(_InfoNCE):
    """The form that torch.func asks for: every result an output, saved afterwards. It takes 15 µs longer."""

    @staticmethod
    def forward(*arguments):
        return native(torch.ops.moco_ext.info_nce_forward.default, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        _InfoNCE.save(ctx, inputs, output)


class NotTwice(torch.autograd.Function):
    """The identity, whose derivative with respect to the inputs of the loss is an error instead of zero."""

    @staticmethod
    def forward(grad, *inputs):
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError("info_nce: second derivatives are not implemented (the gradient is computed in forward)")


@torch.library.register_fake("moco_ext::info_nce_forward")
def _(*arguments):
    a = Arguments(*arguments)
    tensors = {name: x for name in ("query", "key", "queue", "target") if (x := getattr(a, name)) is not None}
    check_devices(**tensors)
    n, c = a.query.shape
    dtype = torch.float64 if torch.float64 in (x.dtype for x in tensors.values()) else torch.float32
    empty = a.query.new_empty
    reduced = (n,) if a.reduction == NONE else ()
    return (
        empty(reduced, dtype=dtype),
        *(empty(n, dtype=dtype) for _ in range(3)),
        empty(n, dtype=torch.int64),
        empty((n, c) if a.query_grad or a.temperature_grad else 0, dtype=dtype),
        empty((n, c) if a.key_grad and not a.in_batch else 0, dtype=dtype),
        empty(reduced if a.temperature_grad else (0,), dtype=dtype),
        empty((n, 3) if a.key_grad and a.in_batch else (0,), dtype=dtype),
    )


@torch.library.register_fake("moco_ext::info_nce_backward")
def _(
    query, key, temperature_tensor, temperature, normalize, precision, key_offset, query_ids, same_id, key_ids, lse, *_
):
    return key.new_empty(key.shape, dtype=lse.dtype)

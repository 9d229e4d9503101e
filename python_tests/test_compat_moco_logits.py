"""Lazy logits compared with the official ones: tensor operations, in-place edits, hooks, gradients."""

import copy
import io
import pickle

import numpy as np
import official
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_ext.compat import moco
from moco_ext.compat.moco.logits import LazyLogits, LazyTensor, Source

DIM = 4
FORWARD = {"wide": (3, 7), "square": (4, 3)}  # images, keys in the queue


class Encoder(nn.Module):
    def __init__(self, num_classes: int = DIM) -> None:
        super().__init__()
        self.fc = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Sides:
    """Our model and the official one, in the same state. Each call computes new logits."""

    def __init__(self, shape: str = "wide") -> None:
        n, k = FORWARD[shape]
        torch.manual_seed(0)
        self.theirs = official.MoCo(Encoder, DIM, k, T=0.5).double()
        self.ours = moco.builder.MoCo(Encoder, DIM, k, T=0.5).double()
        self.state = {name: value.clone() for name, value in self.theirs.state_dict().items()}
        self.images = torch.randn(2, n, 6, dtype=torch.float64)

    def lazy(self) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, labels, weight of the encoder)"""
        self.ours.load_state_dict(self.state)
        logits, labels = self.ours(*self.images)
        assert isinstance(logits, LazyLogits)
        assert not torch.equal(self.ours.queue.t(), self.state["queue"])  # which has changed since
        return logits, labels, self.ours.encoder_q.fc.weight

    def real(self) -> tuple[Tensor, Tensor, Tensor]:
        self.theirs.load_state_dict(self.state)
        self.theirs.enqueue = lambda keys: None  # its batch must divide K
        return *self.theirs(*self.images), self.theirs.encoder_q.fc.weight

    def both(self):
        return self.lazy(), self.real()


SIDES = {shape: Sides(shape) for shape in FORWARD}


def close(got, want):
    """In float64, some operations amplify the difference of two orders of summation."""
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9, equal_nan=True)


# --- every operation --------------------------------------------------------------------------------------------------

# Arguments -> methods and properties of a tensor that accept them. Those for integer, complex, sparse or quantized
# tensors, or for another number of dimensions, are left out.
TABLE = {
    "": """H T abs abs_ absolute absolute_ acos acos_ acosh adjoint all amax amin angle any arccos arccos_ arccosh
        arcsin arcsin_ arcsinh arctan arctan_ arctanh argmax argmin argsort argwhere asin asin_ asinh atan atan_ atanh
        bernoulli_ bfloat16 bool byte cauchy_ cdouble ceil ceil_ cfloat chalf char clone conj conj_physical
        conj_physical_ contiguous corrcoef cos cos_ cosh cosh_ count_nonzero cov cpu data deg2rad deg2rad_ dense_dim
        detach detach_ device diag diag_embed diagflat diagonal diff dim dim_order double dtype element_size erf erf_
        erfc erfc_ erfinv erfinv_ exp exp2 exp2_ exp_ expm1 expm1_ exponential_ fix fix_ flatten fliplr flipud float
        floor floor_ frac frac_ frexp get_device half hardshrink has_names histc i0 i0_ int is_complex is_conj
        is_contiguous is_cpu is_cuda is_distributed is_floating_point is_inference is_leaf is_meta is_mkldnn is_mps
        is_mtia is_neg is_nested is_pinned is_quantized is_shared is_signed is_sparse is_sparse_csr is_xla isfinite
        isinf isnan isneginf isposinf isreal itemsize layout lgamma lgamma_ log log10 log10_ log1p log1p_ log2 log2_
        log_ log_normal_ logical_not logical_not_ logit logit_ long lu mH mT max mean median min msort names nan_to_num
        nan_to_num_ nanmean nanmedian nansum nbytes ndim ndimension neg neg_ negative negative_ nelement nonzero norm
        normal_ numel output_nr pinverse positive prod qr rad2deg rad2deg_ random_ ravel real reciprocal reciprocal_
        relu relu_ requires_grad requires_grad_ resolve_conj resolve_neg retains_grad rot90 round round_ rsqrt rsqrt_
        sgn sgn_ shape short sigmoid sigmoid_ sign sign_ signbit sin sin_ sinc sinc_ sinh sinh_ size sort sparse_dim
        sqrt sqrt_ square square_ squeeze std storage_offset storage_type stride sum svd t tan tan_ tanh tanh_ to
        to_dense tolist trace tril tril_ triu triu_ trunc trunc_ type unbind uniform_ var zero_ __abs__ __iter__
        __len__ __neg__""",
    "2": """__add__ __contains__ __eq__ __getitem__ __iadd__ __imul__ __ipow__ __isub__ __itruediv__ __lt__
        __mod__ __mul__ __pow__ __radd__ __rmul__ __rpow__ __rsub__ __rtruediv__ __sub__ __truediv__ add add_ chunk
        clamp clamp_ clamp_max clamp_max_ clamp_min clamp_min_ clip clip_ copysign copysign_ diag diag_embed diagflat
        diagonal diff div div_ divide divide_ eq eq_ fill_ fill_diagonal_ float_power fmod fmod_ ge ge_ greater
        greater_ greater_equal greater_equal_ gt gt_ kthvalue le le_ less less_ less_equal less_equal_ lt lt_ mul mul_
        multiply multiply_ mvlgamma mvlgamma_ ne ne_ new_ones new_zeros norm not_equal not_equal_ polygamma polygamma_
        pow pow_ remainder remainder_ repeat_interleave roll split sub sub_ subtract subtract_ tensor_split tile topk
        true_divide true_divide_ xlogy xlogy_""",
    "0.5": "geometric_ new_tensor nanquantile quantile",
    "1": """all amax amin any argmax argmin argsort count_nonzero cummax cummin cumprod cumprod_ cumsum cumsum_ flip
        log_softmax logcumsumexp logsumexp max mean median min mode nanmedian nansum prod size softmax sort std
        stride sum sum_to_size topk unbind unsafe_chunk unsafe_split unsqueeze var vsplit""",
    "other": """__add__ __eq__ __imul__ __isub__ __rmul__ __rtruediv__ __sub__ add add_ allclose arctan2 arctan2_ atan2
        atan2_ copy_ copysign copysign_ cross dist div div_ eq equal expand_as fmax fmin fmod gt hypot hypot_ inner
        is_same_size is_set_to isclose kron ldexp ldexp_ logaddexp logaddexp2 logical_and logical_and_ logical_or
        logical_or_ logical_xor logical_xor_ maximum minimum mul mul_ pow remainder reshape_as slice_inverse
        slice_scatter sub sub_ type_as view_as xlogy""",
    "mask": "__getitem__ masked_select",
    "index": "take take_along_dim",
    "0, 1": "flip moveaxis movedim permute repeat select swapaxes swapdims transpose",
    "mask, 2.0": "masked_fill masked_fill_",
    "mask, other": "addcdiv addcdiv_ addcmul addcmul_ masked_scatter masked_scatter_",
    "1, index": "gather",
    "1, index, few": "scatter scatter_ scatter_add scatter_add_",
    "1, index, 2.0": "scatter scatter_",
    "other, other": "addcdiv addcmul clamp clamp_ lerp lerp_",
    "other[0]": "add_ inner ldexp matmul mul_ mv prelu",
    "other.t()": "__matmul__ matmul mm",
    "(w, n)": "reshape view",
    "(2, n, w)": "broadcast_to expand",
    "torch.float64": "to type view",
    "(0, 1)": "logsumexp permute sum",
    "1, column": "index_select",
    "1, column, few": "index_add index_add_ index_copy index_copy_",
    "1, column, 2.0": "index_fill index_fill_",
    "1, 0, 2": "narrow",
    "2, 0, 1.0": "renorm renorm_",
    "0, 1, 1": "unfold",
    "other, 2.0": "lerp lerp_",
    "pair, few[0, :]": "index_put index_put_",
    "index, few": "put put_",
    "1, index, few, 'sum'": "scatter_reduce scatter_reduce_",
    "1, column, few, 'mean'": "index_reduce index_reduce_",
    "torch.eye(n), other": "addmm addmm_",
    "torch.ones(n), torch.ones(w)": "addr addr_",
    "(n, w), (1, n)": "as_strided",
    "[3, w - 3], 1": "split_with_sizes unsafe_split_with_sizes",
    "1, (2, w // 2)": "unflatten",
    "other[:, 0], 1, 0": "select_scatter",
    "torch.ones(n)": "diagonal_scatter",
    "(n, w), 2.0": "new_full",
    "size=4": "nonzero_static",
    "min=-1, max=1": "clamp clamp_ clip clip_",
}
DETACHED = {
    "": """acosh_ aminmax arccosh_ arcsinh_ arctanh_ asinh_ atanh_ geqrf histogram numpy to_sparse unique
        unique_consecutive __array__ __dlpack__""",
    "2": "__floordiv__ floor_divide floor_divide_",
    "{}": "__deepcopy__",
    "4": "__reduce_ex__",
    "0.5": "bernoulli",
    "other": "heaviside heaviside_ igamma igamma_ igammac igammac_ nextafter nextafter_",
    "lambda x: x + 1": "apply_",
    "other, lambda x, y: x + y": "map_",
    "1, 0, 2": "narrow_copy",
}
SQUARE = {
    "": "cholesky_inverse det inverse logdet matrix_exp slogdet",
    "2": "matrix_power",
    "other.t()": "cholesky_solve triangular_solve",
    "torch.ones(w)": "orgqr",
}
# Functions, and sequences of operations.
USES = {
    "cat": lambda x: torch.cat([x, x.new_ones(1, x.shape[1])]),
    "stack": lambda x: torch.stack([x, x]),
    "where": lambda x: torch.where(x > 0, x, -1e4),
    "einsum": lambda x: torch.einsum("nk,nk->n", x, x),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=1),
    "vmap": lambda x: torch.vmap(torch.sin)(x),
    "log_softmax, nll_loss": lambda x: F.nll_loss(F.log_softmax(x, 1), torch.arange(len(x))),
    "kl_div": lambda x: F.kl_div(x.log_softmax(1), x.detach().softmax(1), reduction="batchmean"),
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout in place": lambda x: F.dropout(x, 0.5, inplace=True),
    "relu in place": lambda x: F.relu(x, inplace=True),
    "normalize": lambda x: F.normalize(x, dim=1),
    "linear": lambda x: F.linear(x, torch.ones(2, x.shape[1], dtype=x.dtype)),
    "numpy function": lambda x: torch.as_tensor(np.asarray(x.detach()) + 1),
    "float of an element": lambda x: float(x.detach()[0, 0]),
    "format": lambda x: format(x[0, 0].item(), ".4f"),
    "print": lambda x: str(x + 0),
    "all elements": lambda x: [row.tolist() for row in x],
    # edits
    "mask": lambda x: x.__setitem__(x > 0, -1e4),
    "column": lambda x: x.__setitem__((slice(None), 1), 3.0),
    "element": lambda x: x.__setitem__((0, 0), 3.0),
    "row by list": lambda x: x.__setitem__([0, 2], x[[2, 0]]),
    "data": lambda x: x.data.__setitem__(x > 0, -1e4),
    "data assigned": lambda x: (x.detach(), setattr(x, "data", torch.arange(24.0).double().view(3, 8))),
    "data assigned, then edited": lambda x: (setattr(x, "data", torch.zeros_like(x)), x.add_(1)),
    "view": lambda x: x[:, 1:].mul_(2),
    "view of a view": lambda x: x.t()[1].neg_(),
    "flat view": lambda x: x.view(-1)[::2].clamp_(max=0),
    "diagonal": lambda x: x.diagonal().fill_(0),
    "without gradient": lambda x: torch.no_grad()(x.mul_)(2),
    "detached": lambda x: x.detach().mul_(2),
    "twice": lambda x: x.mul_(2).clamp_(max=3).exp_(),
    "edit, then top-2": lambda x: x.neg_().topk(2),
    "top-2, then edit": lambda x: (x.topk(2).values.sum(), x.mul_(2)),
    "numpy view": lambda x: x.detach().numpy().__imul__(2).sum().item(),
    "out": lambda x: torch.mul(x.detach(), 2, out=x.detach()),
    "foreach": lambda x: torch._foreach_mul_([x], 2.0),
    "aug-assign": lambda x: x.__iadd__(torch.ones_like(x)),
    "edit between two uses": lambda x: (x.sum(), x.mul_(3), x.square().sum()),
}


def outcome(make, use, detached):
    """(result of ``use``, the logits after it, the gradient of both with respect to the encoder's weight)"""
    logits, _, weight = make()
    torch.manual_seed(1)
    result = use(logits.detach() if detached else logits)
    total = torch.zeros((), dtype=torch.float64)
    for x in (*torch.utils._pytree.tree_leaves(result), logits):
        if isinstance(x, Tensor) and x.requires_grad and x.is_floating_point():
            finite = torch.where(x.isfinite(), x, 0).double()
            total = total + (finite * torch.linspace(0.5, 2, x.numel(), dtype=torch.float64).view(x.shape)).sum()
    gradient = torch.autograd.grad(total, weight)[0] if total.requires_grad else None
    return result, logits, gradient


def compare(use, shape="wide", detached=False):
    sides = SIDES[shape]
    got, logits, gradient = outcome(sides.lazy, use, detached)
    want, published, expected = outcome(sides.real, use, detached)
    got_leaves, want_leaves = (torch.utils._pytree.tree_leaves(x) for x in (got, want))
    assert len(got_leaves) == len(want_leaves)
    for one, other in zip(got_leaves, want_leaves, strict=True):
        if isinstance(other, Tensor):
            assert isinstance(one, Tensor)
            assert one.requires_grad == other.requires_grad
            assert (one is logits) == (other is published)
            close(one.detach().to_dense() + 0, other.detach().to_dense() + 0)
        elif isinstance(other, (np.ndarray, float)):
            np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9)
        elif isinstance(other, (bool, int, str, torch.dtype, torch.device, torch.layout)):
            assert one == other
    close(logits.detach() + 0, published.detach() + 0)
    if expected is None:
        assert gradient is None
    else:
        close(gradient, expected)


def arguments(text, shape):
    n, k = FORWARD[shape]
    w = 1 + k
    generator = torch.Generator().manual_seed(1)
    other = torch.rand(n, w, generator=generator).double() + 0.5
    mask = torch.rand(n, w, generator=generator) > 0.5
    index = torch.randint(0, w, (n, 2), generator=generator)
    names = {"torch": torch, "n": n, "w": w, "other": other, "mask": mask, "index": index, "few": other[:, :2]}
    names |= {"column": torch.tensor([0, 2]), "pair": (torch.tensor([0, 1]), torch.tensor([2, 3]))}
    torch.set_default_dtype(torch.float64)
    try:
        return eval(f"(lambda *args, **kwargs: (args, kwargs))({text})", names)
    finally:
        torch.set_default_dtype(torch.float32)


TABLES = [("wide", False, TABLE), ("wide", True, DETACHED), ("square", False, SQUARE)]
CASES = [
    (shape, detached, text, name)
    for shape, detached, table in TABLES
    for text, names in table.items()
    for name in names.split()
    if hasattr(Tensor, name)
]


@pytest.mark.parametrize(
    ("shape", "detached", "text", "name"), CASES, ids=[f"{name}({text})" for _, _, text, name in CASES]
)
@pytest.mark.filterwarnings("ignore")
def test_methods(shape, detached, text, name):
    args, kwargs = arguments(text, shape)

    def use(x):
        method = getattr(x, name)
        return method(*args, **kwargs) if callable(method) else method

    compare(use, shape, detached)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_uses(use):
    compare(use)


IN_PLACE_VIEWS = {
    "t_": (),
    "transpose_": (0, 1),
    "squeeze_": (),
    "unsqueeze_": (0,),
    "as_strided_": ((2, 2), (2, 1)),
    "resize_": (2, 2),
    "resize_as_": (torch.ones(2, 2),),
    "set_": (torch.ones(2, 2, dtype=torch.float64),),
}


@pytest.mark.parametrize("name", IN_PLACE_VIEWS)
def test_operations_that_change_the_shape_in_place_are_refused(name):
    logits = SIDES["wide"].lazy()[0].detach()
    with pytest.raises(RuntimeError, match=rf"logits: expected operations that keep .* got aten\.{name}"):
        getattr(logits, name)(*IN_PLACE_VIEWS[name])
    with pytest.raises(RuntimeError, match=r"logits: expected data of shape \[3, 8\]"):
        logits.data = torch.ones(2, 2, dtype=torch.float64)
    assert logits.shape == (3, 8)
    getattr(logits.clone(), name)(*IN_PLACE_VIEWS[name])


# --- gradients, hooks and the loss ------------------------------------------------------------------------------------


def with_both(use):
    """Compare the tensors that ``use(logits, labels, weight)`` returns for both models."""
    got, want = (use(*side) for side in SIDES["wide"].both())
    close([x.detach() + 0 for x in got], [x.detach() + 0 for x in want])
    return got


@pytest.mark.parametrize("order", ["before", "after", "removed"])
def test_register_hook(order):
    def use(logits, labels, weight):
        seen = []

        def register():
            return logits.register_hook(lambda gradient: seen.append(gradient.clone()))

        if order == "removed":
            register().remove()
        if order == "before":
            register()
        loss = F.cross_entropy(logits, labels)
        if order != "before":
            register()
        gradients = torch.autograd.grad(loss, weight)
        assert len(seen) == 1
        return [loss, *seen, *gradients]

    with_both(use)


def test_a_hook_that_changes_the_gradient():
    def use(logits, labels, weight):
        logits.register_hook(lambda gradient: gradient * 2)
        logits.register_hook(lambda gradient: gradient.clamp(max=0.1))
        return torch.autograd.grad(F.cross_entropy(logits, labels), weight)

    with_both(use)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_retain_grad(order, reduction):
    def use(logits, labels, weight):
        if order == "before":
            logits.retain_grad()
        loss = F.cross_entropy(logits, labels, reduction=reduction)
        if order == "after":
            logits.retain_grad()
        gradient = torch.autograd.grad(loss, [logits, weight], torch.ones_like(loss), retain_graph=True)
        loss.backward(torch.ones_like(loss))
        weight.grad = None
        return [logits.grad, *gradient]

    with_both(use)


def test_the_gradient_of_the_logits_alone():
    with_both(lambda logits, labels, weight: torch.autograd.grad(F.cross_entropy(logits, labels), logits))

    def backward(logits, labels, weight):
        F.cross_entropy(logits, labels).backward(inputs=[logits])
        return [logits.grad]

    with_both(backward)


def test_logits_as_a_leaf():
    def use(logits, labels, weight):
        leaf = logits.detach().requires_grad_()
        for _ in range(2):
            F.cross_entropy(leaf, labels).backward()
        return [leaf.grad, copy.deepcopy(leaf)]

    with_both(use)


def test_second_derivatives():
    def use(logits, labels, weight):
        loss = F.cross_entropy(logits, labels)
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        (of_logits,) = torch.autograd.grad(loss, logits, create_graph=True)
        return [gradient, *torch.autograd.grad(gradient.square().sum() + of_logits.square().sum(), weight)]

    with_both(use)


@pytest.mark.parametrize("edit_first", [False, True])
def test_a_loss_before_and_after_an_edit(edit_first):
    def use(logits, labels, weight):
        before = F.cross_entropy(logits, labels)
        mask = torch.zeros(logits.shape, dtype=torch.bool)
        mask[:, 3] = mask[1, 0] = True
        if edit_first:
            logits[mask] = -1e4
        gradient = torch.autograd.grad(before, weight, retain_graph=True)  # the loss of the logits as they were
        logits[mask] = -1e4
        after = F.cross_entropy(logits, labels)
        return [before, *gradient, after, *torch.autograd.grad(after, weight, retain_graph=True), logits.topk(5).values]

    got = with_both(use)
    assert got[2] > 1000


def test_edits_that_autograd_refuses():
    """It needs the values that the edit overwrites."""

    def use(logits, labels, weight):
        total = logits.square().sum()
        with torch.no_grad():
            logits.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
        return [torch.tensor(logits._version)]

    with_both(use)


def test_losses_and_other_uses_add_up():
    def use(logits, labels, weight):
        loss = F.cross_entropy(logits, labels) + F.cross_entropy(logits, labels, reduction="sum")
        loss = loss + 0.1 * logits.square().mean() + F.cross_entropy(logits, labels + 1)
        return torch.autograd.grad(loss, weight)

    with_both(use)


def test_the_backward_pass_may_follow_another_forward_pass():
    """If the logits were used before it: the official logits keep a copy of the queue."""
    sides = SIDES["wide"]
    for use in (
        lambda x, labels: x.square().sum(),
        F.cross_entropy,
        lambda x, labels: F.cross_entropy(x.mul_(2), labels),
    ):
        gradients = []
        for make, model in ((sides.lazy, sides.ours), (sides.real, sides.theirs)):
            logits, labels, weight = make()
            total = use(logits, labels)
            model(*sides.images)
            model.encoder_q.zero_grad()
            gradients.append(torch.autograd.grad(total, weight)[0])
        close(*gradients)


def test_reading_a_lazy_gradient_too_late_is_an_error():
    sides = SIDES["wide"]
    logits, labels, _ = sides.lazy()
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels), logits)
    sides.ours(*sides.images)
    with pytest.raises(RuntimeError, match="before the next forward pass"):
        gradient.sum()


def test_the_loss_computes_neither_logits_nor_their_gradient(monkeypatch):
    """Not even with a hook that does not use the gradient."""
    logits, labels, weight = SIDES["wide"].lazy()
    seen = []
    logits.register_hook(lambda gradient: seen.append(type(gradient)))
    monkeypatch.setattr(Source, "materialize", lambda self: pytest.fail("computed"))
    F.cross_entropy(logits, labels).backward()
    assert seen == [LazyTensor]
    assert weight.grad.norm() > 0
    weight.grad = None


def test_copies_and_pickles_are_plain_tensors():
    (lazy, *_), (real, *_) = SIDES["wide"].both()
    file = io.BytesIO()
    torch.save(lazy, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(lazy.detach()),
        copy.copy(lazy.detach()),
        pickle.loads(pickle.dumps(lazy)),
        torch.load(file, weights_only=True),
    ):
        assert type(copied) is Tensor
        close(copied.detach(), real.detach())
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        copy.deepcopy(lazy)
    with pytest.raises(RuntimeError, match=r"detach\(\)\.numpy\(\)"):
        lazy.numpy()


def test_printing():
    (lazy, *_), (real, *_) = SIDES["wide"].both()
    assert repr(lazy) == "LazyLogits([3, 8], dtype=torch.float64, device='cpu')"
    _ = lazy + 0
    assert repr(lazy).splitlines()[0] == repr(real).splitlines()[0]


def test_code_that_reads_memory_without_an_operation_gets_an_error():
    logits = SIDES["wide"].lazy()[0].detach()
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(logits)

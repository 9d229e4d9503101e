"""CLIP's loss in both directions, and compat.open_clip compared with open_clip if it is installed."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import HALF, rel_error
from ranks import leave_group
from torch import nn

import moco_ext
from moco_ext.compat import open_clip as ours


def pairs(n=12, c=16, device="cpu", dtype=torch.float32):
    image = torch.randn(n, c, device=device, dtype=torch.float64)
    text = 0.5 * image + torch.randn_like(image)
    return image.to(dtype), text.to(dtype)


def formulation(image, text, logit_scale, label_smoothing=0.0):
    logits = logit_scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).t()
    labels = torch.arange(len(image), device=image.device)
    losses = [F.cross_entropy(x, labels, label_smoothing=label_smoothing) for x in (logits, logits.t())]
    return sum(losses) / 2


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("n", "c"), [(1, 8), (12, 16), (70, 128), (33, 512)])
def test_both_directions_match_float64(device, n, c, dtype):
    image, text = pairs(n, c, device, dtype)
    scale = torch.tensor(14.0, device=device)
    inputs = [x.requires_grad_() for x in (image, text, scale)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    loss = moco_ext.clip_loss(*inputs, label_smoothing=0.1)
    want = formulation(*wide, label_smoothing=0.1)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert loss.dtype == torch.float32
    assert abs(loss - want) <= tolerance * max(1, want)
    for got, exact in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(want, wide), strict=True):
        assert (got.double() - exact).norm() <= tolerance * max(float(exact.norm()), 1e-3)


def test_a_number_as_scale(device):
    image, text = pairs(device=device)
    assert rel_error(moco_ext.clip_loss(image, text, 10), formulation(image, text, 10)) <= 1e-5


def test_stores_no_similarities():
    """Nothing as large as N x N is allocated by an operator, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                self.largest = max(self.largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    image, text = (x.requires_grad_() for x in pairs(600, 8))
    with Largest() as mode:
        moco_ext.clip_loss(image, text, 10).backward()
    assert mode.largest <= 600 * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.ones(11, 16)}, r"text: expected the shape of image \[12, 16\], got \[11, 16\]"),
        ({"image": torch.ones(12)}, r"image: expected features \[N, C\], got \[12\]"),
        ({"logit_scale": 0.0}, "^logit_scale: expected a positive number .* got 0"),
        ({"logit_scale": torch.tensor(-1.0)}, "^logit_scale: expected a positive number .* got -1"),
        ({"logit_scale": torch.inf}, "^logit_scale: expected a positive number .* got inf"),
        ({"logit_scale": torch.ones(3)}, r"^logit_scale: expected a number or .* one element, got shape \[3\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    image, text = pairs()
    with pytest.raises(ValueError, match=message):
        moco_ext.clip_loss(**{"image": image, "text": text, "logit_scale": 10.0} | change)


# ---- open_clip ----


def towers():
    torch.manual_seed(0)
    return nn.ModuleDict({"image": nn.Linear(10, 16), "text": nn.Linear(9, 16)})


def step(loss, first, last):
    """The loss of rows [first, last) of a fixed batch, and the gradients of towers and scale."""
    generator = torch.Generator().manual_seed(1)
    data = {"image": torch.randn(8, 10, generator=generator), "text": torch.randn(8, 9, generator=generator)}
    model, scale = towers(), nn.Parameter(torch.tensor([2.3]))
    features = [F.normalize(model[name](data[name][first:last]), dim=1) for name in ("image", "text")]
    value = loss(*features, scale.exp(), output_dict=True)["contrastive_loss"]
    return value.detach(), torch.autograd.grad(value, [*model.parameters(), scale])


def test_equals_open_clip():
    theirs = pytest.importorskip("open_clip.loss")
    (value, grads), (want, want_grads) = (step(package.ClipLoss(), 0, 8) for package in (ours, theirs))
    assert rel_error(value, want) <= 1e-5
    for a, b in zip(grads, want_grads, strict=True):
        assert rel_error(a, b) <= 1e-5


def run_rank(rank, world, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    import open_clip.loss as theirs

    rows = slice(4 * rank, 4 * rank + 4)
    for local_loss in (False, True):
        for gather_with_grad in (False, True):
            options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
            results = []
            for package in (ours, theirs):
                loss = package.ClipLoss(**options, rank=rank, world_size=world)
                results.append(step(loss, rows.start, rows.stop))
            assert rel_error(results[0][0], results[1][0]) <= 1e-5, options
            for a, b in zip(results[0][1], results[1][1], strict=True):
                assert rel_error(a, b) <= 2e-5, options
    # Averaged over the ranks, clip_loss has the gradient of the global batch.
    value, grads = step(
        lambda i, t, s, output_dict: {"contrastive_loss": moco_ext.clip_loss(i, t, s)}, rows.start, rows.stop
    )
    want, want_grads = step(theirs.ClipLoss(), 0, 8)
    for mean, whole in zip((value, *grads), (want, *want_grads), strict=True):
        dist.all_reduce(mean)
        assert rel_error(mean / world, whole) <= 2e-5
    leave_group()


def test_two_processes_equal_open_clip(tmp_path):
    pytest.importorskip("open_clip")
    torch.multiprocessing.spawn(run_rank, (2, tmp_path / "rendezvous"), nprocs=2)


def test_ranks_of_no_process_group_are_refused():
    """Without a group, gathering is the identity: half of a batch would be taken for that of another rank."""
    pairs = torch.randn(2, 4, 8)
    with pytest.raises(ValueError, match="rank, world_size: expected those of the process group, 0 and 1, got 1 and 2"):
        ours.ClipLoss(rank=1, world_size=2)(*pairs, torch.tensor(10.0))


def test_horovod_is_refused():
    with pytest.raises(ValueError, match="use_horovod: expected False"):
        ours.ClipLoss(use_horovod=True)

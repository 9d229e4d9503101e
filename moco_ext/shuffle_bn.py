"""Shuffling BN: the query and the key of an image must not share batch statistics (Sec. 3.3 of the paper).

If they do, the statistics reveal which key belongs to which query, and the encoder learns from them instead of from the
image. With several processes, the key images are permuted across processes before the key encoder, and the keys are put
back in order after it. On one device, :func:`convert_split_bn` computes the statistics of each group of the batch
separately, which has the effect of as many devices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .distributed import rank, start_all_gather, start_exchange, world_size

MODES = ("auto", "gather", "all_to_all", "loader", "none")


def check_mode(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"shuffle_bn: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


def shared_permutation(n: int, step: int) -> Tensor:
    """A random permutation, [n] int64 on the CPU, that depends on the step only, so it is the same on all ranks."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0x6D6F636F + step), device="cpu")


def shuffle_order(
    n: int, mode: str, split_bn: int, permutation: Callable[[int], Tensor], given: Tensor | None
) -> Tensor | None:
    """The order in which the keys are encoded: slot i of the global batch holds image ``order[i]``.

    Args:
        n: number of images of this rank.
        mode: one of ``MODES``.
        split_bn: number of BatchNorm groups.
        permutation: called with the size of the global batch where a random order is needed, the same on all ranks.
        given: [world * n] int64 on the CPU, the same on all ranks: the order to use instead of a random one.

    Returns:
        [world * n] int64 on the CPU, or None for no shuffling.

    Raises:
        ValueError: an order of the wrong length or with an image twice, or no order with mode ``"loader"``.
    """
    total = world_size() * n
    if mode == "loader" and given is None:
        raise ValueError(
            "key_order: expected the permutation with which the loader shuffled the key images, got None; "
            "moco_ext.data.TrainLoader(..., shuffled_keys=True) returns it with each batch"
        )
    if given is not None and given.shape != (total,):
        raise ValueError(f"key_order: expected [{total}], a permutation of the global batch, got {list(given.shape)}")
    # Otherwise a query would get another image's key. A traced function cannot look.
    if given is not None and not torch.compiler.is_compiling() and not _is_permutation(given):
        raise ValueError(f"key_order: expected each of 0 to {total - 1} once, got {given.tolist()}")
    if mode == "none" or (mode != "loader" and world_size() == 1 and split_bn == 1):
        return None
    return permutation(total) if given is None else given


def _is_permutation(order: Tensor) -> bool:
    return torch.equal(order.sort().values, torch.arange(len(order), dtype=order.dtype, device=order.device))


def start_shuffle(images: Tensor, order: Tensor | None, mode: str) -> Callable[[], Tensor] | None:
    """Start to send this rank's images [N, ...] to the slots that ``order`` assigns to them.

    ``"gather"``, as published, gathers all images on every rank. ``"all_to_all"`` (and ``"auto"``) sends only images
    that change rank, 1/world_size of the traffic. With ``"loader"``, the images are already in their slots.

    Returns:
        A function that waits for the images of this rank's slots and returns them, [N, ...]; None if no image moves.
    """
    if order is None or mode == "loader":
        return None
    n, world, me = images.shape[0], world_size(), rank()
    mine = order[me * n : (me + 1) * n]
    if world == 1:
        shuffled = images[_index(mine, images)]
        return lambda: shuffled
    # Collectives send contiguous memory, so channels_last images are sent, and received, as [N, H, W, C].
    channels_last = images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last)
    rows = images.permute(0, 2, 3, 1) if channels_last else images
    if mode == "gather":
        arriving, place = start_all_gather(rows), mine
    else:
        leaving = order // n == me  # slots of images of this rank, in the order of their receivers
        receiver = torch.arange(world * n) // n
        send_counts = torch.bincount(receiver[leaving], minlength=world).tolist()
        receive_counts = torch.bincount(mine // n, minlength=world).tolist()
        arriving = start_exchange(rows[_index(order[leaving] - me * n, rows)], send_counts, receive_counts)
        # Images arrive sorted by sender, then by slot. The inverse of that stable sort puts them into their slots.
        place = torch.argsort(mine // n, stable=True).argsort()

    def arrived() -> Tensor:
        slots = arriving()[_index(place, images)]
        return slots.permute(0, 3, 1, 2) if channels_last else slots

    return arrived


def unshuffle(keys: Tensor, order: Tensor | None) -> Tensor:
    """Put the keys of all slots, [world * N, dim], back into the order of the images."""
    return keys if order is None else keys[_index(order.argsort(), keys)]


def _index(rows: Tensor, like: Tensor) -> Tensor:
    """Row indices on the device of the tensor that they index, without making the host wait for the GPU."""
    return _to_gpu(rows, like.device) if like.is_cuda else rows


@torch.compiler.disable(reason="cannot trace pinned memory")
def _to_gpu(rows: Tensor, device: torch.device) -> Tensor:
    return rows.pin_memory().to(device, non_blocking=True)


class SplitBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm that computes its training statistics separately for G groups of the batch.

    Sample i belongs to group i mod G. If G does not divide the batch, group sizes differ by one. The running statistics
    are updated once per step, with the mean over the groups. In eval mode, and in its state dict, it is a plain
    BatchNorm. Child layers, if there are any, follow the normalization.

    Args:
        num_features: C of an input [N, C, ...].
        groups: G.
        options: see ``torch.nn.BatchNorm2d``.
    """

    def __init__(self, num_features: int, groups: int, **options) -> None:
        super().__init__(num_features, **options)
        self.groups = groups

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"input: expected [N, C, ...], got shape {list(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        groups = min(self.groups, x.shape[0])
        out = self._split(x, groups) if self.training and groups > 1 else super().forward(x)
        for layer in self.children():
            out = layer(out)
        return out

    def _split(self, x: Tensor, groups: int) -> Tensor:
        if x.shape[0] % groups == 0:
            out, mean, var = self._normalize(x, groups)
        else:
            parts = [self._normalize(x[group::groups], 1) for group in range(groups)]
            out = x.new_empty(x.shape, dtype=parts[0][0].dtype)
            for group, (part, _, _) in enumerate(parts):
                out[group::groups] = part
            mean, var = (torch.cat(statistic) for statistic in list(zip(*parts, strict=True))[1:])
        if self.track_running_stats:
            self._track(mean.mean(dim=0), var.mean(dim=0))
        return out

    def _normalize(self, x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """The normalized batch, and the mean and unbiased variance of each group, [groups, C]."""
        # G consecutive samples become one sample of G * C channels: one launch for all groups.
        grouped = x.reshape(x.shape[0] // groups, groups * x.shape[1], *x.shape[2:])
        mean = torch.zeros(grouped.shape[1], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        var = torch.ones_like(mean)
        weight = None if self.weight is None else self.weight.repeat(groups)
        bias = None if self.bias is None else self.bias.repeat(groups)
        out = nn.functional.batch_norm(grouped, mean, var, weight, bias, True, 1.0, self.eps)
        return out.reshape(x.shape), mean.view(groups, -1), var.view(groups, -1)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        # momentum None: a cumulative average, as in torch's BatchNorm
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), momentum)


# The forward passes that only normalize.
_PLAIN = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward, SplitBatchNorm.forward)


def convert_split_bn(module: nn.Module, groups: int) -> nn.Module:
    """Replace every BatchNorm in a module with :class:`SplitBatchNorm`, in place. Parameters and buffers are reused.

    Args:
        module: left as it is if there is only one group.
        groups: number of groups of a batch.

    Returns:
        The module, or its replacement if it is itself a BatchNorm.

    Raises:
        ValueError: fewer than one group, or a BatchNorm that computes something else too and is not timm's.
    """
    if groups < 1:
        raise ValueError(f"split_bn: expected at least one group, got {groups}")
    if groups == 1:
        return module
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        # timm's BatchNormAct2d is followed by its dropout and its activation.
        if type(module).forward not in _PLAIN and list(module._modules) != ["drop", "act"]:
            raise ValueError(f"split_bn: expected BatchNorm layers of torch or timm, got {type(module).__name__}")
        options = {name: getattr(module, name) for name in ("eps", "momentum", "affine", "track_running_stats")}
        split = SplitBatchNorm(module.num_features, groups, **options)
        split._parameters, split._buffers, split._modules = module._parameters, module._buffers, module._modules
        split.training = module.training
        return split
    # Not named_children(), which leaves out the second name of a layer that is used twice.
    for name, child in [(name, child) for name, child in module._modules.items() if child is not None]:
        setattr(module, name, convert_split_bn(child, groups))
    return module

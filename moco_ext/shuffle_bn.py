"""Shuffling BN: query and key of one image must not share batch statistics (Sec. 3.3 of the paper).

Otherwise the statistics of the small sub-batch both are normalised with tell which key belongs to which query, and the
encoder learns to read them instead of the image. Across processes the key images are permuted before the key encoder
and its output is put back in order; on one device :func:`convert_split_bn` gives groups of a batch their own
statistics, the effect of as many devices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import all_gather, rank, world_size

MODES = ("auto", "gather", "all_to_all", "none")


def check_mode(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"shuffle_bn: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


def shared_permutation(n: int, step: int) -> Tensor:
    """A permutation of n that every rank draws for itself: [n] int64 on the CPU, a function of the step alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0x6D6F636F + step))


@torch.no_grad()
def encode_shuffled(encoder: Callable[[Tensor], Tensor], images: Tensor, mode: str, step: int) -> Tensor:
    """Encode this rank's images [N, ...] on other ranks; returns all ranks' outputs [world * N, dim], in order.

    ``"gather"`` (as published) collects every image on every rank; ``"all_to_all"`` sends only the rows the
    permutation moves, 1/world of that; ``"auto"`` is the latter. The outputs are gathered once, which unshuffles them
    and serves the queue.
    """
    world = world_size()
    if mode == "none":
        return all_gather(encoder(images))
    n = images.shape[0]
    order = shared_permutation(world * n, step)  # slot i of the shuffled global batch holds image order[i]
    mine = order[rank() * n : (rank() + 1) * n]
    shuffled = all_gather(images)[mine.to(images.device)] if mode == "gather" else _exchange(images, order, mine)
    keys = all_gather(encoder(shuffled))
    return keys[order.argsort().to(keys.device)]


def _exchange(images: Tensor, order: Tensor, mine: Tensor) -> Tensor:
    """Rows ``mine`` of the global batch, sent here by the ranks that hold them."""
    n, world, me = images.shape[0], world_size(), rank()
    held = order // n  # [world * n] the rank that holds each slot's image
    wanted_by = torch.arange(world * n) // n
    leaving = held == me  # slots filled from here, in the order of their receivers
    send_counts = torch.bincount(wanted_by[leaving], minlength=world).tolist()
    receive_counts = torch.bincount(mine // n, minlength=world).tolist()
    sent = images[(order[leaving] - me * n).to(images.device)]
    received = images.new_empty(images.shape)
    dist.all_to_all_single(received, sent, receive_counts, send_counts)
    # Arrived grouped by sender, within a sender in slot order: a stable sort of the slots by sender, undone.
    arrival = torch.argsort(mine // n, stable=True)
    return received[arrival.argsort().to(images.device)]


class SplitBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose training statistics are taken over groups of the batch: sample i belongs to group i mod G.

    Running statistics move once a step, by the mean over the groups. In eval mode it is plain BatchNorm, and its state
    dict is plain BatchNorm's. Groups of a batch that G does not divide differ in size by one.
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
        if not self.training or groups <= 1:
            return super().forward(x)
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
        """The normalised batch, and each group's mean and unbiased variance [groups, C]."""
        # Rows of G consecutive samples become one sample of G * C channels: one launch for all groups.
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


def convert_split_bn(module: nn.Module, groups: int) -> nn.Module:
    """Replace every BatchNorm in a module by :class:`SplitBatchNorm`; parameters and buffers are the same objects.

    Returns:
        The module, changed in place; a new one if it is itself a BatchNorm.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        options = {name: getattr(module, name) for name in ("eps", "momentum", "affine", "track_running_stats")}
        split = SplitBatchNorm(module.num_features, groups, **options)
        split._parameters, split._buffers = module._parameters, module._buffers
        split.training = module.training
        return split
    for name, child in module.named_children():
        setattr(module, name, convert_split_bn(child, groups))
    return module


@torch.no_grad()
def encode_split(encoder: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Encode images [N, ...] in random order and return the outputs in order: other groups than the queries'."""
    order = torch.randperm(images.shape[0], device=images.device)
    return encoder(images[order])[order.argsort()]

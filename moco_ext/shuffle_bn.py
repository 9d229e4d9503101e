"""Shuffling BN: query and key of one image must not share batch statistics (Sec. 3.3 of the paper).

Otherwise the statistics of the small sub-batch both are normalised with tell which key belongs to which query, and the
encoder learns to read them instead of the image. Across processes the key images are permuted before the key encoder
and its output is put back in order; on one device :func:`convert_split_bn` gives groups of a batch their own
statistics, the effect of as many devices.
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
    """A permutation of n that every rank draws for itself: [n] int64 on the CPU, a function of the step alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0x6D6F636F + step))


def shuffle_order(n: int, mode: str, split_bn: int, step: int, given: Tensor | None) -> Tensor | None:
    """The order in which keys are encoded: slot i of the global batch of world * n holds image ``order[i]``.

    Args:
        n: images of this rank.
        given: [world * n] int64 on the CPU, the same on all ranks, instead of one drawn from the step.

    Returns:
        [world * n] int64 on the CPU; None where nothing is to be shuffled.

    Raises:
        ValueError: an order of the wrong length, or none where the loader has already shuffled.
    """
    total = world_size() * n
    if mode == "loader" and given is None:
        raise ValueError(
            "key_order: expected the permutation by which the loader has shuffled the key images, got none; "
            "moco_ext.data.TrainLoader(..., shuffled_keys=True) gives it with each batch"
        )
    if given is not None and given.shape != (total,):
        raise ValueError(f"key_order: expected [{total}], a permutation of the global batch, got {list(given.shape)}")
    if mode == "none" or (mode != "loader" and world_size() == 1 and split_bn == 1):
        return None
    return shared_permutation(total, step) if given is None else given


def start_shuffle(images: Tensor, order: Tensor | None, mode: str) -> Callable[[], Tensor] | None:
    """Set out this rank's images [N, ...] for the slots that ``order`` gives them.

    ``"gather"`` (as published) collects every image on every rank; ``"all_to_all"`` sends only the rows the permutation
    moves, 1/world of that; ``"auto"`` is the latter. Of ``"loader"`` they are there already.

    Returns:
        A function that waits for the images of this rank's slots [N, ...] and gives them; None if none has to travel.
    """
    if order is None or mode == "loader":
        return None
    n, world, me = images.shape[0], world_size(), rank()
    mine = order[me * n : (me + 1) * n]
    if world == 1:
        shuffled = images[_index(mine, images)]
        return lambda: shuffled
    # Collectives send memory as it lies: images whose channels lie together travel, and arrive, that way.
    channels_last = images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last)
    rows = images.permute(0, 2, 3, 1) if channels_last else images
    if mode == "gather":
        arriving, place = start_all_gather(rows), mine
    else:
        leaving = order // n == me  # slots filled from here, in the order of their receivers
        wanted_by = torch.arange(world * n) // n
        send_counts = torch.bincount(wanted_by[leaving], minlength=world).tolist()
        receive_counts = torch.bincount(mine // n, minlength=world).tolist()
        arriving = start_exchange(rows[_index(order[leaving] - me * n, rows)], send_counts, receive_counts)
        # Arrived grouped by sender, within a sender in slot order: a stable sort of the slots by sender, undone.
        place = torch.argsort(mine // n, stable=True).argsort()

    def arrived() -> Tensor:
        slots = arriving()[_index(place, images)]
        return slots.permute(0, 3, 1, 2) if channels_last else slots

    return arrived


def unshuffle(keys: Tensor, order: Tensor | None) -> Tensor:
    """All slots' keys [world * N, dim] back in the order of the images."""
    return keys if order is None else keys[_index(order.argsort(), keys)]


def _index(rows: Tensor, like: Tensor) -> Tensor:
    """Row numbers beside the tensor that they index, without making the host wait for the GPU."""
    return rows.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else rows


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
        The module, changed in place; a new one if it is itself a BatchNorm. For one group there is nothing to change.

    Raises:
        ValueError: less than one group.
    """
    if groups < 1:
        raise ValueError(f"split_bn: expected at least one group, got {groups}")
    if groups == 1:
        return module
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        options = {name: getattr(module, name) for name in ("eps", "momentum", "affine", "track_running_stats")}
        split = SplitBatchNorm(module.num_features, groups, **options)
        split._parameters, split._buffers = module._parameters, module._buffers
        split.training = module.training
        return split
    for name, child in module.named_children():
        setattr(module, name, convert_split_bn(child, groups))
    return module

"""Distillation of a frozen teacher through a queue of its features (SEED, arXiv 2101.04731)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import distributed, encoders
from .encoders import encode
from .mechanism import Mechanism, check_temperature
from .moco import MoCoOutput
from .ops import expected_key, info_nce, l2_normalize
from .queue import KeyQueue
from .shuffle_bn import convert_split_bn
from .stats import InfoNCEStats


class Distillation(Mechanism, KeyQueue):
    """A student of any architecture learns how a frozen teacher relates each image to others.

    The teacher's features of past images are the queue. The loss is the KL divergence of the student's softmax over the
    teacher's feature of the image and the queue from the teacher's own::

        model = Distillation("resnet18", dim=2048, teacher=teacher)
        out = model(images)
        out.loss.backward()
        optimizer.step()
        model.update(out.keys)  # enqueue

    Args:
        base_encoder, mlp, split_bn, queue_dtype: of the student, see :class:`moco_ext.MoCo`.
        dim: number of the teacher's features, and of the outputs of the student's head.
        K: number of features in the queue, which starts empty.
        T: temperature of the student.
        teacher_T: temperature of the teacher.
        teacher: normalized images -> [N, dim]. It is neither trained nor in the state dict, and stays in eval mode.
            ``set_teacher`` sets it later.

    Raises:
        ValueError, TypeError: an argument of the wrong type or out of its range; the message names it.
    """

    chance_loss = None  # a divergence does not start at log(K + 1)

    def __init__(
        self,
        base_encoder: str | Callable[..., nn.Module],
        dim: int = 128,
        K: int = 65536,
        T: float = 0.07,
        mlp: bool = False,
        *,
        teacher_T: float = 0.04,
        queue_dtype: torch.dtype = torch.float32,
        split_bn: int = 1,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__(dim, K, queue_dtype, empty=True)
        self.T, self.teacher_T = check_temperature(T), check_temperature(teacher_T, "teacher_T")
        self.encoder_q = convert_split_bn(encoders.build(base_encoder, dim, mlp), split_bn)
        self.set_teacher(teacher)

    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher[0]

    def set_teacher(self, teacher: nn.Module | None) -> None:
        """Normalized images -> [N, dim]; frozen and put in eval mode."""
        # In a tuple, where nn.Module does not look for what to train and save.
        self._teacher = (None if teacher is None else teacher.eval().requires_grad_(False),)

    def forward(self, im_q: Tensor) -> MoCoOutput:
        """The loss of a batch of views [N, 3, H, W], which teacher and student see alike.

        Raises:
            ValueError: there is no teacher, or its features are not [N, dim].
        """
        if self.teacher is None:
            raise ValueError("teacher: expected a module, got None; call set_teacher first")
        self._check_images(im_q, im_q)
        self._warn_if_update_is_forgotten()
        queries = encode(self.encoder_q, im_q)
        if self.teacher.training:  # train() of a module that has the teacher, too, among its own
            self.teacher.eval()
        with torch.no_grad():
            features = encode(self.teacher, im_q, "teacher")
        if features.shape != (len(im_q), self.queue.shape[1]):
            expected = [len(im_q), self.queue.shape[1]]
            raise ValueError(f"teacher: expected features {expected}, got {list(features.shape)}")
        self._watch(queries)
        valid = self.queue_valid
        labels = expected_key(features, features, self.queue, self.teacher_T, num_valid=valid)
        loss, stats = info_nce(
            queries, features, self.queue, self.T, target=labels.keys, num_valid=valid, return_stats=True
        )
        score = (l2_normalize(features.float()) * labels.keys).sum(1)
        entropy = labels.lse - score / self.teacher_T  # of the teacher's softmax
        stats = InfoNCEStats(stats.loss - entropy, *stats[1:])
        return MoCoOutput(loss - entropy.mean(), distributed.all_gather(features), stats)

    if TYPE_CHECKING:

        def __call__(self, im_q: Tensor) -> MoCoOutput: ...

    def forward_batch(
        self, im_q: Tensor, im_k: Tensor, *, index: Tensor, key_order: Tensor | None = None
    ) -> tuple[Tensor, InfoNCEStats, tuple[Tensor, ...]]:
        out = self(im_q)
        return out.loss, out.stats, (out.keys,)

    @torch.no_grad()
    def update(self, keys: Tensor) -> None:
        """After the optimizer step: enqueue the teacher's features of the batch, equal on all ranks."""
        self._check_keys(keys)
        self.check_batch(keys)
        self.enqueue(keys)
        self._count_update()

    def _apply(self, *args, **kwargs):  # .to(), .cuda(): the teacher too
        if self.teacher is not None:
            self.teacher._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)

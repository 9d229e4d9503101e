"""The configuration of a pre-training run, with the published defaults."""

from __future__ import annotations

import dataclasses
import math

import torch

from ..data import Augmentation, ImageData
from ..encoders import AUTOCAST
from ..objectives import OBJECTIVES
from ..runs.options import GROUP as LOGGING
from ..runs.settings import (
    BELOW_1,
    FROM_0_TO_1,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Valid,
    at_least,
    check_settings,
    one_of,
    setting,
    settings,
)
from ..shuffle_bn import MODES
from .mechanisms import MECHANISMS, PARAMETERS, has_setting, has_two_views
from .optimizer import check_name

DTYPES = {"fp32": torch.float32} | AUTOCAST
_OPTIMIZATION, _CONTRAST, _VIEWS = "optimization", "momentum contrast", "views"
_DISTILLATION = "distillation and relations"
_QUEUE, _BATCH = "momentum contrast with a queue", "momentum contrast without a queue (MoCo v3)"

_UP_TO_180 = Valid("a number from 0 to 180", lambda value: 0 <= value <= 180)


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Settings of a pre-training run; the defaults are those of the published ImageNet training (MoCo v1).

    Attributes:
        data: name, folder or list, as for :func:`moco_ext.data.load`, as are ``val_fraction`` and ``image_size``.
        init: weights to start from, as for :func:`moco_ext.checkpoints.pretrained.read_weights`.
        steps: number of optimizer steps, instead of ``epochs``; 0: train by epochs.
        batch_size: images per node (all its processes) and forward pass; a step takes ``accumulate`` of these batches.
        optimizer: an optimizer of torch or timm, with ``betas``, ``opt_eps``, ``layer_decay`` and ``decay_norm_bias``
            as for :func:`moco_ext.train.optimizer.build_optimizer`.
        lr: for the whole batch; drops by 10x at each epoch of ``schedule``, or follows half a cosine with ``cos``, or
            is multiplied by ``lr_gamma`` every ``lr_every`` steps if that is not 0.
        lr_base: instead of ``lr``, the learning rate per 256 images: ``lr = lr_base * images per step / 256``.
        warmup_epochs: epochs in which the rate rises linearly from 0, by steps; the cosine then follows by steps too,
            as in MoCo v3 (without warm-up, by epochs, as in MoCo v2).
        clip_grad: largest norm of the gradient; larger gradients are scaled down to it.
        moco_m: momentum of the key encoder (of the features, in a memory bank); with ``moco_m_cos`` it rises from this
            value to 1.
        dictionary: the mechanism; ``key_encoder``: how keys are encoded, None for the mechanism's default.
        same_image: how other views of the query's image in the queue count: as negatives (as published), masked out,
            or as further positives.
        in_batch: use the other keys of the batch as negatives too.
        objective: the loss, as for :class:`moco_ext.MoCo`, with ``teacher_t``.
        teacher: the teacher of distillation, for :func:`moco_ext.load_encoder`.
        empty_queue: start with an empty queue instead of random keys.
        shard_queue: divide the queue among the processes, as ``queue_sharding`` of :class:`moco_ext.MoCo`.
        queue_dtype: of the keys in memory; None becomes ``precision`` for a queue, and "fp32" for a memory bank: its
            features move by (1 - m), which 16 bits would round away at a large m.
        symmetric: use each view as query and as key; the loss is the mean of both.
        views: whole images, or sets of ``patches`` patches.
        crop_min: smallest share of the image's area that a view shows.
        rotate, elastic, erase: as in :class:`moco_ext.data.Augmentation`; 0: off, as published.
        drop_last: drop an epoch's last partial batch, as the official trainer does.
        shard_window: shuffle the images of this many shards at a time; 0: of all shards.
        knn_k: neighbors in the kNN evaluation; ``online_knn``: epochs (when training by steps, steps) between
            evaluations; 0: evaluate only at the end.
        log_every: steps between records when training by steps; otherwise there is one record per epoch.

    Raises:
        ValueError: a setting outside its range, or settings that contradict each other.
    """

    data: str
    val_fraction: float = setting(
        0.0, metavar="F", valid=BELOW_1, help="fraction of the images to hold out for evaluation, if there is no val/"
    )
    image_size: int | None = setting(
        None, valid=at_least(1), shown="224, or that of the small data sets", help="side of the views in pixels"
    )
    arch: str = setting(
        "resnet50",
        flags=("-a", "--arch"),
        metavar="ARCH",
        help="torchvision model, resnet18-small and similar for small images, or timm:NAME",
    )
    init: str | None = setting(
        None,
        metavar="WEIGHTS",
        shown="random",
        help="start from a run, a checkpoint of any known format, a state dict, torchvision:IMAGENET1K_V2 or timm:NAME",
    )
    stop_grad_conv1: bool = setting(
        False, help="freeze the patch projection of a vision transformer at its random values"
    )
    zero_init_residual: bool = setting(False, help="start the residual blocks of a ResNet as the identity")
    epochs: int = setting(200, valid=at_least(1), help="number of epochs", group=_OPTIMIZATION)
    steps: int = setting(
        0, valid=NOT_NEGATIVE, shown="train by epochs", help="number of optimizer steps", group=_OPTIMIZATION
    )
    batch_size: int = setting(
        256,
        flags=("-b", "--batch-size"),
        valid=at_least(2),  # BatchNorm needs two samples
        help="images per node and forward pass, over all its GPUs",
        group=_OPTIMIZATION,
    )
    accumulate: int = setting(
        1,
        metavar="A",
        valid=at_least(1),
        help="batches per optimizer step, whose gradients are accumulated",
        group=_OPTIMIZATION,
    )
    lr: float = setting(
        0.03,
        flags=("--lr", "--learning-rate"),
        metavar="LR",
        valid=POSITIVE,
        help="learning rate",
        group=_OPTIMIZATION,
    )
    lr_base: float | None = setting(
        None,
        metavar="X",
        valid=POSITIVE,
        shown="use --lr",
        help="learning rate per 256 images, scaled by the images per step (the --lr of MoCo v3)",
        group=_OPTIMIZATION,
    )
    warmup_epochs: float = setting(
        0.0, metavar="E", valid=NOT_NEGATIVE, help="epochs in which lr rises linearly from 0", group=_OPTIMIZATION
    )
    schedule: tuple[int, ...] = setting(
        (120, 160), metavar="E", valid=NOT_NEGATIVE, help="epochs at which lr drops by 10x", group=_OPTIMIZATION
    )
    cos: bool = setting(False, help="cosine schedule instead of --schedule", group=_OPTIMIZATION)
    lr_gamma: float = setting(0.9, metavar="G", valid=POSITIVE, help="factor for --lr-every", group=_OPTIMIZATION)
    lr_every: int = setting(
        0,
        valid=NOT_NEGATIVE,
        shown="follow the schedule",
        help="multiply lr by --lr-gamma every N steps, instead of --schedule",
        group=_OPTIMIZATION,
    )
    optimizer: str = setting(
        "sgd", metavar="NAME", help="sgd, adamw, lars, lamb, or another optimizer of torch or timm", group=_OPTIMIZATION
    )
    momentum: float = setting(
        0.9, metavar="M", valid=BELOW_1, help="momentum of SGD, LARS and others", group=_OPTIMIZATION
    )
    betas: tuple[float, ...] = setting(
        (), metavar="B", valid=BELOW_1, shown="the optimizer's", help="betas of Adam and others", group=_OPTIMIZATION
    )
    opt_eps: float | None = setting(
        None, metavar="E", valid=POSITIVE, shown="the optimizer's", help="eps of Adam and others", group=_OPTIMIZATION
    )
    weight_decay: float = setting(
        1e-4,
        flags=("--wd", "--weight-decay"),
        metavar="W",
        valid=NOT_NEGATIVE,
        help="weight decay",
        group=_OPTIMIZATION,
    )
    decay_norm_bias: bool | None = setting(
        None, shown="yes; no with LARS and LAMB", help="weight decay for norms and biases too", group=_OPTIMIZATION
    )
    layer_decay: float | None = setting(
        None,
        metavar="D",
        valid=SHARE,
        shown="none",
        help="multiply the learning rate by D from each layer to the one below it",
        group=_OPTIMIZATION,
    )
    clip_grad: float | None = setting(
        None, metavar="NORM", valid=POSITIVE, shown="none", help="clip the norm of the gradient", group=_OPTIMIZATION
    )
    moco_dim: int = setting(128, metavar="C", valid=at_least(1), help="feature dimension", group=_CONTRAST)
    moco_mlp_dim: int = setting(
        4096,
        metavar="C",
        valid=at_least(1),
        help="width of the hidden layers of MoCo v3's projector and predictor",
        group=_BATCH,
    )
    moco_k: int = setting(
        65536, metavar="K", valid=at_least(1), help="queue size: number of negatives", group=_CONTRAST
    )
    moco_m: float = setting(
        0.999, metavar="M", valid=FROM_0_TO_1, help="momentum of the key encoder; 0: a plain copy", group=_CONTRAST
    )
    moco_t: float = setting(0.07, metavar="T", valid=POSITIVE, help="softmax temperature", group=_CONTRAST)
    moco_m_cos: bool = setting(False, help="increase m to 1 on a cosine schedule", group=_CONTRAST)
    mlp: bool = setting(False, help="MoCo v2's projection head", group=_CONTRAST)
    dictionary: str = setting(
        "queue", valid=one_of(*MECHANISMS), help="how the dictionary of keys is built", group=_CONTRAST
    )
    key_encoder: str | None = setting(
        None,
        metavar="KIND",
        shown="the first of these",
        help="queue: momentum, partial (shared backbone) or identical; end-to-end: identical, partial, different or "
        "an architecture",
        group=_CONTRAST,
    )
    same_image: str = setting(
        "negative",
        valid=one_of("negative", "mask", "positive"),
        help="how other views of the query's image in the queue count",
        group=_QUEUE,
    )
    label_smoothing: float = setting(
        0.0, metavar="E", valid=BELOW_1, help="fraction of the target that is spread over all keys", group=_QUEUE
    )
    in_batch: bool = setting(
        False, help="use the other keys of the batch (of all ranks) as negatives too", group=_QUEUE
    )
    empty_queue: bool = setting(False, help="start with an empty queue instead of random keys", group=_QUEUE)
    shard_queue: bool = setting(False, help="divide the queue among the processes", group=_QUEUE)
    objective: str = setting(
        "infonce",
        valid=one_of("infonce", *OBJECTIVES),
        help="contrast with the key (infonce) or its nearest neighbor (nnclr), or learn the key's similarities (ressl)",
        group=_QUEUE,
    )
    teacher: str | None = setting(
        None,
        metavar="WEIGHTS",
        shown="none",
        help="with --dictionary distillation: the frozen encoder to learn from",
        group=_DISTILLATION,
    )
    teacher_t: float = setting(
        0.04,
        metavar="T",
        valid=POSITIVE,
        help="temperature of the teacher's softmax, or of the key's with ressl",
        group=_DISTILLATION,
    )
    symmetric: bool = setting(
        False, help="use each view as query and as key; the loss is the mean of both", group=_CONTRAST
    )
    queue_dtype: str = setting(
        None, valid=one_of(*DTYPES), shown="that of --precision", help="dtype of the stored keys", group=_CONTRAST
    )
    shuffle_bn: str = setting(
        "auto",
        valid=one_of(*MODES),
        help="how keys are shuffled across GPUs or groups with separate BatchNorm statistics",
        group=_CONTRAST,
    )
    split_bn: int = setting(
        1,
        metavar="G",
        valid=at_least(1),
        help="groups of the batch with separate BatchNorm statistics, like G GPUs",
        group=_CONTRAST,
    )
    aug_plus: bool = setting(False, help="MoCo v2's augmentations", group=_VIEWS)
    aug_byol: bool = setting(
        False, help="BYOL's augmentations, different for the two views, as in MoCo v3", group=_VIEWS
    )
    crop_min: float = setting(
        0.2, metavar="A", valid=FROM_0_TO_1, help="smallest fraction of the image's area in a view", group=_VIEWS
    )
    rotate: float = setting(
        0.0, metavar="DEGREES", valid=_UP_TO_180, help="largest rotation of a view, in either direction", group=_VIEWS
    )
    elastic: float = setting(
        0.0, metavar="ALPHA", valid=NOT_NEGATIVE, help="strength of elastic deformation of a view", group=_VIEWS
    )
    erase: float = setting(
        0.0, metavar="P", valid=FROM_0_TO_1, help="probability that a box of a view is erased", group=_VIEWS
    )
    views: str = setting("image", valid=one_of("image", "patches"), help="whole images, or patches", group=_VIEWS)
    patches: int = setting(9, metavar="P", valid=at_least(1), help="patches per image, a square number", group=_VIEWS)
    augment_on: str = setting(
        "loader", valid=one_of("loader", "device"), help="where color jitter and blur are computed", group=_VIEWS
    )
    shard_window: int = setting(
        0,
        metavar="N",
        valid=NOT_NEGATIVE,
        shown="shuffle all images",
        help="with shards: shuffle the images of N shards (Parquet: row groups) at a time",
        group=_VIEWS,
    )
    drop_last: bool = setting(False, help="drop an epoch's last partial batch", group=_VIEWS)
    precision: str = setting(
        "fp32", valid=one_of(*DTYPES), help="precision of autocast; fp16 uses loss scaling", group=_OPTIMIZATION
    )
    channels_last: bool | None = setting(
        None, shown="on CPUs, and with bf16 or fp16", help="channels-last memory layout", group=_OPTIMIZATION
    )
    compile: bool = setting(False, help="compile the encoders with torch.compile", group=_OPTIMIZATION)
    compile_mode: str = setting(
        "default",
        valid=one_of("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        help="with --compile: torch.compile's mode; reduce-overhead replays CUDA graphs, for small batches on a GPU",
        group=_OPTIMIZATION,
    )
    knn_k: int = setting(200, valid=at_least(1), help="neighbors in the kNN evaluation", group=LOGGING)
    online_knn: int = setting(
        10, valid=NOT_NEGATIVE, help="epochs (with --steps, steps) between kNN evaluations", group=LOGGING
    )
    log_every: int = setting(1000, valid=at_least(1), help="with --steps: steps between records", group=LOGGING)
    seed: int = setting(0, help="seed of weights, order and augmentations")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.queue_dtype is None:  # what runs save and compare is the dtype itself
            object.__setattr__(
                self, "queue_dtype", self.precision if has_setting(self.dictionary, "queue_dtype") else "fp32"
            )
        check_name(self.optimizer)
        if not self.steps and 0 < self.epochs <= self.warmup_epochs:
            raise ValueError(f"warmup_epochs: expected less than the {self.epochs} epochs, got {self.warmup_epochs}")
        if self.compile_mode != "default" and not self.compile:
            raise ValueError(f"compile_mode: expected default without compile, got {self.compile_mode}")
        if self.cuda_graphs and self.accumulate > 1:
            raise ValueError(
                f"accumulate: expected 1 with compile_mode {self.compile_mode}, whose CUDA graphs overwrite the last "
                f"batch's gradients, got {self.accumulate}"
            )
        if self.aug_plus and self.aug_byol:
            raise ValueError("aug_byol: expected False with aug_plus, got both")
        if self.symmetric and MECHANISMS[self.dictionary].symmetric:
            raise ValueError(f"symmetric: expected False with dictionary {self.dictionary}, which always is, got True")
        if self.symmetric and not has_two_views(self.dictionary):
            raise ValueError(f"symmetric: expected a mechanism with two views, got dictionary {self.dictionary}")
        if self.symmetric and self.shuffle_bn == "loader":
            raise ValueError(
                "symmetric: expected both views on the same rank, got shuffle_bn loader, which sends keys elsewhere"
            )
        if (self.teacher is None) == (self.dictionary == "distillation"):
            expected = "weights" if self.dictionary == "distillation" else "none"
            raise ValueError(f"teacher: expected {expected} with dictionary {self.dictionary}, got {self.teacher}")
        for name, declared in settings(PretrainConfig).items():
            value = getattr(self, name)
            if name not in PARAMETERS or has_setting(self.dictionary, name):
                continue
            harmful = name in ("key_encoder", "split_bn") or (name, value) == ("shuffle_bn", "loader")
            if declared.group not in (_QUEUE, _BATCH) and not harmful:
                continue
            if value != declared.default:
                raise ValueError(
                    f"{name}: expected {declared.default!r} with dictionary {self.dictionary}, got {value!r}"
                )

    @property
    def cuda_graphs(self) -> bool:
        """Whether the compiled encoders are replayed as CUDA graphs, on a GPU."""
        return self.compile_mode in ("reduce-overhead", "max-autotune")

    def augmentation(self, data: ImageData) -> Augmentation:
        """Views of MoCo v1, with ``aug_plus`` v2 or with ``aug_byol`` v3, at the size of the data; flipped only if
        ``data.flip``."""
        published = Augmentation.v2 if self.aug_plus else Augmentation.byol if self.aug_byol else Augmentation.v1
        return published(
            data.size,
            scale=(self.crop_min, 1.0),
            flip_p=0.5 if data.flip else 0.0,
            rotate=self.rotate,
            elastic=self.elastic,
            erase_p=self.erase,
        )

    def total_steps(self, steps_per_epoch: int) -> int:
        """Number of steps of the run.

        Raises:
            ValueError: all of them are warm-up.
        """
        total = self.steps or self.epochs * steps_per_epoch
        if total <= self.warmup_epochs * steps_per_epoch:
            raise ValueError(
                f"warmup_epochs: expected less than the {total / steps_per_epoch:.4g} epochs of {total:,} steps, got "
                f"{self.warmup_epochs}"
            )
        return total

    def learning_rate(self, step: int, steps_per_epoch: int, nodes: int = 1) -> float:
        """Learning rate of 0-based ``step``. Constant within an epoch, as published, unless training by steps or with
        warm-up."""
        lr = self.lr
        if self.lr_base is not None:
            lr = self.lr_base * nodes * self.batch_size * self.accumulate / 256
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return lr * step / warmup
        if self.lr_every:
            return lr * self.lr_gamma ** (step // self.lr_every)
        epoch = step // steps_per_epoch
        if self.cos:
            progress = epoch / self.epochs
            if self.steps or warmup:
                progress = (step - warmup) / (self.total_steps(steps_per_epoch) - warmup)
            return lr * 0.5 * (1 + math.cos(math.pi * progress))
        return lr * 0.1 ** sum(epoch >= milestone for milestone in self.schedule)

    def key_momentum(self, step: int, steps_per_epoch: int) -> float:
        """Momentum of 0-based ``step``; cosine: 1 - (1 - m) (cos(pi t) + 1) / 2 (BYOL, arXiv 2006.07733)."""
        if not self.moco_m_cos:
            return self.moco_m
        progress = step / self.total_steps(steps_per_epoch)
        return 1 - (1 - self.moco_m) * (math.cos(math.pi * progress) + 1) / 2

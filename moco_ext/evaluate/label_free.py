"""What can be measured without labels: two views of held-out images, and the spread of their features."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..data import Augmentation, ImageData, Split, TensorSplit, TrainLoader
from ..encoders import autocast, backbone, restored_modes
from .features import take, to_device

SAMPLE = 2048  # images: [SAMPLE, SAMPLE] similarities


def effective_rank(gram: Tensor) -> float:
    """exp of the entropy of the normalized singular values of a matrix, from its Gram matrix; NaN if that has any."""
    if not bool(gram.isfinite().all()):
        return torch.nan
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


def scored_split(data: ImageData) -> Split:
    """The test split if it has two images to tell apart, else the training split."""
    return data.test if data.test is not None and len(data.test) > 1 else data.train


@torch.no_grad()
def label_free_scores(
    encoder: nn.Module,
    data: ImageData,
    augmentation: Augmentation,
    *,
    device: torch.device | str = "cpu",
    workers: int = 0,
    precision: str = "fp32",
) -> dict[str, float]:
    """Scores of the pooled features of two views of up to 2,048 images of :func:`scored_split`.

    - ``contrast_top1``: share of images, in percent, whose other view is nearest among all other views.
    - ``alignment``: mean squared distance of the unit features of two views; 0 is best.
    - ``uniformity``: log of the mean of exp(-2 d²), d the distance of the unit features of two images; 0 if all are the
      same, lower is better (both: Wang & Isola, arXiv 2005.10242).
    - ``rankme``: effective rank of the features (Garrido et al., arXiv 2210.02885): from 1 to min(N, D).
    - ``images``: their number, without unreadable ones.

    The encoder runs in eval mode and in ``precision``, as in :func:`encoder_features`; the mode of every layer is
    restored. The views are the same in every call.
    """
    split = scored_split(data)
    # float32 would round the position of the last of more than 2^24 images up.
    rows = torch.linspace(0, len(split) - 1, min(SAMPLE, len(split)), dtype=torch.float64).long().unique().tolist()
    sample = dataclasses.replace(data, train=take(split, rows), test=None)
    loader = TrainLoader(sample, augmentation, min(64, len(rows)), workers=workers, device=device)
    views: list[tuple[Tensor, Tensor]] = []
    index: list[int] = []
    with restored_modes(encoder):
        model = backbone(encoder.eval())
        for batch in loader.epoch(0):
            with autocast(device, precision):
                one, other = (model(to_device(images, device)).flatten(1).float().cpu() for images in batch[:2])
            views.append((one, other))
            index += batch.index.tolist()
    raw, other = (torch.cat(part).double() for part in zip(*views, strict=True))
    if not isinstance(sample.train, TensorSplit):  # other images take the place of unreadable ones
        kept = torch.tensor([sample.train.name(position) not in data.unreadable for position in index])
        raw, other = raw[kept], other[kept]
    one, other = normalize(raw, dim=1), normalize(other, dim=1)
    nearest = (one @ other.T).argmax(1)
    distances = torch.pdist(one).square_()
    gram = raw @ raw.T if len(raw) < raw.shape[1] else raw.T @ raw
    scores = {
        "contrast_top1": 100 * (nearest == torch.arange(len(one))).double().mean().item(),
        "alignment": (one - other).square().sum(1).mean().item(),
        "uniformity": distances.mul_(-2).exp_().mean().log_().item(),
        "rankme": effective_rank(gram),
        "images": len(one),
    }
    return {name: round(score, 4) for name, score in scores.items()}

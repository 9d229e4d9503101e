"""The answers at the top of the page: did the encoder learn, and have its features collapsed?"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..train.diagnostics import COLLAPSED_RANK, COLLAPSED_STD
from .read import ReportedRun

_PROTOCOLS = {"knn": "kNN", "linear": "linear"}


class Answer(NamedTuple):
    """``css``: "good", "bad" or "unclear"."""

    verdict: str
    css: str
    reason: str


def learned(run: ReportedRun) -> Answer:
    """Whether the trained encoder scores higher than the untrained one, by more than two standard errors.

    By kNN and linear accuracy, or without labels by contrast accuracy. The standard error of the difference is that of
    two independent samples, although both encoders are evaluated on the same images: it is too large, never too small.
    """
    scores, images = _scores(run)
    if not scores:
        loss = run.curve("loss")[1]
        return Answer(
            "Not measured", "unclear", f"The last loss is {loss[-1]:.2f} nats." if loss else "No loss is recorded."
        )
    gains = [_in_errors(untrained, trained, images) for untrained, trained in scores.values()]
    told = ", ".join(f"{name} {trained:.1f} % (untrained {start:.1f} %)" for name, (start, trained) in scores.items())
    if max(gains) > 2 and min(gains) >= -2:
        return Answer("Yes", "good", f"{told}.")
    if min(gains) < -2 and max(gains) <= 2:
        return Answer("No", "bad", f"{told}.")
    mixed = min(gains) < -2
    return Answer("Unclear", "unclear", told + ("." if mixed else ": less than two standard errors apart."))


def collapsed(run: ReportedRun) -> Answer:
    """Whether the queries of the last record point in one direction, or in almost no direction but one."""
    spread, rank = run.curve("feature_std")[1][-1:], run.curve("effective_rank")[1][-1:]
    if not (spread and rank):
        return Answer("Not measured", "unclear", "The run has recorded no diagnostics.")
    told = f"Spread of the queries {spread[0]:.2f} (1: even, 0: none), effective rank {rank[0]:.1f}."
    if spread[0] < COLLAPSED_STD or rank[0] < COLLAPSED_RANK:
        return Answer("Yes", "bad", told)
    return Answer("No", "good", told)


def _scores(run: ReportedRun) -> tuple[dict[str, tuple[float, float]], int]:
    """By protocol the scores of the untrained and the trained encoder in percent, and the number of images."""
    untrained, trained = run.scores("untrained"), run.scores("trained")
    both = {label: (untrained[p], trained[p]) for p, label in _PROTOCOLS.items() if p in untrained and p in trained}
    free = run.summary.get("label_free", {})
    if both or not {"untrained", "trained"} <= free.keys():
        return both, run.summary.get("test_images", 0)
    return {"Contrast accuracy": (free["untrained"]["contrast_top1"], free["trained"]["contrast_top1"])}, free["images"]


def _in_errors(before: float, after: float, images: int) -> float:
    """The difference of two percentages in standard errors; infinite if they differ and the images are not counted."""
    if before == after:
        return 0.0
    variance = sum(score * (100 - score) for score in (before, after)) / images if images else 0.0
    return (after - before) / math.sqrt(variance) if variance else math.copysign(math.inf, after - before)

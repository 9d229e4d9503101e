"""What a page is made of: runs as their directories describe them, and the features of their encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.pretrained import load_pretrained
from ..data import ImageData, load
from ..evaluate.features import estimate_batchnorm_
from ..evaluate.scores import all_features
from ..runs.files import read_json
from ..runs.metrics import read_metrics
from ..runs.options import RunOptions
from ..train.config import PretrainConfig
from ..train.model import build_model

GALLERY_RUNS = 3  # of each data set, whose neighbours and maps stand side by side
_EVALUATIONS = ("knn", "linear", "finetune")


@dataclasses.dataclass(frozen=True)
class ReportedRun:
    """One run.

    Attributes:
        config: as in ``config.json``.
        records: those of ``metrics.jsonl``.
        summary: that of ``summary.json``; empty while the run is under way.
        evaluations: by command, what ``moco-ext knn``, ``linear`` and ``finetune`` have left in the directory.
    """

    name: str
    config: dict[str, Any]
    records: list[dict[str, Any]]
    summary: dict[str, Any]
    evaluations: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def top1(self, protocol: str) -> dict[str, float]:
        """Top-1 of ``"knn"`` or ``"linear"`` by representation (pixels, untrained, trained); empty if unknown."""
        own = self.summary.get(f"{protocol}_top1")
        return own or self.evaluations.get(protocol, {}).get(f"{protocol}_top1", {})

    def curve(self, figure: str, x: str = "epoch") -> tuple[list[float], list[float]]:
        """(x, y) of the records that have the figure."""
        points = [(record[x], record[figure]) for record in self.records if record.get(figure) is not None]
        return [point[0] for point in points], [point[1] for point in points]


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Representations of one data set to look at: by label, rows [N, D] of the training and of the test split."""

    data: ImageData
    features: dict[str, tuple[Tensor, Tensor]]


def read_run(folder: str | Path, name: str) -> ReportedRun:
    """The run in a directory.

    Raises:
        ValueError: no run directory, or one without a single record.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    records = read_metrics(folder / "metrics.jsonl")
    if not config or not records:
        raise ValueError(f"run: expected a run directory, with config.json and a line in metrics.jsonl, got {folder}")
    evaluations = {command: read_json(folder / f"{command}.json") for command in _EVALUATIONS}
    return ReportedRun(name, config, records, read_json(folder / "summary.json"), evaluations)


def galleries(
    runs: Sequence[ReportedRun],
    folders: Sequence[str | Path],
    *,
    data_root: str | Path,
    device: torch.device,
    workers: int,
) -> list[Gallery]:
    """For each data set, the features of raw pixels and of the first few runs, from their checkpoints.

    With a single run, those of its encoder before training too.

    Raises:
        ValueError: the data of a run, or its checkpoint, cannot be found or read.
    """
    found = []
    for name in dict.fromkeys(run.config["data"] for run in runs):
        data = load(name, data_root)
        if data.test is None:
            continue
        members = [i for i, run in enumerate(runs) if run.config["data"] == name][:GALLERY_RUNS]
        encoders = {f"run{i}": load_pretrained(folders[i])[0] for i in members}
        labels = {f"run{i}": runs[i].name for i in members}
        place = RunOptions(Path(), device, workers=workers)
        if len(runs) == 1:
            encoders = {"untrained": _untrained(runs[0], data, place), **encoders}
            labels = {"untrained": "untrained encoder", "run0": "trained encoder"}
        features = all_features(data, place, **encoders)
        found.append(Gallery(data, {({"pixels": "raw pixels"} | labels)[key]: rows for key, rows in features.items()}))
    return found


def _untrained(run: ReportedRun, data: ImageData, place: RunOptions) -> torch.nn.Module:
    """The run's encoder as it was before its first step, with BatchNorm statistics of the training images."""
    # Of another version's settings those that this one knows; the encoder is made of arch, dim, head and seed alone.
    known = {field.name for field in dataclasses.fields(PretrainConfig)}
    settings = {name: value for name, value in run.config.items() if name in known}
    encoder = build_model(PretrainConfig(**settings), len(data.train)).encoder_q.to(place.device)
    estimate_batchnorm_(encoder, data, data.train, device=place.device, workers=place.workers)
    return encoder

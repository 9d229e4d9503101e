"""The content of a page: runs as their directories describe them, and the features of their encoders."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoints.pretrained import load_pretrained
from ..data import ImageData, load, seen_from_here
from ..evaluate.features import is_missing, take
from ..evaluate.scores import LABELS, Features, representations, split_features
from ..runs.files import read_json
from ..runs.metrics import read_metrics
from ..runs.options import RunOptions
from ..train.config import PretrainConfig
from ..train.model import build_model

_ENCODED = 200_000  # images without labeled test images; encoding more, only for pictures, takes too long
GALLERY_RUNS = 3  # per data set, whose neighbors and maps fit side by side
_EVALUATIONS = ("knn", "linear", "finetune")


class ImageSet(NamedTuple):
    """The images of a run."""

    data: str
    val_fraction: float
    image_size: int | None


@dataclasses.dataclass(frozen=True)
class ReportedRun:
    """The files of one run directory.

    Attributes:
        config: ``config.json``.
        records: ``metrics.jsonl``.
        summary: ``summary.json``; empty while the run is under way.
        evaluations: results of ``moco-ext knn``, ``linear`` and ``finetune``, by command.
        environment: ``environment.json``; empty for runs of earlier versions.
    """

    name: str
    config: dict[str, Any]
    records: list[dict[str, Any]]
    summary: dict[str, Any]
    evaluations: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def images(self) -> ImageSet:
        """What :func:`moco_ext.data.load` makes its images from."""
        data = seen_from_here(self.config["data"], self.environment.get("directory"))
        return ImageSet(data, self.config.get("val_fraction", 0.0), self.config.get("image_size"))

    def other_data(self, command: str) -> str:
        """The data that ``moco-ext knn``, ``linear`` or ``finetune`` evaluated on; empty if it is that of the run."""
        data = self.evaluations.get(command, {}).get("data", self.config["data"])
        start = self.environment.get("directory", "")
        return "" if os.path.join(start, data) == os.path.join(start, self.config["data"]) else data

    def top1(self, protocol: str) -> dict[str, float]:
        """Top-1 of ``"knn"`` or ``"linear"`` on the run's own data by representation (pixels, untrained, trained);
        empty if unknown."""
        evaluation = {} if self.other_data(protocol) else self.evaluations.get(protocol, {})
        few = evaluation.get("labels_per_class")  # the summary has the scores of all labels
        return self.summary.get(f"{protocol}_top1") or ({} if few else evaluation.get(f"{protocol}_top1", {}))

    def scores(self, representation: str) -> dict[str, float]:
        """Top-1 of a representation by protocol; empty if unknown."""
        by_protocol = {protocol: self.top1(protocol) for protocol in ("knn", "linear")}
        return {protocol: top1[representation] for protocol, top1 in by_protocol.items() if representation in top1}

    def curve(self, metric: str, x: str = "epoch") -> tuple[list[float], list[float]]:
        """(x, y) of the records that have the metric."""
        points = [(record[x], record[metric]) for record in self.records if record.get(metric) is not None]
        return [point[0] for point in points], [point[1] for point in points]


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Features to show: by label, rows [N, D] of the training and of the test split of a data set."""

    data: ImageData
    features: Features
    title: str = ""

    @staticmethod
    def of(data: ImageData, features: Features, title: str = "") -> Gallery:
        """Without the images that could not be read for one of the representations."""
        parts = zip(*features.values(), strict=True)  # training and test rows of each representation
        kept = [~torch.stack([is_missing(rows) for rows in part]).any(0) for part in parts]
        if all(part.all() for part in kept):
            return Gallery(data, features, title)
        rows = [part.nonzero().flatten().tolist() for part in kept]
        data = dataclasses.replace(data, train=take(data.train, rows[0]), test=data.test and take(data.test, rows[1]))
        return Gallery(data, {name: (train[kept[0]], test[kept[1]]) for name, (train, test) in features.items()}, title)


def read_run(folder: str | Path, name: str) -> ReportedRun:
    """Read a run directory.

    Raises:
        ValueError: the folder is not a run directory, or has no record yet.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    records = read_metrics(folder / "metrics.jsonl")
    if not config or not records:
        raise ValueError(f"run: expected a run directory, with config.json and a line in metrics.jsonl, got {folder}")
    evaluations = {command: read_json(folder / f"{command}.json") for command in _EVALUATIONS}
    summary, environment = read_json(folder / "summary.json"), read_json(folder / "environment.json")
    return ReportedRun(name, config, records, summary, evaluations, environment)


def galleries(
    runs: Sequence[ReportedRun],
    folders: Sequence[str | Path],
    *,
    data_root: str | Path,
    device: torch.device,
    workers: int,
) -> list[Gallery]:
    """Features of raw pixels and of the first few runs on each set of images, from their checkpoints.

    For a single run, also those of the untrained encoder.

    Raises:
        FloatingPointError: the features of a run are not finite.
        ValueError: the data of a run, or its checkpoint, cannot be found or read.
    """
    options = RunOptions(Path(), device, workers=workers)
    found = []
    for images, title in titles(runs).items():
        data = load(images.data, data_root, val_fraction=images.val_fraction, image_size=images.image_size)
        if data.why_not_scored and len(data.train) > _ENCODED:
            continue
        members = [(run, folder) for run, folder in zip(runs, folders, strict=True) if run.images == images]
        encoders = {run.name: load_pretrained(folder)[0] for run, folder in members[:GALLERY_RUNS]}
        if len(runs) == 1:
            untrained, trained = _untrained(runs[0], data), encoders[runs[0].name]
            both = representations(data, options, untrained=untrained, trained=trained)
            features = {LABELS[key]: rows for key, rows in both}
        else:
            features = {LABELS["pixels"]: split_features(data, options, None)}
            features |= {key: split_features(data, options, encoder, key) for key, encoder in encoders.items()}
        found.append(Gallery.of(data, features, title))
    return found


def titles(runs: Sequence[ReportedRun]) -> dict[ImageSet, str]:
    """A title for each of the sets of images: the name of the data, and the other settings if sets share it."""
    sets = dict.fromkeys(run.images for run in runs)
    names = [images.data for images in sets]
    return {
        images: images.data
        if names.count(images.data) == 1
        else f"{images.data}, val_fraction {images.val_fraction:g}, image_size {images.image_size or 'default'}"
        for images in sets
    }


def _untrained(run: ReportedRun, data: ImageData) -> torch.nn.Module:
    """The encoder of a run before its first step."""
    # A run of another version may have unknown settings; arch, dim, head and seed suffice for the encoder.
    known = {field.name for field in dataclasses.fields(PretrainConfig)}
    settings: dict[str, Any] = {  # JSON has no tuples
        name: tuple(v) if isinstance(v, list) else v for name, v in run.config.items() if name in known
    }
    return build_model(PretrainConfig(**settings), len(data.train), data.size).encoder_q

"""Ablations: what the mechanism, m, K, T and shuffling BN each do, by runs that differ in nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import __version__
from ..data import ImageData, TensorSplit
from ..evaluate.features import encoder_features, estimate_batchnorm_, pixel_features
from ..evaluate.scores import top1
from ..runs.files import write_json
from ..runs.options import RunOptions
from ..train.config import PretrainConfig
from ..train.model import build_model
from ..train.trainer import pretrain

# Which axes a mechanism knows: the others would only repeat a run.
AXES = {
    "queue": ("dictionary", "moco_m", "moco_k", "moco_t", "shuffle_bn", "key_encoder"),
    "end-to-end": ("dictionary", "moco_t", "shuffle_bn", "key_encoder"),
    "memory-bank": ("dictionary", "moco_k", "moco_t"),
}
Setting = dict[str, Any]  # axis -> value; what a run has that the base has not


class Trial(NamedTuple):
    """A run of the grid: its directory's name, its setting and seed, and the configuration these make."""

    name: str
    setting: Setting
    config: PretrainConfig


class Grid(NamedTuple):
    """What is to be run, and how it is shown.

    Attributes:
        trials: all runs, seed by seed, so that a grid broken off is balanced.
        tables: title -> rows of (label, the run's name without its seed).
    """

    trials: list[Trial]
    tables: dict[str, list[tuple[str, str]]]


def make_grid(
    base: PretrainConfig,
    axes: Mapping[str, Sequence[Any]],
    seeds: Sequence[int],
    *,
    groups: int = 8,
    full: bool = False,
) -> Grid:
    """The base and each value of each axis alone or, with ``full``, all combinations.

    Runs of equal configuration are one run, and values that a mechanism does not know (m, K end to end; m and the key
    encoder of a memory bank, whose features have a momentum of 0.5) are left out of its combinations.

    Args:
        axes: from the names in :data:`AXES` to values.
        groups: ``split_bn`` of the runs of the axis ``shuffle_bn``, so that one device has as many groups of BatchNorm
            statistics as that many devices.

    Raises:
        ValueError: an axis that the base's mechanism does not know, or a value out of its range.
    """
    settings: list[Setting] = [{}]
    if full:
        settings = [
            {axis: v for axis, v in zip(axes, values, strict=True) if axis in AXES[_dictionary(base, axes, values)]}
            for values in itertools.product(*axes.values())
        ]
    else:
        for axis, values in axes.items():
            if axis not in AXES[base.dictionary]:
                raise ValueError(f"{axis}: expected an axis of dictionary {base.dictionary}, which does not know it")
            settings += [{axis: value} for value in values]
    distinct: dict[PretrainConfig, Setting] = {}
    for setting in settings:
        distinct.setdefault(_configure(base, setting, groups), setting)
    trials = [
        Trial(f"{_name(setting)},seed={seed}", setting, dataclasses.replace(config, seed=seed))
        for seed in seeds
        for config, setting in distinct.items()
    ]
    if full:
        rows = [(_name(s).replace(",", ", "), _name(s)) for s in distinct.values()]
        return Grid(trials, {"all combinations": rows})
    tables = {}
    for axis, values in axes.items():
        own = {_configure(base, {axis: value}, groups): _label(axis, value, groups) for value in values}
        own.setdefault(base, _base_label(axis, base))
        names = {config: _name(distinct[config]) for config in own}
        if axis in ("moco_m", "moco_k", "moco_t"):
            own = dict(sorted(own.items(), key=lambda item: getattr(item[0], axis)))
        tables[axis] = [(label, names[config]) for config, label in own.items()]
    return Grid(trials, tables)


def run_grid(grid: Grid, base: PretrainConfig, data: ImageData, options: RunOptions) -> dict[str, Any]:
    """Train and evaluate what ``options.output`` does not hold yet; everything it then holds, as :func:`collect`.

    A run broken off goes on from its newest checkpoint. One whose loss is not finite is kept as failed, with its error.
    Each seed also has its untrained encoder evaluated, and raw pixels beside it: what training has to beat.

    Raises:
        ValueError: the directory holds runs of another configuration or another number of images.
    """
    for trial in grid.trials:
        _claim(options.output / trial.name, trial.config, len(data.train))
    done = took = 0.0
    for number, trial in enumerate(grid.trials, start=1):
        folder = options.output / trial.name
        if (folder / "result.json").is_file():
            continue
        _evaluate_untrained(dataclasses.replace(base, seed=trial.config.seed), data, options)
        left = f", about {(len(grid.trials) - number + 1) * took / done / 60:.0f} minutes left" if done else ""
        options.console.print(f"run {number} of {len(grid.trials)}: {trial.name}{left}", highlight=False)
        started = time.perf_counter()
        result = _train(trial, data, dataclasses.replace(options, output=folder, resume="auto"))
        write_json(folder / "result.json", result)
        done, took = done + 1, took + time.perf_counter() - started
        figures = "".join(
            f"  {name} {result[name]:.2f}" for name in ("loss", "knn_top1", "linear_top1") if name in result
        )
        options.console.print(f"{result['status']}{figures}", highlight=False)
        write_json(options.output / "results.json", collect(grid, base, len(data.train), options.output))
    return collect(grid, base, len(data.train), options.output)


def collect(grid: Grid, base: PretrainConfig, images: int, output: Path) -> dict[str, Any]:
    """What ``results.json`` holds: data, images, base, tables, and each finished or failed run."""
    seeds = dict.fromkeys(trial.config.seed for trial in grid.trials)
    folders = ["pixels", *(f"untrained,seed={seed}" for seed in seeds)]
    folders += [trial.name for trial in grid.trials]
    paths = [output / name / "result.json" for name in folders]
    return {
        "data": base.data,
        "images": images,
        "base": dataclasses.asdict(base),
        "tables": grid.tables,
        "runs": [json.loads(path.read_text()) for path in paths if path.is_file()],
    }


def subset(data: ImageData, images: int) -> ImageData:
    """``data`` with only so many training images, drawn at random but always the same ones."""
    if images < 1 or images > len(data.train) or not isinstance(data.train, TensorSplit):
        raise ValueError(
            f"images: expected 1 to {len(data.train)} of a data set that is held in memory, got {images} of {data.name}"
        )
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:images]
    return dataclasses.replace(data, train=TensorSplit(data.train.images[chosen], data.train.labels[chosen]))


def _configure(base: PretrainConfig, setting: Setting, groups: int) -> PretrainConfig:
    changes = dict(setting)
    if "shuffle_bn" in changes:
        changes["split_bn"] = groups
    if changes.get("dictionary", base.dictionary) != base.dictionary:
        changes.setdefault("key_encoder", None)
        if changes["dictionary"] == "memory-bank":
            changes["moco_m"] = 0.5  # of the features, as in the paper's comparison
    return dataclasses.replace(base, **changes)


def _dictionary(base: PretrainConfig, axes: Mapping[str, Sequence[Any]], values: Sequence[Any]) -> str:
    return dict(zip(axes, values, strict=True)).get("dictionary", base.dictionary)


def _name(setting: Setting) -> str:
    return ",".join(f"{axis}={_plain(value)}" for axis, value in setting.items()) or "base"


def _label(axis: str, value: Any, groups: int) -> str:
    if axis == "shuffle_bn":
        return f"{groups} groups, {value}"
    return _plain(value)


def _base_label(axis: str, base: PretrainConfig) -> str:
    if axis == "shuffle_bn":
        return "one group" if base.split_bn == 1 else f"{base.split_bn} groups, {base.shuffle_bn}"
    value = getattr(base, axis)
    return "the mechanism's own" if value is None else _plain(value)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _claim(folder: Path, config: PretrainConfig, images: int) -> None:
    """The run directory, which belongs to this configuration from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps({"config": dataclasses.asdict(config), "images": images}))
    path = folder / "trial.json"
    if not path.is_file():
        write_json(path, wanted)
        return
    found = json.loads(path.read_text())
    if found != wanted:
        flat = [{"images": side["images"]} | side["config"] for side in (wanted, found)]
        differing = sorted(name for name in flat[0].keys() | flat[1].keys() if flat[0].get(name) != flat[1].get(name))
        raise ValueError(
            f"output: expected runs of this configuration or none, got another {', '.join(differing)} in {folder}"
        )


def _train(trial: Trial, data: ImageData, options: RunOptions) -> dict[str, Any]:
    config = trial.config
    result: dict[str, Any] = {"name": trial.name, "setting": trial.setting, "seed": config.seed}
    result |= {"made_with": _made_with(options.device)}
    model = build_model(config, len(data.train))
    # kNN at the end is ours to do, from the features that the linear classifier takes too.
    unseen = data if config.online_knn else dataclasses.replace(data, test=None)
    try:
        records = pretrain(config, unseen, options, model)
    except FloatingPointError as error:
        return result | {"status": "failed", "error": str(error).replace(str(options.output), trial.name)}
    last = records[-1]
    result |= {"status": "finished", "loss": last["loss"], "acc1": last["acc1"], "seconds": last["seconds"]}
    result |= _scores(data, config, *_features(model.encoder_q, data, options))
    return result | {"records": records, "curves": _curves(options.output / "tensorboard")}


def _evaluate_untrained(config: PretrainConfig, data: ImageData, options: RunOptions) -> None:
    """Raw pixels and the base's encoder at its random start, unless they have been evaluated."""
    for name in ("pixels", f"untrained,seed={config.seed}"):
        path = options.output / name / "result.json"
        if path.is_file():
            continue
        options.console.print(f"evaluating {name}", highlight=False)
        result: dict[str, Any] = {"name": name, "status": "untrained", "made_with": _made_with(options.device)}
        if name == "pixels":
            train, test = (pixel_features(data, split, workers=options.workers) for split in data.splits)
            result |= _scores(data, config, train, test)
        else:
            encoder = build_model(config, len(data.train)).encoder_q.to(options.device)
            estimate_batchnorm_(encoder, data, data.train, device=options.device, workers=options.workers)
            result |= _scores(data, config, *_features(encoder, data, options))
        path.parent.mkdir(exist_ok=True)
        write_json(path, result)


def _features(encoder: nn.Module, data: ImageData, options: RunOptions) -> tuple[Tensor, Tensor]:
    train, test = (
        encoder_features(encoder, data, split, device=options.device, workers=options.workers) for split in data.splits
    )
    return train, test


def _scores(data: ImageData, config: PretrainConfig, train: Tensor, test: Tensor) -> dict[str, float]:
    return {name: each["it"] for name, each in top1(data, {"it": (train, test)}, config.knn_k).items()}


def _curves(folder: Path) -> dict[str, list[float]]:
    """Loss and contrast accuracy along the run, as TensorBoard has them: means of each few steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    curves: dict[str, list[float]] = {}
    for figure in ("loss", "acc1"):
        points = events.Scalars(f"train/{figure}")
        curves["step"] = [point.step for point in points]
        curves[figure] = [round(point.value, 4) for point in points]
    return curves


def _made_with(device: torch.device) -> dict[str, Any]:
    """Versions, device and, in a work tree, its commit."""
    source = Path(__file__).parent

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=source, capture_output=True, text=True).stdout.strip()
        except OSError:  # no git here
            return ""

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
        name = found[1].strip() if found else platform.processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "moco_ext": __version__,
        "commit": git("rev-parse", "--short=10", "HEAD") or None,
        "changed": bool(git("status", "--porcelain", "--", ".")),
    }

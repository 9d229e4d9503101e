"""Ablations: the effect of the mechanism, batch, m, K, T and shuffling BN, by runs that differ in nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data import ImageData, TensorSplit
from ..evaluate.scores import Rows, representations, split_features, top1
from ..runs.environment import environment
from ..runs.files import read_json, write_json
from ..runs.options import RunOptions
from ..train.config import PretrainConfig
from ..train.mechanisms import MECHANISMS, PARAMETERS, has_setting, own_momentum
from ..train.model import build_model
from ..train.teacher import load_teacher
from ..train.trainer import pretrain

_AXES = ("objective", "moco_m", "moco_k", "moco_t", "shuffle_bn", "key_encoder")
# The axes that apply to each mechanism: others would only repeat a run, or mean something else.
AXES = {
    name: (
        "dictionary",
        "batch_size",
        *(axis for axis in _AXES if has_setting(name, axis) and axis not in own_momentum(name)),
    )
    for name in MECHANISMS
}
Setting = dict[str, Any]  # axis -> value, where a run differs from the base


class AblationRun(NamedTuple):
    """A run of the grid: the name of its directory, how it differs from the base, and its configuration."""

    name: str
    setting: Setting
    config: PretrainConfig


class Grid(NamedTuple):
    """The runs of an ablation and the tables that show them.

    Attributes:
        runs: all runs, seed by seed, so that an interrupted grid is balanced.
        tables: title -> rows of (label, name of the run without its seed).
    """

    runs: list[AblationRun]
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

    Runs of equal configuration are one run. Combinations leave out axes that do not apply to their mechanism (m and K
    of end-to-end; m and the key encoder of a memory bank, whose features have a momentum of 0.5).

    Args:
        axes: from the names in :data:`AXES` to values.
        groups: ``split_bn`` of the runs of the axis ``shuffle_bn``, so that one device has as many groups of BatchNorm
            statistics as that many devices.

    Raises:
        ValueError: an axis that does not apply to the mechanism of the base, or a value out of its range.
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
                raise ValueError(
                    f"{axis}: expected an axis of dictionary {base.dictionary}, one of "
                    f"{', '.join(AXES[base.dictionary])}"
                )
            settings += [{axis: value} for value in values]
    distinct: dict[PretrainConfig, Setting] = {}
    for setting in settings:
        distinct.setdefault(_configure(base, setting, groups), setting)
    runs = [
        AblationRun(f"{_name(setting)},seed={seed}", setting, dataclasses.replace(config, seed=seed))
        for seed in seeds
        for config, setting in distinct.items()
    ]
    if full:
        rows = [(_name(s).replace(",", ", "), _name(s)) for s in distinct.values()]
        return Grid(runs, {"all combinations": rows})
    tables = {}
    for axis, values in axes.items():
        labels = {_configure(base, {axis: value}, groups): _label(axis, value, groups) for value in values}
        labels.setdefault(base, _base_label(axis, base))
        names = {config: _name(distinct[config]) for config in labels}
        if not isinstance(values[0], str):
            labels = dict(sorted(labels.items(), key=lambda item: getattr(item[0], axis)))
        tables[axis] = [(label, names[config]) for config, label in labels.items()]
    return Grid(runs, tables)


def run_grid(grid: Grid, base: PretrainConfig, data: ImageData, options: RunOptions) -> dict[str, Any]:
    """Train and evaluate the runs that ``options.output`` does not have yet; returns :func:`collect`.

    An interrupted run resumes from its newest checkpoint. A run that diverges is recorded as failed, with its error.
    Raw pixels, a teacher and, for each seed, the untrained encoder are evaluated as baselines.

    Raises:
        ValueError: the directory has runs of another configuration or number of images.
    """
    claims = {run.name: run.config for run in grid.runs}
    for seed in dict.fromkeys(run.config.seed for run in grid.runs):
        seeded = dataclasses.replace(base, seed=seed)
        claims |= {name: seeded if key == "untrained" else base for key, name in _baselines(seeded).items()}
    _claim(options.output, claims, len(data.train))
    done = took = 0.0
    for number, run in enumerate(grid.runs, start=1):
        folder = options.output / run.name
        if (folder / "result.json").is_file():
            continue
        _evaluate_baselines(dataclasses.replace(base, seed=run.config.seed), data, options)
        left = f", about {(len(grid.runs) - number + 1) * took / done / 60:.0f} minutes left" if done else ""
        options.console.print(f"run {number} of {len(grid.runs)}: {run.name}{left}", highlight=False)
        started = time.perf_counter()
        result = _train(run, data, dataclasses.replace(options, output=folder, resume="auto"))
        write_json(folder / "result.json", result)
        done, took = done + 1, took + time.perf_counter() - started
        metrics = "".join(
            f"  {name} {result[name]:.2f}" for name in ("loss", "knn_top1", "linear_top1") if name in result
        )
        options.console.print(f"{result['status']}{metrics}", highlight=False)
        write_json(options.output / "results.json", collect(grid, base, len(data.train), options.output))
    return collect(grid, base, len(data.train), options.output)


def collect(grid: Grid, base: PretrainConfig, images: int, output: Path) -> dict[str, Any]:
    """The content of ``results.json``: data, images, base, tables, and each finished or failed run."""
    seeds = dict.fromkeys(run.config.seed for run in grid.runs)
    names = ["pixels", "teacher", *(f"untrained,seed={seed}" for seed in seeds), *(run.name for run in grid.runs)]
    results = (read_json(output / name / "result.json") for name in names)
    return {
        "data": base.data,
        "images": images,
        "base": dataclasses.asdict(base),
        "tables": grid.tables,
        "runs": [result for result in results if result],
    }


def subset(data: ImageData, images: int) -> ImageData:
    """``data`` with ``images`` of its training images: a random subset, always the same."""
    if images < 1 or images > len(data.train) or not isinstance(data.train, TensorSplit):
        raise ValueError(
            f"images: expected 1 to {len(data.train)} of a data set held in memory, got {images} of {data.name}"
        )
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:images]
    return dataclasses.replace(data, train=TensorSplit(data.train.images[chosen], data.train.labels[chosen]))


def _configure(base: PretrainConfig, setting: Setting, groups: int) -> PretrainConfig:
    changes = dict(setting)
    if "shuffle_bn" in changes:
        changes["split_bn"] = groups
    if changes.get("dictionary", base.dictionary) != base.dictionary:
        changes.setdefault("key_encoder", None)
        # What the other mechanism does not have: the masks of a queue, for example.
        optional = PARAMETERS.keys() - {*AXES["queue"], "queue_dtype"}
        defaults: Setting = {
            field.name: field.default
            for field in dataclasses.fields(base)
            if field.name in optional and not has_setting(changes["dictionary"], field.name)
        }
        default: Setting = {"queue_dtype": None}
        if base == dataclasses.replace(base, **default):  # it depends on the mechanism
            defaults |= default
        changes = defaults | changes
        changes |= own_momentum(changes["dictionary"])
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
    return "default" if value is None else _plain(value)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _claim(output: Path, claims: Mapping[str, PretrainConfig], images: int) -> None:
    """Make the run directories and record their configurations; a ValueError if one has another, before any is made."""
    recorded = {name: dataclasses.asdict(config) for name, config in claims.items()}
    for name, config in recorded.items():
        found = read_json(output / name / "trial.json")
        if not found:
            continue
        found = found["config"] | {"images": found["images"]}
        wanted = json.loads(json.dumps(config | {"images": images}))  # lists for tuples, as in the file
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if differing:
            raise ValueError(
                f"output: expected runs of this configuration or none, got another {', '.join(differing)} in "
                f"{output / name}"
            )
    for name, config in recorded.items():
        (output / name).mkdir(parents=True, exist_ok=True)
        if not (output / name / "trial.json").is_file():
            write_json(output / name / "trial.json", {"config": config, "images": images})


def _train(run: AblationRun, data: ImageData, options: RunOptions) -> dict[str, Any]:
    config = run.config
    result: dict[str, Any] = {"name": run.name, "setting": run.setting, "seed": config.seed}
    result |= {"made_with": environment(options.device)}
    model = build_model(config, len(data.train), data.size)
    # The last evaluation is done here, from the features that the linear classifier uses too.
    training_data = data if config.online_knn else dataclasses.replace(data, test=None)
    try:
        records = pretrain(config, training_data, options, model)
        scores = _scores(data, config, split_features(data, options, model.encoder_q, "trained"))
    except FloatingPointError as error:
        return result | {"status": "failed", "error": str(error).replace(str(options.output), run.name)}
    last = records[-1]
    result |= {"status": "finished", "loss": last["loss"], "acc1": last["acc1"], "seconds": last["seconds"]}
    return result | scores | {"records": records, "curves": _curves(options.output / "tensorboard")}


def _baselines(config: PretrainConfig) -> dict[str, str]:
    """Names of the directories of a base's baselines, by representation."""
    names = {"pixels": "pixels", "untrained": f"untrained,seed={config.seed}"}
    return names if config.teacher is None else names | {"teacher": "teacher"}


def _evaluate_baselines(config: PretrainConfig, data: ImageData, options: RunOptions) -> None:
    """Evaluate raw pixels, the untrained encoder of the base and its teacher, if any, unless their results exist."""
    names = _baselines(config)
    paths = {key: options.output / name / "result.json" for key, name in names.items()}
    if all(path.is_file() for path in paths.values()):
        return
    options.console.print(f"evaluating {', '.join(names)}", highlight=False)
    encoders = {"untrained": build_model(config, len(data.train), data.size).encoder_q}
    if config.teacher is not None and not paths["teacher"].is_file():
        encoders["teacher"] = load_teacher(config.teacher, data)[0].eval()
    for key, rows in representations(data, options, precision=config.precision, **encoders):
        if paths[key].is_file():
            continue
        result = {"name": names[key], "status": "untrained", "made_with": environment(options.device)}
        write_json(paths[key], result | _scores(data, config, rows))


def _scores(data: ImageData, config: PretrainConfig, rows: Rows) -> dict[str, float]:
    return {protocol: scores["rows"] for protocol, scores in top1(data, {"rows": rows}, config.knn_k).items()}


def _curves(folder: Path) -> dict[str, list[float]]:
    """Loss and contrast accuracy by step: means over every few steps, from TensorBoard's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    curves: dict[str, list[float]] = {}
    for metric in ("loss", "acc1"):
        points = events.Scalars(f"train/{metric}")
        curves["step"] = [point.step for point in points]
        curves[metric] = [round(point.value, 4) for point in points]
    return curves

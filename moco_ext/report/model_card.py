"""What a model card says about the run of an encoder."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from ..runs.files import read_json
from ..runs.settings import settings
from ..train import guide
from ..train.config import PretrainConfig
from ..train.recipes import resolve_config


def training_section(source: str) -> str:
    """Command, settings and scores of the run in Markdown; empty if ``source`` is not of a run."""
    if not (source and Path(source).exists()):
        return ""
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    if "data" not in config:
        return ""
    lines = ["```bash", command_of(config), "```", "", "| setting | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in config.items()]
    scores = [
        (f"{protocol} top-1 on the test images, % ({features})", f"{value:.2f}")
        for protocol in ("knn", "linear")
        for features, value in summary.get(f"{protocol}_top1", {}).items()
    ]
    scores += [
        (f"{name}, two views without labels ({features})", f"{value:.4g}")
        for features, values in summary.get("label_free", {}).items()
        if isinstance(values, dict)
        for name, value in values.items()
    ]
    if "seconds" in summary:
        scores.append(("seconds of training", f"{summary['seconds']:.0f}"))
    if scores:
        lines += ["", "| result | |", "|---|---|", *(f"| {name} | {value} |" for name, value in scores)]
    return "\n".join(lines)


def command_of(config: dict[str, Any]) -> str:
    """The ``moco-ext pretrain`` command of a run's configuration: its data, and the settings that are not defaults.

    A recipe keeps the size guide from choosing others. The architecture is always stated: without it, a preset's image
    size would replace that of the data.
    """
    data = str(config["data"])
    recipe = "moco-v1" if guide.applies(data, None) else None
    words = ["moco-ext", "pretrain", "--data", data, *(["--recipe", recipe] if recipe else [])]
    declared = settings(PretrainConfig)
    wanted = {name: tuple(v) if isinstance(v, list) else v for name, v in config.items() if name in declared}
    stated = {"arch"} & wanted.keys()
    while True:  # what is stated may change the defaults of other settings
        found = dataclasses.asdict(resolve_config(data, {name: wanted[name] for name in stated}, recipe))
        differing = {name for name, value in wanted.items() if value is not None and value != found[name]}
        if differing <= stated:
            break
        stated |= differing
    for name in filter(stated.__contains__, declared):
        value = wanted[name]
        flag = (declared[name].flags or (f"--{name.replace('_', '-')}",))[-1]
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)

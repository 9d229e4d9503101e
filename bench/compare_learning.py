"""Compares four trainers with the same encoder, the same initial weights and the same batches.

    python bench/compare_learning.py --seeds 0 1 2 --out bench/results/learning.json
    python bench/compare_learning.py --data digits --epochs 80 --curve 5 --seeds 0 1 2 3 4
    python bench/compare_learning.py --out bench/results/learning.json --table docs/learning.md

Every trainer gets each batch before the next one is drawn, in rotating order: all get the same views, and other load on
the machine affects all of them. Runs already in the file are kept, so it can be filled in several steps.
"""

import argparse
import copy
import dataclasses
import importlib.metadata
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moco_ext
from moco_ext import data as datasets
from moco_ext.encoders import resolve
from moco_ext.evaluate import encoder_features, estimate_batchnorm_, knn_top1, linear_top1
from moco_ext.train import PretrainConfig, resolve_config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python_tests"))
import official

ROOT = Path(__file__).resolve().parent.parent
PLOT = "learning/{data}-{epochs}-epochs.svg"  # beside the page


class Trainer(Protocol):
    encoder: nn.Module  # what is evaluated
    modules: list[nn.Module]  # all of it
    parameters: list[nn.Parameter]  # what the optimizer trains

    def loss(self, im_q: Tensor, im_k: Tensor) -> Tensor: ...
    def after_step(self) -> None: ...


class Ours:
    def __init__(self, start: moco_ext.MoCo) -> None:
        self.model = self.build(start)
        self.modules: list[nn.Module] = [self.model]
        self.encoder: nn.Module = self.model.encoder_q
        self.parameters = list(self.encoder.parameters())

    def build(self, start: moco_ext.MoCo) -> moco_ext.MoCo | moco_ext.EndToEnd:
        return copy.deepcopy(start)

    def loss(self, im_q: Tensor, im_k: Tensor) -> Tensor:
        self.out = self.model(im_q, im_k)
        return self.out.loss

    def after_step(self) -> None:
        self.model.update(self.out.keys)


class Official:
    def __init__(self, start: moco_ext.MoCo) -> None:
        dim = start.queue.shape[1]
        self.model = official.MoCo(lambda num_classes: copy.deepcopy(start.encoder_q), dim, start.K, start.m, start.T)
        self.model.load_state_dict(start.state_dict())
        self.modules: list[nn.Module] = [self.model]
        self.encoder: nn.Module = self.model.encoder_q
        self.parameters = list(self.encoder.parameters())

    def loss(self, im_q: Tensor, im_k: Tensor) -> Tensor:
        return F.cross_entropy(*self.model(im_q, im_k))

    def after_step(self) -> None:
        pass


class Lightly:
    """Composed as its examples do: backbone, head, their momentum copies, and a loss that owns the queue."""

    def __init__(self, start: moco_ext.MoCo) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead
        from lightly.models.utils import deactivate_requires_grad, update_momentum

        self.encoder: nn.Module = copy.deepcopy(start.encoder_q)
        self.head: nn.Module = self.encoder.fc  # a linear one is torch's
        self.encoder.fc = nn.Identity()
        if isinstance(self.head, nn.Sequential):
            hidden, _, last = self.head
            self.head = MoCoProjectionHead(hidden.in_features, hidden.out_features, last.out_features)
            for ours, theirs in zip((hidden, last), (self.head.layers[0], self.head.layers[2]), strict=True):
                theirs.load_state_dict(ours.state_dict())
        self.encoder_momentum, self.head_momentum = copy.deepcopy(self.encoder), copy.deepcopy(self.head)
        deactivate_requires_grad(self.encoder_momentum)
        deactivate_requires_grad(self.head_momentum)
        self.criterion = NTXentLoss(temperature=start.T, memory_bank_size=(start.K, start.queue.shape[1]))
        self.criterion.memory_bank.bank.copy_(start.queue)
        self.parameters = [*self.encoder.parameters(), *self.head.parameters()]
        self.modules = [self.encoder, self.head, self.encoder_momentum, self.head_momentum, self.criterion]
        self.update_momentum, self.m = update_momentum, start.m

    def loss(self, im_q: Tensor, im_k: Tensor) -> Tensor:
        self.update_momentum(self.encoder, self.encoder_momentum, self.m)
        self.update_momentum(self.head, self.head_momentum, self.m)
        query = self.head(self.encoder(im_q))
        with torch.no_grad():  # one device: a shuffled batch has the same batch statistics, so there is no shuffle
            key = self.head_momentum(self.encoder_momentum(im_k))
        return self.criterion(query, key)

    def after_step(self) -> None:
        pass


class InBatch(Ours):
    """As in SimCLR, in one direction: the keys are those of the batch, without a queue, and gradients reach them."""

    def build(self, start: moco_ext.MoCo) -> moco_ext.EndToEnd:
        dim = start.queue.shape[1]
        return moco_ext.EndToEnd(lambda num_classes: copy.deepcopy(start.encoder_q), dim, start.T)


TRAINERS: dict[str, Callable[[moco_ext.MoCo], Trainer]] = {
    "ours": Ours,
    "official": Official,
    "lightly": Lightly,
    "in-batch": InBatch,
}
NAMES = {
    "ours": "moco_ext",
    "official": "official formulation",
    "lightly": "Lightly",
    "in-batch": "in-batch keys (`EndToEnd`)",
    "untrained": "untrained encoder",
}
COLORS = {"ours": "#2f6fdb", "official": "#888888", "lightly": "#4c9a6a", "in-batch": "#d9772b"}


def train(
    config: PretrainConfig, data: datasets.ImageData, names: list[str], device: torch.device, curve: int
) -> dict[str, dict]:
    """Every trainer on the same batches: the figures of each by name, and the untrained encoder's.

    Only full batches: the published queue takes no other.
    """
    torch.manual_seed(config.seed)
    start = moco_ext.MoCo(
        resolve(config.arch), config.moco_dim, config.moco_k, config.moco_m, config.moco_t, config.mlp
    )
    trainers = {name: TRAINERS[name](start) for name in names}
    for trainer in trainers.values():
        for module in trainer.modules:
            module.to(device)
    optimizers = {
        name: torch.optim.SGD(t.parameters, config.lr, config.momentum, weight_decay=config.weight_decay)
        for name, t in trainers.items()
    }
    loader = datasets.TrainLoader(
        data,
        config.augmentation(data),
        config.batch_size,
        seed=config.seed,
        drop_last=True,
        channels_last=True,
        device=device,
    )
    losses: dict[str, list[list[float]]] = {name: [] for name in names}  # per epoch, per step
    ms: dict[str, list[float]] = {name: [] for name in names}
    curves: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for epoch in range(config.epochs):
        began = time.perf_counter()
        lr = config.lr * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
        for name in names:
            optimizers[name].param_groups[0]["lr"] = lr
            losses[name].append([])
        for step, batch in enumerate(loader.epoch(epoch)):
            for turn in range(len(names)):
                name = names[(step + turn) % len(names)]
                t, optimizer = trainers[name], optimizers[name]
                clock = time.perf_counter()
                loss = t.loss(batch.im_q, batch.im_k)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                t.after_step()
                ms[name].append((time.perf_counter() - clock) * 1e3)
                losses[name][-1].append(loss.item())
        for name in names if curve and (epoch + 1) % curve == 0 else ():
            knn = round(knn_score(data, trainers[name].encoder, config, device), 2)
            curves[name].append({"epoch": epoch + 1, "seconds": round(sum(ms[name]) / 1e3, 2), "knn_top1": knn})
        means = ", ".join(f"{name} {statistics.fmean(losses[name][-1]):.4f}" for name in names)
        took = time.perf_counter() - began
        print(f"seed {config.seed}, epoch {epoch + 1} of {config.epochs}: loss {means}; {took:.0f} s", flush=True)
    figures = {
        name: {
            "epoch_loss": [round(statistics.fmean(epoch), 5) for epoch in losses[name]],
            "first_losses": losses[name][0][:20],
            "seconds": round(sum(ms[name]) / 1e3, 2),
            "step_ms_deciles": [round(decile, 2) for decile in statistics.quantiles(ms[name], n=10)],
        }
        | ({"curve": curves[name]} if curve else {})
        | top1(trainers[name].encoder, data, config, device)
        for name in names
    }
    start.to(device)
    estimate_batchnorm_(start.encoder_q, data, data.train, device=device)
    return figures | {"untrained": top1(start.encoder_q, data, config, device)}


Task = tuple[Tensor, Tensor, Tensor, Tensor]


def features(data: datasets.ImageData, encoder: nn.Module, device: torch.device) -> Task:
    (train, train_labels), (test, test_labels) = (
        (encoder_features(encoder, data, split, device=device), split.labels) for split in data.splits
    )
    return train, train_labels, test, test_labels


def knn_score(data: datasets.ImageData, encoder: nn.Module, config: PretrainConfig, device: torch.device) -> float:
    return knn_top1(*features(data, encoder, device), k=config.knn_k, device=device)


def top1(
    encoder: nn.Module, data: datasets.ImageData, config: PretrainConfig, device: torch.device
) -> dict[str, float]:
    task = features(data, encoder, device)
    return {"knn_top1": knn_top1(*task, k=config.knn_k, device=device), "linear_top1": linear_top1(*task)}


def subset(data: datasets.ImageData, images: int) -> datasets.ImageData:
    if images >= len(data.train):
        return data
    assert isinstance(data.train, datasets.TensorSplit)
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:images]
    train = datasets.TensorSplit(data.train.images[chosen], data.train.labels[chosen])
    return dataclasses.replace(data, train=train)


def setting(device: torch.device) -> dict:
    """What the figures were made with."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    cpu = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) or [platform.processor()]
    packages = [name for name in ("torch", "lightly", "scikit-learn") if installed(name)]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu[0].strip(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": git("rev-parse", "--short=10", "HEAD"),
        "script_changed": bool(
            git("status", "--porcelain", "--", "bench/compare_learning.py", "python_tests/official.py")
        ),
    }


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def tables(runs: list[dict], page: Path | None = None) -> str:
    """Means and deviations over the seeds, then ours minus each other on the same seed and batches.

    Plots go beside the page.
    """
    parts = []
    for group in budgets(runs):
        data, images, epochs, threads = (group[0][name] for name in BUDGET)
        versions = ", ".join(f"{name} {version}" for name, version in group[0]["versions"].items())
        commits = ", ".join(sorted({run["commit"] for run in group}))
        lines = [
            f"{data}: {images:,} images, {epochs} epochs, {group[0]['device']}, {threads} thread{'s' * (threads > 1)}; "
            f"{versions}; commit {commits}. Mean ± standard deviation over the seeds.",
            "",
            "| | seeds | kNN top-1, % | linear top-1, % | loss of the last epoch | ms per step, median |",
            "|---|---|---|---|---|---|",
        ]
        by_name = {name: {run["seed"]: run for run in group if run["trainer"] == name} for name in NAMES}
        by_name = {name: seeds for name, seeds in by_name.items() if seeds}
        for name, seeds in by_name.items():
            rows = list(seeds.values())
            trained = "epoch_loss" in rows[0]
            cells = [
                spread([run["knn_top1"] for run in rows]),
                spread([run["linear_top1"] for run in rows]),
                spread([run["epoch_loss"][-1] for run in rows], 3) if trained else "",
                f"{statistics.median(run['step_ms_deciles'][4] for run in rows):.0f}" if trained else "",
            ]
            lines.append(f"| {NAMES[name]} | {', '.join(map(str, sorted(seeds)))} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
        paired = [
            f"| {NAMES[name]} | {difference(by_name, name, 'knn_top1')} | {difference(by_name, name, 'linear_top1')} |"
            for name in TRAINERS
            if name != "ours" and {name, "ours"} <= by_name.keys()
        ]
        if paired:  # on equal batches
            head = "| ours minus | kNN top-1 | linear top-1 |\n|---|---|---|"
            parts.append(
                "Differences in points of top-1: mean ± standard error (values of the seeds).\n\n"
                + "\n".join([head, *paired])
            )
        if any("curve" in run for run in group):
            name = PLOT.format(data=data, epochs=epochs)
            if page is not None:
                draw(group, page.parent / name)
            parts.append(f"![kNN accuracy by epochs and by time]({name})")
    return "\n\n".join(parts)


BUDGET = ("data", "images", "epochs", "threads")


def budgets(runs: list[dict]) -> list[list[dict]]:
    """The runs of each budget."""
    keys = sorted({tuple(run[name] for name in BUDGET) for run in runs}, reverse=True)
    return [[run for run in runs if tuple(run[name] for name in BUDGET) == key] for key in keys]


def draw(group: list[dict], path: Path) -> None:
    """kNN accuracy along the runs of a budget: a line per seed, the mean in bold."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    untrained = statistics.fmean(run["knn_top1"] for run in group if run["trainer"] == "untrained")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "learning", "axes.spines.top": False, "font.size": 9}):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        plots = figure.subplots(1, 2, sharey=True)
        for plot, axis in zip(plots, ("epoch", "seconds"), strict=True):
            for name, color in COLORS.items():
                curves = [run["curve"] for run in group if run["trainer"] == name and "curve" in run]
                if not curves:
                    continue
                for curve in curves:
                    points = [0, *(point[axis] for point in curve)]
                    values = [untrained, *(point["knn_top1"] for point in curve)]
                    plot.plot(points, values, color=color, alpha=0.2, lw=0.8)
                means = [
                    [statistics.fmean(point[of] for point in points) for points in zip(*curves, strict=True)]
                    for of in (axis, "knn_top1")
                ]
                plot.plot([0, *means[0]], [untrained, *means[1]], color=color, label=NAMES[name].replace("`", ""))
            plot.set_xlabel({"epoch": "epochs", "seconds": "seconds of training steps"}[axis])
            plot.spines["right"].set_visible(False)
        plots[0].set_ylabel("kNN top-1 (%)")
        plots[1].legend(frameon=False)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def spread(values: list[float], digits: int = 2) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def difference(by_name: dict[str, dict[int, dict]], other: str, figure: str) -> str:
    ours, theirs = by_name["ours"], by_name[other]
    each = [ours[seed][figure] - theirs[seed][figure] for seed in sorted(ours.keys() & theirs.keys())]
    if not each:
        return ""
    error = f" ± {statistics.stdev(each) / math.sqrt(len(each)):.2f}" if len(each) > 1 else ""
    return f"{statistics.fmean(each):+.2f}{error} ({', '.join(f'{value:+.2f}' for value in each)})"


def write_table(runs: list[dict], page: str) -> None:
    if page == "-":
        print(tables(runs))
        return
    text = Path(page).read_text()
    section = tables(runs, Path(page))
    pattern = r"(<!-- learning:start -->\n).*?(<!-- learning:end -->)"
    filled, found = re.subn(pattern, lambda match: f"{match[1]}{section}\n{match[2]}", text, flags=re.DOTALL)
    if not found:
        sys.exit(f"--table: expected <!-- learning:start --> and <!-- learning:end --> in {page}, got neither")
    Path(page).write_text(filled)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--curve", type=int, default=0, metavar="N", help="kNN every N epochs; 0: only after the last")
    parser.add_argument("--images", type=int, default=60000, help="training images, drawn once if fewer than all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "learning.json")
    parser.add_argument("--table", nargs="?", const="-", metavar="PAGE", help="only tables: printed, or into PAGE")
    arguments = parser.parse_args()
    runs: list[dict] = json.loads(arguments.out.read_text())["runs"] if arguments.out.is_file() else []
    if arguments.table:
        write_table(runs, arguments.table)
        return 0

    torch.set_num_threads(arguments.threads)
    names = list(dict.fromkeys(arguments.trainers))
    if "lightly" in names and not installed("lightly"):
        print("lightly: skipped, it is not installed (pip install lightly==1.6.0)", flush=True)
        names.remove("lightly")
    data = subset(datasets.load(arguments.data), arguments.images)
    values = (arguments.data, len(data.train), arguments.epochs, arguments.threads)
    budget = dict(zip(BUDGET, values, strict=True))
    for seed in arguments.seeds:
        done = {run["trainer"] for run in runs if run["seed"] == seed and budget.items() <= run.items()}
        todo = [name for name in names if name not in done]
        if not todo:
            print(f"seed {seed}: kept, {arguments.out} has it", flush=True)
            continue
        config = resolve_config(arguments.data, {"epochs": arguments.epochs, "seed": seed})
        data = dataclasses.replace(data, size=config.image_size or data.size)
        made_with = setting(arguments.device)
        for name, figures in train(config, data, todo, arguments.device, arguments.curve).items():
            if name not in done:
                runs.append({"trainer": name, "seed": seed} | budget | figures | made_with)
            print(
                f"seed {seed}, {name}: kNN {figures['knn_top1']:.2f}, linear {figures['linear_top1']:.2f}", flush=True
            )
        arguments.out.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

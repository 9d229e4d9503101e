"""How many labels does MoCo save? Fashion-MNIST, or other --data, with 1 to 500 labels per class.

    python bench/label_efficiency.py search --epochs 6 "" "--crop-min 0.3" "--rotate 15 --erase 0.25"
    python bench/label_efficiency.py final --seeds 0 1 2 --settings "--epochs 60 --rotate 15"
    python bench/label_efficiency.py table

`search` trains the settings (flags of `moco-ext pretrain`) on five sixths of the training images and scores them on the
last sixth. `final` compares methods: every choice is made on this sixth, labels are drawn from the other images, and
each trained model is evaluated once on the test images. `table` writes docs/learning.md and its plots from the results.

Pre-training for `final` uses all training images, without labels; a finished run in --runs is used as it is.
Finished parts are kept in --work. Several processes may run the same command: each takes parts that no other process
has taken. --parts leaves some parts to another machine: all but the linear classifiers are faster on a GPU
(--device cuda).
"""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from moco_ext.checkpoints.pretrained import load_pretrained
from moco_ext.cli.flags import Parser, add_settings, given
from moco_ext.data import ImageData, load
from moco_ext.data.datasets import labeled_subset, stratified_split
from moco_ext.encoders import build
from moco_ext.evaluate.features import take
from moco_ext.evaluate.linear import linear_top1
from moco_ext.evaluate.scores import Features, all_features, few_label_top1, knn_score
from moco_ext.runs.directory import exclusive
from moco_ext.runs.environment import environment
from moco_ext.runs.files import read_json, write_json
from moco_ext.runs.options import RunOptions
from moco_ext.runs.settings import settings
from moco_ext.train import PretrainConfig, build_model, pretrain, resolve_config
from moco_ext.train.classifier import Classifier, ClassifierConfig, evaluate, train_classifier

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "label-efficiency.json"
PAGE, PLOT = ROOT / "docs" / "learning.md", "learning/labels-{data}.svg"  # beside the page
BUDGETS = (1, 5, 10, 50, 500)  # labels per class
PENALTIES = (1e-3, 1e-2, 0.1, 1.0, 10.0)  # C of the linear classifiers
RATES = (0.003, 0.01, 0.03, 0.1)  # of all layers but the new one
HEAD_RATE = 0.1
COMPONENTS = (20, 50, 100, 200)  # of PCA
VIEWS, COPIES = 5000, 4  # of an epoch of fine-tuning, and of each image in it, at least
VALIDATED = 0.2  # share of the validation images that chooses the rate of fine-tuning
PARTS = ("pretrain", "linear", "scratch", "finetune")
METHODS = {
    "finetune": "fine-tuned from MoCo",
    "moco": "linear, MoCo",
    "scratch": "the same network from scratch",
    "untrained": "linear, untrained encoder",
    "pca": "linear, PCA of pixels",
    "pixels": "linear, pixels",
}
COLORS = dict(zip(METHODS, ("#1b4fa8", "#2f6fdb", "#d9772b", "#8a5fbf", "#4c9a6a", "#888888"), strict=True))


def part(folder: Path, device: torch.device, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The content of `folder`/part.json, made if there is none; empty if another process is making it."""
    if (folder / "part.json").is_file():
        return read_json(folder / "part.json")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(exclusive(folder, lambda: None))
        except ValueError:
            return {}
        if not (folder / "part.json").is_file():  # another process may just have finished
            print(f"{folder.name} ...", flush=True)
            write_json(folder / "part.json", make() | {"made_with": environment(device)})
            print(f"{folder.name}: {(folder / 'part.json').read_text()}", flush=True)
        return read_json(folder / "part.json")


def collect(work: Path, result: Path) -> None:
    """Put all parts of `work`, DATA/search or DATA/final, into the result."""
    found = {folder.name: read_json(folder / "part.json") for folder in sorted(work.iterdir())}
    result.parent.mkdir(parents=True, exist_ok=True)
    results = read_json(result)
    of_data = results.setdefault(work.parent.name, {})
    of_data[work.name] = {name: content for name, content in found.items() if content}
    write_json(result, results)


def configuration(data: str, flags: str, seed: int, **base: Any) -> PretrainConfig:
    parser = Parser(prog="--settings")
    add_settings(parser, settings(PretrainConfig))
    return resolve_config(data, base | given(parser.parse_args(shlex.split(flags)), PretrainConfig) | {"seed": seed})


def split(data: ImageData) -> tuple[Tensor, Tensor]:
    """Positions of the training and of the validation images among the training images."""
    return stratified_split(data.train.labels, 1 / 6)


def pretrained(config: PretrainConfig, data: ImageData, options: RunOptions) -> nn.Module:
    """The encoder of a run, which is started, resumed or, if it is finished, only loaded."""
    run = options.output
    wanted, found = json.loads(json.dumps(dataclasses.asdict(config))), read_json(run / "config.json")
    if differing := [name for name, value in wanted.items() if found.get(name, value) != value]:
        sys.exit(f"settings: expected those of the run in {run}, got another {', '.join(differing)}")
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "config.json", wanted)
    model = build_model(config, len(data.train), data.size)
    pretrain(config, dataclasses.replace(data, test=None), dataclasses.replace(options, resume="auto"), model)
    return model.encoder_q


def search(data: ImageData, config: PretrainConfig, options: RunOptions) -> dict[str, Any]:
    """Train on five sixths of the training images and score on the last sixth."""
    train, held_out = (take(data.train, rows.tolist()) for rows in split(data))
    data = dataclasses.replace(data, train=train, test=held_out)
    features = all_features(data, options, trained=pretrained(config, data, options))
    knn = {name: round(knn_score(data, rows, k=config.knn_k), 2) for name, rows in features.items()}
    return {"epochs": config.epochs, "seed": config.seed, "knn_top1": knn, **few_label_top1(data, features)}


def representations(data: ImageData, config: PretrainConfig, moco: nn.Module, options: RunOptions) -> Features:
    from sklearn.decomposition import PCA

    untrained = build_model(config, len(data.train), data.size).encoder_q
    features = all_features(data, options, untrained=untrained, moco=moco)
    train, test = features["pixels"]
    pca = PCA(min(max(COMPONENTS), train.shape[1]), random_state=0).fit(train.numpy())
    components = (torch.from_numpy(pca.transform(rows.numpy())) for rows in (train, test))
    return features | {"pca": tuple(components)}  # type: ignore[dict-item]


def probe(data: ImageData, features: Features, budgets: Sequence[int], seed: int) -> dict[str, Any]:
    """Linear probes by representation and labels per class; the validation chooses C, scaling and PCA's components."""
    train, held_out = split(data)
    labels, test_labels = (part.labels for part in data.splits)
    results: dict[str, Any] = {}
    for name, (rows, test) in features.items():
        known, validation = rows[train], rows[held_out]
        for budget in budgets:
            chosen = labeled_subset(labels[train], per_class=budget, seed=seed)

            def top1(choice: tuple[int, bool, float], images: Tensor, targets: Tensor) -> float:
                width, per_feature, C = choice
                task = known[:, :width], labels[train], images[:, :width], targets  # noqa: B023
                return linear_top1(*task, C=C, labeled=chosen, per_feature=per_feature)  # noqa: B023

            widths = COMPONENTS if name == "pca" else (rows.shape[1],)
            choices = list(itertools.product(widths, (True, False), PENALTIES))
            validated = {choice: top1(choice, validation, labels[held_out]) for choice in choices}
            best = max(validated, key=validated.__getitem__)
            scores = {"top1": round(top1(best, test, test_labels), 2), "validation_top1": round(validated[best], 2)}
            results.setdefault(name, {})[str(budget)] = scores | {
                "features": best[0],
                "per_feature": best[1],
                "C": best[2],
            }
    return results


def tune(
    data: ImageData,
    arch: str,
    start: nn.Module | None,
    budget: int,
    options: RunOptions,
    *,
    rates: Sequence[float],
    epochs: int,
    seed: int,
) -> dict[str, Any]:
    """Train all layers with `budget` labels per class, from `start` or from scratch; the validation chooses the rate.

    An epoch repeats the images: 5,000 views, or four of each image. The number of steps does not depend on `start`.
    """
    train, held_out = split(data)
    labels = data.train.labels
    chosen = train[labeled_subset(labels[train], per_class=budget, seed=seed)].tolist()
    validation = held_out[labeled_subset(labels[held_out], fraction=VALIDATED)].tolist()
    repeated = (chosen * max(-(-VIEWS // len(chosen)), COPIES))[: max(VIEWS, COPIES * len(chosen))]
    few = dataclasses.replace(data, train=take(data.train, repeated), test=take(data.train, validation))
    runs: dict[float, tuple[dict[str, Any], Classifier]] = {}
    for rate in rates:
        config = ClassifierConfig(
            epochs=epochs,
            lr=rate,
            lr_head=HEAD_RATE,
            schedule=(epochs * 6 // 10, epochs * 8 // 10),
            batch_size=50,
            weight_decay=1e-4,
            crop_min=0.5,
            seed=seed,
        )
        torch.manual_seed(seed)
        encoder = build(arch, 1) if start is None else copy.deepcopy(start)
        model = Classifier(encoder, len(data.classes), data.size, head_bn=True)
        # A rate that diverges is not chosen.
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(FloatingPointError):
            quiet = dataclasses.replace(options, output=Path(folder), print_freq=10**6, console=Console(quiet=True))
            runs[rate] = train_classifier(model, few, config, quiet, name="tune", arch=arch)[-1], model
    best = max(runs, key=lambda rate: runs[rate][0]["val_acc1"])
    last, model = runs[best]
    return {
        "top1": round(evaluate(model, data, device=options.device)["acc1"], 2),
        "validation_top1": {str(rate): round(record["val_acc1"], 2) for rate, (record, _) in runs.items()},
        "lr": best,
        "train_top1": round(last["acc1"], 2),
        "steps": last["step"],
    }


def options_of(args: argparse.Namespace, output: Path) -> RunOptions:
    return RunOptions(output, device=args.device, workers=args.workers, logger="none")


def run_search(args: argparse.Namespace, data: ImageData) -> None:
    work = args.work / args.data / "search"
    for flags in args.settings:
        name = f"{re.sub(r'[^a-z0-9.]+', '_', flags).strip('_') or 'preset'},epochs={args.epochs}"
        config = configuration(args.data, flags, args.seed, epochs=args.epochs)
        options = options_of(args, work / name / "run")
        sized = dataclasses.replace(data, size=config.image_size or data.size)
        part(work / name, args.device, lambda: {"settings": flags} | search(sized, config, options))  # noqa: B023
        collect(work, args.out)


def run_final(args: argparse.Namespace, data: ImageData) -> None:
    work = args.work / args.data / "final"
    size = configuration(args.data, args.settings, 0).image_size
    data = dataclasses.replace(data, size=size or data.size)
    for seed in args.seeds:
        config = configuration(args.data, args.settings, seed)
        options = options_of(args, Path(args.runs.format(seed=seed)))

        def do(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            folder = work / name
            if name.partition(",")[0] in args.parts:
                return part(folder, args.device, make)
            return read_json(folder / "part.json") if (folder / "part.json").is_file() else {}

        def pretrain_it() -> dict[str, Any]:
            pretrained(config, data, options)  # noqa: B023
            return {"settings": args.settings, "epochs": config.epochs}  # noqa: B023

        finished = do(f"pretrain,seed={seed}", pretrain_it)
        moco = load_pretrained(options.output)[0] if finished else None
        if moco is not None:
            do(
                f"linear,seed={seed}",
                lambda: probe(data, representations(data, config, moco, options), args.budgets, seed),  # noqa: B023
            )
        starts = {"scratch": None} | ({"finetune": moco} if finished else {})
        chosen = {"rates": args.rates, "epochs": args.epochs, "seed": seed}
        for budget, (method, start) in itertools.product(args.budgets, starts.items()):
            do(
                f"{method},seed={seed},labels={budget}",
                lambda: tune(data, config.arch, start, budget, options, **chosen),  # noqa: B023
            )
            collect(work, args.out)
    wanted = len(args.seeds) * (2 + 2 * len(args.budgets))
    found = len(list(work.glob("*/part.json")))
    print(
        f"{found} of {wanted} parts" + ("; run it again when the other process has finished" if found < wanted else "")
    )


Accuracies = dict[str, dict[int, dict[int, float]]]  # by method, labels per class, and seed


def accuracies(final: dict[str, Any]) -> Accuracies:
    """Test accuracies of all finished parts."""
    found: Accuracies = {method: {} for method in METHODS}
    for name, content in final.items():
        kind, seed, *labels = re.split(r",\w+=", name)
        if kind == "linear":
            for method in METHODS.keys() & content.keys():
                for budget, scores in content[method].items():
                    found[method].setdefault(int(budget), {})[int(seed)] = scores["top1"]
        elif kind in METHODS:
            found[kind].setdefault(int(labels[0]), {})[int(seed)] = content["top1"]
    return found


def section(data: str, result: dict[str, Any]) -> str:
    final, lines = result["final"], []
    scores = accuracies(final)
    budgets = sorted({budget for of_method in scores.values() for budget in of_method})
    runs = [content for name, content in final.items() if name.startswith("pretrain")]
    tuned = [part for part in final.values() if "steps" in part]
    steps = " or ".join(f"{n:,}" for n in sorted({part["steps"] for part in tuned}))
    rates = " or ".join(sorted({rate for part in tuned for rate in part["validation_top1"]}))
    if not runs:
        sys.exit(f"final: expected a pretrain part of {data}, which has the settings, got only {', '.join(final)}")
    made = runs[0]["made_with"]
    lines += [
        f"Top-1 on the test images in %, mean ± standard deviation over {len(runs)} seeds. Pre-training: "
        f"`{' '.join(['moco-ext pretrain --data', data, runs[0]['settings']]).strip()}`, {runs[0]['epochs']} epochs; "
        f"fine-tuning and training from scratch: {steps} steps, learning rate {rates}. {made['device']}, torch "
        f"{made['torch']}, commit {made['commit']}.",
        "",
        f"| labels per class | {' | '.join(map(str, budgets))} |",
        "|---|" + "--:|" * len(budgets),
    ]
    for method, label in METHODS.items():
        cells = []
        for budget in budgets:
            values = [*scores[method].get(budget, {}).values()]
            cells.append(spread(values) + (f" (n = {len(values)})" if 0 < len(values) < len(runs) else ""))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    gains = [
        f"| points of a linear classifier on MoCo over | {' | '.join(map(str, budgets))} |",
        "|---|" + "--:|" * len(budgets),
    ]
    for method in ("pixels", "pca", "untrained", "scratch"):
        cells = [each_gain(scores, method, budget) for budget in budgets]
        gains.append(f"| {METHODS[method].removeprefix('linear, ')} | {' | '.join(cells)} |")
    lines += ["", "Seed by seed:", "", *gains]
    lines += ["", f"![Accuracy on {data} by labels per class]({PLOT.format(data=data)})"]
    return "\n".join(lines)


def search_table(trials: list[dict[str, Any]]) -> str:
    trials = sorted(trials, key=lambda trial: -trial["linear_top1"]["trained"])
    lines = [
        "Settings tried, on the validation images (one seed; linear: mean ± standard deviation of "
        f"{trials[0]['subsets']} subsets of {trials[0]['labels_per_class']} labels per class):",
        "",
        "| settings | epochs | linear, % | kNN, % |",
        "|---|--:|--:|--:|",
    ]
    rows = [("trained", f"`{trial['settings']}`" if trial["settings"] else "preset", trial) for trial in trials]
    for kind, words, trial in [*rows, ("pixels", "pixels, no encoder", trials[0])]:
        linear = f"{trial['linear_top1'][kind]:.1f} ± {trial['linear_std'][kind]:.1f}"
        epochs = trial["epochs"] if kind == "trained" else ""
        lines.append(f"| {words} | {epochs} | {linear} | {trial['knn_top1'][kind]:.1f} |")
    return "\n".join(lines)


def each_gain(scores: Accuracies, method: str, budget: int) -> str:
    """Linear on MoCo minus a method with the same labels, for each seed."""
    ours, theirs = (scores[name].get(budget, {}) for name in ("moco", method))
    return ", ".join(f"{ours[seed] - theirs[seed]:+.1f}" for seed in sorted(ours.keys() & theirs.keys()))


def sections(results: dict[str, Any]) -> str:
    """What the page says, by data set."""
    parts = []
    for data, result in results.items():
        parts.append(f"### {data}")
        if result.get("final"):
            parts.append(section(data, result))
        if result.get("search"):
            parts.append(search_table([*result["search"].values()]))
    return "\n\n".join(parts)


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}" if values else ""


def draw(final: dict[str, Any], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "labels", "axes.spines.top": False, "font.size": 9}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        plot = figure.subplots()
        for method, by_budget in accuracies(final).items():
            budgets = sorted(by_budget)
            values = [[*by_budget[budget].values()] for budget in budgets]
            means = [statistics.fmean(each) for each in values]
            errors = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
            plot.errorbar(
                budgets, means, errors, label=METHODS[method], color=COLORS[method], marker="o", ms=3, capsize=2
            )
        plot.set(xscale="log", xlabel="labels per class", ylabel="top-1 on the test images (%)")
        plot.set_xticks(budgets, map(str, budgets), minor=False)
        plot.minorticks_off()
        plot.spines["right"].set_visible(False)
        plot.legend(frameon=False)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def write_page(args: argparse.Namespace) -> None:
    text = args.page.read_text()
    results = read_json(args.out)
    pattern = r"(<!-- labels:start -->\n).*?(<!-- labels:end -->)"
    filled, found = re.subn(pattern, lambda m: f"{m[1]}{sections(results)}\n{m[2]}", text, flags=re.DOTALL)
    if not found:
        sys.exit(f"--page: expected <!-- labels:start --> and <!-- labels:end --> in {args.page}, got neither")
    args.page.write_text(filled)
    for data, result in results.items():
        if result.get("final"):
            draw(result["final"], args.page.parent / PLOT.format(data=data))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, default=RESULT)
    shared = argparse.ArgumentParser(add_help=False, parents=[common])
    shared.add_argument("--data", default="fashion-mnist")
    shared.add_argument("--work", type=Path, default=ROOT / "runs" / "label-efficiency", help="finished parts")
    shared.add_argument("--threads", type=int, default=1)
    shared.add_argument("--workers", type=int, default=0, help="data loading processes")
    shared.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    one = commands.add_parser("search", parents=[shared])
    one.add_argument("settings", nargs="+", help="flags of moco-ext pretrain, one word for each setting")
    one.add_argument("--epochs", type=int, default=6)
    one.add_argument("--seed", type=int, default=0)
    two = commands.add_parser("final", parents=[shared])
    two.add_argument("--settings", default="", help="flags of moco-ext pretrain, in one word")
    two.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    two.add_argument("--budgets", nargs="+", type=int, default=BUDGETS, help="labels per class")
    two.add_argument("--epochs", type=int, default=10, help=f"of {VIEWS:,} views, of fine-tuning and from scratch")
    two.add_argument("--rates", nargs="+", type=float, default=RATES, help="learning rates of both, one is chosen")
    two.add_argument("--runs", help="pre-training runs (default: WORK/DATA/moco,seed={seed})")
    two.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="do only these")
    three = commands.add_parser("table", parents=[common])
    three.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    if args.command == "table":
        write_page(args)
        return 0
    torch.set_num_threads(args.threads)
    if args.command == "final" and args.runs is None:
        args.runs = f"{args.work}/{args.data}/moco,seed={{seed}}"
    {"search": run_search, "final": run_final}[args.command](args, load(args.data))
    return 0


if __name__ == "__main__":
    sys.exit(main())

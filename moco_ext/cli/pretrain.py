"""``moco-ext pretrain``: the flags of main_moco.py, and what is new beside them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .flags import DATA_HELP, add_launch_flags, add_machine_flags, workers

if TYPE_CHECKING:
    from ..train.config import PretrainConfig
    from .launch import Process

# Flags of where and how, not of what is learnt; all others are settings of PretrainConfig.
_RUN = (
    "command run dir data data_root output resume start_epoch recipe dry_run print_freq save_every keep "
    "workers device threads gpu multiprocessing_distributed world_size rank dist_url dist_backend"
)
RUN_FLAGS = frozenset(_RUN.split())


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "pretrain",
        help="train an encoder by momentum contrast, evaluate it, write a report",
        description="Train an encoder by momentum contrast. Flags keep the names, meanings and defaults of "
        "main_moco.py; the small data sets have presets of their own for whatever is left out.",
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    flag = argparse.BooleanOptionalAction
    add("dir", nargs="?", metavar="DIR", help="image folder; the same as --data DIR")
    add("--data", metavar="NAME|DIR", help=DATA_HELP + " (default: digits)")
    add("--data-root", metavar="DIR", help="where downloaded data sets are kept (default: data)")
    add("--output", metavar="DIR", help="run directory: checkpoint, metrics, report (default: runs/DATA)")
    add("--recipe", metavar="NAME", help="moco-v1, moco-v2, moco-v1-1b: published settings for all that is left out")
    add("--dry-run", action="store_true", help="print the resolved configuration and the memory it takes, and stop")
    add("-a", "--arch", metavar="ARCH", help="torchvision name, resnet18-small and kin, timm:NAME (default: resnet50)")
    add("--seed", type=int, metavar="N", help="of weights, order and augmentations (default: 0)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, metavar="N", help="(default: 200)")
    add("--steps", type=int, metavar="N", help="train for so many optimizer steps instead")
    add("--start-epoch", type=int, metavar="N", help="number of the first, without --resume (default: 0)")
    add("-b", "--batch-size", type=int, metavar="N", help="images of a node in one pass, all GPUs (default: 256)")
    add("--accumulate", type=int, metavar="A", help="batches whose gradients make one step (default: 1)")
    add("--lr", "--learning-rate", type=float, dest="lr", metavar="LR", help="(default: 0.03)")
    add("--schedule", type=int, nargs="*", metavar="E", help="epochs at which lr falls tenfold (default: 120 160)")
    add("--cos", action=flag, help="let lr follow half a cosine instead")
    add("--lr-every", type=int, metavar="N", help="let lr fall by --lr-gamma every N steps instead")
    add("--lr-gamma", type=float, metavar="G", help="(default: 0.9)")
    add("--momentum", type=float, metavar="M", help="of SGD (default: 0.9)")
    add("--wd", "--weight-decay", type=float, dest="weight_decay", metavar="W", help="(default: 1e-4)")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="autocast; fp16 scales the loss (default: fp32)")
    add("--channels-last", action=flag, help="memory layout (default: on the CPU, and with 16 bits)")
    add("--compile", action=flag, help="torch.compile the encoders")

    add = parser.add_argument_group("momentum contrast").add_argument
    add("--moco-dim", type=int, metavar="C", help="feature dimension (default: 128)")
    add("--moco-k", type=int, metavar="K", help="queue size, number of negatives (default: 65536)")
    add("--moco-m", type=float, metavar="M", help="momentum of the key encoder; 0: a plain copy (default: 0.999)")
    add("--moco-t", type=float, metavar="T", help="softmax temperature (default: 0.07)")
    add("--momentum-schedule", choices=("constant", "cosine"), help="cosine: m rises to 1 (default: constant)")
    add("--mlp", action=flag, help="MoCo v2's projection head")
    add("--symmetric", action=flag, help="each view is a query and a key, the loss their mean")
    add("--queue-dtype", choices=("fp32", "bf16", "fp16"), help="of the stored keys (default: fp32)")
    add("--empty-queue", action=flag, help="begin without keys instead of with random ones")
    add("--in-batch", action=flag, help="the batch's other keys (of all ranks) are negatives too")
    add("--label-smoothing", type=float, metavar="E", help="share of the target spread over all keys (default: 0)")
    add(
        "--same-image",
        choices=("negative", "mask", "positive"),
        help="other views of the query's image in the queue (default: negative, as published)",
    )
    add("--shuffle-bn", metavar="MODE", help="auto, gather, all_to_all, loader or none (default: auto)")
    add("--split-bn", type=int, metavar="G", help="groups of a batch with BatchNorm statistics of their own")
    add("--dictionary", metavar="KIND", help="queue, end-to-end or memory-bank (default: queue)")
    add(
        "--key-encoder",
        metavar="KIND",
        help="queue: momentum, partial (backbone shared) or identical; end-to-end: identical, partial, different, ARCH",
    )

    add = parser.add_argument_group("views").add_argument
    add("--aug-plus", action=flag, help="MoCo v2's augmentations")
    add("--crop-min", type=float, metavar="A", help="least share of the image's area in a view (default: 0.2)")
    add("--views", choices=("image", "patches"), help="whole images, or sets of patches (default: image)")
    add("--patches", type=int, metavar="P", help="patches of a set, a square number (default: 9)")
    add("--augment-on", choices=("loader", "device"), help="where colours and blur are done (default: loader)")
    add("--drop-last", action=flag, help="leave out an epoch's last partial batch")

    add = parser.add_argument_group("what is seen and kept").add_argument
    add("-p", "--print-freq", type=int, metavar="N", help="steps between the figures shown (default: 10)")
    add("--online-knn", type=int, metavar="N", help="epochs (with --steps, steps) between kNN scores (default: 10)")
    add("--knn-k", type=int, metavar="N", help="neighbours (default: 200)")
    add("--log-every", type=int, metavar="N", help="with --steps: steps between records (default: 1000)")
    add("--save-every", type=int, metavar="N", help="steps between checkpoints, beside those of each record")
    add("--keep", type=int, metavar="N", help="checkpoints that stay (default: 2)")
    add("--resume", metavar="FILE|auto", help="checkpoint to go on from; auto: the run directory's newest, if any")
    add_machine_flags(parser)
    add_launch_flags(parser)


def run(args: argparse.Namespace) -> int:
    from . import launch

    given = vars(args)
    if "dir" in given and given.get("data", given["dir"]) != given["dir"]:
        raise ValueError(f"data: expected DIR or --data, got both: {given['dir']} and {given['data']}")
    if given.get("dry_run"):
        from ..train.memory import print_plan

        return print_plan(given_config(given), given.get("data_root", "data"), launch.local_device(given))
    return launch.run(_work, args)


def given_config(given: dict[str, Any]) -> PretrainConfig:
    """The configuration that parsed flags ask for; absent is default."""
    from ..train.config import resolve_config

    explicit = {name: value for name, value in given.items() if name not in RUN_FLAGS}
    if "schedule" in explicit:
        explicit["schedule"] = tuple(explicit["schedule"])
    return resolve_config(given.get("dir", given.get("data", "digits")), explicit, given.get("recipe"))


def _work(args: argparse.Namespace, process: Process) -> int:
    """In each process of the run."""
    from rich.console import Console

    from .. import distributed
    from ..data import load
    from ..experiments.pretrain import pretrain_and_evaluate
    from ..runs.options import RunOptions

    given = vars(args)
    config = given_config(given)
    console = Console(quiet=distributed.rank() > 0)
    data = load(config.data, given.get("data_root", "data"))
    if process.device.type == "cpu" and "device" not in given:
        console.print("no GPU that torch can use: training on the CPU", highlight=False)
    length = f"{config.steps:,} steps" if config.steps else f"{config.epochs} epochs"
    world = distributed.world_size()
    console.print(
        f"{data.name}: {len(data.train):,} images, {config.arch}, K = {config.moco_k:,}, m = {config.moco_m:g}, "
        f"T = {config.moco_t:g}, {length} of batch {config.batch_size} on {process.device}"
        + (f", {world} processes" if world > 1 else ""),
        highlight=False,
    )
    options = RunOptions(
        Path(given.get("output", Path("runs") / Path(config.data).name)),
        process.device,
        given.get("resume"),
        given.get("start_epoch", 0),
        -(-workers(given) // process.local_world),
        process.local_world,
        print_freq=max(1, given.get("print_freq", 10)),
        save_every=given.get("save_every", 0),
        keep=max(1, given.get("keep", 2)),
        console=console,
    )
    pretrain_and_evaluate(config, data, options)
    return 0

"""Compares detectors or segmenters from a MoCo encoder and from random weights, after the same number of iterations.

    moco-ext pretrain --data fashion-mnist --output runs/fashion-mnist
    python bench/compare_transfer.py detect runs/fashion-mnist --seeds 0 1 2
    python bench/compare_transfer.py segment runs/fashion-mnist --seeds 0 1 2
    python bench/readme.py                                            # the tables in docs/detection.md

The images are those of bench/garments.py. Other flags are passed to ``moco-ext detect`` or ``segment``. Runs already in
the file are kept, and an interrupted run is resumed.
"""

import argparse
import shlex
import sys
from pathlib import Path

import garments
import torch

from moco_ext import cli
from moco_ext.evaluate import encoder
from moco_ext.runs.environment import environment
from moco_ext.runs.files import read_json, write_json
from moco_ext.runs.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
# Detectors see their images of 96 pixels at twice the size: a ResNet's layer3 has a stride of 16.
DETECT = (
    "--iterations 400 --eval-every 200 -b 4 --lr 0.01 --warmup 50 --min-size 192 --anchors 32 48 64 88 112 --rois 32 "
    "--proposals 50 --roi-size 7 --bn-batches 20 --logger none"
)
SEGMENT = (
    "--iterations 800 --eval-every 200 -b 4 --lr 0.01 --warmup 50 --crop 192 --scales 0.75 1.33 --bn-batches 20 "
    "--logger none"
)
# Layout and side of the images, flags, result.
TASKS = {"detect": ("voc", 96, DETECT, "detection"), "segment": ("folders", 192, SEGMENT, "segmentation")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("pretrained", help="for moco-ext TASK --pretrained")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=600, help="training images")
    parser.add_argument("--test", type=int, default=200, help="test images")
    parser.add_argument("--work", type=Path, default=ROOT / "build/transfer", help="folder of the data and the runs")
    parser.add_argument(
        "--out", type=Path, help="the result (default: bench/results/detection.json, segmentation.json)"
    )
    arguments, flags = parser.parse_known_args()
    task = arguments.task
    layout, side, task_flags, result = TASKS[task]
    out = arguments.out or ROOT / f"bench/results/{result}.json"
    flags = [*shlex.split(task_flags), *flags]
    work = arguments.work / task
    data = work / f"garments-{arguments.train}-{arguments.test}"
    if not data.is_dir():
        garments.write(data, layout, {"train": arguments.train, "val": arguments.test}, side=side)
    arch = encoder.load_encoder(arguments.pretrained)[0].arch
    starts = {"MoCo": ["--pretrained", arguments.pretrained], "random": ["--scratch", "-a", arch]}
    runs = read_json(out).get("runs", [])
    for seed in arguments.seeds:
        for start, chosen in starts.items():
            setting = {"start": start, "seed": seed, "arch": arch, "data": data.name, "flags": shlex.join(flags)}
            if any(setting.items() <= run.items() for run in runs):
                continue
            output = work / f"{data.name}-{start}-{seed}"
            output_flags = ["--seed", str(seed), "--output", str(output), "--resume", "auto"]
            if cli.main([task, str(data), *chosen, *flags, *output_flags]):
                return 1
            records = read_metrics(output / (task if start == "MoCo" else f"{task}-scratch") / "metrics.jsonl")
            made = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            made = {name: made[name] for name in ("device", "threads", "torch", "commit", "changed")}
            runs.append(setting | {"records": records} | made)
            write_json(out, {"runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compares detectors from a MoCo encoder and from random weights, after the same number of iterations.

    moco-ext pretrain --data fashion-mnist --output runs/fashion-mnist
    python bench/compare_detection.py runs/fashion-mnist --seeds 0 1 2
    python bench/readme.py                                            # the table in docs/detection.md

The data set is that of bench/detection_set.py. Other flags are passed to ``moco-ext detect``. Runs already in the
file are kept, and an interrupted run is resumed.
"""

import argparse
import shlex
import sys
from pathlib import Path

import detection_set
import torch

from moco_ext import cli
from moco_ext.evaluate import encoder
from moco_ext.runs.environment import environment
from moco_ext.runs.files import read_json, write_json
from moco_ext.runs.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
# For images of 96 pixels, shown at twice their size: a ResNet's layer3 has a stride of 16.
FLAGS = (
    "--iterations 400 --eval-every 200 -b 4 --lr 0.01 --warmup 50 --min-size 192 --anchors 32 48 64 88 112 --rois 32 "
    "--proposals 50 --roi-size 7 --bn-batches 20 --logger none"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pretrained", help="for moco-ext detect --pretrained")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=600, help="training images")
    parser.add_argument("--test", type=int, default=200, help="test images")
    parser.add_argument("--work", type=Path, default=ROOT / "build/detection", help="folder of the data and the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/detection.json")
    arguments, flags = parser.parse_known_args()
    flags = [*shlex.split(FLAGS), *flags]
    data = arguments.work / f"garments-{arguments.train}-{arguments.test}"
    if not data.is_dir():
        images = {"train": arguments.train, "val": arguments.test}
        detection_set.write(data, "voc", images)
    arch = encoder.load_encoder(arguments.pretrained)[0].arch
    starts = {"MoCo": ["--pretrained", arguments.pretrained], "random": ["--scratch", "-a", arch]}
    runs = read_json(arguments.out).get("runs", [])
    for seed in arguments.seeds:
        for start, chosen in starts.items():
            setting = {"start": start, "seed": seed, "arch": arch, "data": data.name, "flags": shlex.join(flags)}
            if any(setting.items() <= run.items() for run in runs):
                continue
            output = arguments.work / f"{data.name}-{start}-{seed}"
            output_flags = ["--seed", str(seed), "--output", str(output), "--resume", "auto"]
            if cli.main(["detect", str(data), *chosen, *flags, *output_flags]):
                return 1
            records = read_metrics(output / ("detect" if start == "MoCo" else "detect-scratch") / "metrics.jsonl")
            made = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            made = {name: made[name] for name in ("device", "threads", "torch", "commit", "changed")}
            runs.append(setting | {"records": records} | made)
            write_json(arguments.out, {"runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())

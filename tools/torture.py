"""Kills runs with SIGKILL at random moments, resumes them, and compares them with uninterrupted runs.

    python tools/torture.py --kills 100 --out bench/results/torture.json

The runs alternate between all kinds of data and checkpoint formats, with and without data loading processes. The time
of a kill is uniformly distributed over the duration of an uninterrupted run, from its first step to its end, including
saving. All tensors in the last checkpoint of a run must be bit-identical to those of the uninterrupted run.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from moco_ext.checkpoints.training import load_newest
from moco_ext.runs.environment import environment
from moco_ext.runs.files import read_json, write_json

FLAGS = (
    "-a resnet8-small --epochs 4 -b 16 --moco-k 64 --image-size 16 --online-knn 0 --save-every 2 "
    "--threads 1 --logger none"
)
DATA = ("digits", "folder", "list", "tar", "parquet")
FORMATS = ("file", "dcp")
WORKERS = (0, 2)


def make_data(folder: Path) -> dict[str, list[str]]:
    """The flags for each kind of data: 96 images, the same in all but digits."""
    from moco_ext.data import load

    digits = load("digits").train
    for position in range(96):
        path = folder / "images" / str(int(digits.labels[position])) / f"{position}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(digits.images[position], path)
    paths = sorted((folder / "images").rglob("*.png"))
    (folder / "list.txt").write_text("".join(f"{path}\n" for path in paths))
    command("shard", str(folder / "images"), str(folder / "tar"), "--images-per-shard", "20")
    write_parquet(paths, folder / "parquet")
    return {
        "digits": ["--data", "digits", "--epochs", "1"],
        "folder": ["--data", str(folder / "images")],
        "list": ["--data", str(folder / "list.txt")],
        "tar": ["--data", str(folder / "tar")],
        "parquet": ["--data", str(folder / "parquet")],
    }


def write_image(image: torch.Tensor, path: Path) -> None:
    from torchvision.io import write_png

    write_png(image.to(torch.uint8), str(path))


def write_parquet(paths: list[Path], folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    for number, part in enumerate((paths[:50], paths[50:])):
        table = pyarrow.table({"image": [path.read_bytes() for path in part]})
        pyarrow.parquet.write_table(table, folder / f"{number}.parquet", row_group_size=16)


def command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "moco_ext", *arguments], check=True, stdout=subprocess.DEVNULL)


def start(output: Path, flags: list[str]) -> subprocess.Popen:
    arguments = [sys.executable, "-m", "moco_ext", "pretrain", *flags, "--output", str(output), "--resume", "auto"]
    log = (output.parent / f"{output.name}.log").open("ab")
    return subprocess.Popen(arguments, stdout=log, stderr=log, start_new_session=True)


def wait_for_first_step(run: subprocess.Popen, output: Path) -> None:
    """Until the run has printed a step, or ended."""
    log = output.parent / f"{output.name}.log"
    size = log.stat().st_size
    while run.poll() is None and b"step " not in log.read_bytes()[size:]:
        time.sleep(0.02)


def kill(run: subprocess.Popen) -> None:
    os.killpg(run.pid, signal.SIGKILL)  # with its data loading processes
    run.wait()


def tensors(value: object, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {key: x for part, item in items for key, x in tensors(item, f"{name}.{part}").items()}


def state(output: Path) -> dict[str, torch.Tensor]:
    found = load_newest(output)
    if found is None:
        sys.exit(f"{output}: expected a checkpoint, got none")
    return tensors(found[0])


def differing(output: Path, want: dict[str, torch.Tensor]) -> list[str]:
    got = state(output)
    return [name for name in want.keys() | got.keys() if name not in got or name not in want
            or not torch.equal(want[name], got[name])]  # fmt: skip


def campaign(flags: list[str], folder: Path, kills: int) -> dict[str, int]:
    """Kill a run that many times, starting over when it comes to its end."""
    through = folder / "through"
    run = start(through, flags)
    wait_for_first_step(run, through)
    began = time.monotonic()
    if run.wait():
        sys.exit((folder / "through.log").read_text())
    lasts, want = time.monotonic() - began, state(through)
    counts = {"kills": 0, "resumed": 0, "runs": 0, "different": 0, "failed": 0}
    number = 0
    while counts["kills"] < kills or counts["runs"] == 0:
        output = folder / f"run-{number}"
        number += 1
        alive = True
        while alive:
            counts["resumed"] += (output / "checkpoint.pth").exists() or bool([*output.glob("checkpoint*")])
            run = start(output, flags)
            wait_for_first_step(run, output)
            if counts["kills"] < kills:
                try:
                    run.wait(random.uniform(0, lasts))
                except subprocess.TimeoutExpired:
                    kill(run)
                    counts["kills"] += 1
                    continue
            alive = False
        status = run.wait()
        counts["runs"] += 1
        if status:
            counts["failed"] += 1
            print((folder / f"{output.name}.log").read_text()[-3000:], file=sys.stderr)
        elif found := differing(output, want):
            counts["different"] += 1
            print(f"{output}: {found[:5]}", file=sys.stderr)
        shutil.rmtree(output)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the machine has its say, too")
    parser.add_argument("--only", default="", help="data, format and workers, such as tar,dcp")
    parser.add_argument("--out", type=Path, help="JSON; results of other settings in it are kept")
    args = parser.parse_args()
    random.seed(args.seed)
    only = {word for word in args.only.split(",") if word}
    settings = [
        (data, form, workers)
        for data, form, workers in itertools.product(DATA, FORMATS, WORKERS)
        if only <= {data, form, f"{workers}"}
    ]
    results = read_json(args.out).get("settings", {}) if args.out else {}
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder))
        for number, (kind, form, workers) in enumerate(settings):
            kills = args.kills * (number + 1) // len(settings) - args.kills * number // len(settings)
            work = Path(folder) / f"{kind}-{form}-{workers}"
            work.mkdir()
            flags = [*FLAGS.split(), *data[kind], "--workers", str(workers), "--checkpoint-format", form]
            counts = campaign(flags, work, kills)
            shutil.rmtree(work)
            results[f"{kind}, {form}, {workers} workers"] = counts
            failed += counts["different"] + counts["failed"]
            print(f"{kind}, {form}, {workers} workers: {json.dumps(counts)}", flush=True)
    total = {name: sum(counts[name] for counts in results.values()) for name in next(iter(results.values()))}
    print(f"all: {json.dumps(total)}")
    if args.out:
        made = environment(torch.device("cpu"))
        write_json(args.out, {"settings": results, "total": total, "made_with": made})
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

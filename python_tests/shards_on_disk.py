"""Shared by the tests of shards: pictures, folders and tar files on disk."""

import io
import random
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("tensorboard")

from PIL import Image
from training import assert_equal_states, environment, state_of

from moco_ext.data import Augmentation, TrainLoader

ODD_NAME = "émile/" + "x" * 150  # longer than the field of a tar header


def encoded(number: int, kind: str = "PNG") -> bytes:
    """A picture of noise, different for each number, 20 + number pixels wide."""
    pixels = np.random.default_rng(number).integers(0, 256, (24, 20 + number, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path, members: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def contents(split) -> list[bytes]:
    found = []
    for position in range(len(split)):
        with split.open(position) as file:
            found.append(file.read())
    return found


def names(split, root) -> list[str]:
    return [split.name(position).removeprefix(f"{root}/") for position in range(len(split))]


def views_of(data, workers=0, **options) -> list:
    loader = TrainLoader(data, Augmentation.v2(16), 5, workers=workers, seed=3, **options)
    return [batch for epoch in range(2) for batch in loader.epoch(epoch)]


def assert_same_batches(one, other):
    assert len(one) == len(other) > 4
    for mine, theirs in zip(one, other, strict=True):
        assert all(torch.equal(mine[part], theirs[part]) for part in range(4))  # im_q, im_k, index, key_order


def write_folder(root: Path) -> Path:
    """30 images of two classes, 6 of them to test on; names with dots."""
    for number in range(30):
        path = root / ("train" if number < 24 else "val") / "ab"[number % 2] / f"{number:02}.v1.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number))
    return root


PROGRAM = """
import sys
from pathlib import Path
from moco_ext import data as mdata
from training import run_in, tiny
from moco_ext.train import pretrain
data = mdata.load(sys.argv[1], image_size=16)
config = tiny(epochs=12, batch_size=6, accumulate=2, aug_plus=True, moco_k=20, shard_window=int(sys.argv[4]))
pretrain(config, data, run_in(Path(sys.argv[2]), workers=int(sys.argv[3]), save_every=1, keep=3, resume="auto"))
"""


def assert_killed_runs_resume(source: Path, tmp_path: Path, window: int = 0) -> None:
    """SIGKILL at a moment that nobody chose, twice; the resumed run has another number of workers each time."""

    def start(name, workers):
        command = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / name), str(workers), str(window)]
        return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)

    for workers in (2, 1):
        process = start("killed", workers)
        while not (tmp_path / "killed" / "checkpoint.pth").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.7))
        process.kill()
        process.communicate()
    for name, workers in (("killed", 0), ("through", 2)):
        process = start(name, workers)
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
    assert_equal_states(state_of(tmp_path / "through"), state_of(tmp_path / "killed"))

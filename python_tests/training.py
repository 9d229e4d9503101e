"""Shared by the trainer's tests: a few digits, a tiny configuration, and runs of several processes."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console

from moco_ext import data as mdata
from moco_ext.data import TensorSplit
from moco_ext.runs.options import RunOptions
from moco_ext.train import PretrainConfig


def few_digits(images: int = 150) -> mdata.ImageData:
    """150 images: four full batches of 32 and one of 22; 60 to evaluate on."""
    data = mdata.load("digits")
    parts = ((data.train, images), (data.test, 60))
    train, test = (TensorSplit(split.images[:n], split.labels[:n]) for split, n in parts)
    return dataclasses.replace(data, train=train, test=test)


def tiny(**changes) -> PretrainConfig:
    """K = 100 is no multiple of the batch of 32."""
    base = {"arch": "resnet8-small", "epochs": 2, "batch_size": 32, "moco_dim": 16, "moco_k": 100, "online_knn": 0}
    return PretrainConfig("digits", **(base | changes))


def run_in(folder: Path, **changes) -> RunOptions:
    folder.mkdir(exist_ok=True, parents=True)
    return RunOptions(folder, console=Console(quiet=True), **changes)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pth", weights_only=True)["state_dict"]


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal_states(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def environment() -> dict[str, str]:
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent)])
    return os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def torchrun(processes: int, *arguments: object) -> subprocess.CompletedProcess:
    """``torchrun --nproc-per-node PROCESSES ARGUMENTS``, on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment()
    )

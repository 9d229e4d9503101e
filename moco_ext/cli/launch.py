"""Processes: the one there is, torchrun's, or one a GPU started from here; on GPUs (NCCL) or the CPU (gloo)."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .errors import guarded


class Process(NamedTuple):
    """Where a process stands.

    Attributes:
        device: what it computes on.
        local_world: processes on this node. A batch size given for a node is divided by it.
    """

    device: torch.device
    local_world: int = 1


Work = Callable[[argparse.Namespace, Process], int]


class _Group(NamedTuple):
    """A process's place in the group, and where the group meets."""

    url: str
    rank: int
    world: int
    local_rank: int
    local_world: int


def run(work: Work, args: argparse.Namespace) -> int:
    """Call ``work(args, process)`` in every process of the run; the exit status.

    Under torchrun (``RANK`` and ``WORLD_SIZE`` set) this process is one of them. With ``--multiprocessing-distributed``
    one process per GPU of this node is started, ``--world-size`` nodes in all. With ``--world-size`` alone this process
    is one of that many, started by hand. Otherwise there is no process group at all.

    Args:
        work: a function of a module (it travels to new processes by name).
        args: the flags of :func:`moco_ext.cli.flags.add_launch_flags` and ``add_machine_flags``; absent is default.

    Raises:
        ValueError: flags that contradict each other or the machine.
    """
    given = vars(args)
    nodes = given.get("world_size", -1)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        env = {name: int(os.environ[name.upper()]) for name in ("rank", "world_size")}
        local = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return _in_group(work, args, _Group("env://", env["rank"], env["world_size"], *local))
    if given.get("multiprocessing_distributed"):
        nodes, node = max(nodes, 1), max(given.get("rank", 0), 0)
        url = given.get("dist_url") or (f"tcp://127.0.0.1:{_free_port()}" if nodes == 1 else None)
        if url is None:
            raise ValueError(f"dist_url: expected where the {nodes} nodes meet, tcp://HOST:PORT, got none")
        per_node = torch.cuda.device_count() if _wants_cuda(given) else 1
        group = _Group(url, node * per_node, nodes * per_node, 0, per_node)
        try:
            mp.spawn(_spawned, (work, args, group), nprocs=per_node)
        except mp.ProcessExitedException as error:  # the process has said why, unless it was killed
            if error.exit_code is None or error.exit_code < 0:
                print(f"moco-ext: error: {error}", file=sys.stderr)
            return 1
        return 0
    if nodes > 1:
        if not {"rank", "dist_url"} <= given.keys():
            raise ValueError(f"rank, dist_url: expected both with --world-size {nodes}, got {_which(given)}")
        return _in_group(work, args, _Group(given["dist_url"], given["rank"], nodes, given.get("gpu", 0), 1))
    return work(args, Process(local_device(given)))


def local_device(given: dict[str, Any], local_rank: int | None = None) -> torch.device:
    """The device of this process, by ``--device`` or ``--gpu``, else its own GPU, else the CPU; sets CPU threads."""
    if "threads" in given:
        torch.set_num_threads(given["threads"])
    name = given.get("device") or (f"cuda:{given['gpu']}" if "gpu" in given else None)
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {str(error).splitlines()[0]}") from None
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"device: expected one that torch can use, got {device} and no CUDA GPU")
    if local_rank is not None and device.index is None:
        device = torch.device("cuda", local_rank)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device: expected one of {torch.cuda.device_count()} GPUs, got {device}")
    return device


def _spawned(local_rank: int, work: Work, args: argparse.Namespace, group: _Group) -> None:
    group = group._replace(rank=group.rank + local_rank, local_rank=local_rank)
    sys.exit(guarded(lambda: _in_group(work, args, group)))


def _in_group(work: Work, args: argparse.Namespace, group: _Group) -> int:
    given = vars(args)
    device = local_device(given, group.local_rank)
    backend = given.get("dist_backend") or ("nccl" if device.type == "cuda" else "gloo")
    if backend == "nccl" and device.type != "cuda":
        raise ValueError(f"dist_backend: nccl works between GPUs, got {device}; leave it out, or pass gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "threads" not in given and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // group.local_world))
    dist.init_process_group(backend, init_method=group.url, rank=group.rank, world_size=group.world)
    lost = False
    try:
        return work(args, Process(device, group.local_world))
    except RuntimeError as error:
        if any(sign in str(error) for sign in ("gloo", "NCCL", "Connection closed", "Connection reset")):
            lost = True
            raise ConnectionError(
                f"process group: rank {group.rank} has lost contact with another rank; the first one to end says why "
                f"({str(error).splitlines()[0][:200]})"
            ) from error
        raise
    finally:
        # A process that failed must not wait for the others: they learn of it by its end.
        if sys.exc_info()[0] is None:
            dist.barrier()
        if not lost:  # taking a broken group down may abort the process before it has said what happened
            dist.destroy_process_group()


def _wants_cuda(given: dict[str, Any]) -> bool:
    return torch.cuda.is_available() and not str(given.get("device", "cuda")).startswith("cpu")


def _which(given: dict[str, Any]) -> str:
    return " and ".join(f"--{name.replace('_', '-')}" for name in ("rank", "dist_url") if name in given) or "neither"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

"""Start the processes of a command: one, those of torchrun, or one per GPU; on GPUs (NCCL) or CPUs (gloo)."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ..distributed import rank
from ..runs.console import make_console
from ..runs.options import RunOptions
from ..runs.settings import NOT_NEGATIVE, POSITIVE, at_least, check_settings, one_of, setting
from .errors import guarded
from .flags import given

Work = Callable[[argparse.Namespace, RunOptions], int]

_GROUP = "several processes (not needed with torchrun)"
_LOST = ("gloo", "NCCL", "Connection closed", "Connection reset")  # in the errors of a collective
_URL = r"tcp://([^/:]+|\[.+\]):(?P<port>\d+)|file:///.+|env://.*"


@dataclasses.dataclass(frozen=True)
class LaunchOptions:
    """Devices and processes of a command; names and meanings as in main_moco.py.

    Raises:
        ValueError: an option outside its range, or options that contradict each other.
    """

    device: str | None = setting(None, metavar="DEVICE", shown="cuda if available", help="cpu, cuda, cuda:1, ...")
    threads: int | None = setting(None, valid=at_least(1), shown="chosen by torch", help="CPU threads")
    multiprocessing_distributed: bool = setting(
        False, negatable=False, help="start one process per GPU of this machine", group=_GROUP
    )
    world_size: int | None = setting(
        None,
        valid=at_least(1),
        help="number of nodes (without --multiprocessing-distributed: of processes)",
        group=_GROUP,
    )
    rank: int | None = setting(
        None,
        metavar="R",
        valid=NOT_NEGATIVE,
        help="rank of this node (without --multiprocessing-distributed: of this process)",
        group=_GROUP,
    )
    dist_url: str | None = setting(
        None,
        metavar="URL",
        shown="this machine",
        help="where processes find each other: tcp://HOST:PORT or env://",
        group=_GROUP,
    )
    dist_backend: str | None = setting(
        None,
        valid=one_of("nccl", "gloo"),
        shown="nccl on GPUs, else gloo",
        help="communication library",
        group=_GROUP,
    )
    dist_timeout: float = setting(
        10.0,
        metavar="MINUTES",
        valid=POSITIVE,
        help="how long a process waits for the others before it ends",
        group=_GROUP,
    )
    gpu: int | None = setting(None, metavar="I", valid=NOT_NEGATIVE, help="short for --device cuda:I", group=_GROUP)

    def __post_init__(self) -> None:
        check_settings(self)
        match = re.fullmatch(_URL, self.dist_url or "env://")
        if match is None or int(match["port"] or 0) > 65535:
            raise ValueError(f"dist_url: expected tcp://HOST:PORT, file:///PATH or env://, got {self.dist_url}")
        if self.rank is not None and self.rank >= (self.world_size or 1):
            raise ValueError(f"rank: expected less than --world-size {self.world_size or 1}, got {self.rank}")


class _Group(NamedTuple):
    """A process group, and this process's place in it."""

    url: str
    rank: int
    world: int
    local_rank: int
    local_world: int


def run(work: Work, args: argparse.Namespace, output: Path) -> int:
    """Call ``work(args, options)`` in every process of a command; the exit status.

    Under torchrun (``RANK`` and ``WORLD_SIZE`` are set) this process is one of them. With
    ``--multiprocessing-distributed`` one process per GPU of this node is started, on ``--world-size`` nodes. With
    ``--world-size`` alone this process is one of that many, started by hand. Otherwise there is no process group.

    Args:
        work: a module's function, or a ``functools.partial`` of one: it is pickled for new processes.
        args: holds the settings of :class:`LaunchOptions` and :class:`RunOptions` that were given.
        output: ``options.output``.

    Raises:
        ValueError: flags that contradict each other or the machine.
    """
    if output.exists() and not output.is_dir():  # before anything is computed
        raise NotADirectoryError(f"output: expected a directory, got the file {output}")
    launch = LaunchOptions(**given(args, LaunchOptions))
    nodes = launch.world_size or 1
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        env = {name: int(os.environ[name.upper()]) for name in ("rank", "world_size")}
        local = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return _in_group(work, args, output, _Group("env://", env["rank"], env["world_size"], *local))
    if launch.multiprocessing_distributed:
        url = launch.dist_url or (f"tcp://127.0.0.1:{_free_port()}" if nodes == 1 else None)
        if url is None:
            raise ValueError(f"dist_url: expected where the {nodes} nodes find each other, tcp://HOST:PORT, got none")
        per_node = local_processes(args)
        group = _Group(url, (launch.rank or 0) * per_node, nodes * per_node, 0, per_node)
        return _spawn(work, args, output, group)
    if nodes > 1:
        if launch.rank is None or launch.dist_url is None:
            got = "neither" if launch.rank is launch.dist_url else "--dist-url" if launch.rank is None else "--rank"
            raise ValueError(f"rank, dist_url: expected both with --world-size {nodes}, got {got}")
        return _in_group(work, args, output, _Group(launch.dist_url, launch.rank, nodes, launch.gpu or 0, 1))
    return work(args, options_of(args, output))


def local_processes(args: argparse.Namespace) -> int:
    """How many processes :func:`run` starts, or torchrun has started, on this node."""
    launch = LaunchOptions(**given(args, LaunchOptions))
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if launch.multiprocessing_distributed and torch.cuda.is_available():
        return 1 if (launch.device or "cuda").startswith("cpu") else torch.cuda.device_count()
    return 1


def options_of(
    args: argparse.Namespace, output: Path, local_rank: int | None = None, local_world: int = 1
) -> RunOptions:
    """The options of one process; sets its number of CPU threads."""
    launch = LaunchOptions(**given(args, LaunchOptions))
    if launch.threads is not None:
        torch.set_num_threads(launch.threads)
    cores = os.cpu_count() or 1
    workers, most = getattr(args, "workers", min(32, cores)), max(32, 4 * cores)
    if workers > most:
        raise ValueError(f"workers: expected at most {most} on {cores} CPU cores, got {workers}")
    return RunOptions(
        output,
        _device(launch, local_rank),
        local_world=local_world,
        console=make_console(quiet=rank() > 0, stderr=getattr(args, "json", False)),
        **given(args, RunOptions) | {"workers": -(-workers // local_world)},
    )


def _device(launch: LaunchOptions, local_rank: int | None) -> torch.device:
    """The device of this process, by flag, else its GPU, else the CPU. A GPU becomes the current one: pinned memory and
    NCCL would otherwise also take memory of the first GPU."""
    name = launch.device or (f"cuda:{launch.gpu}" if launch.gpu is not None else None)
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"device: expected one that torch can use, got {device} and no CUDA GPU")
    if local_rank is not None and device.index is None:
        device = torch.device("cuda", local_rank)
    if device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device: expected one of {torch.cuda.device_count()} GPUs, got {device}")
        torch.cuda.set_device(device)
    return device


def _spawn(work: Work, args: argparse.Namespace, output: Path, group: _Group) -> int:
    """Start this node's processes and wait for them; SIGTERM is forwarded, so that they save before they end."""
    context = mp.spawn(_spawned, (work, args, output, group), nprocs=group.local_world, join=False)

    def forward(number: int, frame: object) -> None:
        for pid in context.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException as error:  # the process has printed the reason, unless it was killed
        if error.exit_code is None or error.exit_code < 0:
            print(f"moco-ext: error: {error}", file=sys.stderr)
            return 1
        return error.exit_code
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _spawned(local_rank: int, work: Work, args: argparse.Namespace, output: Path, group: _Group) -> None:
    group = group._replace(rank=group.rank + local_rank, local_rank=local_rank)
    sys.exit(guarded(lambda: _in_group(work, args, output, group)))


def _in_group(work: Work, args: argparse.Namespace, output: Path, group: _Group) -> int:
    launch = LaunchOptions(**given(args, LaunchOptions))
    device = _device(launch, group.local_rank)
    backend = launch.dist_backend or ("nccl" if device.type == "cuda" else "gloo")
    if backend == "nccl" and device.type != "cuda":
        raise ValueError(f"dist_backend: expected gloo on {device}, got nccl, which needs GPUs")
    if device.type == "cpu" and launch.threads is None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // group.local_world))
    _join(backend, group, launch.dist_timeout)
    lost = False
    try:
        status = work(args, options_of(args, output, group.local_rank, group.local_world))
        _wait_for_all(group)
        return status
    except RuntimeError as error:
        if any(sign in str(error) for sign in _LOST):
            lost = True
            raise ConnectionError(f"process group: {_why_lost(group, error)}") from error
        raise
    finally:
        if not lost:  # destroying a broken group may abort the process before it has said what happened
            dist.destroy_process_group()


def _join(backend: str, group: _Group, minutes: float) -> None:
    if group.url.startswith("tcp://"):  # torch would try an unknown name again and again
        host, _, port = group.url.removeprefix("tcp://").rpartition(":")
        try:
            socket.getaddrinfo(host.strip("[]"), int(port))
        except OSError as error:
            raise ValueError(f"dist_url: expected an address that can be resolved, got {group.url}: {error}") from None
    try:
        dist.init_process_group(
            backend,
            init_method=group.url,
            rank=group.rank,
            world_size=group.world,
            timeout=datetime.timedelta(minutes=minutes),
        )
    except RuntimeError as error:
        raise ConnectionError(
            f"process group: rank {group.rank} could not join {group.world} processes at {group.url} within "
            f"{minutes:g} minutes: {str(error).splitlines()[0][:200]}"
        ) from None


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _wait_for_all(group: _Group) -> None:
    """Wait until every rank has finished. Not a collective: rank 0 may evaluate for longer than the timeout."""
    store = _store()
    with contextlib.suppress(dist.DistError):  # rank 0, which may hold the store, has ended
        store.set(f"finished/{group.rank}", "")
        store.wait([f"finished/{rank}" for rank in range(group.world)], datetime.timedelta(days=1))


def _why_lost(group: _Group, error: RuntimeError) -> str:
    """Which ranks did not take part in a collective that failed, as far as this one can tell."""
    reason = str(error).splitlines()[0][:200]
    if "imed out" not in reason:
        return f"rank {group.rank} has lost contact with another rank; the first one to end says why ({reason})"
    silent = list(range(group.world))
    silent.remove(group.rank)

    def ask() -> None:  # in a thread, as a store held by a stopped rank does not answer
        store = _store()
        store.set(f"timed out/{group.rank}", "")
        time.sleep(3)  # the others notice at about the same time
        silent[:] = [rank for rank in silent if not store.check([f"timed out/{rank}"])]

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(6)
    if asking.is_alive() and group.rank > 0:
        silent = [0]
    who = ", ".join(map(str, silent)) or "another one"
    return f"rank {group.rank} waited too long for rank {who}, which may be stopped; see --dist-timeout ({reason})"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

"""Traffic and time of shuffling BN between two processes, if all images are gathered or only exchanged."""

import os
import socket
import statistics
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moco_ext.shuffle_bn import shared_permutation, start_shuffle

WORLD, ROUNDS, MODES = 2, 12, ("gather", "all_to_all")


def process(rank: int, port: int, device: str, shape: tuple[int, ...], results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    images = torch.randn(shape, device=device)
    samples: dict[str, list[float]] = {mode: [] for mode in MODES}
    for i in range(ROUNDS + 2):
        order = shared_permutation(WORLD * len(images), i)
        for mode in MODES if i % 2 else MODES[::-1]:
            dist.barrier()
            start = time.perf_counter()
            start_shuffle(images, order, mode)()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= 2:
                samples[mode].append((time.perf_counter() - start) * 1e3)
    own = len(images) * rank
    mine = order[own : own + len(images)]
    moved = int(((mine < own) | (mine >= own + len(images))).sum())
    if rank == 0:
        one = images[0].numel() * images.element_size()
        results.put({"ms": samples, "sent": {"gather": (WORLD - 1) * images.nbytes, "all_to_all": moved * one}})
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(64, 3, 224, 224), (128, 3, 32, 32)], ids=["64-images-of-224", "128-images-of-32"])
def bench_shuffle(benchmark, device, shape):
    if device.type == "cuda" and torch.cuda.device_count() < WORLD:
        pytest.skip(f"needs {WORLD} GPUs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()

    def measure():
        mp.spawn(process, (port, device.type, shape, results), nprocs=WORLD)

    benchmark.group = f"shuffle {shape[0]} images of {shape[2]}² a process, {WORLD} processes, {device.type}"
    benchmark.pedantic(measure, rounds=1, iterations=1)
    found = results.get()
    rows = {}
    for mode in MODES:
        rows[mode] = {"flops": 0, "bytes": found["sent"][mode], "error": None, "peak_bytes": None}
        rows[mode]["ms"] = rows[mode]["wall_ms"] = found["ms"][mode]
    benchmark.extra_info["rows"] = rows
    print({mode: statistics.median(found["ms"][mode]) for mode in MODES})

"""Training with DistributedDataParallel: torchrun --nproc-per-node 2 examples/ddp.py

Each rank encodes its own images. The model shuffles the key images between the ranks (shuffling BN) and gathers the
keys, so the queue is the same on all ranks and need not be broadcast. The script also runs with one process.
"""

import math
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from moco_ext import MoCo
from moco_ext.data import Augmentation, TrainLoader, load


def main() -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    model = MoCo("resnet8-small", dim=64, K=1024, m=0.99, T=0.1, mlp=True).to(device)
    forward = model
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        forward = DistributedDataParallel(model)
    data = load("digits")
    augmentation = Augmentation.v2(data.size, flip_p=0.0)
    loader = TrainLoader(data, augmentation, 64 // world, rank=rank, world=world, device=device, drop_last=True)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    if rank == 0:
        print(f"{world} processes; chance: loss {math.log(model.K + 1):.2f}")
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            out = forward(batch.im_q, batch.im_k)
            optimizer.zero_grad()
            out.loss.backward()  # DDP averages the gradients
            optimizer.step()
            model.update(out.keys)  # out.keys has the keys of all ranks
        if rank == 0:
            print(f"epoch {epoch}: loss {out.loss.item():.2f}, contrast accuracy {out.stats.accuracy()[0]:.0f} %")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

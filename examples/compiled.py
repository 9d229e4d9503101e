"""torch.compile and, on a GPU, the whole step as one CUDA graph: python examples/compiled.py

The operators compile without graph breaks. The queue pointer stays on the device and is never synchronized, so a step
(encoders, loss, backward pass, optimizer, momentum update, enqueue) can be captured once and replayed. On a CPU, which
has no CUDA graphs, the encoders are only compiled.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moco_ext import MoCo
from moco_ext.data import Augmentation, TrainLoader, load

BATCH = 64


class Encoder(nn.Module):
    """A small encoder, which compiles in seconds."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 256), nn.GELU())
        self.fc = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


def as_graph(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Capture ``step`` in a CUDA graph. Each replay overwrites the returned tensor."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up allocations, cuDNN and the optimizer state
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load("digits")
    loader = TrainLoader(data, Augmentation.v2(data.size, flip_p=0.0), BATCH, device=device, drop_last=True)
    model = MoCo(Encoder, dim=64, K=1024, m=0.99, T=0.2).to(device)
    model.encoder_q.compile(fullgraph=True)
    model.encoder_k.compile(fullgraph=True)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=0.05, momentum=0.9)
    first = next(iter(loader.epoch(0)))
    im_q, im_k = first.im_q.clone(), first.im_k.clone()  # a graph reads from fixed addresses

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        out = model(im_q, im_k)
        out.loss.backward()
        optimizer.step()
        model.update(out.keys)
        return out.loss.detach()

    if device.type == "cuda":
        step = as_graph(step)
    else:
        print("no GPU: the encoders are compiled, but the step is not captured in a graph")
    print(f"chance: loss {math.log(model.K + 1):.2f}")
    for epoch in range(5):
        start = time.perf_counter()
        for batch in loader.epoch(epoch):
            im_q.copy_(batch.im_q)
            im_k.copy_(batch.im_k)
            loss = step()
        print(f"epoch {epoch}: loss {loss.item():.2f}, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()

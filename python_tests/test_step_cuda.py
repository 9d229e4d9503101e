"""Whole training steps on a GPU: no waiting for it, one CUDA graph, the CPU's losses, NCCL."""

import argparse
import os

import pytest
import torch
from test_moco import Tiny

from moco_ext import MoCo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def moco(device="cuda", **options) -> MoCo:
    torch.manual_seed(0)
    return MoCo(lambda num_classes: Tiny(num_classes), dim=128, K=4096, m=0.9, T=0.2, **options).to(device)


def views(i: int, device="cuda", n=32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    return [torch.randn(n, 3, 8, 8, generator=generator).to(device) for _ in range(2)]


class Steps:
    """Training of a model; each call is a step on what `images` hold then."""

    def __init__(self, model: MoCo, images: list[torch.Tensor], autocast: bool = False, **ids: torch.Tensor) -> None:
        self.model, self.images, self.autocast, self.ids = model, images, autocast, ids
        self.optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.05, momentum=0.9)

    def __call__(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast):
            out = self.model(*self.images, **self.ids)
        out.loss.backward()
        self.optimizer.step()
        self.model.update(out.keys, **self.ids)
        return out.loss.detach()

    def show(self, images: list[torch.Tensor]) -> None:
        for held, new in zip(self.images, images, strict=True):
            held.copy_(new)


@pytest.mark.parametrize(
    "options", [{}, {"queue_dtype": torch.bfloat16}, {"same_id": "mask", "in_batch": True}], ids=str
)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_never_waits_for_the_device(autocast, options):
    ids = {"ids": torch.arange(32, device="cuda")} if "same_id" in options else {}
    step = Steps(moco(**options, empty="same_id" in options), views(0), autocast, **ids)
    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_in_one_cuda_graph_is_the_eager_step(queue_dtype):
    """Queue pointer, momentum update and enqueue are all on the device, so replays move on as eager steps do.

    Only within rounding: during capture cuBLAS has another workspace, and may choose another algorithm.
    """
    eager, graphed = (Steps(moco(queue_dtype=queue_dtype), views(0)) for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            graphed()
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        eager()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = graphed()
    for i in range(1, 5):
        for steps in (eager, graphed):
            steps.show(views(i))
        graph.replay()
        torch.testing.assert_close(loss, eager(), rtol=1e-4, atol=1e-6)
    assert graphed.model.queue_ptr.item() == eager.model.queue_ptr.item()
    torch.testing.assert_close(graphed.model.queue.float(), eager.model.queue.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("exact_convolutions")
def test_losses_are_those_of_the_cpu():
    """Twenty steps of the same seed: float32 convolutions on two devices drift apart slowly."""
    losses = {}
    for device in ("cpu", "cuda"):
        step = Steps(moco(device), views(0, device))
        losses[device] = []
        for i in range(20):
            step.show(views(i, device))
            losses[device].append(step().item())
    torch.testing.assert_close(torch.tensor(losses["cuda"]), torch.tensor(losses["cpu"]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_trainer_in_mixed_precision(tmp_path, precision):
    pytest.importorskip("torchvision")
    from training import few_digits, run_in, tiny

    from moco_ext.train import pretrain

    data = few_digits()
    records = {}
    for kind in ("fp32", precision):
        config = tiny(epochs=2, precision=kind, channels_last=True)
        records[kind] = pretrain(config, data, run_in(tmp_path / kind, device=torch.device("cuda")))
    assert abs(records["fp32"][0]["loss"] - records[precision][0]["loss"]) < 0.2


def test_one_rank_on_nccl(tmp_path):
    """The process group changes nothing for a single rank: the same losses as without one."""
    pytest.importorskip("torchvision")
    from training import few_digits, run_in, tiny

    from moco_ext.cli import launch as launching
    from moco_ext.runs.options import RunOptions
    from moco_ext.train import pretrain

    data, config = few_digits(), tiny(epochs=1)
    alone = pretrain(config, data, run_in(tmp_path / "alone", device=torch.device("cuda")))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(launching._free_port()), RANK="0", LOCAL_RANK="0")
    os.environ.update(WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    found = []

    def work(args: argparse.Namespace, options: RunOptions) -> int:
        assert torch.distributed.get_backend() == "nccl"
        found.extend(pretrain(config, data, run_in(tmp_path / "group", device=options.device)))
        return 0

    try:
        assert launching.run(work, argparse.Namespace(device="cuda", dist_backend="nccl"), tmp_path) == 0
    finally:
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    assert found[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-3)

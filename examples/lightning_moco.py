"""Momentum contrast as a PyTorch Lightning module with callbacks: python examples/lightning_moco.py

The training step of the module is only the forward pass. After the optimizer step, a callback updates the key encoder
and the queue. Another callback logs a kNN score after each epoch.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor

from moco_ext import MoCo
from moco_ext.data import Augmentation, ImageData, TrainLoader, load
from moco_ext.distributed import exclude_queues_from_ddp
from moco_ext.evaluate import encoder_features, knn_top1


class LitMoCo(L.LightningModule):
    """:class:`moco_ext.MoCo` with an optimizer; batches are pairs of views [N, 3, H, W].

    Args:
        lr, weight_decay: for SGD with momentum 0.9.
        model: arguments of :class:`moco_ext.MoCo`.
    """

    def __init__(self, lr: float = 0.03, weight_decay: float = 1e-4, **model: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = MoCo(**model)
        exclude_queues_from_ddp(self)
        self.keys: list[Tensor] = []  # of the micro-batches since the last optimizer step

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        out = self.model(*batch)
        self.keys.append(out.keys)
        self.log("loss", out.loss, prog_bar=True)
        self.log("top1", out.stats.accuracy()[0], prog_bar=True)
        return out.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        hparams = self.hparams
        parameters = self.model.encoder_q.parameters()
        return torch.optim.SGD(parameters, hparams["lr"], momentum=0.9, weight_decay=hparams["weight_decay"])


class MomentumUpdate(L.Callback):
    """After each optimizer step: the momentum update, then enqueue the keys of all its micro-batches."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step > self.step:  # not while gradients are accumulated
            self.step = trainer.global_step
            pl_module.model.update(torch.cat(pl_module.keys))
            pl_module.keys.clear()


class OnlineKNN(L.Callback):
    """Top-1 of a weighted k-nearest-neighbor classifier on the query encoder's features, logged as ``knn_top1``.

    Args:
        data: the classifier uses its train split and is scored on its test split.
        every: epochs between scores.
        k: neighbors.
    """

    def __init__(self, data: ImageData, every: int = 1, k: int = 20) -> None:
        self.data, self.every, self.k = data, every, k

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every:
            return
        splits = self.data.splits
        train, test = (
            encoder_features(pl_module.model.encoder_q, self.data, split, device=pl_module.device) for split in splits
        )
        score = knn_top1(train, splits[0].labels, test, splits[1].labels, k=self.k, device=pl_module.device)
        pl_module.log("knn_top1", score, prog_bar=True, rank_zero_only=True)


class Views:
    """The batches of an epoch: two views of each image."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader, self.epoch = loader, 0

    def __len__(self) -> int:
        return self.loader.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader.epoch(self.epoch):
            yield batch.im_q, batch.im_k
        self.epoch += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per optimizer step")
    parser.add_argument("--output", default="runs/lightning", help="folder for checkpoints and metrics")
    args = parser.parse_args()
    L.seed_everything(0)
    data = load("digits")
    loader = TrainLoader(data, Augmentation.v2(data.size, flip_p=0.0), batch_size=64, drop_last=True)
    module = LitMoCo(lr=0.05, base_encoder="resnet8-small", dim=64, K=1024, m=0.99, T=0.2, mlp=True, split_bn=8)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accumulate_grad_batches=args.accumulate,
        callbacks=[MomentumUpdate(), OnlineKNN(data)],
        default_root_dir=args.output,
        log_every_n_steps=5,
    )
    trainer.fit(module, Views(loader))
    metrics = {name: round(float(value), 2) for name, value in trainer.callback_metrics.items()}
    print(f"after {trainer.global_step} steps: {metrics}")


if __name__ == "__main__":
    main()

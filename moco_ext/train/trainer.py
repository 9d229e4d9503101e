"""The pre-training loop, with its schedules, metrics, evaluation and checkpoints."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from .. import distributed
from ..checkpoints.files import newest
from ..checkpoints.training import (
    Checkpoints,
    check_finite,
    has_checkpoint,
    load_checkpoint,
    load_into,
    load_newest,
    local_shards,
    official_layout,
    sharded_tensors,
)
from ..data import Batch, EvalTransform, ImageData, TrainLoader
from ..data.datasets import FolderSplit
from ..encoders import AUTOCAST, backbone, restored_modes
from ..evaluate.scores import knn_score, split_features
from ..mechanism import Mechanism
from ..runs.directory import claim, clear, list_unreadable
from ..runs.files import write_atomically
from ..runs.metrics import Averages, RunLog, read_metrics
from ..runs.options import RunOptions
from ..runs.settings import changed_settings
from .config import PretrainConfig
from .diagnostics import Diagnostics
from .initialize import describe, initialize_
from .memory import device_memory
from .model import build_model
from .optimizer import build_optimizer
from .parallel import filled, hollow_copy, images_per_process, shard_
from .preemption import Preemption
from .step import NonFiniteLoss, OptimizerStep
from .teacher import attach_teacher


def pretrain(
    config: PretrainConfig, data: ImageData, options: RunOptions, model: Mechanism | None = None
) -> list[dict[str, Any]]:
    """Train ``model`` (by default :func:`build_model`'s) in place, on one process or in a process group.

    Writes checkpoints, ``metrics.jsonl`` and ``tensorboard/`` to ``options.output``. A record has step, epoch,
    loss, acc1 and acc5 (contrast accuracy, percent), lr, images_per_second, wait (share of the time spent waiting for
    data), seconds (training time so far, without evaluations), the metrics of :class:`Diagnostics`, and, if the
    features were evaluated, knn_top1.

    Returns:
        All records: one per epoch, or one every ``config.log_every`` steps when training by steps.

    Raises:
        FloatingPointError: the loss is not finite, in which case parameters and queue are those before the step, and
            ``nonfinite.pth`` contains them and the batch; or the weights are not finite when a checkpoint is due.
        ValueError: data, configuration or checkpoint do not fit together, or ``options.output`` belongs to another run
            (see :func:`moco_ext.runs.directory.claim`).
        SystemExit: 143, after SIGTERM, once a checkpoint has been saved.
    """
    with claim(options):
        return Trainer(config, data, options, model).train()


class Trainer:
    """A pre-training run, in a directory reserved with :func:`moco_ext.runs.directory.claim`; see :func:`pretrain`.

    The constructor checks everything and loads the checkpoint to resume, before it deletes a run to overwrite.
    """

    def __init__(self, config: PretrainConfig, data: ImageData, options: RunOptions, model: Mechanism | None) -> None:
        self.config, self.data, self.options = config, data, options
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.nodes = max(1, self.world // options.local_world)
        batch_size = images_per_process(config.batch_size, options)
        cuda = options.device.type == "cuda"
        wanted = config.channels_last
        channels_last = wanted if wanted is not None else not cuda or config.precision != "fp32"
        self.model = (model or build_model(config, len(data.train), data.size)).to(options.device)
        if config.teacher is not None:
            attach_teacher(self.model, config.teacher, data)
        queue = self.model.key_queue()
        if queue is not None and len(queue) > len(data.train) and config.same_image == "negative" and self.rank == 0:
            warnings.warn(
                f"moco_k: {len(queue)} keys but only {len(data.train)} images in {data.name}: other views of an image "
                "will be among its negatives; use a smaller --moco-k, or --same-image mask",
                stacklevel=4,
            )
        # With one process there is nothing to shard.
        self.sharded = options.parallel == "fsdp" and self.world > 1
        if self.sharded and config.cuda_graphs:
            raise ValueError(
                "compile_mode: expected default or max-autotune-no-cudagraphs with parallel fsdp, whose weights move "
                f"between steps, got {config.compile_mode}"
            )
        if channels_last and (cuda or wanted) and not self.sharded:  # FSDP2 needs contiguous weights
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.loader = TrainLoader(
            data,
            config.augmentation(data),
            batch_size,
            accumulate=config.accumulate,
            seed=config.seed,
            rank=self.rank,
            world=self.world,
            workers=options.workers,
            drop_last=config.drop_last,
            shuffled_keys=config.shuffle_bn == "loader",
            shard_window=config.shard_window,
            patches=config.patches if config.views == "patches" else 0,
            augment_on=config.augment_on,
            device=options.device,
            channels_last=channels_last,
        )
        resumes = options.resume is not None and (options.resume != "auto" or has_checkpoint(options.output))
        if config.init is not None:
            self._initialize(config.init, resumes)
        self._has_knn = not data.why_not_scored and self._features_fit()
        if self.sharded:
            self._hollow = hollow_copy(self.model.encoder_q)
            shard_(self.model, options.device, AUTOCAST.get(config.precision))
        self.optimizer = build_optimizer(
            self.model,
            config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            betas=config.betas,
            eps=config.opt_eps,
            layer_decay=config.layer_decay,
            decay_norm_bias=config.decay_norm_bias,
        )
        if config.compile:
            for encoder in self.model.children():  # encoder_q, encoder_k
                encoder.compile(mode=config.compile_mode)
        # Random numbers (a memory bank's negatives) differ between ranks, but not between runs.
        torch.manual_seed(config.seed + 1_000_003 * self.rank)
        self.per_epoch = self.loader.steps_per_epoch
        self.total = config.total_steps(self.per_epoch)
        self.step = options.start_epoch * self.per_epoch
        self.seconds, self.averages, self.health_averages = 0.0, Averages(), Averages()
        self.skipped_steps = 0
        self.images, self.epoch_seconds, self.waited = 0, 0.0, 0.0  # since the last record
        self.optimizer_step = OptimizerStep(
            self.model, self.optimizer, config.precision, config.symmetric, clip_grad=config.clip_grad
        )
        # All ranks take part in a forward pass of sharded weights.
        self.diagnostics = Diagnostics(self.model, every=options.print_freq if self.rank == 0 or self.sharded else 0)
        self.checkpoints = Checkpoints(options.output, options.keep, options.checkpoint_format)
        if resumes:
            self._resume(*self._checkpoint_to_resume())
        # A finished run in its own directory is not trained again, but its records are there to be evaluated.
        if self.step >= self.total and (options.overwrite or not read_metrics(options.output / "metrics.jsonl")):
            raise ValueError(
                f"resume, start_epoch: expected a start before the last of {self.total} steps, got {self.step} "
                "completed steps; raise the number of epochs, or evaluate the checkpoint with moco-ext knn or linear"
            )
        if options.overwrite and self.rank == 0:
            clear(options.output)

    def train(self) -> list[dict[str, Any]]:
        config, options = self.config, self.options
        log = RunLog(
            options.output,
            options,
            total_steps=self.total,
            steps_per_epoch=self.per_epoch,
            done_steps=self.step,
            chance_loss=self.model.chance_loss,
            config=dataclasses.asdict(config),
            enabled=self.rank == 0,
        )
        with log, Preemption() as preemption, self.checkpoints:
            while self.step < self.total:
                self.model.train()
                epoch = self.step // self.per_epoch
                for batches, waited in _steps(self.loader.epoch(epoch)):
                    self._train_step(batches, waited, log)
                    done = self.step == self.total
                    every = config.log_every if config.steps else self.per_epoch
                    if done or self.step % every == 0:
                        self._record(log, preemption)
                    recorded = done or self.step % every == 0
                    if recorded or (options.save_every and self.step % options.save_every == 0):
                        self._save(preemption, last=done)
                    if preemption.agreed(done or self.step % options.print_freq == 0):
                        if not recorded:
                            self._save(preemption, last=True)
                        self._finish_checkpoint(preemption)
                        preemption.stop(options.console, self.step)
                    if done:
                        break
        return log.records

    def _train_step(self, batches: list[Batch], waited: float, log: RunLog) -> None:
        config, started = self.config, time.perf_counter()
        lr = config.learning_rate(self.step, self.per_epoch, self.nodes)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if self.model.m is not None:
            # The published update opens the next step.
            self.model.m = config.key_momentum(self.step + 1, self.per_epoch)
        if config.cuda_graphs:  # they may overwrite the last step's outputs
            torch.compiler.cudagraph_mark_step_begin()
        health: dict[str, float] = {}

        def examine(scale: float) -> None:
            health.update(self.diagnostics.after(self.step + 1, batches[0].im_k, grad_scale=scale * batches[0].share))

        self.diagnostics.before(self.step + 1)
        try:
            result = self.optimizer_step(batches, examine if self.diagnostics.due(self.step + 1) else None)
        except NonFiniteLoss as error:
            self._dump(error, lr)
        self.step += 1
        self.skipped_steps += result.skipped
        self.images += result.images
        self.averages.add(result.images, **result.metrics)
        if health:
            self.health_averages.add(1, **health)
        spent = waited + time.perf_counter() - started
        self.seconds += spent
        self.epoch_seconds += spent
        self.waited += waited
        log.step(self.step, result.metrics | health | {"images": result.images, "wait": waited, "lr": lr})

    def _record(self, log: RunLog, preemption: Preemption) -> None:
        means = _mean_over_ranks(self.averages.means(), self.options.device)
        record: dict[str, Any] = {"step": self.step, "epoch": _whole(self.step / self.per_epoch), **means}
        record |= {
            "lr": self.config.learning_rate(self.step - 1, self.per_epoch, self.nodes),
            "images_per_second": self.images / self.epoch_seconds,
            "wait": self.waited / self.epoch_seconds,
            "seconds": round(self.seconds, 3),
            **self.health_averages.means(),
        }
        if self._has_knn and self._evaluation_is_due():
            top1 = preemption.unless_stopped(self._knn)
            record |= {} if top1 is None else {"knn_top1": top1}
        unreadable = len(self.data.unite_unreadable())
        counts = {"skipped_images": unreadable, "skipped_steps": self.skipped_steps}
        record |= {name: count for name, count in counts.items() if count}
        log.record(record)
        self.averages.clear()
        self.health_averages.clear()
        self.images, self.epoch_seconds, self.waited = 0, 0.0, 0.0

    @torch.no_grad()
    def _features_fit(self) -> bool:
        """Whether each machine has memory for the features of all images, which the kNN evaluation holds."""
        encoder, device = self.model.encoder_q, self.options.device
        with restored_modes(encoder):
            width = backbone(encoder.eval())(torch.zeros(1, 3, self.data.size, self.data.size, device=device)).numel()
        images, memory = sum(map(len, self.data.splits)), device_memory(torch.device("cpu"))
        needed = self.options.local_world * images * width * 4
        sizes = f"{needed / 2**30:,.1f} GiB, and there are {memory / 2**30:,.1f} GiB"
        failures = distributed.unite({sizes} if needed > memory else set())
        if failures and self.rank == 0:
            warnings.warn(
                f"knn_top1: the features of {images:,} images take {min(failures)}: kNN accuracy is not measured",
                stacklevel=5,
            )
        return not failures

    def _evaluation_is_due(self) -> bool:
        if self.step == self.total:
            return True
        every = self.config.online_knn * (1 if self.config.steps else self.per_epoch)
        return every > 0 and self.step % every == 0

    def encoder(self) -> nn.Module:
        """The query encoder in one piece, to be evaluated, with rank 0's BatchNorm statistics. Every rank must call it.

        Of sharded weights it is a copy.
        """
        encoder = self.model.encoder_q
        if self.world > 1:  # BatchNorm statistics differ between ranks in training
            for buffer in encoder.buffers():
                dist.broadcast(buffer, 0)
        return filled(self._hollow, encoder) if self.sharded else encoder

    def _knn(self) -> float:
        precision = self.config.precision
        rows = split_features(self.data, self.options, self.encoder(), "trained", precision=precision)
        return knn_score(self.data, rows, k=self.config.knn_k, device=self.options.device, sharded=True)

    def _save(self, preemption: Preemption, last: bool) -> None:
        """Write a checkpoint. A failed write, as on a full disk, is an error only for the last one."""
        check_finite(self.model, self.optimizer)
        unreadable = sorted(self.data.unite_unreadable())
        random = {"cpu": _of_all_ranks(torch.get_rng_state())}
        if self.options.device.type == "cuda":
            random["cuda"] = _of_all_ranks(torch.cuda.get_rng_state(self.options.device))
        averages = self.averages.state_dict()
        averages["sums"] = _mean_over_ranks(averages["sums"], self.options.device)  # all ranks will resume from these
        trainer = {
            "step": self.step,
            "loader": self.loader.state_dict(),
            "scaler": self.optimizer_step.scaler.state_dict(),
            "random": random,
            "averages": averages,
            "health_averages": self.health_averages.state_dict(),
            "seconds": [self.seconds, self.epoch_seconds, self.waited],
            "images": self.images,
            "skipped_steps": self.skipped_steps,
            "unreadable": unreadable,
            "updates": self.model.updates,
            "config": dataclasses.asdict(self.config),
            "image_size": self.data.size,
            "files": self._files(),
        }
        content = official_layout(
            epoch=self.step // self.per_epoch,
            arch=self.config.arch,
            model=self.model,
            optimizer=self.optimizer,
            trainer=trainer,
            transform=EvalTransform.of(self.data).as_dict(),
        )
        try:
            self.checkpoints.save(self.step, content)
            if self.rank == 0:
                list_unreadable(self.options.output, unreadable)
        except OSError as error:
            if last:
                raise OSError(f"output: the last checkpoint could not be written: {error}") from error
            if self.rank == 0:
                warnings.warn(f"checkpoint of step {self.step} not written, training continues: {error}", stacklevel=2)
        if last:
            self._finish_checkpoint(preemption)

    def _finish_checkpoint(self, preemption: Preemption) -> None:
        """Wait for a checkpoint that is still being written."""
        try:
            self.checkpoints.finish(preemption.progress)
        except OSError as error:
            raise OSError(f"output: the last checkpoint could not be written: {error}") from error

    def _initialize(self, source: str, resumed: bool) -> None:
        said = "init: not used, as the run continues from its checkpoint"
        if not resumed:
            loaded, arch = initialize_(self.model, source, self.config.arch)
            said = describe(loaded, source, self.config.arch, arch)
        if self.rank == 0:
            self.options.console.print(said, highlight=False, soft_wrap=True)

    def _checkpoint_to_resume(self) -> tuple[dict[str, Any], Path]:
        source, shards = self.options.resume, sharded_tensors(self.model, self.optimizer)
        if source == "auto":
            found = load_newest(self.options.output, shards)
            assert found is not None
            return found
        assert source is not None
        return load_checkpoint(newest(Path(source)), shards), Path(source)

    def _resume(self, checkpoint: dict[str, Any], path: Path) -> None:
        trainer, before = checkpoint.get("trainer"), {}
        settings = trainer.get("config") if isinstance(trainer, dict) else None
        saved = settings.get("optimizer", "sgd") if isinstance(settings, dict) else "sgd"
        if saved != self.config.optimizer:
            raise ValueError(
                f"resume: {path} has the state of another optimizer: expected --optimizer {saved}, got "
                f"{self.config.optimizer}"
            )
        load_into(self.model, checkpoint, path, arch=self.config.arch, optimizer=self.optimizer)
        if trainer is None:  # saved by the official trainer after whole epochs
            self.step = checkpoint["epoch"] * self.per_epoch
        else:
            try:
                self._restore(trainer)
                before = dict(trainer["config"])
            except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
                reason = str(error) if isinstance(error, ValueError) else repr(error)
                raise ValueError(
                    f"resume: {path} does not fit this run: {' '.join(reason.split())[:300]}; -a {self.config.arch} "
                    f"--init {path} starts a new run from its weights"
                ) from None
        if self.rank > 0:
            return
        self.options.console.print(f"resumed at step {self.step:,} of {self.total:,}: {path}", highlight=False)
        if changed := changed_settings(before, self.config):
            self.options.console.print(f"resumed with changed settings: {', '.join(changed)}", highlight=False)
        if self.step >= self.total:
            warnings.warn(f"resume: {path} has completed all of its {self.total} steps", stacklevel=5)

    def _files(self) -> int | None:
        return self.data.train.checksum() if isinstance(self.data.train, FolderSplit) else None

    def _restore(self, trainer: dict[str, Any]) -> None:
        counts = {name: trainer[name] for name in ("step", "images", "skipped_steps", "updates")}
        counts |= {f"loader {name}": trainer["loader"][name] for name in ("epoch", "step")}
        for name, count in counts.items():
            if not isinstance(count, int) or count < 0:
                raise ValueError(f"{name}: expected a count, got {count}")
        self.step = trainer["step"]
        self.loader.load_state_dict(trainer["loader"])
        epochs, steps = trainer["loader"]["epoch"], trainer["loader"]["step"]
        if self.step != epochs * self.per_epoch + steps:
            raise ValueError(
                f"step: expected {epochs} epochs of this run's {self.per_epoch} steps and {steps} more, got "
                f"{self.step}; drop_last and the number of processes decide whether an epoch's last images are a step"
            )
        self.optimizer_step.scaler.load_state_dict(trainer["scaler"])
        self.averages.load_state_dict(trainer["averages"])
        self.health_averages.load_state_dict(trainer["health_averages"])
        self.seconds, self.epoch_seconds, self.waited = trainer["seconds"]
        self.skipped_steps, self.images = trainer["skipped_steps"], trainer["images"]
        self.data.unreadable.update(trainer.get("unreadable", ()))
        if trainer.get("files") not in (None, files := self._files()) and files is not None and self.rank == 0:
            warnings.warn(
                "resume: the training images have other file names, or another order, than those of the checkpoint",
                stacklevel=6,
            )
        self.model.updates = trainer["updates"]
        random = trainer["random"]
        if len(random["cpu"]) != self.world:
            return  # another number of processes: their random number generators start anew
        torch.set_rng_state(random["cpu"][self.rank])
        if "cuda" in random and self.options.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"][self.rank], self.options.device)

    def _dump(self, error: NonFiniteLoss, lr: float) -> NoReturn:
        path = self.options.output / "nonfinite.pth"
        content = {
            "step": self.step + 1,
            "rank": self.rank,
            "lr": lr,
            "index": torch.cat([batch.index for batch in error.batches]),
            "im_q": torch.cat([batch.im_q for batch in error.batches]).cpu(),
            "im_k": torch.cat([batch.im_k for batch in error.batches]).cpu(),
            "state_dict": local_shards(self.model.state_dict()),
        }
        written = f"; the batch and the model before the step are in {path}"
        try:
            write_atomically(path, lambda file: torch.save(content, file))
        except (OSError, RuntimeError) as failure:
            written = f"; the batch could not be saved: {failure}"
        epoch, step = divmod(self.step, self.per_epoch)
        raise FloatingPointError(
            f"{error} in epoch {epoch + 1}, step {step + 1} (lr {lr:g}, moco_t {self.config.moco_t:g}); a lower "
            f"learning rate may help{written}"
        ) from None


def _steps(batches: Iterator[Batch]) -> Iterator[tuple[list[Batch], float]]:
    """For each optimizer step its micro-batches and the seconds spent waiting for them."""
    while True:
        started = time.perf_counter()
        step: list[Batch] = []
        for batch in batches:
            step.append(batch)
            if batch.last:
                break
        if not step:
            return
        yield step, time.perf_counter() - started


def _mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean over all ranks, which have processed equally many images."""
    world = distributed.world_size()
    if world == 1 or not values:
        return values
    total = distributed.all_reduce(torch.tensor(list(values.values()), dtype=torch.float64, device=device))
    return dict(zip(values, (total / world).tolist(), strict=True))


def _of_all_ranks(state: torch.Tensor) -> list[torch.Tensor]:
    """The CPU tensors of all ranks, on every rank. Waits for all: if one is lost, no checkpoint is written."""
    if distributed.world_size() == 1:
        return [state]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    parts = distributed.all_gather(state.to(device)).chunk(distributed.world_size())
    return [part.cpu().clone() for part in parts]  # copies, as set_rng_state misreads views


def _whole(epoch: float) -> float | int:
    return int(epoch) if epoch == int(epoch) else round(epoch, 4)

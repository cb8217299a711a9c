"""The training loop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from comask.bundle import BEST
from comask.config import Config
from comask.data.loading import Batch, epoch_batches, load_batches, micro_batches
from comask.data.open_data import TrainingData
from comask.data.source import Id
from comask.data.training_set import TrainingSet
from comask.errors import TrainingError
from comask.files import write_whole
from comask.models.comask import CoMask, load_weights
from comask.progress import Progress
from comask.training.callbacks import Callback
from comask.training.checkpoint import Checkpoint, save_checkpoint
from comask.training.distributed import (
    Ranks,
    gather,
    largest_over_ranks,
    mean_over_ranks,
    require_agreement,
    share_from_first,
)
from comask.training.figures import draw_curves
from comask.training.losses import Objective
from comask.training.optim import average_weights, build_optimizer, learning_rate, set_learning_rate
from comask.training.record import RunRecord, Step
from comask.training.report import write_report
from comask.training.validation import Validation, Validator

LAST = "checkpoint-last.pt"


class Trainer:
    """Trains a model on a data set, and writes checkpoints and metrics to a folder.

    Args:
        model: the model, which is trained in place on the device of `ranks`.
        config: all settings.
        data: the training images; checkpoints keep the digest and the categories of the data.
        output: the folder for `checkpoint-last.pt`, `checkpoint-best.pt`, `metrics.csv` and `eval.csv`.
        ranks: this process and the number of processes that train together.
        evaluate: scores a model on the validation images; without it the last checkpoint is the best.
        resume: the checkpoint to resume from.
        callbacks: objects that are told what happens; the first process calls them.
        signal: returns the number of a signal that asked to end the run, 0 for no signal; called after
            each step.

    Attributes:
        ended_by: the signal that ended `train` before its last step, on any process; 0 for no signal.
        trained: whether any step was left to train.
    """

    def __init__(
        self,
        model: CoMask,
        config: Config,
        data: TrainingData,
        output: Path,
        *,
        ranks: Ranks,
        evaluate: Validator | None,
        resume: Checkpoint | None = None,
        callbacks: Sequence[Callback] = (),
        signal: Callable[[], int] = lambda: 0,
    ) -> None:
        train = config.train
        self.model, self.config, self.ranks, self.output = model, config, ranks, output
        self.evaluate, self._signal, self.ended_by = evaluate, signal, 0
        self.categories, self.digest = data.train.categories, data.digest
        self.dataset = TrainingSet(
            data.train,
            data.train_indices,
            config.preprocess,
            config=config.data,
            seed=train.seed,
        )
        self.optimizer = build_optimizer(model, train, model.backbone.stages())
        self.ema = average_weights(model, train.ema_decay)
        self.scaler = torch.amp.GradScaler("cuda", enabled=train.precision == "fp16")
        self.step, self.best_ap, self.stale = 0, -1.0, 0
        self.validation: Validation | None = None  # of the last evaluation
        if resume:
            self._restore(resume)
        elif ranks.first:  # A run that was killed before its first LAST may have left one.
            (output / BEST).unlink(missing_ok=True)
        require_agreement((self.digest, self.step))
        if train.channels_last:
            model.to(memory_format=torch.channels_last)
        if train.compile:
            heads = (model.head, model.fine_head, model.mask_scorer)
            for part in (model.backbone, model.mfpn, *heads):
                if part:
                    part.compile()
        objective = Objective(model)
        self.objective: nn.Module = objective
        if ranks.world > 1:
            places = [ranks.device] if ranks.device.type == "cuda" else None
            self.objective = DistributedDataParallel(objective, device_ids=places)
        self.record = None
        if ranks.first:
            self.record = RunRecord(output, keep_until=self.step)
        self._callbacks = tuple(callbacks) if ranks.first else ()
        self.steps_per_epoch = math.ceil(self.dataset.epoch_length() / train.batch_size)
        self.total_steps = train.epochs * self.steps_per_epoch
        if train.max_steps >= 0:
            self.total_steps = min(self.total_steps, train.max_steps)
        self.trained = resume is None or not self.is_finished

    def train(self) -> None:
        """Trains and evaluates until the last step, the end of `train.patience`, or a signal.

        Raises:
            TrainingError: a loss is not finite, or memory does not suffice.
        """
        for callback in self._callbacks:
            callback.on_start(self.output, self.config, self.step)
        try:
            self._train()
        finally:
            for callback in self._callbacks:
                callback.on_end(self.output)

    def _train(self) -> None:
        train = self.config.train
        quiet = not self.ranks.first
        with Progress("training", self.total_steps, done=self.step, quiet=quiet) as bar:
            while not self.is_finished:
                epoch, done = divmod(self.step, self.steps_per_epoch)
                self.model.train()
                with self._batches(epoch, done) as steps:
                    for batches, seconds in steps:
                        try:
                            note = self.train_step(batches, epoch, seconds)
                        except torch.OutOfMemoryError as error:
                            raise out_of_memory(batches[0]) from error
                        bar.advance(note=note)
                        # The last step of an epoch is saved below, after its evaluation.
                        if self.step in (self.total_steps, (epoch + 1) * self.steps_per_epoch):
                            continue
                        if self._is_to_end():
                            return
                        if self.step % train.checkpoint_every == 0:
                            self.save(LAST)
                last = self.step == self.total_steps
                if self.evaluate and (last or (epoch + 1) % train.evaluate_every == 0):
                    self.run_evaluation(epoch, last=last)
                # Saved after the evaluation, so that a run killed during it evaluates when it resumes.
                if not last and self._is_to_end():
                    return
                self.save(LAST)
        if self.total_steps == 0:
            self.save(LAST)
        if self.evaluate is None or not (self.output / BEST).exists():
            self.save(BEST)
        if self.record and self.validation is None:  # The last evaluation writes the report, too.
            self._report()

    def _is_to_end(self) -> bool:
        """Returns whether a signal asks to end; if so, saves `LAST`, which continues bit for bit."""
        self.ended_by = largest_over_ranks(self._signal(), self.ranks)
        if self.ended_by:
            self.save(LAST)
            # Wait for the write, since torchrun ends all processes when the first one ends.
            share_from_first(None)
        return self.ended_by != 0

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.step >= self.total_steps or self.out_of_patience

    @property
    def out_of_patience(self) -> bool:
        """Whether mask AP has not improved for `train.patience` evaluations."""
        return 0 < self.config.train.patience <= self.stale

    @contextmanager
    def _batches(self, epoch: int, done: int) -> Iterator[Iterator[tuple[list[Batch], float]]]:
        """Yields this process's micro-batches of each optimiser step, and the seconds it waited."""
        train, ranks = self.config.train, self.ranks
        batches = epoch_batches(
            self.dataset, train.batch_size, train.seed, epoch, ranks=ranks.world
        )
        steps = [
            micro_batches(batch, train.micro_batch, ranks.rank, ranks.world)
            for batch in batches[done : done + self.total_steps - self.step]
        ]
        flat = [micro for step in steps for micro in step]
        with load_batches(self.dataset, flat, workers=self.config.data.workers) as loaded:
            yield _timed(loaded, [len(step) for step in steps])

    def train_step(self, batches: list[Batch], epoch: int, data_seconds: float) -> str:
        """Runs one optimiser step and returns a note for the progress display."""
        started = time.perf_counter()
        train = self.config.train
        rate = learning_rate(train, self.step, self.steps_per_epoch, self.total_steps)
        set_learning_rate(self.optimizer, rate)
        # Only ConvNeXt's stochastic depth uses this generator; a resumed run must draw the same.
        torch.manual_seed(hash((train.seed, self.step, self.ranks.rank)))
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._accumulate(batches)
        total = sum(losses.values())
        if not math.isfinite(total):
            shares = gather([image for batch in batches for image in batch.image_ids])
            images = [image for share in shares for image in share]
            raise non_finite(self.output, self.step, losses, images)
        self.scaler.unscale_(self.optimizer)
        if train.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            self.ema.update_parameters(self.model)
        self.step += 1
        if self.record:
            done = Step(
                step=self.step,
                epoch=epoch,
                rate=rate,
                losses=losses,
                seconds=time.perf_counter() - started + data_seconds,
                data_seconds=data_seconds,
            )
            self.record.add_step(done)
            for callback in self._callbacks:
                callback.on_step(done)
        return f"loss {total:.3f}  " + "  ".join(f"{k} {v:.3f}" for k, v in losses.items())

    def _accumulate(self, batches: list[Batch]) -> dict[str, float]:
        """Accumulates the gradients of one optimiser step; returns each loss's mean over its images."""
        device, precision = self.ranks.device, self.config.train.precision
        images = sum(len(batch.targets) for batch in batches)
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        means: Tensor | float = 0.0
        for i, batch in enumerate(batches):
            # DDP exchanges gradients only in the last backward pass.
            last = i == len(batches) - 1
            ddp = self.objective if isinstance(self.objective, DistributedDataParallel) else None
            with ddp.no_sync() if ddp and not last else nullcontext():
                with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
                    losses = self.objective(
                        batch.images.to(device, non_blocking=True),
                        batch.image_sizes.to(device, non_blocking=True),
                        [target.to(device) for target in batch.targets],
                    )
                parts = torch.stack(list(losses.values())) * (len(batch.targets) / images)
                self.scaler.scale(parts.sum()).backward()
            means = means + parts.detach()
        assert isinstance(means, Tensor)
        return dict(zip(losses, mean_over_ranks(means).tolist(), strict=True))

    def run_evaluation(self, epoch: int, *, last: bool) -> None:
        """Scores the model, records the scores, and saves the model if it is the best so far.

        Args:
            epoch: the current epoch, from 0.
            last: whether the run ends here; the last evaluation scores more, see `Validator`.
        """
        assert self.evaluate is not None
        model = self.ema.module if self.ema else self.model
        assert isinstance(model, CoMask)
        model.eval()
        validation = self.evaluate(model, self.step, last=last)
        ap = validation.final.values["segm"]["AP"]
        self.stale += ap >= 0  # AP is -1 without any object, which says nothing about progress.
        if ap > self.best_ap:
            self.best_ap, self.stale = ap, 0
            self.save(BEST)
        if self.out_of_patience and not last:  # The run ends here.
            validation = self.evaluate(model, self.step, last=True)
        self.validation = validation
        if self.record:
            self.record.add_metrics(self.step, epoch, validation.stages)
            if validation.errors:
                self.record.add_analysis(self.step, validation.errors)
            self._report()
        for callback in self._callbacks:
            callback.on_evaluation(self.step, epoch, validation)

    def _report(self) -> None:
        draw_curves(self.output)
        write_report(
            self.output, config=self.config, categories=self.categories, title=self.output.name
        )

    def save(self, name: str) -> None:
        """Writes the current state as `name`. Only the first process writes."""
        if not self.ranks.first:
            return
        save_checkpoint(
            self.output / name,
            Checkpoint(
                config=self.config,
                categories=self.categories,
                model=self.model.state_dict(),
                ema=self.ema.module.state_dict() if self.ema else None,
                optimizer=self.optimizer.state_dict(),
                scaler=self.scaler.state_dict(),
                step=self.step,
                best_ap=self.best_ap,
                stale=self.stale,
                data=self.digest,
            ),
        )

    def _restore(self, resume: Checkpoint) -> None:
        load_weights(self.model, resume.model)
        if self.ema:
            assert isinstance(self.ema.module, CoMask)
            load_weights(self.ema.module, resume.ema or resume.model)
            self.ema.n_averaged.fill_(resume.step)
        self.optimizer.load_state_dict(resume.optimizer)
        if resume.scaler:
            self.scaler.load_state_dict(resume.scaler)
        self.step, self.best_ap, self.stale = resume.step, resume.best_ap, resume.stale


def _timed(loaded: Iterator[Batch], sizes: list[int]) -> Iterator[tuple[list[Batch], float]]:
    """Yields batches in groups of these sizes, with the seconds waited for each group."""
    for size in sizes:
        started = time.perf_counter()
        group = list(islice(loaded, size))
        yield group, time.perf_counter() - started


def non_finite(
    folder: Path, step: int, losses: dict[str, float], image_ids: list[Id]
) -> TrainingError:
    """Returns the error for a loss that is not finite, and writes `non_finite.json` to find the cause.

    Args:
        folder: the run's folder.
        step: the number of finished optimiser steps.
        losses: the losses of the failed step.
        image_ids: the ids of the step's images on all processes; empty on all processes but the first,
            which writes the file.
    """
    file = folder / "non_finite.json"
    if image_ids:
        # JSON has no NaN and no infinity.
        report = {
            "step": step,
            "losses": {name: str(loss) for name, loss in losses.items()},
            "image_ids": image_ids,
        }
        write_whole(file, (json.dumps(report, indent=2) + "\n").encode())
    parts = ", ".join(f"{name} {loss:.3g}" for name, loss in losses.items())
    return TrainingError(
        f"the loss is not finite at step {step} ({parts}); its images {image_ids} are kept in {file}; "
        f"lower train.learning_rate, raise train.warmup_steps or set train.clip_norm, then go on "
        f"with --resume"
    )


def out_of_memory(batch: Batch) -> TrainingError:
    """Returns the error for a batch that is too large for the GPU; it names settings that help."""
    count, height, width = batch.images.shape[:3]
    problem = f"out of GPU memory with {count} images of {width}x{height} at once"
    if count == 1:
        return TrainingError(
            f"{problem}: go on with --resume --set train.precision=bf16, or start anew with a smaller "
            f"preprocess.max_side"
        )
    return TrainingError(
        f"{problem}: go on with --resume --set train.micro_batch={count // 2} (a step keeps its images, "
        f"in smaller parts) or train.precision=bf16"
    )

"""The training loop, on one page."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from comask.config import Config
from comask.data.source import Category
from comask.data.training_set import Batch, TrainingSet, epoch_batches, load_batches
from comask.errors import TrainingError
from comask.evaluate import CocoMetrics
from comask.models.comask import CoMask
from comask.progress import Progress
from comask.training.checkpoint import Checkpoint, load_weights, save_checkpoint
from comask.training.losses import Objective
from comask.training.optim import build_optimizer, learning_rate
from comask.training.record import RunRecord

Evaluator = Callable[[CoMask], CocoMetrics]


class Trainer:
    """Trains a model on a data set and leaves checkpoints and metrics in a folder.

    Args:
        model: to train, in place.
        config: all settings.
        dataset: training images.
        categories: the classes in label order.
        output: `checkpoint-last.pt`, `checkpoint-best.pt`, `metrics.csv` and `eval.csv` go here.
        evaluate: scores a model on the validation images; None leaves the last checkpoint the best.
        resume: where to go on.
    """

    def __init__(
        self,
        model: CoMask,
        config: Config,
        dataset: TrainingSet,
        categories: tuple[Category, ...],
        output: Path,
        *,
        evaluate: Evaluator | None,
        resume: Checkpoint | None = None,
    ) -> None:
        self.model, self.config, self.dataset = model, config, dataset
        self.categories, self.output, self.evaluate = categories, output, evaluate
        self.objective = Objective(model)
        self.optimizer = build_optimizer(model, config.train)
        self.step = 0
        self.best_ap = -1.0
        self.metrics: CocoMetrics | None = None  # of the last evaluation
        torch.manual_seed(config.train.seed)
        if resume:
            load_weights(model, resume.model)
            self.optimizer.load_state_dict(resume.optimizer)
            self.step, self.best_ap = resume.step, resume.best_ap
            torch.set_rng_state(resume.rng)
        self.record = RunRecord(output, keep_until=self.step)
        self.steps_per_epoch = math.ceil(len(dataset) / config.train.batch_size)
        self.total_steps = config.train.epochs * self.steps_per_epoch
        if config.train.max_steps >= 0:
            self.total_steps = min(self.total_steps, config.train.max_steps)

    def train(self) -> None:
        """Runs to the last step, evaluating after every `evaluate_every` epochs and at the end.

        Raises:
            TrainingError: when a loss is not finite.
        """
        train = self.config.train
        with Progress("training", self.total_steps, done=self.step) as progress:
            while self.step < self.total_steps:
                epoch, done = divmod(self.step, self.steps_per_epoch)
                batches = epoch_batches(self.dataset, train.batch_size, train.seed, epoch)
                todo = batches[done : done + self.total_steps - self.step]
                self.model.train()
                for batch in load_batches(self.dataset, todo, workers=self.config.data.workers):
                    progress.advance(note=self.train_step(batch, epoch))
                    if self.step % train.checkpoint_every == 0:
                        self.save("checkpoint-last.pt")
                last = self.step == self.total_steps
                if self.evaluate and (last or (epoch + 1) % train.evaluate_every == 0):
                    self.run_evaluation(epoch)
        self.save("checkpoint-last.pt")
        if not (self.output / "checkpoint-best.pt").exists():
            self.save("checkpoint-best.pt")

    def train_step(self, batch: Batch, epoch: int) -> str:
        """One optimiser step; returns a note for the progress display."""
        rate = learning_rate(self.config.train, self.step, self.steps_per_epoch, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        device = self.model.mean.device
        losses = self.objective(
            batch.images.to(device),
            batch.image_sizes.to(device),
            [target.to(device) for target in batch.targets],
        )
        total = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(total):
            parts = ", ".join(f"{name} {loss.item():.3g}" for name, loss in losses.items())
            raise TrainingError(
                f"the loss is not finite at step {self.step} ({parts}), images {batch.image_ids}; "
                f"lower train.learning_rate or raise train.warmup_steps, then go on with --resume"
            )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        self.step += 1
        values = {name: loss.item() for name, loss in losses.items()}
        self.record.add_losses(self.step, epoch, rate, values)
        return f"loss {total.item():.3f}  " + "  ".join(f"{k} {v:.3f}" for k, v in values.items())

    def run_evaluation(self, epoch: int) -> None:
        """Scores the model, records it, and keeps it when it is the best so far."""
        assert self.evaluate is not None
        self.model.eval()
        self.metrics = self.evaluate(self.model)
        self.record.add_metrics(self.step, epoch, self.metrics)
        ap = self.metrics.values["segm"]["AP"]
        if ap > self.best_ap:
            self.best_ap = ap
            self.save("checkpoint-best.pt")

    def save(self, name: str) -> None:
        """Writes the present state as `name`."""
        save_checkpoint(
            self.output / name,
            Checkpoint(
                config=self.config,
                categories=self.categories,
                model=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                step=self.step,
                best_ap=self.best_ap,
                rng=torch.get_rng_state(),
            ),
        )

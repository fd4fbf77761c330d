"""The training loop: data → step → optimiser → teacher → log → checkpoint. No maths."""

import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich import print as rich_print
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fsr_fast.config import Config
from fsr_fast.dataloading.batch import Batch
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.dataloading.torch_pipeline import build_train_loader
from fsr_fast.engine import build_step
from fsr_fast.errors import UserError
from fsr_fast.evaluation.evaluator import Evaluation, evaluate_network
from fsr_fast.models.build import build_network, without_start
from fsr_fast.optim import build_optimiser, fill_missing_gradients, set_learning_rate
from fsr_fast.reporting.pictures import evaluation_grid, training_grid
from fsr_fast.reporting.progress import TrainingProgress
from fsr_fast.reporting.tables import score_table
from fsr_fast.reporting.tracking import Tracker, read_metrics
from fsr_fast.runtime.checkpoint import read_checkpoint, write_checkpoint
from fsr_fast.runtime.distributed import Process, sum_over_ranks, wait_for_all, world_size
from fsr_fast.runtime.run_folder import claim_run_folder, open_run_folder
from fsr_fast.runtime.seeding import stream
from fsr_fast.schedules import schedule_at
from fsr_fast.step import StepOutput

PICTURES = 6
"""Images in a picture grid."""


class Trainer:
    """One run, from its configuration to its summary.

    Args:
        config: the whole configuration.
        process: this process among all.

    Raises:
        UserError: anything in the configuration, the data or the run folder that cannot work; nothing is written then.
    """

    def __init__(self, config: Config, process: Process) -> None:
        self.config = config
        self.process = process
        if config.optim.batch_size % process.world_size:
            raise UserError(
                f"optim.batch_size: {config.optim.batch_size} images cannot be shared by "
                f"{process.world_size} processes; give a multiple of {process.world_size}"
            )
        newest = claim_run_folder(config)
        self.train_set, self.val_set = build_datasets(config.data)
        torch.manual_seed(config.run.seed)
        model = config.model if newest is None else without_start(config.model)
        self.network = build_network(model, self.train_set.classes, config.data.image_size).to(process.device)
        self.step = build_step(self.network, config, self.train_set.max_labels).to(process.device)
        self.optimiser = build_optimiser(self.network, config.optim)
        self.iteration = 0
        self.tracker: Tracker | None = None
        self.loader = build_train_loader(
            self.train_set,
            config.data,
            config.augment,
            batch_size=config.optim.batch_size // process.world_size,
            rank=process.rank,
            world_size=process.world_size,
            seed=config.run.seed,
            mean=self.network.mean,
            std=self.network.deviation,
        )
        if newest is not None:
            self._restore(read_checkpoint(newest), newest)

    def run(self) -> dict[str, Any]:
        """Train to the end, evaluate, and write the summary.

        Returns:
            The content of summary.json; empty on all processes but the first.

        Raises:
            UserError: the loss is no longer finite.
        """
        wait_for_all()  # every process has looked at the folder before the first one fills it
        if self.process.is_main:
            open_run_folder(self.config)
            self.tracker = Tracker(self.config.run.output, iteration=self.iteration)
        forward = self._distribute()
        optim = self.config.optim
        averages = _Averages()
        progress = TrainingProgress(optim.iterations, start=self.iteration, device=self.process.device)
        with progress:
            while self.iteration < optim.iterations:
                began = time.perf_counter()
                batch = next(self.loader)
                waited = time.perf_counter() - began
                output = self._iterate(forward, batch)
                averages.add(output)
                progress.step(images=optim.batch_size, data_seconds=waited)
                if self._is_due(self.config.run.log_every):
                    losses = averages.take()
                    rates = progress.report(losses["total"])
                    self._log(losses, rates)
                self._record(batch, output, progress)
        return self._finish()

    def close(self) -> None:
        """Stop the loader's processes and write out what is buffered."""
        self.loader.close()
        if self.tracker is not None:
            self.tracker.close()

    def _iterate(self, forward: torch.nn.Module, batch: Batch) -> StepOutput:
        config, device = self.config, self.process.device
        schedule = schedule_at(config, self.iteration)
        set_learning_rate(self.optimiser, schedule.learning_rate_factor)
        views = tuple(view.to(device, non_blocking=True) for view in batch.views)
        labels = batch.labels.to(device, non_blocking=True)
        rank = self.process.rank if config.run.seed_per_rank else 0
        draws = self.step.draw(len(labels), stream(config.run.seed, "step", rank, self.iteration))

        output: StepOutput = forward(views, labels, draws, schedule)
        self.optimiser.zero_grad()
        output.loss.backward()
        fill_missing_gradients(self.optimiser)
        if config.optim.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.optim.clip_norm, foreach=True)
        self.optimiser.step()
        self.step.teacher.follow(self.network, schedule.encoder_momentum, schedule.projector_momentum)
        self.iteration += 1
        return output

    def _record(self, batch: Batch, output: StepOutput, progress: TrainingProgress) -> None:
        run, tracker = self.config.run, self.tracker
        if tracker and output.pseudo_labels is not None and self._is_due(run.picture_every, last=False):
            with progress.paused():
                images = self.step.denormalise(batch.views[0])
                grid = training_grid(images, output, self.network.classes, self.network.encoder.grid, PICTURES)
                tracker.pictures(self.iteration, grid, "training")
        if tracker and self._is_due(run.checkpoint_every):
            with progress.paused():
                write_checkpoint(run.output, self._state())
        if self._is_due(run.evaluate_every, last=False) and self.iteration < self.config.optim.iterations:
            with progress.paused():
                evaluation = evaluate_network(self.network, self.val_set, self.config, self.process)
            if tracker:
                tracker.log(self.iteration, _mean_ious(evaluation))

    def _log(self, losses: dict[str, float], rates: dict[str, float]) -> None:
        if not math.isfinite(losses["total"]):
            raise UserError(
                f"the loss is {losses['total']} at iteration {self.iteration} ({losses}); "
                "start again in another run.output with a lower optim.learning_rate or with optim.clip_norm"
            )
        if self.tracker is not None:
            rate = self.optimiser.param_groups[0]["lr"]
            named = {f"loss/{name}": value for name, value in losses.items()}
            self.tracker.log(self.iteration, {**named, "learning_rate": rate, **rates})

    def _finish(self) -> dict[str, Any]:
        evaluation = evaluate_network(self.network, self.val_set, self.config, self.process, examples=PICTURES)
        if self.tracker is None:
            return {}
        picture = self.tracker.pictures(
            self.iteration, evaluation_grid(evaluation.examples, self.network.classes), "validation"
        )
        rates = [
            line["images_per_second"] for line in read_metrics(self.config.run.output) if "images_per_second" in line
        ]
        summary = {
            "iterations": self.iteration,
            **_mean_ious(evaluation),
            "images_per_second": statistics.median(rates) if rates else None,
            "picture": str(picture),
            "results": evaluation.results,
        }
        path = self.tracker.summary(summary)
        rich_print(score_table(evaluation.results))
        print(f"summary: {path}\npicture: {picture}", flush=True)
        return summary

    def _is_due(self, every: int, *, last: bool = True) -> bool:
        return (every > 0 and self.iteration % every == 0) or (last and self.iteration == self.config.optim.iterations)

    def _state(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "config": self.config.model_dump(mode="json"),
            "classes": list(self.network.classes),
            "student": self.network.state_dict(),
            "teacher": self.step.teacher.state_dict(),
            "centres": self.step.distillation.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "loader": self.loader.state_dict(),
        }

    def _restore(self, state: dict[str, Any], origin: Path) -> None:
        try:
            self.network.load_state_dict(state["student"])
            self.step.teacher.load_state_dict(state["teacher"])
            self.step.distillation.load_state_dict(state["centres"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.loader.load_state_dict(state["loader"])
            self.iteration = state["iteration"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{origin}: does not fit this run ({' '.join(str(error).split()[:30])}); delete it"
            ) from None

    def _distribute(self) -> torch.nn.Module:
        if self.process.world_size == 1:
            return self.step
        devices = [self.process.device] if self.process.device.type == "cuda" else None
        # stages that a weight of 0 switches off leave parameters without gradient
        return DistributedDataParallel(
            self.step, device_ids=devices, broadcast_buffers=False, find_unused_parameters=True
        )


class _Averages:
    """Losses since the last log line, added up on the device and read when asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, output: StepOutput) -> None:
        for name, value in {**output.losses, "total": output.loss.detach()}.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        means = torch.stack([value.float() / self._counts[name] for name, value in self._sums.items()])
        values = (sum_over_ranks(means) / world_size()).tolist()
        named = dict(zip(self._sums, values, strict=True))
        self._sums.clear()
        self._counts.clear()
        return named


def _mean_ious(evaluation: Evaluation) -> dict[str, float]:
    return {f"{name}_miou": result["mean_iou"] for name, result in evaluation.results.items()}

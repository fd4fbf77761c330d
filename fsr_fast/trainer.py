"""The training loop: data → step → optimiser → teacher → log → checkpoint. No maths."""

import functools
import logging
import time
from pathlib import Path
from typing import Any

import torch
from rich import print as rich_print
from torch import Tensor

from fsr_fast.config import Config, untrained_decoder
from fsr_fast.dataloading.batch import Batch
from fsr_fast.dataloading.build import build_train_loader
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.dataloading.fingerprint import fingerprint, first_difference
from fsr_fast.dataloading.measured import measure, read_measured
from fsr_fast.dataloading.reading import given_window
from fsr_fast.dataloading.stream import BAD_FILES
from fsr_fast.engine import build_step, keep_backends
from fsr_fast.errors import UserError
from fsr_fast.evaluation.evaluator import Evaluation, evaluate_network
from fsr_fast.evaluation.label_scores import score_labels
from fsr_fast.method.optim import build_optimiser, fill_missing_gradients, set_learning_rate
from fsr_fast.method.schedules import reaches_all, schedule_at
from fsr_fast.method.step import StepOutput
from fsr_fast.models.build import build_network, reading_of, takes_measured, without_start
from fsr_fast.models.pretrained import StartWeights, describe_start
from fsr_fast.plugins import BACKBONES
from fsr_fast.reporting.averages import Averages
from fsr_fast.reporting.loggers import check_loggers
from fsr_fast.reporting.pictures import evaluation_grid, training_grid
from fsr_fast.reporting.summary import mean_ious, mean_label_scores, median_rates
from fsr_fast.reporting.tables import label_table, score_table
from fsr_fast.reporting.tracking import Tracker, read_metrics
from fsr_fast.runtime.checkpoint import TrainState, read_newest
from fsr_fast.runtime.cores import OtherPrograms
from fsr_fast.runtime.distributed import Process, distribute, wait_for_all
from fsr_fast.runtime.files import write_json
from fsr_fast.runtime.guard import NonFiniteGuard, gradient_norm
from fsr_fast.runtime.loading import RestartingLoader
from fsr_fast.runtime.log import LOGGER
from fsr_fast.runtime.precision import measure_ceiling
from fsr_fast.runtime.run_folder import claim_run_folder, open_run_folder
from fsr_fast.runtime.seeding import stream
from fsr_fast.runtime.sharding import shard_step, whole_weights
from fsr_fast.runtime.signals import Stopped
from fsr_fast.runtime.supervision import Supervisor
from fsr_fast.runtime.terminal import TrainingProgress

INPUT_FILE = "input.json"
"""In the run folder: window, mean and standard deviation measured over the training pictures."""
PICTURES = 6
"""Images in a picture grid."""


logger = logging.getLogger(__name__)
_ceiling = functools.cache(measure_ceiling)


class Trainer:
    """One run, from its configuration to its summary.

    Args:
        config: the whole configuration.
        process: this process among all.

    Raises:
        UserError: the configuration, the data or the run folder cannot work; nothing is written then.
    """

    def __init__(self, config: Config, process: Process) -> None:
        others = OtherPrograms()
        self.config = config
        self.process = process
        if config.optim.batch_size % process.world_size:
            raise UserError(
                f"optim.batch_size: {config.optim.batch_size} images cannot be divided among "
                f"{process.world_size} processes; give a multiple of {process.world_size}"
            )
        check_loggers(config.run.loggers)
        newest = self._newest = claim_run_folder(config)
        if reason := untrained_decoder(config, config.optim.iterations):
            LOGGER.warning("%s", reason)
        self.train_set, self.val_set = build_datasets(config.data, reading_of(config, given_window(config.data)))
        self._fingerprint = fingerprint(self.train_set, contents=config.data.fingerprint == "contents")
        torch.manual_seed(config.run.seed)
        model = config.model if newest is None else without_start(config.model)
        state, origin = (None, None) if newest is None else read_newest(config.run.output)
        measured = (
            measure(self.train_set, config.data, self.train_set.reading, normalisation=takes_measured(model))
            if state is None
            else read_measured(state.get("input"), model.in_chans, str(origin))
        )
        network = build_network(model, self.train_set.classes, config.data.image_size, measured)
        network.reading = reading_of(config, network.reading.window)
        self.train_set, self.val_set = (images.read_as(network.reading) for images in (self.train_set, self.val_set))
        self.network = network.to(process.device)
        self.step = build_step(self.network, config, self.train_set.max_labels).to(process.device)
        on_cpu = process.device.type == "cpu" and process.world_size == 1
        if on_cpu and (advice := others.advice(torch.get_num_threads())):
            LOGGER.warning("%s", advice)
        if config.run.shard:
            shard_step(self.step, process, config.run.amp)
        self.start = describe_start(model)
        self.optimiser = build_optimiser(self.network, config.optim)
        self.guard = NonFiniteGuard(self.optimiser, self.step.distillation.buffers())
        self.tracker: Tracker | None = None
        self._shared: tuple[bool, torch.nn.Module] | None = None
        self.loader = RestartingLoader(
            build_train_loader(
                self.train_set,
                config.data,
                config.augment,
                batch_size=config.optim.batch_size // process.world_size,
                rank=process.rank,
                world_size=process.world_size,
                seed=config.run.seed,
                mean=self.network.mean,
                std=self.network.std,
                device=process.device,
                bad_files=config.run.output / BAD_FILES,
            )
        )
        self.train_state = TrainState(
            student=self.network,
            teacher=self.step.teacher,
            centres=self.step.distillation,
            optimiser=self.optimiser,
            loader=self.loader,
            guard=self.guard,
        )
        self.iteration = 0 if state is None or origin is None else self._restore(state, origin)
        self._missed = self._has_missed()
        self.supervisor = Supervisor(config.run, process, self._state, None if newest is None else self.iteration)

    def run(self) -> dict[str, Any]:
        """Train to the end, evaluate, and write the summary.

        Returns:
            The content of summary.json; empty on all processes but the first.

        Raises:
            UserError: the losses are no longer finite, an image cannot be read, another run has the folder.
            Stopped: SIGTERM or SIGINT came; the state is saved.
        """
        wait_for_all()  # every process has checked the folder before the first one fills it
        with self.supervisor:
            logger.info("start weights: %s", self.start or "none")
            if self.process.is_main:
                if claim_run_folder(self.config, locked=True) != self._newest:
                    raise UserError(
                        f"run.output: another process has trained in {self.config.run.output} while this one started; "
                        "repeat the command: it resumes from what is there now"
                    )
                open_run_folder(self.config)
                if self.network.reading.window is not None or takes_measured(self.config.model):
                    write_json(self.config.run.output / INPUT_FILE, self._input())
                run = self.config.run
                if self.iteration >= self.config.optim.iterations:
                    print(f"{run.output}: finished at iteration {self.iteration}; only its last evaluation is left")
                described = self.config.model_dump(mode="json")
                self.tracker = Tracker(run.output, iteration=self.iteration, loggers=run.loggers, config=described)
            self._train()
            return self._finish()

    def close(self) -> None:
        """Stop the loader's processes and write out what is buffered."""
        self.loader.close()
        if self.tracker is not None:
            self.tracker.close()

    def _restore(self, state: dict[str, Any], origin: Path) -> int:
        learned = tuple(state.get("classes", ()))
        if learned != self.network.classes:  # e.g. after classes.txt was re-sorted
            raise UserError(
                f"{origin}: learned the classes {learned}, but the data have {self.network.classes}; restore the "
                "data's names and order, or give another --run.output"
            )
        recorded = state.get("training_set")  # None in checkpoints of earlier versions
        if isinstance(recorded, Tensor) and self.config.data.fingerprint != "off":
            difference = first_difference(recorded, self._fingerprint, self.train_set)
            if difference is not None:
                raise UserError(
                    f"{origin}: the training set has changed since: {difference}; restore it, give another "
                    "--run.output, or resume all the same with --data.fingerprint off"
                )
        self.start = state.get("start") and StartWeights(**state["start"])
        keep_backends(self.step, self.config, state.get("attention", ()), self.process.device)
        return self.train_state.restore(state, origin)

    def _train(self) -> None:
        optim = self.config.optim
        averages = Averages()
        device, processes = self.process.device, self.process.world_size
        ceiling = processes * _ceiling(device, self.config.run.amp)
        progress = TrainingProgress(optim.iterations, start=self.iteration, device=device, ceiling=ceiling)
        with progress:
            if self._missed:
                self._validate(progress)
            while self.iteration < optim.iterations:
                self.supervisor.beat(f"the data of iteration {self.iteration + 1}")
                began = time.perf_counter()
                batch = self._next_batch()
                waited = time.perf_counter() - began
                self.supervisor.beat(f"the computation of iteration {self.iteration + 1}")
                output, skipped = self._iterate(self._shared_step(), batch)
                averages.add({**output.losses, "total": output.loss}, skipped)
                flops = processes * output.work.flops if output.work else 0.0
                progress.step(images=optim.batch_size, data_seconds=waited, flops=flops)
                if self._is_due(self.config.run.log_every):
                    self._log(averages, progress)
                self.supervisor.boundary(self.iteration)
                self._record(batch, output, progress)

    def _shared_step(self) -> torch.nn.Module:
        """Wrap the step in DDP; again once the decoder trains, since DDP need not search for unused parameters then."""
        reached = reaches_all(self.config, self.iteration)
        if self._shared is None or self._shared[0] != reached:
            self._shared = None  # its hooks are removed before new ones are set
            self._shared = reached, distribute(self.step, self.process, all_reached=reached)
        return self._shared[1]

    def _next_batch(self) -> Batch:
        position = self.loader.state_dict()
        try:
            with self.supervisor.waiting():
                return next(self.loader)
        except Stopped as stopped:
            self.loader.load_state_dict(position)  # a batch that arrived at this moment was not trained on
            self.supervisor.save_and_stop(stopped, self.iteration, together=self.process.world_size == 1)
            raise

    def _iterate(self, forward: torch.nn.Module, batch: Batch) -> tuple[StepOutput, Tensor]:
        config, device = self.config, self.process.device
        schedule = schedule_at(config, self.iteration)
        set_learning_rate(self.optimiser, schedule.learning_rate_factor)
        views = tuple(view.to(device, non_blocking=True) for view in batch.views)
        labels = batch.labels.to(device, non_blocking=True)
        rank = self.process.rank if config.run.seed_per_rank else 0
        draws = self.step.draw(len(labels), stream(config.run.seed, "step", rank, self.iteration))

        self.guard.hold()
        self.optimiser.zero_grad()  # before the memory of the last gradients may be used again
        output: StepOutput = forward(views, labels, draws, schedule)
        output.loss.backward()
        parameters = fill_missing_gradients(self.optimiser)
        skipped = self.guard.judge(output.loss, gradient_norm(parameters, config.optim.clip_norm))
        self.optimiser.step()
        self.step.teacher.update_ema(self.network, schedule.encoder_momentum, schedule.projector_momentum, skipped)
        self.iteration += 1
        return output, skipped

    def _record(self, batch: Batch, output: StepOutput, progress: TrainingProgress) -> None:
        run, tracker = self.config.run, self.tracker
        if tracker and output.pseudo_labels is not None and self._is_due(run.picture_every, last=False):
            with progress.paused():
                grid = training_grid(self.step, batch.views, output, PICTURES)
                tracker.pictures(self.iteration, grid, "training")
        if self._is_due(run.checkpoint_every):
            self.supervisor.save()
        if self._validates():
            self._validate(progress)

    def _validates(self) -> bool:
        due = self._is_due(self.config.run.evaluate_every, last=False)
        return due and self.iteration < self.config.optim.iterations

    def _validate(self, progress: TrainingProgress) -> None:
        with progress.paused():
            if len(self.val_set):
                scores = mean_ious(self._evaluate(during_training=True))
            else:
                scores = mean_label_scores(self._score_labels())
        if self.tracker is not None:
            self.tracker.log(self.iteration, scores)

    def _has_missed(self) -> bool:
        """Return whether the run was ended during the evaluation after the checkpoint that it resumes from."""
        if not self.iteration or not self._validates():
            return False
        lines = read_metrics(self.config.run.output)
        return not any(line["iteration"] == self.iteration and {"seg_miou", "label_ap"} & line.keys() for line in lines)

    def _evaluate(self, *, examples: int = 0, during_training: bool = False) -> Evaluation:
        with self.supervisor.interlude(), whole_weights(self.step, self.network):
            evaluation = evaluate_network(
                self.network,
                self.val_set,
                self.config,
                self.process,
                examples=examples,
                during_training=during_training,
            )
        self.supervisor.mark_best(mean_ious(evaluation)["seg_miou"])
        return evaluation

    def _score_labels(self) -> dict[str, Any]:
        """Score the classifier on training pictures: the only scores without a list of pictures with masks."""
        with self.supervisor.interlude(), whole_weights(self.step, self.network):
            scores = score_labels(self.network, self.train_set, self.config, self.process)
        self.supervisor.mark_best(mean_label_scores(scores)["label_ap"])
        return scores

    def _log(self, averages: Averages, progress: TrainingProgress) -> None:
        losses, (in_row, skipped) = averages.take(self.guard.counts)
        rates = progress.report(losses["total"])
        if self.tracker is not None:
            rate = self.optimiser.param_groups[0]["lr"]
            named = {f"loss/{name}": value for name, value in losses.items()}
            self.tracker.log(self.iteration, {**named, "learning_rate": rate, "skipped": skipped, **rates})
        self.supervisor.check(in_row, self.iteration)

    def _finish(self) -> dict[str, Any]:
        evaluation = self._evaluate(examples=PICTURES) if len(self.val_set) else None
        labels = self._score_labels() if evaluation is None else None
        self.supervisor.finish()
        if self.tracker is None:
            return {}
        summary: dict[str, Any] = {"iterations": self.iteration, **median_rates(read_metrics(self.config.run.output))}
        summary["start_weights"] = self.start and self.start._asdict()
        summary["checkpoint_wait"] = self.supervisor.saving_share()
        if evaluation is not None:
            summary |= {**mean_ious(evaluation), "results": evaluation.results}
            rich_print(score_table(evaluation.results))
            if evaluation.examples:  # empty if the first images could not be evaluated
                grid = evaluation_grid(evaluation.examples, self.network.classes)
                picture = self.tracker.pictures(self.iteration, grid, "validation")
                if picture is not None:
                    summary["picture"] = str(picture)
                    print(f"picture: {picture}")
        if labels is not None:
            summary |= {**mean_label_scores(labels), "labels": labels}
            rich_print(label_table(labels))
            print(
                "no list of pictures with masks (data.val_list): these are scores of the image labels of the training"
            )
        print(f"summary: {self.tracker.summary(summary)}")
        run = self.config.run.output
        model, plugins = self.config.model, self.config.run.plugins
        named = f" --run.plugins {' '.join(plugins)}" if model.backbone in BACKBONES else ""
        print(f"next: fsr-fast report {run}, or fsr-fast predict --checkpoint {run} PICTURES{named}", flush=True)
        return summary

    def _is_due(self, every: int, *, last: bool = True) -> bool:
        return (every > 0 and self.iteration % every == 0) or (last and self.iteration == self.config.optim.iterations)

    def _input(self) -> dict[str, Any]:
        """Return what was measured once over the training pictures and belongs to the network."""
        window = self.network.reading.window
        return {
            "window": None if window is None else [list(ends) for ends in window],
            "mean": list(self.network.mean),
            "std": list(self.network.std),
        }

    def _state(self) -> dict[str, Any]:
        described = {
            "config": self.config.model_dump(mode="json"),
            "classes": list(self.network.classes),
            "start": self.start and self.start._asdict(),
            "training_set": self._fingerprint,
            "attention": list(self.network.encoder.attention),
            "input": self._input(),
        }
        return self.train_state.state(self.iteration, described)

"""When a run saves, how it resumes from a checkpoint, and how it stops after a signal."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from ipt.errors import UserError
from ipt.stage import installed_versions
from ipt.training.checkpoint.remote import upload
from ipt.training.checkpoint.signals import REQUEUE, RankConsensus, StopSignals
from ipt.training.checkpoint.state import TrainingState, random_state, set_random_state
from ipt.training.checkpoint.storage import (
    FORMAT,
    METRICS,
    Snapshot,
    check_files,
    checkpoint_name,
    prune,
    read_facts,
    read_random,
    read_tensors,
    remove_leftovers,
    whole_checkpoints,
    write_checkpoint,
)
from ipt.training.lightning_private import replace_epoch_loop, resume_at
from ipt.training.module import PretrainingModule

TIMEOUT = timedelta(hours=2)  # for the slowest process to write its part

log = logging.getLogger(__name__)


class Checkpoints(Callback):
    """Saves by steps and by time, when a signal stops the run, and always after the last step, so
    that a failed export loses no steps. Before the first step, it resumes from the newest complete
    checkpoint.

    At most one checkpoint is being written at a time: the next save and the end of the run wait for
    it. `run` is the key of the run (ipt.training.run_key), and `about` is stored in each checkpoint
    for exports.
    """

    def __init__(self, output: Path, run: str, about: dict[str, Any], remote: str | None) -> None:
        self.folder = output / "checkpoints"
        self.metrics = output / METRICS
        self.run = run
        self.about = about
        self.remote = remote
        self.stopped_by: str | None = None
        self.failed_uploads = 0
        self.sequences = 0  # that all processes together have trained on
        self._earlier_seconds = 0.0
        self._signals = StopSignals()
        self._step = self._saved = self._uploading = -1
        self._requested = False  # a checkpoint by time
        self._random: dict[str, Any] | None = None  # to restore at the first batch

    def seconds(self) -> float:
        """Duration of the training so far, with loading and saving: of this start, and of earlier
        starts up to the checkpoint that the next one resumed from.
        """
        return self._earlier_seconds + monotonic() - self._started

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self._started = monotonic()
        replace_epoch_loop(trainer)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._uploads = ThreadPoolExecutor(1, "upload")
        self._writing: Future[None] | None = None
        self._sending: Future[None] | None = None
        # Process groups on the host, because writing runs in another thread and must not interfere
        # with the collectives of the training.
        self._group = self._signal_group = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
            self._signal_group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._consensus = RankConsensus(self._signal_group if trainer.world_size > 1 else None)

    # Resuming
    # ----------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Runs when everything is built, and before the data loader is created."""
        assert isinstance(module, PretrainingModule)
        self._config = module.config
        from_scratch = bool(module.config.architecture)
        self._state = TrainingState(
            module, module.model, trainer.optimizers[0], frozen=from_scratch
        )
        pinned = module.device.type == "cuda"
        self._stager = DefaultStager(StagingOptions(pinned, False, False, pinned))
        if trainer.is_global_zero:
            remove_leftovers(self.folder)
        newest = trainer.strategy.broadcast(next(reversed(whole_checkpoints(self.folder)), None))
        if newest is not None:
            self._resume(trainer, newest)
        elif trainer.is_global_zero:
            self.metrics.unlink(missing_ok=True)

    def _resume(self, trainer: L.Trainer, checkpoint: Path) -> None:
        facts = read_facts(checkpoint)
        if facts["run"] != self.run:
            raise UserError(
                f"{checkpoint} belongs to a run with other data or settings: choose another "
                "output_dir, or remove its checkpoints"
            )
        check_files(checkpoint, self._group)
        self._state.prepare()
        read_tensors(checkpoint, self._state.tensors(), self._group)
        trainer.lr_scheduler_configs[0].scheduler.load_state_dict(facts["schedule"])
        for group, rate in zip(trainer.optimizers[0].param_groups, facts["lr"], strict=True):
            group["lr"] = rate
        self._step = self._saved = facts["step"]
        self.sequences = facts["sequences"]
        self._earlier_seconds = facts.get("seconds", 0.0)  # early checkpoints do not have it
        resume_at(trainer, self._step)
        if facts["processes"] == trainer.world_size:
            self._random = read_random(checkpoint, trainer.global_rank)
        else:
            # The checkpoint has no random state for each process.
            entropy = [self._config.seed, self._step, trainer.global_rank]
            seed = np.random.SeedSequence(entropy).generate_state(1)[0]
            L.seed_everything(int(seed), verbose=False)
        if trainer.is_global_zero:
            self.metrics.write_bytes((checkpoint / METRICS).read_bytes())
            log.info("resuming from step %s: %s", self._step, checkpoint)

    # Saving
    # ----------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self._clock = monotonic()
        self._signals.install()  # after Lightning has installed its own handlers

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not earlier: creating the loader draws a random number, as it did when the run started.
        if self._random is not None:
            set_random_state(self._random)
            self._random = None

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self._step:
            return  # not the last micro-batch of a step
        self._step = trainer.global_step
        self.sequences = self._step * self._config.trainer.global_batch_size
        due = self._is_due()
        requests = trainer.is_global_zero and not due and self._time_is_up()
        requested, stop = self._consensus.exchange([requests, self._signals.received])
        if due or requested:
            self.save(trainer)
        if stop and self._step < self._config.trainer.max_steps:
            self._stop(trainer, stop)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._consensus.last()
        if not self.stopped_by and self._step != self._saved:
            self._save_last(trainer)
        self.wait()
        self._signals.restore()

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        self._signals.restore()

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        for thread in (self._thread, self._uploads):
            thread.shutdown(wait=False)

    def save(self, trainer: L.Trainer) -> None:
        """Copy the run's state to host memory and write it, in the background with
        `checkpoint.async_save`. All processes call it.
        """
        self._wait_for_writing()
        tensors = self._state.tensors()
        facts = {
            "format": FORMAT,
            "run": self.run,
            "step": self._step,
            "sequences": self.sequences,
            "seconds": self.seconds(),
            "processes": trainer.world_size,
            "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "lr": [group["lr"] for group in trainer.optimizers[0].param_groups],
            "config": asdict(self._config),
            "about": self.about,
            "versions": installed_versions(),
            "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
        }
        metrics = self.metrics.read_bytes() if trainer.is_global_zero else b""
        if torch.cuda.is_available():
            # Copies of paged state, which is in host memory, are not ordered after the step.
            torch.cuda.synchronize()
        staged = self._stager.stage(tensors)
        assert isinstance(staged, dict)  # not a future: the options above exclude it
        snapshot = Snapshot(staged, random_state(), facts, metrics)
        self._writing = self._thread.submit(self._write, snapshot, trainer.is_global_zero)
        self._saved = self._step
        self._clock = monotonic()
        self._requested = False
        if not self._config.checkpoint.async_save:
            self._wait_for_writing()

    def _save_last(self, trainer: L.Trainer) -> None:
        """Save the last step. If the disk is full, the export, which is smaller, may still fit."""
        self._wait_for_writing()
        saved = self._saved
        try:
            self.save(trainer)
            self._wait_for_writing()
        except OSError as error:
            self._saved = saved
            log.warning(
                f"step {self._step} could not be saved ({error}); the model is exported anyway"
            )

    def wait(self) -> None:
        """Wait until the checkpoint is written and the newest one is uploaded. Raises the error of
        the writing thread.
        """
        self._wait_for_writing()
        if self._sending is not None:
            self._sending.result()
            if self._uploading != self._saved and self.remote:
                self._upload(self.folder / checkpoint_name(self._saved), self.remote)
            prune(self.folder, self._config.checkpoint)

    def _write(self, snapshot: Snapshot, first: bool) -> None:
        checkpoint = self.folder / checkpoint_name(snapshot.facts["step"])
        write_checkpoint(checkpoint, snapshot, self._group)
        if not first:
            return
        if self.remote and (self._sending is None or self._sending.done()):
            self._uploading = snapshot.facts["step"]
            self._sending = self._uploads.submit(self._upload, checkpoint, self.remote)
        uploading = self.folder / checkpoint_name(self._uploading)
        prune(self.folder, self._config.checkpoint, keep=uploading)

    def _upload(self, checkpoint: Path, url: str) -> None:
        """A failed upload does not end the run; the next checkpoint is uploaded again."""
        try:
            upload(checkpoint, url, self._config.checkpoint)
        except UserError as error:
            self.failed_uploads += 1
            log.warning(f"{checkpoint.name} was not uploaded: {error}")

    def _wait_for_writing(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _stop(self, trainer: L.Trainer, stop: int) -> None:
        self.stopped_by = REQUEUE.name if stop == 2 else "SIGTERM"
        if self._saved != self._step:
            self.save(trainer)
        trainer.should_stop = True

    def _is_due(self) -> bool:
        config = self._config.checkpoint
        for steps in (config.every_n_train_steps, config.keep_every_n_steps):
            if steps and self._step % steps == 0:
                return True
        return False

    def _time_is_up(self) -> bool:
        """True once per checkpoint: with several processes, all of them know a step later."""
        minutes = self._config.checkpoint.every_n_minutes
        if minutes is None or self._requested or monotonic() - self._clock < 60 * minutes:
            return False
        self._requested = True
        return True

"""When a run saves, how it goes on from what it saved, and how it stops when it is told to."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from ipt.console import console
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
from ipt.training.module import PretrainingModule
from ipt.training.run_key import global_batch

TIMEOUT = timedelta(hours=2)  # that processes wait for the slowest one to write


class EpochLoop(_TrainingEpochLoop):
    """Lightning's, without its exchange of SIGTERM before each micro-batch, for which all devices
    wait; here there is one a step.
    """

    def _broadcast_sigterm_tensor(self) -> None:
        pass


class Checkpoints(Callback):
    """Saves by steps and by time, after the last step, and when a signal stops the run; before the
    first step, goes on from the newest whole checkpoint. After the last step it always saves: an
    export that fails then costs no steps.

    At most one checkpoint is being written at a time: the next one waits for it, and so does the
    end of the run. `run` says whose checkpoints these are, as
    `ipt.training.checkpoint.storage.run_key` does, and `about` is kept in them for exports.
    """

    def __init__(self, output: Path, run: str, about: dict[str, Any], remote: str | None) -> None:
        self.folder, self.metrics, self.run, self.about, self.remote = (
            output / "checkpoints",
            output / METRICS,
            run,
            about,
            remote,
        )
        self.stopped_by: str | None = None
        self.failed_uploads = 0
        self.sequences = 0  # that all processes together have been through
        self._earlier_seconds = 0.0
        self._signals = StopSignals()
        self._step = self._saved = self._uploading = -1
        self._asked = False
        self._random: dict[str, Any] | None = None  # states to go on with

    def seconds(self) -> float:
        """Of training so far, loading and saving included: of this start, and of earlier ones as
        far as it goes on from them.
        """
        return self._earlier_seconds + monotonic() - self._started

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self._started = monotonic()
        loop = trainer.fit_loop.epoch_loop
        trainer.fit_loop.epoch_loop = EpochLoop(trainer, loop.min_steps, loop.max_steps)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._uploads = ThreadPoolExecutor(1, "upload")
        self._writing: Future[None] | None = None
        self._sending: Future[None] | None = None
        # Groups of their own, on the host: writing goes on in another thread, and neither may meet
        # the training's collectives.
        groups = [
            dist.new_group(backend="gloo", timeout=TIMEOUT) if dist.is_initialized() else None
            for _ in range(2)
        ]
        self._group, self._agreement = (
            groups[0],
            RankConsensus(groups[1] if trainer.world_size > 1 else None),
        )

    # Going on from a checkpoint
    # ----------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Everything is built now; the loader is asked for next."""
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
                f"{checkpoint} is of a run with other data or settings: choose another output_dir, "
                "or remove its checkpoints"
            )
        check_files(checkpoint, self._group)
        self._state.prepare()
        tensors = self._state.tensors()
        read_tensors(checkpoint, tensors, self._group)
        self._state.put_back(tensors)
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        scheduler.load_state_dict(facts["schedule"])
        for group, rate in zip(trainer.optimizers[0].param_groups, facts["lr"], strict=True):
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], torch.Tensor) else rate
        self._step = self._saved = facts["step"]
        self.sequences = facts["sequences"]
        self._earlier_seconds = facts.get(
            "seconds", 0.0
        )  # the first checkpoints of this format have none
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = (
            self._step
        )  # what trainer.global_step reads
        loop._batches_that_stepped = self._step
        if facts["processes"] == trainer.world_size:
            self._random = read_random(checkpoint, trainer.global_rank)
        else:  # there is no state for each process: new ones from seed, step and process
            L.seed_everything(
                (self._config.seed * 1_000_003 + self._step * 1009 + trainer.global_rank) % 2**32,
                verbose=False,
            )
        if trainer.is_global_zero:
            self.metrics.write_bytes((checkpoint / METRICS).read_bytes())
            console.print(f"going on from step {self._step}: {checkpoint}")

    # Saving
    # ----------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self._clock = monotonic()
        self._signals.install()  # after Lightning has installed its own

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if (
            self._random is not None
        ):  # only now: the loader has drawn a seed, which the run that was left alone did at its start
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
            return  # within an accumulation
        self._step = trainer.global_step
        self.sequences = self._step * global_batch(self._config.trainer)
        due = self._is_due()
        ask = trainer.is_global_zero and not due and self._time_is_up()
        time_is_up, stop = self._agreement.exchange([ask, self._signals.received])
        if due or time_is_up:
            self.save(trainer)
        if stop and self._step < self._config.trainer.max_steps:
            self._stop(trainer, stop)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._agreement.last()
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
        """Copy the run's state to host memory, then write it, in the background if the config says
        so. All processes call it.
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
            "schedule": {
                name: value
                for name, value in trainer.lr_scheduler_configs[0].scheduler.state_dict().items()
                if _is_plain(value)
            },
            "lr": [float(group["lr"]) for group in trainer.optimizers[0].param_groups],
            "config": asdict(self._config),
            "about": self.about,
            "versions": installed_versions(),
            "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
        }
        metrics = self.metrics.read_bytes() if trainer.is_global_zero else b""
        if torch.cuda.is_available():
            # state that lies in host memory (paged) is not copied behind the step, as what is on
            # the GPU is
            torch.cuda.synchronize()
        staged = self._stager.stage(tensors)
        assert isinstance(staged, dict)  # not a promise: it was not asked to copy in the background
        snapshot = Snapshot(staged, random_state(), facts, metrics)
        self._writing = self._thread.submit(self._write, snapshot, trainer.is_global_zero)
        self._saved, self._clock, self._asked = self._step, monotonic(), False
        if not self._config.checkpoint.async_save:
            self._wait_for_writing()

    def _save_last(self, trainer: L.Trainer) -> None:
        """Save the last step. Without room for it the export, which is smaller, may still have
        room.
        """
        self._wait_for_writing()
        saved = self._saved
        try:
            self.save(trainer)
            self._wait_for_writing()
        except OSError as error:
            self._saved = saved
            message = (
                f"step {self._step} could not be saved ({error}); the model is exported all the "
                "same"
            )
            console.print(message, style="yellow", markup=False)

    def wait(self) -> None:
        """Until what is being written is there, and the newest checkpoint is copied. Raises what
        went wrong with the writing.
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
        if first:
            if self.remote and (self._sending is None or self._sending.done()):
                self._uploading = snapshot.facts["step"]
                self._sending = self._uploads.submit(self._upload, checkpoint, self.remote)
            prune(
                self.folder, self._config.checkpoint, self.folder / checkpoint_name(self._uploading)
            )

    def _upload(self, checkpoint: Path, url: str) -> None:
        """A copy that cannot be made does not end the run; the next checkpoint is tried again."""
        try:
            upload(checkpoint, url, self._config.checkpoint)
        except UserError as error:
            self.failed_uploads += 1
            console.print(
                f"{checkpoint.name} was not copied: {error}", style="yellow", markup=False
            )

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
        return any(
            steps and self._step % steps == 0
            for steps in (config.every_n_train_steps, config.keep_every_n_steps)
        )

    def _time_is_up(self) -> bool:
        """Told once; with several processes it takes a step until all know."""
        minutes = self._config.checkpoint.every_n_minutes
        if minutes is None or self._asked or monotonic() - self._clock < 60 * minutes:
            return False
        self._asked = True
        return True


def _is_plain(value: Any) -> bool:
    """Whether a part of a schedule's state is a value, and not the function that it was made of."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | None)

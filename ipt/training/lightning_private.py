"""Everything of Lightning that we use and that is private there.

tests/training/test_lightning_private.py fails when a new version of Lightning changes one of these
names.
"""

import lightning as L
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


class EpochLoop(_TrainingEpochLoop):
    """Lightning's loop without its collective for SIGTERM before each micro-batch, which makes all
    devices wait. `ipt.training.checkpoint.signals` exchanges signals once per optimizer step.
    """

    def _broadcast_sigterm_tensor(self) -> None:
        pass


def replace_epoch_loop(trainer: L.Trainer) -> None:
    """Let `trainer` run our EpochLoop."""
    loop = trainer.fit_loop.epoch_loop
    trainer.fit_loop.epoch_loop = EpochLoop(trainer, loop.min_steps, loop.max_steps)


def resume_at(trainer: L.Trainer, step: int) -> None:
    """Set `trainer.global_step`, and the step under which Lightning's own callbacks log."""
    loop = trainer.fit_loop.epoch_loop
    loop.manual_optimization.optim_step_progress.total.completed = step
    loop._batches_that_stepped = step

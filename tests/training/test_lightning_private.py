"""The private names of Lightning that we use still exist and do what we need."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import nn

from ipt.training.lightning_private import EpochLoop, replace_epoch_loop, resume_at


class TwoMicroBatches(L.LightningModule):
    """Takes an optimizer step after every second batch, as PretrainingModule does."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = nn.Linear(1, 1)

    def on_train_start(self) -> None:
        self.trainer.accumulate_grad_batches = 2

    def training_step(self, batch: torch.Tensor, batch_index: int) -> None:
        self.manual_backward(self.layer(batch).sum())
        if batch_index % 2:
            self.optimizers().step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(torch.ones(8, 1), batch_size=1)


@pytest.fixture
def trainer():
    return L.Trainer(
        accelerator="cpu",
        max_steps=5,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_the_loop_calls_the_method_that_ours_replaces():
    assert "_broadcast_sigterm_tensor" in _TrainingEpochLoop.advance.__code__.co_names
    assert "_broadcast_sigterm_tensor" in vars(EpochLoop)


def test_a_run_steps_in_our_loop_and_counts_the_steps_before_it(trainer):
    class Resume(L.Callback):
        def on_fit_start(self, trainer, module):
            resume_at(trainer, 3)

    trainer.callbacks.append(Resume())
    replace_epoch_loop(trainer)
    assert isinstance(trainer.fit_loop.epoch_loop, EpochLoop)
    trainer.fit(TwoMicroBatches())
    assert trainer.global_step == trainer.max_steps == 5
    assert trainer.fit_loop.epoch_loop.batch_progress.current.ready == 4
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == 5  # the step that loggers show

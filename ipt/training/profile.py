"""A trace of a few steps, for a look at where the time goes."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile, schedule

from ipt.console import console

WARM_UP, TRACED = (
    5,
    3,
)  # steps that are let go by, compilers and allocators settling; and steps in the trace


class TorchProfile(Callback):
    """Writes `trace-step-N.json.gz` of the first process to `folder` (for ui.perfetto.dev or
    chrome://tracing) and says where it is.
    """

    def __init__(self, folder: Path, max_steps: int) -> None:
        self.folder, self.max_steps = folder, max_steps
        self._profile: Any = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._step = trainer.global_step
        left = self.max_steps - self._step
        traced = min(TRACED, max(1, left - 1))
        ready = min(1, left - traced)  # a step in which the profiler itself settles
        self._profile = profile(
            activities=[
                ProfilerActivity.CPU,
                *([ProfilerActivity.CUDA] if torch.cuda.is_available() else []),
            ],
            schedule=schedule(
                wait=min(WARM_UP, left - traced - ready), warmup=ready, active=traced, repeat=1
            ),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._profile is not None and trainer.global_step != self._step:
            self._step = trainer.global_step
            self._profile.step()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, trace: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"trace-step-{self._step}.json.gz"
        trace.export_chrome_trace(str(path))
        console.print(f"profile: {path}")

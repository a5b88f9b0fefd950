"""What happens beside the training loop: metrics, progress, checkpoints that appear whole."""

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from ipt.console import progress
from ipt.training.flops import flops_per_token, peak_flops
from ipt.training.module import PretrainingModule


class StepMetrics(Callback):
    """Writes a line of `metrics.jsonl` and moves the progress bar at each optimizer step, and logs the same to the loggers."""

    def __init__(self, path: Path, max_steps: int, tokens_per_step: int, log_every: int) -> None:
        self.path, self.max_steps, self.tokens_per_step, self.log_every = path, max_steps, tokens_per_step, log_every
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, PretrainingModule)
        self._step = trainer.global_step
        self._flops, self._peak = flops_per_token(module.model, module.config.mixture.seq_len), peak_flops(module.device)
        if trainer.is_global_zero:
            _keep_steps(self.path, self._step)
            self._bar_context = progress("training", self.max_steps)
            self._bar = self._bar_context.__enter__()
            self._bar.advance(self._step)
        self._clock = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:
            return
        assert isinstance(module, PretrainingModule)
        self._step = trainer.global_step
        now = time.monotonic()
        speed = self.tokens_per_step / (now - self._clock) / trainer.world_size
        self._clock = now
        record = {
            "step": self._step,
            "tokens": self._step * self.tokens_per_step,
            **module.finish_step(),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "tokens_per_second": speed,
            "mfu": self._flops * speed / self._peak if self._peak else None,
            "skipped": 0,
        }
        if trainer.is_global_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            self._bar.advance(1, f"loss {record['loss']:.3f}  {speed:,.0f} tokens/s per device")
        if trainer.loggers and self._step % self.log_every == 0:
            module.log_dict({name: value for name, value in record.items() if value is not None and name != "step"})

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if hasattr(self, "_bar_context"):
            self._bar_context.__exit__(None, None, None)
            del self._bar_context


def _keep_steps(path: Path, last: int) -> None:
    """Drop the lines of steps that a resumed run is about to take again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= last]
        path.write_text("".join(line + "\n" for line in lines))

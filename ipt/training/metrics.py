"""Numbers while a run goes on: a line of metrics.jsonl, the progress bar and the loggers, at each
optimizer step.
"""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from ipt.console import progress
from ipt.training.flops import flops_per_token, peak_flops
from ipt.training.logger import log_metrics
from ipt.training.module import PretrainingModule

NOTABLE_WAIT = 0.05  # share of a step
Score = Callable[
    [PretrainingModule, int], dict[str, float | None]
]  # scores of the model after an optimizer step, where they are due


class StepMetrics(Callback):
    """Writes a line of `metrics.jsonl` and moves the progress bar at each optimizer step, and logs
    the same to the loggers.

    `tokens_per_second` is for each device, `mfu` by the convention of `ipt.training.flops` (null
    for a device whose peak is not known), `data_wait` the share of the step's time that was spent
    waiting for batches, `memory` the peak of the first process so far in GiB: allocated on its GPU,
    or on a CPU resident. What `score` finds stands in the record of its step, and the time that it
    takes counts for no step.
    """

    def __init__(
        self,
        path: Path,
        max_steps: int,
        tokens_per_step: int,
        log_every: int,
        score: Score | None = None,
    ) -> None:
        self.path, self.max_steps, self.tokens_per_step, self.log_every = (
            path,
            max_steps,
            tokens_per_step,
            log_every,
        )
        self.score = score
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, PretrainingModule)
        self._step = trainer.global_step
        self._flops, self._peak = (
            flops_per_token(module.model, module.config.mixture.seq_len),
            peak_flops(module.device),
        )
        if trainer.is_global_zero:
            self._bar_context = progress("training", self.max_steps)
            self._bar = self._bar_context.__enter__()
            self._bar.advance(self._step)
        self._started = self._asked = time.monotonic()
        self._waited = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += time.monotonic() - self._asked

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(module, PretrainingModule)
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._tell(trainer, module)
        self._asked = time.monotonic()

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, module, "fit")

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if hasattr(self, "_bar_context"):
            self._bar_context.__exit__(None, None, None)
            del self._bar_context

    def _tell(self, trainer: L.Trainer, module: PretrainingModule) -> None:
        figures = module.finish_step()  # waits for the device
        now = time.monotonic()
        seconds, waited = now - self._started, self._waited
        self._waited = 0.0
        speed = self.tokens_per_step / seconds / trainer.world_size
        record = {
            "step": self._step,
            "tokens": self._step * self.tokens_per_step,
            **figures,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "tokens_per_second": speed,
            "mfu": self._flops * speed / self._peak if self._peak else None,
            "data_wait": waited / seconds,
            "memory": peak_memory(module.device),
        }
        scores = self.score(module, self._step) if self.score else {}
        record |= scores
        self._started = time.monotonic()
        if trainer.is_global_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self._bar.advance(1, step_note(record, trainer.world_size))
        if trainer.loggers and (self._step % self.log_every == 0 or scores):
            known = {
                name: value
                for name, value in record.items()
                if value is not None and name != "step"
            }
            # not by log_dict, whose float32 does not count tokens beyond 2^24
            log_metrics(trainer.loggers, known, self._step)


def step_note(record: dict[str, Any], devices: int) -> str:
    """What stands behind the progress bar: "loss 2.143  8 x 8,512 tokens/s  MFU 51%  96.3 GiB"."""
    speed = f"{record['tokens_per_second']:,.0f} tokens/s"
    parts = [f"loss {record['loss']:.3f}", speed if devices == 1 else f"{devices} x {speed}"]
    parts += [] if record["mfu"] is None else [f"MFU {record['mfu']:.0%}"]
    parts += [f"{record['memory']:.1f} GiB"]
    parts += [f"data wait {record['data_wait']:.0%}"] if record["data_wait"] >= NOTABLE_WAIT else []
    parts += [f"skipped {record['skipped']:.0f}"] if record["skipped"] else []
    return "  ".join(parts)


def peak_memory(device: torch.device) -> float:
    """GiB at most so far: allocated by this process on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30

"""Metrics of each optimizer step: a line of metrics.jsonl, the progress bar, the loggers; FLOPs and
peak rates of devices for model FLOPs utilisation (MFU).

MFU counts for each token 6 FLOPs per trained parameter (2 forward, 4 backward) and 4 per frozen one
(under LoRA layers), without the embedding table unless it is also the projection, plus 12 x layers
x width of the heads x sequence length for full attention, not halved for causality. Recomputed
activations do not count.
"""

import json
import re
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from ipt.config import TrainerConfig
from ipt.console import progress
from ipt.training.logger import log_metrics
from ipt.training.module import PretrainingModule

NOTABLE_WAIT = 0.05  # fraction of a step from which the progress bar shows the wait for data

# Scores of the model after an optimizer step, empty for steps that are not scored.
Score = Callable[[PretrainingModule, int], dict[str, float | None]]

CONVENTION = (
    "6 x parameters (frozen: 4 x) without the input embedding + 12 x layers x width x sequence, "
    "full attention, no recomputation"
)

# Dense bf16 FLOP/s with fp32 accumulation, from the vendors' datasheets. The first name that occurs
# in a device's name counts.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class StepMetrics(Callback):
    """Appends a line to `path` after each optimizer step, moves the progress bar, and logs the same
    metrics to the loggers every `log_every_n_steps` steps.

    `tokens_per_second` is per device; `mfu` is null if the device's peak is unknown; `data_wait` is
    the fraction of the step's time spent waiting for batches; `memory` is the peak of the first
    process so far in GiB. What `score` returns is added to the step's metrics; its time is not part
    of any step.
    """

    def __init__(
        self, path: Path, config: TrainerConfig, tokens_per_step: int, score: Score | None
    ) -> None:
        self.path = path
        self.config = config
        self.tokens_per_step = tokens_per_step
        self.score = score
        self._step = 0
        self._bar_context = ExitStack()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, PretrainingModule)
        self._step = trainer.global_step
        self._flops = flops_per_token(module.model, module.config.mixture.seq_len)
        self._peak = peak_flops(module.device)
        hidden = not trainer.is_global_zero
        bar = progress("training", self.config.max_steps, hidden)
        self._bar = self._bar_context.enter_context(bar)
        self._bar.advance(self._step)
        self._started = self._batch_ended = time.monotonic()
        self._waited = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += time.monotonic() - self._batch_ended

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
            self._record_step(trainer, module)
        self._batch_ended = time.monotonic()

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        self._bar_context.close()

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self._bar_context.close()

    def _record_step(self, trainer: L.Trainer, module: PretrainingModule) -> None:
        metrics = module.finish_step()  # waits for the device
        seconds = time.monotonic() - self._started
        speed = self.tokens_per_step / seconds / trainer.world_size
        record = {
            "step": self._step,
            "tokens": self._step * self.tokens_per_step,
            **metrics,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "tokens_per_second": speed,
            "mfu": self._flops * speed / self._peak if self._peak else None,
            "data_wait": self._waited / seconds,
            "memory": peak_memory(module.device),
        }
        scores = self.score(module, self._step) if self.score else {}
        record |= scores
        self._started = time.monotonic()
        self._waited = 0.0
        if trainer.is_global_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self._bar.advance(1, step_note(record, trainer.world_size))
        if trainer.loggers and (self._step % self.config.log_every_n_steps == 0 or scores):
            del record["step"]
            known = {name: value for name, value in record.items() if value is not None}
            # Not through log_dict, whose float32 cannot count tokens beyond 2^24.
            log_metrics(trainer.loggers, known, self._step)


def step_note(record: dict[str, Any], devices: int) -> str:
    """Text next to the progress bar: "loss 2.143  8 x 8,512 tokens/s  MFU 51%  96.3 GiB"."""
    speed = f"{record['tokens_per_second']:,.0f} tokens/s"
    parts = [f"loss {record['loss']:.3f}", speed if devices == 1 else f"{devices} x {speed}"]
    if record["mfu"] is not None:
        parts.append(f"MFU {record['mfu']:.0%}")
    parts.append(f"{record['memory']:.1f} GiB")
    if record["data_wait"] >= NOTABLE_WAIT:
        parts.append(f"data wait {record['data_wait']:.0%}")
    if record["skipped"]:
        parts.append(f"skipped {record['skipped']:.0f}")
    return "  ".join(parts)


def peak_memory(device: torch.device) -> float:
    """Peak of this process so far in GiB: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def flops_per_token(model: Any, seq_len: int) -> float:
    """FLOPs of the forward and backward pass of one token in a sequence of `seq_len`. `model` may
    be on the meta device or sharded.
    """
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings().weight
    total = 0
    for weight in model.parameters():
        if weight is not embedding or config.tie_word_embeddings:
            total += (6 if weight.requires_grad else 4) * parameter_count(weight)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_hidden_layers * config.num_attention_heads
    return float(total + 12 * heads * width * seq_len)


def parameter_count(parameter: torch.Tensor) -> int:
    """Number of elements; for a packed 4-bit weight of bitsandbytes, of the unpacked matrix."""
    packed = getattr(parameter, "quant_state", None)
    return packed.shape.numel() if packed is not None else parameter.numel()


def peak_flops(device: torch.device) -> float | None:
    return named_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def named_peak(name: str) -> float | None:
    """Peak bf16 FLOP/s of a device named like "NVIDIA H100 80GB HBM3"; None if unknown."""
    for known, peak in PEAKS.items():
        if re.search(rf"\b{known.replace(' ', ' ?')}\b", name, re.IGNORECASE):
            return peak
    return None

"""Trainings in processes of their own: the real stage on made-up documents, less the export, which
needs a tokenizer.

    python -m benchmarks.gpu.jobs JOB.json       # what `run_job` starts

A process for each, so that one that runs out of memory or is killed leaves nothing to the next.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.gpu import allow_older_torch, import_all_the_same
from ipt.config import Config
from ipt.tokens.store import EncodedDocument, write_store

OUT_OF_MEMORY = 9


@dataclass
class Job:
    """A training: `settings` are keys of the config, as `trainer.compile`."""

    settings: dict[str, Any]
    stores: dict[str, str]
    output: str
    kill_after: int | None = None  # SIGKILL after this step
    deterministic: bool = False  # only kernels that always add up in the same order


@dataclass
class Outcome:
    """What a job left: its exit code (None: its time was up), a line for each step, and what the
    process says of itself.
    """

    code: int | None
    steps: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def run_job(job: Job, seconds: float) -> Outcome:
    output = Path(job.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    path, facts = output.with_suffix(".json"), output.with_suffix(".facts.json")
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    environment = (
        {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if job.deterministic else None
    )
    try:
        command = [sys.executable, "-m", "benchmarks.gpu.jobs", str(path)]
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            timeout=max(1.0, seconds),
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return Outcome(None, error="its time was up")
    metrics = output / "metrics.jsonl"
    return Outcome(
        done.returncode,
        [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        if metrics.exists()
        else [],
        json.loads(facts.read_text(encoding="utf-8")) if facts.exists() else {},
        "\n".join(done.stderr.strip().splitlines()[-25:]) if done.returncode else "",
    )


def config_of(settings: dict[str, Any]) -> Config:
    """A config with these keys. Raises AttributeError for one that there is not."""
    config = Config()
    for key, value in settings.items():
        *parts, name = key.split(".")
        part = reduce(getattr, parts, config)
        getattr(part, name)
        setattr(part, name, value)
    return config


def make_stores(folder: Path, vocabulary: int, tokens: int) -> dict[str, str]:
    """Token stores of two sources with about `tokens` random tokens each. Documents of `raw` are as
    long as web pages, those of `instruction` twice as long.
    """
    stores = {}
    for seed, (name, mean) in enumerate((("raw", 700), ("instruction", 1400))):
        random = np.random.default_rng(seed)
        sizes = lengths(tokens, mean, seed)
        write_store(
            folder / name,
            (
                EncodedDocument(random.integers(0, vocabulary, size, dtype=np.uint32))
                for size in sizes
            ),
            "made up",
            1 << 26,
        )
        stores[name] = str(folder / name)
    return stores


def lengths(tokens: int, mean: float, seed: int) -> list[int]:
    """Lengths of documents that are `tokens` together: log-normal, as those of the web are, the
    last one cut.
    """
    random, sizes = np.random.default_rng(seed), list[int]()
    while sum(sizes) < tokens:
        sizes.append(
            min(max(2, int(random.lognormal(np.log(mean) - 0.5, 1.0))), tokens - sum(sizes))
        )
    return sizes


# In the process
# ----------------------------------------------------------------------------------------------


def main(path: Path) -> int:
    import torch

    import ipt.training.module  # noqa: F401  # what is large, before anything has a stand-in

    import_all_the_same("ipt.training.train")
    allow_older_torch()
    from ipt.training import train

    job = Job(**json.loads(path.read_text(encoding="utf-8")))
    if job.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    if job.kill_after:
        _kill_after(job.kill_after)
    config = config_of(job.settings)
    try:
        with patch.object(train, "PretrainingModule", _built_on_device()):
            summary = train.train(config, job.stores, Path(job.output))
    except torch.OutOfMemoryError as error:
        print(error, file=sys.stderr)
        return OUT_OF_MEMORY
    facts = {
        "attention": summary["attention"],
        "flops_per_token": summary["flops"] / summary["tokens"],
    }
    if torch.cuda.is_available():
        facts["reserved"] = torch.cuda.max_memory_reserved() / 2**30
    path.with_suffix(".facts.json").write_text(json.dumps(facts), encoding="utf-8")
    return 0


def _built_on_device() -> type:
    """Random weights are drawn where they are trained: 8 billion of them take minutes on a host."""
    import torch

    from ipt.training.module import PretrainingModule

    class BuiltOnDevice(PretrainingModule):
        def configure_model(self) -> None:
            with torch.device(self.trainer.strategy.root_device):
                super().configure_model()

    return BuiltOnDevice


def _kill_after(step: int) -> None:
    from ipt.training.metrics import StepMetrics

    tell = StepMetrics.on_train_batch_end

    def tell_and_die(self: StepMetrics, trainer: Any, *arguments: Any) -> None:
        tell(self, trainer, *arguments)
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    patch.object(StepMetrics, "on_train_batch_end", tell_and_die).start()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""Training runs as processes of their own, so that they can be killed, be slow, and be several."""

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ipt.config import Config
from ipt.evaluation.callback import DuringTraining
from ipt.training.checkpoint import storage
from ipt.training.checkpoint.signals import Stopped
from ipt.training.metrics import StepMetrics
from ipt.training.train import train

SOURCES = ("raw", "instruction")


def write_job(
    config: Config, stores: dict, output: Path, signal: tuple | None = None, slow_from: int = 0
) -> Path:
    """A file that tells `run_jobs` of a training.

    `signal`: (step, rank, signal) that this rank gets after this step; `slow_from`: checkpoints of
    this step and later ones stay unfinished for minutes.
    """
    folders = {name: str(folder) for name, folder in stores.items()}
    job = {
        "config": asdict(config),
        "stores": folders,
        "output": str(output),
        "signal": signal,
        "slow_from": slow_from,
    }
    path = output.with_suffix(f".{signal[0] if signal else 'end'}.json")
    path.write_text(json.dumps(job))
    return path


def run_jobs(*paths: Path) -> None:
    """The trainings of some files, one after the other. A stop ends that training, and the process
    if it is the last one.
    """
    tell, finish = StepMetrics.on_train_batch_end, storage._finish

    def signalling(self, trainer, *arguments):
        tell(self, trainer, *arguments)
        if job["signal"] and [trainer.global_step, trainer.global_rank] == job["signal"][:2]:
            os.kill(os.getpid(), job["signal"][2])

    def slow(temporary, folder, snapshot):
        if job["slow_from"] and snapshot.facts["step"] >= job["slow_from"]:
            time.sleep(600)
        finish(temporary, folder, snapshot)

    StepMetrics.on_train_batch_end, storage._finish = signalling, slow
    for path in paths:
        job = json.loads(path.read_text())
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), job["config"]))
        try:
            output = Path(job["output"])
            score = (
                DuringTraining(config, None, output)
                if config.evaluation.during_training.every_n_train_steps
                else None
            )
            train(
                config,
                {name: Path(folder) for name, folder in job["stores"].items()},
                output,
                score=score,
            )
        except Stopped:
            if path == paths[-1]:
                raise


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that no other process is given meanwhile: it is bound here, but nothing listens, so a
    server may still take it.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("localhost", 0))
        yield held.getsockname()[1]


def read_metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same_steps(left: Path, right: Path, tolerance: float = 0.0) -> None:
    for one, other in zip(read_metrics(left), read_metrics(right), strict=True):
        for name in (
            "step",
            "tokens",
            "loss",
            "grad_norm",
            "lr",
            "loss/raw",
            "tokens/raw",
            "tokens/instruction",
        ):
            assert one[name] == pytest.approx(other[name], rel=tolerance, abs=0), (
                one["step"],
                name,
            )


def copy_run(output: Path, target: Path) -> Path:
    shutil.copytree(output, target)
    return target


if __name__ == "__main__":
    run_jobs(*map(Path, sys.argv[1:]))

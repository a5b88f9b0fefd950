import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from torch import distributed

from ipt.config import Config
from ipt.tokens.store import EncodedDocument, write_store
from ipt.training.checkpoint.signals import EXIT_CODE
from tests.processes import ROOT
from tests.training.jobs import write_job
from tests.training.small_model import write_model

SETTINGS = [
    "trainer.accelerator=cpu",
    "trainer.max_steps=6",
    "trainer.micro_batch_size=2",
    "checkpoint.every_n_train_steps=2",
    "mixture.ratios.raw=0.5",
    "mixture.ratios.instruction=0.5",
    "mixture.seq_len=64",
    "optimizer.lr=5e-2",
]


@pytest.fixture(scope="session")
def stores(made_once):
    """Two stores of short random documents over a few hundred tokens, so that a tiny model learns
    something in six steps.
    """

    def write(folder: Path) -> None:
        random = np.random.default_rng(0)
        for source in ("raw", "instruction"):
            documents = [
                EncodedDocument(
                    random.integers(100, 300, random.integers(10, 50)).astype(np.uint32)
                )
                for _ in range(60)
            ]
            write_store(folder / source, documents, "f", 10_000)

    folder = made_once("stores", write)
    return {source: folder / source for source in ("raw", "instruction")}


@pytest.fixture(scope="session")
def small_model(made_once) -> str:
    """A tiny random Llama with few tokens."""
    return str(made_once("small-model", write_model))


@pytest.fixture(scope="session")
def make_config(small_model):
    def make(*overrides: str) -> Config:
        merged = OmegaConf.merge(
            OmegaConf.structured(Config),
            OmegaConf.from_dotlist([f"model={small_model}", *SETTINGS, *overrides]),
        )
        return OmegaConf.to_object(merged)

    return make


@pytest.fixture(autouse=True)
def _no_process_group_is_left():
    """A training under FSDP leaves its process group, which another test could not set up again."""
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


class Clock:
    """Replaces the clock of step metrics: one second passes at each reading, and more only where a
    test calls `advance`.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    replacement = Clock()
    monkeypatch.setattr("ipt.training.metrics.time", replacement)
    return replacement


@pytest.fixture(scope="session")
def uninterrupted(stores, make_config, tmp_path_factory):
    """A finished run of one process that others are compared with, and its summary."""
    from tests.training.jobs import train

    output = tmp_path_factory.mktemp("run") / "whole"
    return output, train(make_config(), stores, output)


@pytest.fixture(scope="session")
def two_ranks(make_config):
    """The config of the same run, on two processes."""
    return make_config("trainer.devices=2", "trainer.micro_batch_size=1")


@pytest.fixture(scope="session")
def tasks(made_once):
    """Tasks of each kind that a live model answers: options in one row, documents, and generated
    text.
    """
    folder = made_once("tasks", _write_tasks)
    return [str(folder / f"{name}.yaml") for name in ("choices", "texts", "answers")]


def _write_tasks(folder: Path) -> None:
    texts = [
        "The heart pumps blood through the body",
        "A femur is a long bone",
        "Nerves carry signals",
    ]
    options = [" of the child", " and", " at night"]
    choices = [
        {"prompt": text, "options": options[number:] + options[:number], "gold": 0}
        for number, text in enumerate(texts * 3)
    ]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"{text}. " * 5}) + "\n" for text in texts)
    )
    (folder / "choices.yaml").write_text("kind: choice\ndata: choices.jsonl\n")
    (folder / "texts.yaml").write_text("kind: perplexity\ndata: texts.jsonl\n")
    (folder / "answers.yaml").write_text(
        "kind: generation\ndata: texts.jsonl\nprompt: '{{ text }}'\nanswer: bone\nmax_new_tokens: "
        "4\n"
    )


@pytest.fixture(scope="session")
def during(tasks):
    """Settings of a run that is scored after every second step."""
    return [
        "evaluation.during_training.every_n_train_steps=2",
        f"evaluation.during_training.tasks=[{','.join(tasks)}]",
    ]


@pytest.fixture(scope="session")
def runs_of_two(stores, two_ranks, make_config, during, made_once):
    """Three runs of the same two processes under FSDP2: a whole one, one that is scored on the way,
    and one that stops because one of the processes gets SIGTERM after step 3. The processes are
    started by the real torchrun.
    """

    def run(folder: Path) -> None:
        scored = make_config("trainer.devices=2", "trainer.micro_batch_size=1", *during)
        jobs = [
            write_job(two_ranks, stores, folder / "two"),
            write_job(scored, stores, folder / "scored"),
        ]
        jobs.append(write_job(two_ranks, stores, folder / "stopped", (3, 1, signal.SIGTERM)))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "tests.training.jobs",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            [*command, *map(str, jobs)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=600,
        )
        assert f"exitcode  : {EXIT_CODE}" in result.stderr, result.stderr

    return made_once("two", run)


@pytest.fixture(scope="session")
def uninterrupted_two(runs_of_two):
    return runs_of_two / "two"


@pytest.fixture(scope="session")
def stopped_two(runs_of_two):
    return runs_of_two / "stopped"

import signal

import numpy as np
import pytest
from omegaconf import OmegaConf

from ipt.config import Config
from ipt.tokens.store import EncodedDocument, write_store
from ipt.training.stop import EXIT_CODE
from tests.training.jobs import run_torchrun, write_job

SETTINGS = [
    "trainer.accelerator=cpu",
    "trainer.max_steps=6",
    "trainer.micro_batch_size=2",
    "trainer.checkpoint_steps=2",
    "mixture.ratios.raw=0.5",
    "mixture.ratios.instruction=0.5",
    "mixture.seq_len=64",
    "optimizer.lr=5e-2",
]


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """Two stores of short random documents over a few hundred tokens, so that a tiny model learns something in six steps."""
    random = np.random.default_rng(0)
    folders = {}
    for source in ("raw", "instruction"):
        folders[source] = tmp_path_factory.mktemp(source)
        documents = [EncodedDocument(random.integers(100, 300, random.integers(10, 50)).astype(np.uint32)) for _ in range(60)]
        write_store(folders[source], documents, "f", 10_000)
    return folders


@pytest.fixture(scope="session")
def make_config(tiny_model):
    def make(*overrides: str) -> Config:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.from_dotlist([f"model={tiny_model}", *SETTINGS, *overrides]))
        return OmegaConf.to_object(merged)

    return make


class Clock:
    """Replaces the clock of step metrics: one second passes at each reading, and more only where a test calls `advance`."""

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
    monkeypatch.setattr("ipt.training.callbacks.time", replacement)
    return replacement


@pytest.fixture(scope="session")
def uninterrupted(stores, make_config, tmp_path_factory):
    """A finished run of one process that others are compared with, and its summary."""
    from ipt.training.run import train

    output = tmp_path_factory.mktemp("run") / "whole"
    return output, train(make_config(), stores, output)


@pytest.fixture(scope="session")
def two_ranks(make_config):
    """The config of the same run, on two processes."""
    return make_config("trainer.devices=2", "trainer.micro_batch_size=1")


@pytest.fixture(scope="session")
def runs_of_two(stores, two_ranks, tmp_path_factory):
    """Two runs of the same two processes under FSDP2: a whole one, and one that stops, since one of them gets SIGTERM after step 3."""
    folder = tmp_path_factory.mktemp("run")
    whole, stopped = folder / "two", folder / "stopped"
    jobs = write_job(two_ranks, stores, whole) + write_job(two_ranks, stores, stopped, (3, 1, signal.SIGTERM))[1:]
    result = run_torchrun(jobs)
    assert f"exitcode  : {EXIT_CODE}" in result.stderr
    return whole, stopped


@pytest.fixture(scope="session")
def uninterrupted_two(runs_of_two):
    return runs_of_two[0]


@pytest.fixture(scope="session")
def stopped_two(runs_of_two):
    return runs_of_two[1]

"""Synthesis on a Ray cluster (`synthesis.cluster=ray`): Ray actors on any number of machines
process the shards of one corpus.

Each actor has its own engine. Shards are files on storage that all machines share, with the same
atomic renames and journals as on one machine, so Ray stores nothing: a lost actor costs only its
running generations, and other actors finish its shards.
"""

import logging
import os
import time
from collections import Counter, deque
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ipt.config import SynthesisConfig
from ipt.console import Progress
from ipt.errors import UserError
from ipt.synthesis.engines import EngineDied
from ipt.synthesis.shards import Documents
from ipt.synthesis.worker import Counts, ShardWorker, start

# shards per actor, so that the first one's last chains do not leave the engine idle
SHARDS_AT_ONCE = 2
MAX_LOST = 3  # actors that may be lost on one shard before the run stops
PATIENCE = 60.0  # seconds without a free worker before a warning

log = logging.getLogger(__name__)


def check_ray() -> None:
    if find_spec("ray") is None:
        raise UserError(
            "synthesis.cluster=ray: the package ray is not installed: pip install 'ipt[ray]', or "
            "set synthesis.cluster=none"
        )


class Worker:
    """An actor: processes shards concurrently on one engine, which the first shard starts."""

    def __init__(self, config: SynthesisConfig, documents: Path, pairs: Path, seed: int) -> None:
        self._config = config
        self._corpus = Documents(documents, config.shard_size)
        self._pairs = pairs
        self._seed = seed
        self._worker: ShardWorker | None = None

    async def ready(self) -> None:
        """Returns as soon as the actor runs."""

    async def process(self, index: int) -> Counts:
        """Finish a shard and return the counts of this actor so far."""
        if self._worker is None:
            engine = start(self._config, self._seed)
            self._worker = ShardWorker(self._config, self._corpus, self._pairs, *engine)
        await self._worker.process([index], lambda documents, note: None)
        return self._worker.counts


def process_on_ray(
    config: SynthesisConfig,
    corpus: Documents,
    pairs: Path,
    unfinished: list[int],
    seed: int,
    bar: Progress,
) -> dict[str, Any]:
    """Finish the `unfinished` shards on an existing or a local cluster, and return what was done.

    Raises EngineDied if one shard has lost MAX_LOST actors; finished shards and journals are kept.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    ray.init(
        address=config.ray_address,
        log_to_driver=False,
        include_dashboard=False,
        logging_level=logging.ERROR,
    )
    try:
        return _Driver(ray, config, corpus, pairs, seed, bar).run(unfinished)
    finally:
        ray.shutdown()


class _Driver:
    """Assigns shards to actors, and replaces lost actors."""

    def __init__(
        self,
        ray: Any,
        config: SynthesisConfig,
        corpus: Documents,
        pairs: Path,
        seed: int,
        bar: Progress,
    ) -> None:
        self._ray = ray
        self._corpus = corpus
        self._bar = bar
        cluster = ray.cluster_resources()
        gpus = int(cluster.get("GPU", 0))
        gpus_per_worker = config.tensor_parallel_size * config.data_parallel_size
        self.workers = config.workers or max(1, gpus // gpus_per_worker)
        if gpus:
            remote = ray.remote(num_gpus=gpus_per_worker)(Worker)
        else:
            cpus = int(cluster.get("CPU", 1)) // self.workers
            remote = ray.remote(num_cpus=max(1, cpus))(Worker)
        self._new_actor = lambda: remote.remote(
            config, corpus.folder.absolute(), pairs.absolute(), seed
        )
        self._shards: deque[int] = deque()
        # running calls: their actor and shard, or None as the shard of an actor that is starting
        self._calls: dict[Any, tuple[Any, int | None]] = {}
        self._load: Counter[Any] = Counter()  # running shards per ready actor
        self._counts: dict[Any, Counts] = {}
        self._lost: Counter[int | None] = Counter()  # lost actors per shard

    def run(self, unfinished: list[int]) -> dict[str, Any]:
        self._shards.extend(unfinished)
        started = time.monotonic()
        for _ in range(min(self.workers, len(unfinished))):
            self._start_actor()
        while self._shards or any(self._load.values()):
            done, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=PATIENCE)
            if not done and not any(self._load.values()):
                log.warning(
                    "synthesis: the Ray cluster has had no resources for any of %d workers for "
                    "%.0f s",
                    self.workers,
                    PATIENCE,
                )
            for call in done:
                self._finish(call, time.monotonic() - started)
            self._assign_shards()
        report = self._total().report(time.monotonic() - started)
        return {**report, "workers": self.workers, "workers_lost": self._lost.total()}

    def _start_actor(self) -> None:
        actor = self._new_actor()
        self._calls[actor.ready.remote()] = (actor, None)

    def _assign_shards(self) -> None:
        for actor, load in self._load.items():
            for _ in range(min(SHARDS_AT_ONCE - load, len(self._shards))):
                shard = self._shards.popleft()
                self._calls[actor.process.remote(shard)] = (actor, shard)
                self._load[actor] += 1

    def _finish(self, call: Any, seconds: float) -> None:
        actor, shard = self._calls.pop(call)
        try:
            counts = self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", error)
            if not isinstance(cause, EngineDied | self._ray.exceptions.RayError):
                raise cause from error
            self._replace(actor, shard, cause)
            return
        if shard is None:
            self._load[actor] = 0
            return
        self._load[actor] -= 1
        self._counts[actor] = counts
        self._bar.advance(self._corpus.size(shard), self._total().note(seconds))

    def _replace(self, actor: Any, shard: int | None, cause: BaseException) -> None:
        """Put the shard back in front of the queue. The first failed call of an actor also starts
        its replacement.
        """
        if shard is not None:
            self._shards.appendleft(shard)
            if actor not in self._load:
                return
        self._load.pop(actor, None)
        self._ray.kill(actor)
        self._lost[shard] += 1
        reason = " ".join(str(cause).split())[:200]
        if self._lost[shard] >= MAX_LOST:
            what = "worker" if shard is None else f"shard {shard}"
            raise EngineDied(
                f"synthesis.cluster=ray: {what} failed {MAX_LOST} times, most recently with: "
                f"{reason}"
            )
        log.warning("synthesis: a worker was lost, others take over its shards: %s", reason)
        self._start_actor()

    def _total(self) -> Counts:
        return sum(self._counts.values(), Counts())

"""Synthesis on a Ray cluster (`synthesis.cluster=ray`): the shards of one corpus, worked off by
actors on any number of machines.

Each actor has an engine of its own. Shards are files on storage that all machines share, appear by
an atomic rename and are journalled as on one machine, so Ray keeps nothing: an actor that is lost
costs its generations in flight, and its shards are done by others.
"""

import logging
import os
import time
from collections import Counter, deque
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ipt.config import SynthesisConfig
from ipt.console import Progress, console
from ipt.errors import UserError
from ipt.synthesis.engines import EngineDied
from ipt.synthesis.shards import Documents
from ipt.synthesis.worker import Figures, ShardWorker, note, start, with_rates

# shards in one actor, so that its window of live chains stays full at the end of the first one
SHARDS_AT_ONCE = 2
MAX_LOST = 3  # actors that one shard may lose before the run stops
PATIENCE = 60.0  # seconds without news before the user is told what the cluster is waited for


def check_ray() -> None:
    if find_spec("ray") is None:
        raise UserError(
            "synthesis.cluster=ray: the package ray is not installed: pip install 'ipt[ray]', or "
            "set synthesis.cluster=none"
        )


class Worker:
    """What one actor does: shards beside each other on one engine, which it starts at the first of
    them.
    """

    def __init__(self, config: SynthesisConfig, documents: Path, pairs: Path, seed: int) -> None:
        self._config, self._corpus, self._pairs, self._seed = (
            config,
            Documents(documents, config.shard_size),
            pairs,
            seed,
        )
        self._session: ShardWorker | None = None

    async def ready(self) -> None:
        """Returns once the actor lives."""

    async def work_off(self, index: int) -> Figures:
        """Finish a shard; returns what the actor has done since it began."""
        if self._session is None:
            self._session = ShardWorker(
                self._config, self._corpus, self._pairs, *start(self._config, self._seed)
            )
        await self._session.work_off([index], lambda documents, note: None)
        return self._session.figures


def work_off_on_ray(
    config: SynthesisConfig,
    corpus: Documents,
    pairs: Path,
    unfinished: list[int],
    seed: int,
    bar: Progress,
) -> Figures:
    """Work off the unfinished shards on a cluster that is there already, or on this machine, and
    return what was done.

    Raises EngineDied if a shard has lost MAX_LOST actors: finished shards and journals stay.
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
    """Gives shards to actors, and starts another actor for each one that is lost."""

    def __init__(
        self,
        ray: Any,
        config: SynthesisConfig,
        corpus: Documents,
        pairs: Path,
        seed: int,
        bar: Progress,
    ) -> None:
        self._ray, self._corpus, self._bar = ray, corpus, bar
        cluster, needed = (
            ray.cluster_resources(),
            config.tensor_parallel_size * config.data_parallel_size,
        )
        gpus = int(cluster.get("GPU", 0))
        self.workers = config.workers or max(1, gpus // needed)
        share = (
            {"num_gpus": needed}
            if gpus
            else {"num_cpus": max(1, int(cluster.get("CPU", 1)) // self.workers)}
        )
        remote = ray.remote(**share)(Worker)
        self._new_actor = lambda: remote.remote(
            config, corpus.folder.absolute(), pairs.absolute(), seed
        )
        self._shards: deque[int] = deque()
        self._calls: dict[
            Any, tuple[Any, int | None]
        ] = {}  # what runs: its actor and its shard, None for an actor that is starting
        self._load: Counter[Any] = Counter()  # shards that each living actor is at
        self._figures: dict[Any, Figures] = {}
        self._lost: Counter[int | None] = Counter()  # by shard

    def run(self, unfinished: list[int]) -> Figures:
        self._shards.extend(unfinished)
        started = time.monotonic()
        for _ in range(min(self.workers, len(unfinished))):
            self._start_actor()
        while self._shards or any(self._load.values()):
            done, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=PATIENCE)
            if not done and not any(self._load.values()):
                console.print(
                    f"[yellow]synthesis: the Ray cluster has had no room for any of {self.workers} "
                    f"workers for {PATIENCE:.0f} s"
                )
            for call in done:
                self._finish(call, time.monotonic() - started)
            self._give_out()
        figures = self._total()
        return with_rates(
            {**figures, "workers": self.workers, "workers_lost": self._lost.total()},
            time.monotonic() - started,
        )

    def _start_actor(self) -> None:
        actor = self._new_actor()
        self._calls[actor.ready.remote()] = (actor, None)

    def _give_out(self) -> None:
        for actor, load in self._load.items():
            for _ in range(min(SHARDS_AT_ONCE - load, len(self._shards))):
                shard = self._shards.popleft()
                self._calls[actor.work_off.remote(shard)] = (actor, shard)
                self._load[actor] += 1

    def _finish(self, call: Any, seconds: float) -> None:
        actor, shard = self._calls.pop(call)
        try:
            figures = self._ray.get(call)
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
        self._figures[actor] = figures
        self._bar.advance(self._corpus.size(shard), note(self._total(), seconds))

    def _replace(self, actor: Any, shard: int | None, cause: BaseException) -> None:
        """Put the shard back to the front; the first call that an actor loses starts another one in
        its place.
        """
        if shard is not None:
            self._shards.appendleft(shard)
        if actor not in self._load and shard is not None:
            return
        self._load.pop(actor, None)
        self._ray.kill(actor)
        self._lost[shard] += 1
        reason = " ".join(str(cause).split())[:200]
        if self._lost[shard] >= MAX_LOST:
            what = "worker" if shard is None else f"shard {shard}"
            raise EngineDied(
                f"synthesis.cluster=ray: {what} has failed {MAX_LOST} times, the last time with: "
                f"{reason}"
            )
        console.print(
            f"synthesis: a worker was lost, its shards go to others: {reason}",
            style="yellow",
            markup=False,
        )
        self._start_actor()

    def _total(self) -> Figures:
        total: Counter[str] = Counter()
        for figures in self._figures.values():
            total.update(figures)
        return dict(total)

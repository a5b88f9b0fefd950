"""Our launcher and sweepers. Hydra finds plugins in the namespace package `hydra_plugins` only."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class SubprocessLauncherConfig:
    _target_: str = "hydra_plugins.ipt_sweeps.SubprocessLauncher"
    n_jobs: int = 1  # jobs at the same time
    gpus_per_job: float | None = None  # below 1: jobs share a GPU; null: as in the job's config
    retries: int = 0  # of a job that fails


@dataclass
class GridConfig:
    _target_: str = "hydra_plugins.ipt_sweeps.GridSweeper"
    # key -> its values, in the syntax of the command line; for recipes
    params: dict[str, str] = field(default_factory=dict)


@dataclass
class OptunaConfig:
    _target_: str = "hydra_plugins.ipt_sweeps.OptunaSweeper"
    # key -> its search space, in the syntax of the command line; for recipes
    params: dict[str, str] = field(default_factory=dict)
    metric: str = "final_loss"  # a figure that the jobs report, as held_out_perplexity.nll
    direction: str = "minimize"  # minimize | maximize
    n_trials: int = 20  # of the whole study, earlier runs included
    n_jobs: int | None = None  # trials at the same time; null: the launcher's n_jobs
    sampler: str = "tpe"  # tpe | random | grid
    seed: int | None = 0  # of the sampler; null: a different search each time
    storage: str | None = None  # URL of an Optuna storage; null: study.db in the sweep's folder


ConfigStore.instance().store(
    group="hydra/launcher", name="subprocess", node=SubprocessLauncherConfig, provider="ipt"
)
ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=GridConfig, provider="ipt")
ConfigStore.instance().store(
    group="hydra/sweeper", name="optuna", node=OptunaConfig, provider="ipt"
)


class SubprocessLauncher(Launcher):
    """`hydra/launcher=subprocess`: jobs as subprocesses of this machine."""

    def __init__(self, n_jobs: int, gpus_per_job: float | None, retries: int) -> None:
        self.settings = {"n_jobs": n_jobs, "gpus_per_job": gpus_per_job, "retries": retries}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from ipt.sweeps.launcher import LaunchSettings, run_jobs
        from ipt.sweeps.process import launch_of

        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        jobs = run_jobs(launch_of(self.config.hydra), numbers, LaunchSettings(**self.settings))
        return [
            JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED, _return_value=job)
            for job in jobs
        ]


class IptSweeper(Sweeper):
    """What our sweepers share: the folder of the sweep, and its overrides."""

    def __init__(self, params: DictConfig) -> None:
        self.params = dict(params)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from ipt.console import setup_logging
        from ipt.sweeps.sweep import name_sweep

        setup_logging()  # again, because Hydra has replaced the handlers
        self.hydra_context, self.config = hydra_context, config
        name_sweep(config)  # writes the folder that the launcher reads
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def _overrides(self, arguments: Sequence[str]) -> list[Override]:
        """The overrides of the recipe and of the command line, which takes precedence."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        parsed = parser.parse_overrides(
            [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        )
        return list({override.get_key_element(): override for override in parsed}.values())


class GridSweeper(IptSweeper):
    """`hydra/sweeper=grid`: a job for each combination of values."""

    def sweep(self, arguments: list[str]) -> Any:
        from ipt.sweeps.sweeper import run_grid

        return run_grid(self.config, self.launcher, self._overrides(arguments))


class OptunaSweeper(IptSweeper):
    """`hydra/sweeper=optuna`: a job for each trial of a search."""

    def __init__(self, params: DictConfig, **settings: Any) -> None:
        super().__init__(params)
        self.settings = settings

    def sweep(self, arguments: list[str]) -> Any:
        from ipt.sweeps.sweeper import SearchSettings, run_search

        return run_search(
            self.config, self.launcher, self._overrides(arguments), SearchSettings(**self.settings)
        )

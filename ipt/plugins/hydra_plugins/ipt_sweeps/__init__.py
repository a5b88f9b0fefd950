"""Where Hydra finds our launcher and sweepers: it takes plugins from the namespace package
`hydra_plugins` only.
"""

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
    n_jobs: int = 1  # jobs side by side
    gpus_per_job: float | None = (
        None  # below 1: so many jobs share a GPU; null: as many as the config asks for
    )
    retries: int = 0  # further tries of a job that fails


@dataclass
class GridConfig:
    _target_: str = "hydra_plugins.ipt_sweeps.GridSweeper"
    params: dict[str, str] = field(
        default_factory=dict
    )  # key -> what it varies over, as on the command line; for recipes


@dataclass
class OptunaConfig:
    _target_: str = "hydra_plugins.ipt_sweeps.OptunaSweeper"
    params: dict[str, str] = field(
        default_factory=dict
    )  # key -> search space, as on the command line; for recipes
    metric: str = "final_loss"  # a figure that the jobs report, as held_out_perplexity.nll
    direction: str = "minimize"  # minimize | maximize
    n_trials: int = 20  # trials of the whole study, those of earlier runs included
    n_jobs: int | None = None  # trials at the same time; null: the launcher's n_jobs
    sampler: str = "tpe"  # tpe | random | grid
    seed: int | None = 0  # of the sampler; null: a different search each time
    storage: str | None = None  # an Optuna storage's URL; null: study.db in the sweep's folder


ConfigStore.instance().store(
    group="hydra/launcher", name="subprocess", node=SubprocessLauncherConfig, provider="ipt"
)
ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=GridConfig, provider="ipt")
ConfigStore.instance().store(
    group="hydra/sweeper", name="optuna", node=OptunaConfig, provider="ipt"
)


class SubprocessLauncher(Launcher):
    """`hydra/launcher=subprocess`: see ipt.sweeps.launcher."""

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
    """What our sweepers share: the sweep's folder, and that its end is told however it ends."""

    def __init__(self, params: DictConfig) -> None:
        self.params = dict(params)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from ipt.sweeps.sweep import name_sweep

        self.hydra_context, self.config = hydra_context, config
        name_sweep(config)  # before the launcher looks
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def _overrides(self, arguments: Sequence[str]) -> list[Override]:
        """What the recipe and the command line vary, and what they fix; the command line has the
        last word.
        """
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        parsed = parser.parse_overrides(
            [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        )
        return list({override.get_key_element(): override for override in parsed}.values())


class GridSweeper(IptSweeper):
    """`hydra/sweeper=grid`: a job for each combination of values; see ipt.sweeps.sweeper."""

    def sweep(self, arguments: list[str]) -> Any:
        from ipt.sweeps.sweeper import run_grid

        return run_grid(self.config, self.launcher, self._overrides(arguments))


class OptunaSweeper(IptSweeper):
    """`hydra/sweeper=optuna`: a job for each trial of a search; see ipt.sweeps.sweeper."""

    def __init__(self, params: DictConfig, **settings: Any) -> None:
        super().__init__(params)
        self.settings = settings

    def sweep(self, arguments: list[str]) -> Any:
        from ipt.sweeps.sweeper import SearchSettings, run_search

        return run_search(
            self.config, self.launcher, self._overrides(arguments), SearchSettings(**self.settings)
        )

"""Where Hydra finds our launcher: it takes plugins from the namespace package `hydra_plugins` only."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class SubprocessLauncherConfig:
    _target_: str = "hydra_plugins.ipt_launcher.SubprocessLauncher"
    n_jobs: int = 1  # jobs side by side
    gpus_per_job: float | None = None  # below 1: so many jobs share a GPU; null: as many as the config asks for
    retries: int = 0  # further tries of a job that fails


ConfigStore.instance().store(group="hydra/launcher", name="subprocess", node=SubprocessLauncherConfig, provider="ipt")


class SubprocessLauncher(Launcher):
    """`hydra/launcher=subprocess`: see ipt.experiment.launcher."""

    def __init__(self, n_jobs: int, gpus_per_job: float | None, retries: int) -> None:
        self.settings = {"n_jobs": n_jobs, "gpus_per_job": gpus_per_job, "retries": retries}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from ipt.experiment.launcher import LaunchSettings, run_jobs
        from ipt.experiment.process import launch_of

        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        jobs = run_jobs(launch_of(self.config.hydra), numbers, LaunchSettings(**self.settings))
        return [JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED, _return_value=job) for job in jobs]

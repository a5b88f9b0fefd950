"""Where Hydra finds our launcher: it takes plugins from the namespace package `hydra_plugins` only."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class SubprocessLauncherConfig:
    _target_: str = "hydra_plugins.ipt_launcher.SubprocessLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="subprocess", node=SubprocessLauncherConfig, provider="ipt")


class SubprocessLauncher(Launcher):
    """`hydra/launcher=subprocess`: see ipt.experiment.launcher."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from ipt.experiment.launcher import run_sweep

        return run_sweep(self.config.hydra.job.config_name, job_overrides)

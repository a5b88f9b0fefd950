"""GPUs and CPU cores of the jobs that run at the same time on one machine."""

import math
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

from ipt.config import Config
from ipt.parallel import worker_count

# A job keeps only these of SLURM's variables. Those of a step would make its processes ranks of it.
SLURM_KEPT = "SLURM_JOB"


@dataclass
class GpuAllocator:
    """The number of further jobs that can start, and the free fraction of each GPU."""

    jobs: int
    free: dict[str, float] = field(default_factory=dict)

    def take(self, share: float) -> list[str] | None:
        """GPUs for a job that needs `share` of them (below 1: a fraction of one).

        None if the job has to wait.
        """
        needed = math.ceil(share)
        enough = [gpu for gpu, free in self.free.items() if free >= min(share, 1.0) - 1e-9]
        if self.jobs == 0 or len(enough) < needed:
            return None
        # GPUs in use come first, which leaves free ones for jobs that need whole GPUs.
        taken = sorted(enough, key=self.free.__getitem__)[:needed]
        self._change(taken, share, -1)
        return taken

    def give(self, taken: list[str], share: float) -> None:
        self._change(taken, share, 1)

    def _change(self, taken: list[str], share: float, sign: int) -> None:
        self.jobs += sign
        for gpu in taken:
            self.free[gpu] += sign * min(share, 1.0)


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.

    Does not initialize CUDA, which would reserve memory.
    """
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        return [name for name in names if name not in ("", "-1", "NoDevFiles")]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, encoding="utf-8", check=False
        )
    except FileNotFoundError:
        return []
    count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [str(number) for number in range(count)]


def gpu_share(command: str, config: Config, gpus_per_job: float | None) -> float:
    """GPUs that a job uses on a machine with GPUs: `gpus_per_job`, else as in its config."""
    if config.trainer.accelerator == "cpu" and command == "train":
        return 0.0
    if gpus_per_job is not None:
        return gpus_per_job
    if command == "synthesize":
        return float(config.synthesis.tensor_parallel_size * config.synthesis.data_parallel_size)
    return float(config.trainer.devices)


def job_environment(environment: Mapping[str, str], gpus: list[str], n_jobs: int) -> dict[str, str]:
    """The environment of a job's processes: its GPUs, and its share of the cores if `n_jobs` run at
    the same time.
    """
    result = {"PYTHONUNBUFFERED": "1"}
    for name, value in environment.items():
        if not name.startswith("SLURM_") or name.startswith(SLURM_KEPT):
            result[name] = value
    if gpus:
        result["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if n_jobs > 1:
        result.setdefault("OMP_NUM_THREADS", str(max(1, worker_count(None) // n_jobs)))
    return result

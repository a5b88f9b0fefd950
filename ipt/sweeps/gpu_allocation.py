"""The shares of a machine that jobs run on side by side."""

import math
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

from ipt.config import Config
from ipt.parallel import worker_count

# what a job keeps of SLURM's variables: those of the step would make its processes ranks of that
# step
STEP = "SLURM_JOB"


@dataclass
class GpuAllocator:
    """At most `jobs` jobs, and what is still free of each GPU, 0 to 1."""

    jobs: int
    free: dict[str, float] = field(default_factory=dict)

    def take(self, share: float) -> list[str] | None:
        """GPUs for a job that needs so many, or a share of one; None if it has to wait."""
        needed = math.ceil(share)
        enough = [gpu for gpu, free in self.free.items() if free >= min(share, 1.0) - 1e-9]
        if self.jobs == 0 or len(enough) < needed:
            return None
        taken = sorted(enough, key=self.free.__getitem__)[
            :needed
        ]  # begun ones first: whole ones are left for jobs that need them
        self._change(taken, share, -1)
        return taken

    def give(self, taken: list[str], share: float) -> None:
        self._change(taken, share, 1)

    def _change(self, taken: list[str], share: float, sign: int) -> None:
        self.jobs += sign
        for gpu in taken:
            self.free[gpu] += sign * min(share, 1.0)


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. Asks no CUDA, so that
    none is taken hold of.
    """
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [
            name.strip()
            for name in given.split(",")
            if name.strip() not in ("", "-1", "NoDevFiles")
        ]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, encoding="utf-8", check=False
        )
    except FileNotFoundError:
        return []
    return [
        str(number)
        for number, line in enumerate(
            line for line in listed.stdout.splitlines() if line.startswith("GPU ")
        )
    ]


def gpu_share(command: str, config: Config, wish: float | None) -> float:
    """GPUs that a job takes where there are any: what it is given, or what its config says."""
    if config.trainer.accelerator == "cpu" and command == "train":
        return 0.0
    if wish is not None:
        return wish
    if command == "synthesize":
        return float(config.synthesis.tensor_parallel_size * config.synthesis.data_parallel_size)
    return float(config.trainer.devices)


def job_environment(
    environment: Mapping[str, str], gpus: list[str], side_by_side: int
) -> dict[str, str]:
    """What a job's processes find: their GPUs, and their share of the cores where jobs run side by
    side.
    """
    result = {
        name: value
        for name, value in environment.items()
        if not name.startswith("SLURM_") or name.startswith(STEP)
    }
    if gpus:
        result["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if side_by_side > 1:
        result.setdefault("OMP_NUM_THREADS", str(max(1, worker_count(None) // side_by_side)))
    return {"PYTHONUNBUFFERED": "1", **result}

"""Hundreds of ranks simulated in one process with the code of ipt: the sequences that each rank
reads, the shards that it holds, and the checkpoint files that it writes.

Two process-group backends from torch's own tests simulate the cluster. With the fake backend this
process is one rank of many, and collectives do nothing. This suffices for what a rank computes
alone, such as its shards. With the threaded backend each rank is a thread and collectives really
run, which writing a checkpoint needs.
"""

import copy
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch
from rich.table import Table
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed import multi_threaded_pg as threaded
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.loading import FormulaLengths, status
from ipt.config import MixtureConfig, OptimizerConfig, TrainerConfig
from ipt.mixture.batches import MicroBatches, PackedLoader, PackedSequences
from ipt.mixture.plan import make_plan
from ipt.training.checkpoint.state import TrainingState
from ipt.training.checkpoint.storage import (
    FORMAT,
    Snapshot,
    is_whole,
    read_facts,
    read_tensors,
    write_checkpoint,
)
from ipt.training.memory_estimate import sharded
from ipt.training.model import meta_model, transformer_blocks
from ipt.training.optim.build import build_optimizer
from ipt.training.optim.dtensor import local, rows
from ipt.training.parallelize import data_mesh, shard

Result = TypeVar("Result")
TOKENS, SEQUENCE = 10**12, 2048  # size of the planned run, tokens per sequence


def measure_ranks(world: int, resumed: int) -> Table:
    """Run each simulation with `world` ranks: CPU seconds and result of each."""
    table = Table(title=f"{world} ranks in one process", title_justify="left")
    table.add_column("simulation")
    table.add_column("s", justify="right")
    table.add_column("result")
    trials: dict[str, Callable[[], str]] = {
        f"{world} ranks read the sequences of one process; {resumed} ranks resume": lambda: order(
            world, resumed
        ),
        f"1 T tokens: plan and a step's batch on ranks 0 and {world - 1}": lambda: planned(world),
        "8B: shards on the first and the last rank, FSDP2": lambda: shard_sizes(world, 1),
        "8B: shards with one replica per 64 ranks (HSDP)": lambda: shard_sizes(
            world, max(1, world // 64)
        ),
        "8B: merging the checkpoint plans on the first rank": lambda: merged(world),
        f"a tiny model's checkpoint, written by {world} ranks, read by {resumed}": lambda: written(
            world, resumed
        ),
    }
    for name, trial in trials.items():
        started = time.process_time()
        found = trial()
        table.add_row(name, f"{time.process_time() - started:.1f}", found)
    return table


def order(world: int, resumed: int) -> str:
    data = synthetic_data(3 * world, 64)
    whole = steps_of(data, 1, world)
    assert len({sequence for step in whole for sequence in step}) == 3 * world, (
        "sequences are not distinct"
    )
    assert steps_of(data, world, 1) == whole
    assert steps_of(data, resumed, world // resumed, taken=world) == whole[1:]
    return f"equal in every step, {3 * world:,} sequences"


def planned(world: int) -> str:
    empty, started = status_now(), time.process_time()
    data = synthetic_data(TOKENS // SEQUENCE // world * world, SEQUENCE, 2_000_000_000)
    plan_seconds, seconds = time.process_time() - started, []
    for rank in (0, world - 1):
        batches = MicroBatches(data, 1, 1, rank, world)
        for number in (0, len(batches) // 2, len(batches) - 1):
            started = time.process_time()
            batches[number]
            seconds.append(time.process_time() - started)
    grown = (status_now() - empty) / 2**20
    return (
        f"plan in {plan_seconds:.2f} s; any batch, with the targets of its step, in at most "
        f"{max(seconds):.2f} s; {grown:.0f} MiB"
    )


def shard_sizes(world: int, replicas: int) -> str:
    sizes = []
    for rank in (0, world - 1):
        with one_of(rank, world) as mesh:
            model = _model_8b()
            shard(
                model,
                transformer_blocks(model),
                data_mesh(mesh, replicas),
                TrainerConfig(devices=world, replicas=replicas),
            )
            sizes.append(sum(local(parameter).numel() for parameter in model.parameters()))
    foreseen = sum(sharded(parameter, world // replicas) for parameter in _model_8b().parameters())
    assert sizes[0] == foreseen, "the dry run estimates another size for the first rank"
    return f"{sizes[0]:,} parameters, as the dry run estimates, and {sizes[1]:,}"


def merged(world: int) -> str:
    """Make the checkpoint plan of every rank and merge them as the first rank does. No tensor is
    allocated and no file is written.
    """
    shapes = {name: parameter.shape for name, parameter in _model_8b().named_parameters()}
    plans: list[SavePlan] = []
    first: DefaultSavePlanner | None = None
    for rank in range(world):
        with one_of(rank, world) as mesh:
            planner = DefaultSavePlanner()
            planner.set_up_planner(_state(shapes, mesh, rank), None, rank == 0)
            plans.append(planner.create_local_plan())
            first = first or planner
    assert first is not None
    gathered = sum(len(pickle.dumps(plan)) for plan in plans)
    shards = sum(len(plan.items) for plan in plans)
    started = time.process_time()
    _, metadata = first.create_global_plan(plans)
    seconds, size = time.process_time() - started, len(pickle.dumps(metadata))
    return (
        f"{gathered / 1e6:.0f} MB gathered, {shards:,} shards merged in {seconds:.1f} s to "
        f"{size / 1e6:.0f} MB of metadata"
    )


def written(world: int, resumed: int) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name) / "step-00000001", tiny_model()
        write_together(model, folder, world)
        assert is_whole(folder)
        files = read_facts(folder)["files"]
        assert not (wrong := differences(model, folder, resumed)), (
            f"tensors differ from those written: {wrong}"
        )
        return f"{len(files):,} files, all tensors bit-identical"


# Simulated process groups
# ----------------------------------------------------------------------------------------------


@contextmanager
def one_of(rank: int, world: int) -> Iterator[DeviceMesh]:
    """Make this process rank `rank` of `world`, and yield the mesh of all ranks. Collectives do
    nothing.
    """
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()


def together(world: int, work: Callable[[int], Result]) -> list[Result]:
    """The results of `work(rank)` in `world` threads that form a process group.

    If any rank fails, the exception of the lowest such rank is raised.
    """
    found: dict[int, Result] = {}
    failures: dict[int, BaseException] = {}
    store = dist.HashStore()

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            found[rank] = work(rank)
            dist.destroy_process_group()
        except BaseException as error:
            failures[rank] = error
            # ends the other ranks, which wait for this one
            threaded.ProcessLocalGroup.exception_handle(error)

    torch._C._distributed_c10d._set_thread_isolation_mode(True)  # type: ignore[attr-defined]
    threaded._install_threaded_pg()
    try:
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threaded._uninstall_threaded_pg()
        threaded.ProcessLocalGroup.reset()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)  # type: ignore[attr-defined]
    for rank in sorted(failures):
        if not isinstance(failures[rank], SystemExit):  # a rank ended because another one failed
            raise failures[rank]
    return [found[rank] for rank in range(world)]


# Batches
# ----------------------------------------------------------------------------------------------


class SyntheticStore(FormulaLengths):
    """Documents whose token ids are their positions in the store; nothing is kept in memory."""

    indices = ()  # no shards, so no loss mask

    def tokens(self, document: int, start: int, end: int) -> np.ndarray:
        begin, stop = self.positions(np.array([document, document + 1])).tolist()
        return np.arange(begin + start, min(begin + end, stop)) % 2**31


def synthetic_data(sequences: int, seq_len: int, documents: int = 10_000) -> PackedSequences:
    store: Any = SyntheticStore(documents)
    plan = make_plan(
        {"all": store}, MixtureConfig(ratios={"all": 1.0}, seq_len=seq_len), sequences, seed=0
    )
    return PackedSequences(plan, [store])


def batches_of(
    data: PackedSequences, world: int, rank: int, accumulate: int, taken: int = 0
) -> list[dict[str, Any]]:
    """The micro-batches of one sequence each that a rank reads after all ranks have read `taken`
    sequences in total.
    """
    loader = PackedLoader(data, 1, accumulate, rank, world)
    loader.load_state_dict({"taken": taken})
    return list(loader)


def steps_of(
    data: PackedSequences, world: int, accumulate: int, taken: int = 0
) -> list[list[bytes]]:
    """The sequences that `world` ranks read in each optimizer step, sorted within the step."""
    read = [batches_of(data, world, rank, accumulate, taken) for rank in range(world)]
    steps = range(len(read[0]) // accumulate)
    return [
        sorted(
            batch["input_ids"].numpy().tobytes()
            for batches in read
            for batch in batches[step * accumulate : (step + 1) * accumulate]
        )
        for step in steps
    ]


# A checkpoint
# ----------------------------------------------------------------------------------------------


class Run(L.LightningModule):
    """A model and its optimizer state, sharded for one rank as `ipt.training` does it."""

    def __init__(self, model: nn.Module, world: int, replicas: int = 1) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        config = TrainerConfig(accelerator="cpu", devices=world, replicas=replicas)
        shard(
            self.model,
            transformer_blocks(self.model),
            data_mesh(init_device_mesh("cpu", (world,)), replicas),
            config,
        )
        self.state = TrainingState(
            self, self.model, build_optimizer(self.model, OptimizerConfig()), frozen=True
        )
        self.state.prepare()

    def fill(self, number: float) -> None:
        """Change every value: multiply weights by `number`, and set element i of each optimizer
        state to `number` * i.
        """
        for name, tensor in self.state.tensors().items():
            here = local(tensor)
            if name.startswith("optimizer."):
                whole = torch.arange(tensor.numel(), dtype=here.dtype).view(tensor.shape)
                start, end = rows(tensor) if tensor.ndim else (0, 0)
                here.copy_(number * (whole[start:end] if tensor.ndim else whole))
            else:
                here.mul_(number)


def write_together(model: nn.Module, folder: Path, world: int, replicas: int = 1) -> None:
    """Write the checkpoint of a synthetic run with `world` ranks."""

    def write(rank: int) -> None:
        run = Run(model, world, replicas)
        run.fill(2)
        tensors = run.state.tensors()
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        facts = {"format": FORMAT, "step": 1, "processes": world, "tensors": shapes}
        write_checkpoint(
            folder,
            Snapshot(tensors, {"rank": rank}, facts, b""),
            dist.new_group(backend="threaded"),
        )

    together(world, write)


def differences(model: nn.Module, folder: Path, world: int, replicas: int = 1) -> list[str]:
    """Names of the tensors that differ in any bit when `world` ranks read that checkpoint."""

    def read(rank: int) -> set[str]:
        run, wanted = Run(model, world, replicas), Run(model, world, replicas)
        wanted.fill(2)
        tensors = run.state.tensors()
        read_tensors(folder, tensors, dist.new_group(backend="threaded"))
        return {
            name
            for name, tensor in wanted.state.tensors().items()
            if not torch.equal(local(tensor), local(tensors[name]))
        }

    return sorted(set().union(*together(world, read)))


def tiny_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig.from_dict({"vocab_size": 401, **shape}))


def _model_8b() -> Any:
    from ipt.config import compose_config

    return meta_model(compose_config("train", ["experiment=medicine_llama3_8b"]))


def _state(shapes: dict[str, torch.Size], mesh: DeviceMesh, rank: int) -> dict[str, Any]:
    """Weights and AdamW state of one rank as shards on the meta device."""
    state: dict[str, Any] = {}
    for name, shape in shapes.items():
        size = -(-shape[0] // mesh.size())
        here = max(0, min(size, shape[0] - rank * size))
        whole = torch.empty(shape, device="meta")
        part = torch.empty((here, *shape[1:]), device="meta")
        sharded_tensor = DTensor.from_local(
            part, mesh, [Shard(0)], run_check=False, shape=shape, stride=whole.stride()
        )
        for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
            state[f"{kind}.{name}"] = sharded_tensor
        state[f"optimizer.step.{name}"] = torch.zeros(())
    return state


def status_now() -> int:
    return status(os.getpid(), "VmRSS")

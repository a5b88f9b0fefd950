"""Hundreds of processes in one: which sequences each reads, what each holds, and what each writes,
through the project's own code.

Two of torch's own stand-ins for a cluster serve here. The fake backend makes this process one of
many whose collectives do nothing: enough for whatever a process decides alone, as its slices. The
threaded backend makes many threads of this process, whose collectives are carried out: what it
takes to write a checkpoint together.
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
TOKENS, SEQUENCE = 10**12, 2048  # of the run that is planned


def measure_ranks(world: int, resumed: int) -> Table:
    """What was tried with so many ranks, and how it went: CPU seconds, and what was found."""
    table = Table(title=f"{world} ranks in one process", title_justify="left")
    table.add_column("what")
    table.add_column("s", justify="right")
    table.add_column("found")
    trials: dict[str, Callable[[], str]] = {
        f"{world} ranks read what one process reads; {resumed} go on from there": lambda: order(
            world, resumed
        ),
        f"1 T tokens: plan and a step's batch on ranks 0 and {world - 1}": lambda: planned(world),
        "8B: slices on the first and the last rank, by FSDP2": lambda: slices(world, 1),
        "8B: slices with a copy on each 64 ranks (HSDP)": lambda: slices(
            world, max(1, world // 64)
        ),
        "8B: what the first rank does to agree on a checkpoint": lambda: agreed(world),
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
    data = made_up_data(3 * world, 64)
    whole = steps_of(data, 1, world)
    assert len({sequence for step in whole for sequence in step}) == 3 * world, (
        "sequences are told apart"
    )
    assert steps_of(data, world, 1) == whole
    assert steps_of(data, resumed, world // resumed, taken=world) == whole[1:]
    return f"equal, step by step, {3 * world:,} sequences"


def planned(world: int) -> str:
    empty, started = status_now(), time.process_time()
    data = made_up_data(TOKENS // SEQUENCE // world * world, SEQUENCE, 2_000_000_000)
    plan_seconds, seconds = time.process_time() - started, []
    for rank in (0, world - 1):
        batches = MicroBatches(data, 1, 1, rank, world)
        for number in (0, len(batches) // 2, len(batches) - 1):
            started = time.process_time()
            batches[number]
            seconds.append(time.process_time() - started)
    grown = (status_now() - empty) / 2**20
    return (
        f"planned in {plan_seconds:.2f} s; any batch, with its step's targets, in at most "
        f"{max(seconds):.2f} s; {grown:.0f} MiB"
    )


def slices(world: int, replicas: int) -> str:
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
    assert sizes[0] == foreseen, "the dry run's memory is that of the first rank"
    return f"{sizes[0]:,} numbers, as the dry run foresees, and {sizes[1]:,}"


def agreed(world: int) -> str:
    """Plans of all ranks, as each makes its own, and the first rank's work on them: no device's
    memory and no file is touched.
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
    gathered, pieces = (
        sum(len(pickle.dumps(plan)) for plan in plans),
        sum(len(plan.items) for plan in plans),
    )
    started = time.process_time()
    _, metadata = first.create_global_plan(plans)
    seconds, size = time.process_time() - started, len(pickle.dumps(metadata))
    return (
        f"{gathered / 1e6:.0f} MB gathered, {pieces:,} slices merged in {seconds:.1f} s to "
        f"{size / 1e6:.0f} MB of metadata"
    )


def written(world: int, resumed: int) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name) / "step-00000001", tiny_model()
        write_together(model, folder, world)
        assert is_whole(folder)
        files = read_facts(folder)["files"]
        assert not (wrong := differences(model, folder, resumed)), f"not as written: {wrong}"
        return f"{len(files):,} files, all tensors equal to the bit"


# One process for all
# ----------------------------------------------------------------------------------------------


@contextmanager
def one_of(rank: int, world: int) -> Iterator[DeviceMesh]:
    """This process as number `rank` of `world`, with the mesh of them all; its collectives do
    nothing.
    """
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()


def together(world: int, work: Callable[[int], Result]) -> list[Result]:
    """What `work(rank)` gives in each of `world` threads, which are a process group. Raises what
    the first of them that failed raised.
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
            threaded.ProcessLocalGroup.exception_handle(
                error
            )  # the others, which wait for this one, end too

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
        if not isinstance(failures[rank], SystemExit):  # one that only ended with the others
            raise failures[rank]
    return [found[rank] for rank in range(world)]


# Batches
# ----------------------------------------------------------------------------------------------


class MadeUpStore(FormulaLengths):
    """Documents whose tokens say where they are, in no memory."""

    indices = ()  # of no shard, and so without a loss mask

    def tokens(self, document: int, start: int, end: int) -> np.ndarray:
        begin, stop = self.positions(np.array([document, document + 1])).tolist()
        return np.arange(begin + start, min(begin + end, stop)) % 2**31


def made_up_data(sequences: int, seq_len: int, documents: int = 10_000) -> PackedSequences:
    store: Any = MadeUpStore(documents)
    plan = make_plan(
        {"all": store}, MixtureConfig(ratios={"all": 1.0}, seq_len=seq_len), sequences, seed=0
    )
    return PackedSequences(plan, [store])


def batches_of(
    data: PackedSequences, world: int, rank: int, accumulate: int, taken: int = 0
) -> list[dict[str, Any]]:
    """The micro-batches, of one sequence each, that a process reads once all have taken `taken`
    sequences together.
    """
    loader = PackedLoader(data, 1, accumulate, rank, world)
    loader.load_state_dict({"taken": taken})
    return list(loader)


def steps_of(
    data: PackedSequences, world: int, accumulate: int, taken: int = 0
) -> list[list[bytes]]:
    """The sequences of each optimizer step, as `world` processes read them between them, in an
    order of their own (sorted).
    """
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
    """What a checkpoint is made of: a model and its optimizer's state, cut as `ipt.training` cuts
    them for one process of many.
    """

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
        """Other numbers everywhere: of weights their own times `number`, of moments as many as
        numbers before them, times `number`.
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
    """Write the checkpoint of a made-up run of `world` processes."""

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
    """Names of the tensors that `world` other processes do not read from that checkpoint as they
    were written, to the bit.
    """

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
    """Weights and AdamW's state of one rank, as slices without memory."""
    state: dict[str, Any] = {}
    for name, shape in shapes.items():
        size = -(-shape[0] // mesh.size())
        here = max(0, min(size, shape[0] - rank * size))
        whole = torch.empty(shape, device="meta")
        part = torch.empty((here, *shape[1:]), device="meta")
        cut = DTensor.from_local(
            part, mesh, [Shard(0)], run_check=False, shape=shape, stride=whole.stride()
        )
        state |= {
            f"{kind}.{name}": cut for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
        }
        state[f"optimizer.step.{name}"] = torch.zeros(())
    return state


def status_now() -> int:
    return status(os.getpid(), "VmRSS")

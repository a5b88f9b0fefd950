"""What several processes do together, for tests: `main` writes what each check found to
FOLDER/found-RANK.json.
"""

import copy
import json
import threading
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from ipt.config import Config, OptimizerConfig
from ipt.training.loss import CausalLMLoss
from ipt.training.model import (
    build_model,
    can_be_filled,
    empty_model,
    fill,
    stored_weights,
    transformer_blocks,
)
from ipt.training.optim import optimizers
from ipt.training.optim.build import build_optimizer
from ipt.training.optim.dtensor import local
from ipt.training.parallelize import parallelize, set_gradient_sync

LENGTH, SIZES = 48, [20, 28]
OPTIMIZERS = ("adamw", "adamw_8bit", "lion", "lion_8bit", "muon")


def config_of(folder: Path, **trainer) -> Config:
    config = Config(model=str(folder))
    for key, value in {"accelerator": "cpu", "loss_chunk": 16, **trainer}.items():
        setattr(config.trainer, key, value)
    return config


def batch_of(seed: int) -> dict:
    ids = torch.randint(5, 300, (1, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(size) for size in SIZES])[None]
    return {
        "input_ids": ids[:, :-1],
        "labels": ids[:, 1:],
        "position_ids": positions,
        "source_ids": torch.zeros(1, LENGTH, dtype=torch.long),
        "document_sizes": SIZES,
    }


def sharded_loss(config: Config, mesh: DeviceMesh) -> CausalLMLoss:
    stored = stored_weights(config.model)
    model = empty_model(config)
    assert can_be_filled(model, stored)
    loss = CausalLMLoss(model, config.trainer.loss_chunk)
    parallelize(loss, transformer_blocks(model), mesh, config.trainer)
    fill(model, stored, torch.device("cpu"), config.seed)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return loss


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def quantized_loss(config: Config, mesh: DeviceMesh) -> CausalLMLoss:
    """Cut but for the quantised matrices, which are whole everywhere."""
    model = build_model(config)
    loss = CausalLMLoss(model, config.trainer.loss_chunk)
    parallelize(loss, transformer_blocks(model), mesh, config.trainer)
    assert {isinstance(parameter, DTensor) for parameter in model.parameters()} == {True, False}
    assert all(
        isinstance(parameter, DTensor)
        for parameter in model.parameters()
        if parameter.requires_grad
    )
    return loss


def loaded_in_slices(
    folder: Path, mesh: DeviceMesh, lora: int = 0, quantize: str | None = None
) -> dict:
    """Loss and gradients of a cut model against those of the whole one, tied and untied."""
    config = config_of(folder)
    config.lora.rank, config.lora.quantize = lora, quantize
    cut = quantized_loss(config, mesh) if quantize else sharded_loss(config, mesh)
    plain = CausalLMLoss(build_model(config), 1000)
    values = []
    for loss in (cut, plain):
        value, _ = loss(batch_of(0), 1 / LENGTH, True)
        value.backward()
        values.append(value.item())
    pairs = list(zip(cut.named_parameters(), plain.named_parameters(), strict=True))
    return {
        "names": all(one[0] == other[0] for one, other in pairs),
        "losses": values,
        "gradients": len([1 for _, (_, parameter) in pairs if parameter.grad is not None]),
        "difference": max(
            float((whole(one.grad) - other.grad).abs().max())
            for (_, one), (_, other) in pairs
            if other.grad is not None
        ),
        "largest": max(
            float(parameter.grad.abs().max())
            for parameter in plain.parameters()
            if parameter.grad is not None
        ),
    }


def memory_of_loading(folder: Path, mesh: DeviceMesh) -> dict:
    """Bytes that building and filling a cut model took at most, beyond what there was, of memory
    that is no file's.
    """
    before, most, done = anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    loss = sharded_loss(config_of(folder), mesh)
    done.set()
    watcher.join()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in loss.parameters())
    return {"taken": most[0] - before, "whole": weights}


def anonymous_memory() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def reduced_once(folder: Path, mesh: DeviceMesh, no_sync: bool) -> dict:
    """Reductions of three micro-batches, and their gradients."""
    config = config_of(folder, no_sync=no_sync)
    loss = sharded_loss(config, mesh)
    counts = []
    for number in range(3):
        set_gradient_sync(loss, number == 2, config.trainer)
        with CommDebugMode() as communication:
            loss(batch_of(10 * number + dist.get_rank()), 1 / LENGTH, True)[0].backward()
        counts.append(
            sum(
                count
                for name, count in communication.get_comm_counts().items()
                if "reduce_scatter" in str(name)
            )
        )
    return {
        "counts": counts,
        "norm": whole(nn.utils.clip_grad_norm_(loss.parameters(), 1e9)).item(),
    }


def same_optimizer(name: str, dtype: torch.dtype, mesh: DeviceMesh) -> dict:
    """Three steps on a cut model and on a whole one, then one that is skipped."""
    plain = _layers(dtype)
    start, cut = copy.deepcopy(plain), copy.deepcopy(plain)
    fully_shard(cut, mesh=mesh)
    built = [build_optimizer(model, OptimizerConfig(name=name, lr=1e-2)) for model in (plain, cut)]
    for step in range(4):
        ids = torch.randint(0, 40, (8,), generator=torch.Generator().manual_seed(step))
        before = (
            [whole(tensor).clone() for tensor in _all_tensors(cut, built[1])] if step == 3 else []
        )
        for model, optimizer in zip((plain, cut), built, strict=True):
            optimizer.zero_grad()
            model(ids).float().square().mean().backward()
            optimizer.found_inf = torch.tensor(float(step == 3))
            optimizer.step()
    parameters = zip(plain.parameters(), cut.parameters(), start.parameters(), strict=True)
    triples = [
        (one.detach(), whole(other).detach(), before.detach()) for one, other, before in parameters
    ]
    return {
        "apart": max(
            float((one - other).float().norm() / (one - before).float().norm())
            for one, other, before in triples
        ),
        "moved": min(float((one - before).abs().max()) for one, _, before in triples),
        "untouched": all(
            torch.equal(one, whole(other))
            for one, other in zip(before, _all_tensors(cut, built[1]), strict=True)
        ),
        "cut": all(
            isinstance(value, DTensor)
            for state in built[1].state.values()
            for key, value in state.items()
            if key != "step"
        ),
    }


def same_in_pieces(name: str, mesh: DeviceMesh) -> bool:
    """Whether a cut model in bf16 and its optimizer's state are to the bit what they are if slices
    are updated in one piece.
    """
    ended, whole_slices = [], optimizers.PIECE
    for piece in (3 * 256, whole_slices):
        # of slices of 2,800 numbers and more, but for one of 1,600
        optimizers.PIECE = piece
        model = _layers(torch.bfloat16)
        fully_shard(model, mesh=mesh)
        optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=1e-2))
        for step in range(2):
            optimizer.zero_grad()
            model(torch.arange(8) + step).float().square().mean().backward()
            optimizer.step()
        ended.append([local(tensor) for tensor in _all_tensors(model, optimizer)])
    return all(map(torch.equal, *ended))


def copies_round_alike() -> dict:
    """Two copies of a model in bf16, each whole on its device (HSDP): their noise must be the same,
    or they drift apart.
    """
    torch.manual_seed(0)
    model = nn.Linear(64, 64).to(torch.bfloat16)
    start = model.weight.detach().clone()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-4))
    for _ in range(5):
        model(torch.ones(2, 64, dtype=torch.bfloat16)).float().square().mean().backward()
        optimizer.step()
    mine = model.weight.to_local().float()
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    return {"equal": torch.equal(*both), "moved": float((mine - start.float()).abs().max())}


def _layers(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(40, 256), nn.Linear(256, 70), nn.Linear(70, 80), nn.Linear(80, 40, bias=False)
    ).to(dtype)


def _all_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [
        *model.parameters(),
        *(value for state in optimizer.state.values() for value in state.values()),
    ]


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {
        "tied": loaded_in_slices(folder / "tied", mesh),
        "untied": loaded_in_slices(folder / "untied", mesh),
        "lora": loaded_in_slices(folder / "tied", mesh, lora=2),
        "qlora": loaded_in_slices(folder / "tied", mesh, lora=2, quantize="4bit"),
        "memory": memory_of_loading(folder / "large", mesh),
        "each": reduced_once(folder / "tied", mesh, no_sync=False),
        "once": reduced_once(folder / "tied", mesh, no_sync=True),
        "optimizers": {name: same_optimizer(name, torch.float32, mesh) for name in OPTIMIZERS},
        "bf16": same_optimizer("adamw", torch.bfloat16, mesh),
        "pieces": {name: same_in_pieces(name, mesh) for name in OPTIMIZERS},
        "copies": copies_round_alike(),
    }
    (folder / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()

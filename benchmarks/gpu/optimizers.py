"""Each optimizer from the same start on a small model, under FSDP2 and not: its loss against fp32
AdamW's, its state, its time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from benchmarks.gpu.piece import Piece, milliseconds, run
from ipt.config import Config, OptimizerConfig, TrainerConfig
from ipt.training.loss import CausalLMLoss
from ipt.training.model import build_model, transformer_blocks
from ipt.training.optim.build import build_optimizer
from ipt.training.optim.dtensor import local
from ipt.training.parallelize import parallelize

STEPS = 50
VOCABULARY, ROWS, LENGTH = 512, 8, 128


@dataclass(frozen=True)
class Contender:
    name: str
    lr: float
    limit: float  # of the mean loss of all steps, as a share of fp32 AdamW's
    precision: str = "bf16-mixed"


ADAMW = Contender("adamw", 3e-3, 1.01)
CONTENDERS = (
    ADAMW,
    Contender("adamw", 3e-3, 1.02, "bf16-true"),
    Contender("adamw_8bit", 3e-3, 1.02),
    Contender("adamw_8bit", 3e-3, 1.02, "bf16-true"),
    Contender("paged_adamw_8bit", 3e-3, 1.02),
    Contender("lion", 5e-4, 1.25),
    Contender("lion_8bit", 5e-4, 1.25),
    Contender("muon", 3e-3, 1.1),
)


def measure(piece: Piece) -> None:
    dist.init_process_group(
        "gloo" if piece.smoke else "nccl", store=dist.HashStore(), rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh(piece.device.type, (1,))
        losses, *_ = train(piece, ADAMW, None)
        expected = sum(losses) / len(losses)
        for contender, sharded in rows(piece):
            what = (
                f"{contender.name}, {contender.precision}, "
                f"{'FSDP2' if sharded else 'one plain process'}"
            )
            if piece.reach(what, 20):
                show(piece, what, contender, mesh if sharded else None, expected)
        for name in dict.fromkeys(contender.name for contender, _ in rows(piece)):
            if piece.reach(f"time of an update with {name}", 20):
                time_of_update(piece, name)
    finally:
        dist.destroy_process_group()


def rows(piece: Piece) -> Iterator[tuple[Contender, bool]]:
    """Those whose kernels are here, each plain and under FSDP2."""
    for contender in CONTENDERS:
        if "8bit" in contender.name and find_spec("bitsandbytes") is None:
            if (
                text := f"not here: {contender.name} needs the package bitsandbytes"
            ) not in piece.notes:
                piece.note(text)
            continue
        if "paged" in contender.name and piece.smoke:
            continue  # its pages move between a GPU and its host
        yield contender, False
        yield contender, True


def show(
    piece: Piece, what: str, contender: Contender, mesh: DeviceMesh | None, expected: float
) -> None:
    losses, state_bytes, parameters = train(piece, contender, mesh)
    found = sum(losses) / len(losses)
    figures = {
        "first loss": losses[0],
        "last": losses[-1],
        "mean": found,
        "of fp32 AdamW's": found / expected,
        "bytes of state a weight": state_bytes / parameters,
    }
    sharded = {"under": "FSDP2" if mesh else "one plain process"}
    piece.row(
        f"{len(losses)} steps from the same start",
        {"optimizer": contender.name, "precision": contender.precision} | sharded | figures,
    )
    piece.check(f"{what}: mean loss as a share of fp32 AdamW's", found / expected, contender.limit)


def train(
    piece: Piece, contender: Contender, mesh: DeviceMesh | None
) -> tuple[list[float], int, int]:
    """Losses of the steps, bytes of the optimizer's state, and the number of weights."""
    config = config_of(piece, contender)
    torch.manual_seed(0)
    model = build_model(config)
    parallelize(loss := CausalLMLoss(model, 256), transformer_blocks(model), mesh, config.trainer)
    loss.to(piece.device)
    optimizer = build_optimizer(loss, config.optimizer)
    losses = []
    for step in range(5 if piece.smoke else STEPS):
        optimizer.zero_grad()
        with torch.autocast(
            piece.device.type,
            torch.bfloat16,
            enabled=mesh is None and contender.precision == "bf16-mixed",
        ):
            value, _ = loss(batch(step, piece.device), 1 / (ROWS * LENGTH), True)
        value.backward()
        nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
        optimizer.step()
        losses.append(value.item())
    tensors = [
        local(tensor)
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, Tensor)
    ]
    return (
        losses,
        sum(tensor.nbytes for tensor in tensors),
        sum(parameter.numel() for parameter in loss.parameters()),
    )


def config_of(piece: Piece, contender: Contender) -> Config:
    architecture = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    architecture |= {"hidden_size": 256, "intermediate_size": 512}
    trainer = TrainerConfig(
        accelerator=piece.device.type.replace("cuda", "gpu"),
        precision=contender.precision,
        attn_implementation="packed",
    )
    return Config(
        architecture=architecture,
        trainer=trainer,
        optimizer=OptimizerConfig(name=contender.name, lr=contender.lr),
    )


def batch(step: int, device: torch.device) -> dict[str, object]:
    """Sequences in which the previous token determines the next one, except for a random tenth. A
    model learns them in tens of steps.
    """
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    drawn = torch.rand(ids.shape, generator=generator) < 0.1
    for place in range(1, LENGTH + 1):
        ids[:, place] = torch.where(
            drawn[:, place], ids[:, place], (5 * ids[:, place - 1] + 7) % VOCABULARY
        )
    return {
        "input_ids": ids[:, :-1].to(device),
        "labels": ids[:, 1:].to(device),
        "position_ids": torch.arange(LENGTH, device=device).expand(ROWS, LENGTH),
        "source_ids": torch.zeros(ROWS, LENGTH, dtype=torch.long, device=device),
        "document_sizes": [LENGTH] * ROWS,
    }


def time_of_update(piece: Piece, name: str) -> None:
    """Of bf16 weights, matrices as large as an 8B model's, all of whose gradients are there."""
    shape, count = ((64, 96), 2) if piece.smoke else ((4096, 14336), 8)
    torch.manual_seed(0)
    model = nn.ParameterList(
        torch.randn(shape, device=piece.device, dtype=torch.bfloat16) for _ in range(count)
    )
    for parameter in model:
        parameter.grad = torch.randn_like(parameter)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=1e-5))
    numbers = sum(parameter.numel() for parameter in model)
    taken = milliseconds(optimizer.step, piece.device, repeats=5)
    piece.row(
        "Update of bf16 weights, rounded stochastically",
        {"optimizer": name, "ms a billion weights": taken * 1e9 / numbers},
    )


if __name__ == "__main__":
    run("optimizers", measure)

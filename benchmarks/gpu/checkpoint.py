"""Killed and resumed runs, compared bit by bit with uninterrupted ones, and the time that a step
waits for a checkpoint, with `checkpoint.async_save` and without.
"""

import shutil
import signal
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu.jobs import Job, make_stores, run_job
from benchmarks.gpu.piece import Piece, run
from ipt.training.checkpoint.storage import whole_checkpoints

STEPS, EVERY, KILLED = (
    8,
    2,
    7,
)  # at the kill the checkpoint of step 4 is whole, since that of step 6 has waited for it
SAME = ("loss", "grad_norm", "lr", "tokens/raw")
STALLS, STALL_EVERY = 13, 4
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
}
SMALL = LLAMA | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
LARGE = LLAMA | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
}  # 0.6 billion weights
TINY = LLAMA | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 512,
}


def measure(piece: Piece) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocabulary = (TINY if piece.smoke else LLAMA)["vocab_size"]
        stores = make_stores(folder / "stores", vocabulary, 20_000 if piece.smoke else 2_000_000)
        for optimizer, precision in variants():
            if piece.reach(f"kill and resume with {optimizer}, {precision}", 120):
                resume(
                    piece,
                    folder / f"{optimizer}-{precision}",
                    stores,
                    {"optimizer.name": optimizer, "trainer.precision": precision},
                )
        for beside in (True, False):
            if piece.reach(f"stalls, async_save={beside}".lower(), 60):
                stall(piece, folder / f"stall-{beside}", stores, beside)
                shutil.rmtree(folder / f"stall-{beside}")  # gigabytes


def variants() -> Iterator[tuple[str, str]]:
    yield "adamw", "bf16-mixed"
    yield "adamw", "bf16-true"
    if find_spec("bitsandbytes"):
        yield "adamw_8bit", "bf16-true"


def resume(piece: Piece, folder: Path, stores: dict[str, str], settings: dict[str, Any]) -> None:
    """A run that is killed and started again against one that is left alone, and that against
    itself: some kernels add up in any order.
    """
    settings = (
        base_settings(piece, SMALL)
        | settings
        | {"trainer.max_steps": STEPS, "checkpoint.every_n_train_steps": EVERY}
    )
    whole, again = (
        train(piece, Job(settings, stores, str(folder / run), deterministic=True))
        for run in ("whole", "again")
    )
    killed = run_job(
        Job(settings, stores, str(folder / "killed"), KILLED, deterministic=True), piece.left
    )
    assert killed.code == -signal.SIGKILL, killed.error
    newest = list(whole_checkpoints(folder / "killed" / "checkpoints"))[-1].name
    resumed = train(piece, Job(settings, stores, str(folder / "killed"), deterministic=True))
    itself, off = difference(whole, again), difference(whole, resumed)
    names = f"{settings['optimizer.name']}, {settings['trainer.precision']}"
    cells = {
        "optimizer": settings["optimizer.name"],
        "precision": settings["trainer.precision"],
        "killed after step": KILLED,
        "went on from": newest,
    }
    piece.row(
        "Kill and resume: largest relative difference of a step's figures",
        cells | {"resumed": off, "the same run twice": itself},
    )
    piece.check(f"{names}: resumed against uninterrupted", off, itself)
    piece.check(f"{names}: the same run twice", itself, 0)


def stall(piece: Piece, folder: Path, stores: dict[str, str], beside: bool) -> None:
    settings = base_settings(piece, LARGE) | {
        "checkpoint.every_n_train_steps": STALL_EVERY,
        "checkpoint.async_save": beside,
    }
    steps = train(piece, Job(settings | {"trainer.max_steps": STALLS}, stores, str(folder / "run")))
    seconds = [
        1 / step["tokens_per_second"] for step in steps
    ]  # of a token: all steps have as many
    tokens = steps[0]["tokens"]
    behind = range(STALL_EVERY, STALLS, STALL_EVERY)  # the step after a save has waited for it
    plain = median(value for number, value in enumerate(seconds) if number not in behind and number)
    first, *others = [(seconds[number] - plain) * tokens for number in behind]
    newest = list(whole_checkpoints(folder / "run" / "checkpoints"))[-1]
    size = sum(file.stat().st_size for file in newest.iterdir()) / 2**30
    how = "beside the training" if beside else "before the next step"
    cells = {
        "written": how,
        "GiB": size,
        "seconds of a step": plain * tokens,
        "first save, s": first,
        "later saves, s": max(others),
    }
    piece.row("How long a step waits for a checkpoint", cells)


def train(piece: Piece, job: Job) -> list[dict[str, Any]]:
    """The steps of a job. Raises RuntimeError with its last words if it fails."""
    outcome = run_job(job, piece.left)
    if outcome.code != 0:
        raise RuntimeError(f"{Path(job.output).name}: {outcome.error}")
    return outcome.steps


def difference(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> float:
    assert (
        [step["step"] for step in left]
        == [step["step"] for step in right]
        == list(range(1, STEPS + 1))
    )
    pairs = [
        (one[name], other[name]) for one, other in zip(left, right, strict=True) for name in SAME
    ]
    return max(abs(one - other) / max(abs(one), 1e-12) for one, other in pairs)


def base_settings(piece: Piece, architecture: dict[str, Any]) -> dict[str, Any]:
    return {
        "architecture": TINY if piece.smoke else architecture,
        "mixture.ratios": {"raw": 0.5, "instruction": 0.5},
        "mixture.seq_len": 64 if piece.smoke else 1024,
        "optimizer.lr": 1e-3,
        "trainer.accelerator": "cpu" if piece.smoke else "gpu",
        "trainer.strategy": "fsdp2",
        "trainer.precision": "bf16-mixed",
        # the one that can always be made to add up in the same order
        "trainer.attn_implementation": "packed",
        "trainer.micro_batch_size": 4,
        "checkpoint.every_n_minutes": None,
    }


if __name__ == "__main__":
    run("checkpoint", measure)

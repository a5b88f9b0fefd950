"""litgpt's side of benchmarks/training.py: `litgpt pretrain` from the same weights, over rows of
one length, which it compiles.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import torch
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data.base import DataModule
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from stepping import Stepping
from torch.utils.data import DataLoader


class GivenRows(DataModule):
    """Micro-batches of rows of `seq_len` tokens and the one after them."""

    def __init__(self, micro_batches: list[list[list[int]]]) -> None:
        super().__init__()
        self.batches = [torch.tensor(rows) for rows in micro_batches]

    def connect(
        self,
        tokenizer: Any = None,
        batch_size: int = 1,
        max_seq_length: int | None = None,
        **options: Any,
    ) -> None:
        """There is nothing to prepare."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.batches[:1], batch_size=None)  # it validates before it trains


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    output = Path(job["output"])
    Stepping(lambda: logged_losses(output))
    rows, width = len(job["rows"][0]), len(job["rows"][0][0]) - 1
    train = TrainArgs(
        save_interval=None,
        global_batch_size=rows * job["accumulate"],
        micro_batch_size=rows,
        lr_warmup_steps=0,
        max_tokens=len(job["rows"]) * rows * width,
        max_seq_length=width,
        tie_embeddings=job["tied"],
        max_norm=1.0,
        min_lr=job["lr"],  # the peak: constant
    )
    pretrain.setup(
        job["name"],
        out_dir=output,
        precision=job["precision"],
        initial_checkpoint_dir=converted(job["name"], Path(job["model"]), output),
        data=GivenRows(job["rows"]),
        train=train,
        eval=EvalArgs(interval=10**9, max_iters=1),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": job["lr"], "betas": job["betas"], "weight_decay": 0.0},
        },
        devices=1,
        logger_name="csv",
    )


def converted(name: str, model: Path, output: Path) -> Path:
    """A Hugging Face folder's weights in litgpt's own format."""
    folder = output.with_name(f"{output.name}-weights")
    folder.mkdir()
    for path in model.glob("*.safetensors*"):
        (folder / path.name).symlink_to(path)
    convert_hf_checkpoint(folder, model_name=name)
    return folder


def logged_losses(output: Path) -> list[float]:
    paths = sorted(output.glob("logs/**/metrics.csv"))
    return [
        float(row["loss"])
        for path in paths
        for row in csv.DictReader(path.open(encoding="utf-8"))
        if row["loss"]
    ]


if __name__ == "__main__":
    main()

"""Hugging Face Trainer's side of benchmarks/training.py, with batches that are packed or padded as
its own collators do it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from stepping import Stepping
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)


class GivenBatches(Trainer):
    """A dataset's item is a micro-batch, as the documents in it: all sides see the same."""

    def get_train_dataloader(self) -> DataLoader:
        return self.accelerator.prepare(
            DataLoader(self.train_dataset, batch_size=None, collate_fn=self.data_collator)
        )


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    batches = [
        [{"input_ids": document} for document in documents] for documents in job["micro_batches"]
    ]
    trainer = GivenBatches(
        model=model,
        args=training_arguments(job),
        train_dataset=batches,
        data_collator=collator(job),
    )
    Stepping(lambda: [record["loss"] for record in trainer.state.log_history if "loss" in record])
    trainer.train()


def collator(job: dict[str, Any]) -> Any:
    """Packed: one row, positions restart, by which transformers' sdpa keeps documents apart.
    Padded: a document a row.
    """
    if job["packed"]:
        return DataCollatorWithFlattening()
    return DataCollatorForLanguageModeling(AutoTokenizer.from_pretrained(job["model"]), mlm=False)


def training_arguments(job: dict[str, Any]) -> TrainingArguments:
    return TrainingArguments(
        output_dir=job["output"],
        max_steps=len(job["micro_batches"]) // job["accumulate"],
        gradient_accumulation_steps=job["accumulate"],
        use_cpu=True,
        bf16=job["precision"] == "bf16-mixed",
        optim="adamw_torch_fused",
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        adam_beta1=job["betas"][0],
        adam_beta2=job["betas"][1],
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()

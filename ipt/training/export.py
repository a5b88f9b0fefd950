"""A trained model as a Hugging Face folder: safetensors, tokenizer, and a card that says what it was trained on."""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from ipt.config import Config
from ipt.models import load_tokenizer
from ipt.training.module import build_model


def export(model: Any, config: Config, output: Path, report: dict[str, dict[str, Any]]) -> None:
    """Write `output/export`; LoRA layers are merged there and also written as they are to `output/adapter`, in bf16.

    All ranks must call it: sharded weights are gathered, and rank 0 writes.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if torch.distributed.get_rank() != 0:
            return
        model = build_model(config)
        model.load_state_dict(weights)
    if config.lora.rank:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        adapter = {name: tensor.to(torch.bfloat16) for name, tensor in get_peft_model_state_dict(model).items()}
        model.peft_config["default"].base_model_name_or_path = config.model  # not the place where this machine keeps it
        model.save_pretrained(output / "adapter", state_dict=adapter)
        set_peft_model_state_dict(model, adapter)  # merged or apart, it is the same model
        model = model.merge_and_unload()
    model.save_pretrained(output / "export")
    load_tokenizer(config.model).save_pretrained(output / "export")
    (output / "export" / "README.md").write_text(model_card(config, report))


def model_card(config: Config, report: dict[str, dict[str, Any]]) -> str:
    rows = [
        f"| {name} | {row['unique_tokens']:,} | {row['tokens']:,} | {row['realised']:.2%} | {row['repeats']:.2f} |"
        for name, row in report.items()
    ]
    start = "random weights" if config.architecture else f"`{config.model}`"
    return "\n".join(
        [
            f"# {config.name}",
            "",
            f"Trained with ipt from {start}: {config.trainer.max_steps} steps of sequences of {config.mixture.seq_len} tokens,",
            f"seed {config.seed}.",
            "",
            "| source | unique tokens | trained tokens | share | repeats |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "The licences of the start model and of the data apply.",
            "",
        ]
    )

"""The model card: base model, training data, training settings and loss."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipt.config import Config
from ipt.files import read_json_lines

LAST_STEPS = 20  # over which the card averages the loss


def model_card(config: Config, sources: Mapping[str, Any], metrics: Path) -> str:
    """README.md of a model, in Markdown with the hub's header.

    `sources` is the mixture's report of what the whole run takes from each source, `metrics` the
    run's metrics.jsonl so far.
    """
    steps = read_json_lines(metrics)
    start = f"`{config.model}`"
    if config.architecture:
        start = f"random weights, architecture `{config.architecture['model_type']}`"
    lines = [
        *_header(config),
        f"# {config.title or config.name}",
        "",
        "A causal language model trained with ipt (Instruction Pre-Training, "
        f"arXiv:2406.14491) from {start}.",
        "",
        "## Data",
        "",
        "| source | unique tokens | tokens of the run | proportion | repeats | targets so far | "
        "loss |",
        "|---|---|---|---|---|---|---|",
        *[_source_row(name, row, steps) for name, row in sources.items()],
        "",
        f"Packed into sequences of {config.mixture.seq_len:,} tokens "
        f"({config.mixture.packing}); seed {config.seed}.",
        "`raw` is the corpus itself, `instruction` the corpus with instruction-response pairs that "
        "a model generated from it.",
        "",
        "## Training",
        "",
        *_training(config, steps),
        "",
        "## Licence",
        "",
        "This card grants no licence. The licences of the base model, of the model that generated",
        "the pairs and of the data apply: check them before you distribute this model.",
        "",
    ]
    return "\n".join(lines)


def _header(config: Config) -> list[str]:
    is_hub_name = config.model.count("/") == 1 and not Path(config.model).exists()
    base = [f"base_model: {config.model}"] if is_hub_name and not config.architecture else []
    return [
        "---",
        *base,
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [instruction-pre-training]",
        "---",
        "",
    ]


def _source_row(name: str, row: Mapping[str, Any], steps: list[dict[str, Any]]) -> str:
    targets = sum(step.get(f"tokens/{name}", 0) for step in steps)
    losses = [step[f"loss/{name}"] for step in steps[-LAST_STEPS:] if f"loss/{name}" in step]
    loss = f"{sum(losses) / len(losses):.3f}" if losses else "-"
    tokens = f"{row['unique_tokens']:,} | {row['tokens']:,} | {row['realised']:.2%}"
    return f"| {name} | {tokens} | {row['repeats']:.2f} | {targets:,} | {loss} |"


def _training(config: Config, steps: list[dict[str, Any]]) -> list[str]:
    trainer, optimizer, lora = config.trainer, config.optimizer, config.lora
    rows = ["- no step yet"]
    if steps:
        last = [step["loss"] for step in steps[-LAST_STEPS:]]
        rows = [
            f"- {len(steps):,} of {trainer.max_steps:,} steps, {steps[-1]['tokens']:,} tokens",
            f"- loss {sum(last) / len(last):.3f}, mean of the last {len(last)} steps",
        ]
    return [
        *rows,
        f"- {optimizer.name}, peak learning rate {optimizer.lr:g}, {config.lr_scheduler.name} "
        f"schedule, weight decay {optimizer.weight_decay:g}",
        f"- LoRA of rank {lora.rank}, merged" if lora.rank else "- all weights trained",
        f"- arithmetic in {trainer.precision}, weights here in {trainer.export_dtype}",
    ]

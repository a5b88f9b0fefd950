"""The card of a trained model: what it comes from, what it was trained on, and what came of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipt.config import Config
from ipt.files import read_json_lines

LAST = 20  # steps that the card's loss is a mean of


def model_card(config: Config, sources: Mapping[str, Any], metrics: Path) -> str:
    """README.md of a model, in Markdown with the hub's header.

    `sources` is the mixture's report of what a whole run takes from each source, `metrics` the
    run's metrics.jsonl so far.
    """
    steps = read_json_lines(metrics)
    start = (
        f"random weights, architecture `{config.architecture['model_type']}`"
        if config.architecture
        else f"`{config.model}`"
    )
    return "\n".join(
        [
            *_header(config),
            f"# {config.title or config.name}",
            "",
            "A causal language model trained with ipt (Instruction Pre-Training, "
            f"arXiv:2406.14491) from {start}.",
            "",
            "## Data",
            "",
            "| source | unique tokens | tokens of the run | share | repeats | targets so far | "
            "loss |",
            "|---|---|---|---|---|---|---|",
            *[_source_row(name, row, steps) for name, row in sources.items()],
            "",
            f"Packed into sequences of {config.mixture.seq_len:,} tokens "
            f"({config.mixture.packing}); seed {config.seed}.",
            "`raw` is the corpus as it is, `instruction` the corpus with instruction-response "
            "pairs that a model wrote about it.",
            "",
            "## Training",
            "",
            *_training(config, steps),
            "",
            "## Licence",
            "",
            "No licence is given here. Those of the start model, of the model that wrote the "
            "pairs and of the data apply: look at them",
            "before you pass this model on.",
            "",
        ]
    )


def _header(config: Config) -> list[str]:
    is_hub_name = (
        not config.architecture and config.model.count("/") == 1 and not Path(config.model).exists()
    )
    base = [f"base_model: {config.model}"] if is_hub_name else []
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
    losses = [step[f"loss/{name}"] for step in steps[-LAST:] if f"loss/{name}" in step]
    loss = f"{sum(losses) / len(losses):.3f}" if losses else "-"
    figures = (
        f"{row['unique_tokens']:,} | {row['tokens']:,} | {row['realised']:.2%} | "
        f"{row['repeats']:.2f}"
    )
    return f"| {name} | {figures} | {targets:,} | {loss} |"


def _training(config: Config, steps: list[dict[str, Any]]) -> list[str]:
    optimizer, schedule, lora = config.optimizer, config.lr_scheduler, config.lora
    rows = [
        f"- {len(steps):,} of {config.trainer.max_steps:,} steps, {steps[-1]['tokens']:,} tokens"
        if steps
        else "- no step yet"
    ]
    if steps:
        last = steps[-LAST:]
        rows.append(
            f"- loss {sum(step['loss'] for step in last) / len(last):.3f}, mean of the last "
            f"{len(last)} steps"
        )
    rates = f"peak learning rate {optimizer.lr:g}, {schedule.name} schedule"
    rows.append(f"- {optimizer.name}, {rates}, weight decay {optimizer.weight_decay:g}")
    rows.append(f"- LoRA of rank {lora.rank}, merged" if lora.rank else "- all weights trained")
    rows.append(
        f"- arithmetic in {config.trainer.precision}, weights here in {config.trainer.export_dtype}"
    )
    return rows

"""Processes that generate together, for a test: `main` reads FOLDER/asked.json and writes
FOLDER/said-RANK.json.
"""

import json
from pathlib import Path

import torch
from evaluation_cases import opinionated
from torch import distributed
from torch.distributed.fsdp import fully_shard

from ipt.evaluation.backends.generate import Greedy
from ipt.models import load_model, load_tokenizer


def main(folder: Path) -> None:
    asked = json.loads((folder / "asked.json").read_text())
    distributed.init_process_group("gloo")
    model = opinionated(load_model("embedded:tiny", torch.float32))
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    greedy = Greedy(model, load_tokenizer("embedded:tiny"), ["\n"], asked["new"])
    said = {
        "whole": greedy.run(asked["prompts"], asked["batch_tokens"], "test"),
        "calls": len(calls),
    }
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    said["sharded"] = greedy.run(asked["prompts"], asked["batch_tokens"], "test")
    (folder / f"said-{distributed.get_rank()}.json").write_text(json.dumps(said))
    distributed.destroy_process_group()

"""What several processes do together, for tests: `main` writes what each found to
FOLDER/found-RANK.json.
"""

import json
from pathlib import Path

import torch
from evaluation_cases import TASK, make_scorer
from torch.distributed.fsdp import fully_shard

from ipt import distributed
from ipt.evaluation.task_types import multiple_choice
from ipt.evaluation.task_types.multiple_choice import Question
from ipt.models import load_tokenizer
from ipt.training.model import transformer_blocks


def main(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    distributed.join()
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    questions = [
        Question(*fields) for fields in json.loads((folder / "questions.json").read_text())
    ]
    found = {"together": score(model, questions)}
    for block in transformer_blocks(model):
        fully_shard(block)
    fully_shard(model)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))  # as a step of training has done
    # what lies outside the blocks; a block is gathered by each of its calls, which takes all
    # processes
    model.unshard()
    found["sharded"] = score(model, questions)
    (folder / f"found-{distributed.place()[0]}.json").write_text(json.dumps(found))
    distributed.leave()


def score(model, questions):
    scorer = make_scorer(model, load_tokenizer("embedded:tiny"), batch_tokens=60)
    jobs = scorer._jobs(
        [
            scorer.option_rows(scorer.encoder.question(question.prompt, question.options))[0]
            for question in questions
        ]
    )
    assert len(jobs) % 2 == 1 and {bool(job.prefix) for job in jobs} == {True, False}, (
        "an idle process and a prefix are not exercised"
    )
    return [row["sums"] for row in multiple_choice.score(TASK, questions, scorer)]

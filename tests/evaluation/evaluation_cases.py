"""What several of this room's tests need: texts, and the plain way of scoring as an oracle."""

import torch

from ipt.config import EvaluationConfig
from ipt.evaluation.backends.huggingface import Scorer
from ipt.evaluation.task import Task

TASK = Task("test", "choice", "test.jsonl")
DOCUMENTS = [
    "Anaemia is a condition in which the blood carries too little oxygen.",
    "The femur, or thigh bone, is the longest bone of the body. It bears weight while standing, "
    "walking and running.",
    "Gut.",
    "A nerve cell receives signals through its dendrites and sends them on along its axon, at up "
    "to 100 m/s – in myelinated fibres.",
]


def make_scorer(model, tokenizer, **config):
    return Scorer(model, tokenizer, EvaluationConfig(**config))


def opinionated(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)
    return model.eval()


@torch.no_grad()
def loop_sums(model, scorer, questions):
    """The plain way: each prompt with one option alone, all logits, one sum for each option."""
    sums = []
    for question in questions:
        encoded = scorer.encoder.question(question.prompt, question.options)
        for option in encoded.options:
            ids = torch.tensor([encoded.prompt + option])
            logprobs = model(input_ids=ids).logits[0].double().log_softmax(-1)
            first = len(encoded.prompt)
            sums.append(
                sum(
                    float(logprobs[position - 1, ids[0, position]])
                    for position in range(first, ids.shape[1])
                )
            )
    return sums

"""Evaluation on a GPU: options that share a row with their prompt (the tree mask) against each
option alone, in fp32 and bf16, and time.
"""

import random
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.gpu.piece import Piece, run
from ipt.config import EvaluationConfig
from ipt.evaluation.backends.huggingface import DTYPES, Scorer

LIMITS = {
    "float32": 1e-4,
    "bfloat16": 0.1,
}  # nats, root mean square over all tokens of all options; a leak between options gives whole nats
# times the weights of a fresh model, so that what a token sees moves its log-probabilities by whole
# nats
SHARPER = 12


def measure(piece: Piece) -> None:
    tokenizer, questions = byte_tokenizer(), make_questions(8 if piece.smoke else 400)
    torch.manual_seed(0)
    sizes = (32, 48, 2, 2, 1) if piece.smoke else (1024, 4096, 12, 16, 4)
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    model = LlamaForCausalLM(
        LlamaConfig.from_dict(
            {"vocab_size": len(tokenizer), **dict(zip(names, sizes, strict=True))}
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(SHARPER / (model.config.hidden_size / 32) ** 0.5)
    exact = None
    for dtype in ("float32", "bfloat16"):
        model.to(piece.device, DTYPES[dtype])
        found = {}
        for scoring in ("plain", "tree"):
            scorer = Scorer(
                model,
                tokenizer,
                EvaluationConfig(batch_tokens=512 if piece.smoke else 16_384, scoring=scoring),
            )
            clock = time.monotonic()
            encoded = [scorer.encoder.question(prompt, options) for prompt, options in questions]
            rows = [row for question in encoded for row in scorer.option_rows(question)]
            found[scoring] = np.concatenate(scorer.logprobs(rows, f"{dtype} {scoring}"))
            taken = time.monotonic() - clock
            exact = found[scoring] if exact is None else exact
            figures = {"questions/s": len(questions) / taken, "mean": float(found[scoring].mean())}
            piece.row(
                "Scoring",
                {"dtype": dtype, "scoring": scoring}
                | figures
                | {"off fp32, plain": apart(found[scoring], exact)},
            )
        piece.check(
            f"{dtype}: tree against each option alone",
            apart(found["tree"], found["plain"]),
            LIMITS[dtype],
        )
        takes_tree = Scorer(model, tokenizer, EvaluationConfig()).tree_length > 0
        piece.check(f"{dtype}: scoring=auto does not take the tree", not takes_tree, 0)


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the differences, in nats."""
    return float(np.sqrt(np.mean((found - expected) ** 2)))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte: needs no file."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=names[0], eos_token=names[0]
    )


def make_questions(count: int) -> list[tuple[str, list[str]]]:
    """Prompts of made-up words, each with four options."""
    choose = random.Random(0)

    def words(number: int) -> str:
        return " ".join(
            "".join(choose.choices("aeilnorst", k=choose.randint(2, 7))) for _ in range(number)
        )

    return [
        (words(30), [" " + words(choose.randint(1, 6)) for _ in range(4)]) for _ in range(count)
    ]


if __name__ == "__main__":
    run("evaluation", measure)

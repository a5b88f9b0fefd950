"""Examples scored per second: this scorer, a plain loop that runs each option whole, and
lm-evaluation-harness's Hugging Face backend.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --data ../shared/data
    python benchmarks/evaluation.py --model FOLDER --device cuda --dtype bfloat16 \\
        --items 512 --peer-items 512 --batch-size 64

The first command uses synthetic items with the shape of ChemProt and ARC (ten minutes on two
cores). `--data` names a folder with the real data sets in the layout of data_dir.

Three forms of tasks: 13 options after 13 demonstrations that each item has for itself, as in the
published prompts; the same after demonstrations that all items share; and 4 options without
demonstrations. One model in memory serves all sides, which take turns. The loop reads one prompt
with one option at a time and scores the tokens that the whole has more than the prompt, as the
released scorer does. The harness's `loglikelihood` gets all options as its requests, in batches of
--batch-size. Both cost the same for every item, so on a CPU they are given the first --peer-items
only. A ratio is the median of those of neighbouring passes, and scores are compared on the items
that all sides have: mean log-probability per token of each option.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import Comparison, add_json_option, alternate, clocked, named, report
from ipt.config import EvaluationConfig
from ipt.evaluation.backends.huggingface import Scorer, load_scorer
from ipt.evaluation.data import subset
from ipt.evaluation.task import Task, load_tasks
from ipt.evaluation.task_types import multiple_choice
from ipt.evaluation.task_types.multiple_choice import Question

Scores = list[list[float]]  # of each option of each question
Side = Callable[[list[Question]], Scores]
TASK = Task("benchmark", "choice")
HARNESS = "lm-evaluation-harness"


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    scorer = load_scorer(
        EvaluationConfig(
            device=arguments.device, dtype=arguments.dtype, batch_tokens=arguments.batch_tokens
        ),
        arguments.model,
    )
    sides = {
        "ipt": our_side(scorer),
        "plain loop": loop(scorer),
        HARNESS: harness(scorer, arguments.batch_size),
    }
    tasks = (real_questions if arguments.data else made_up_questions)(arguments)
    report(
        [
            row
            for title, questions in tasks.items()
            for row in measure(arguments, title, questions, sides)
        ],
        arguments.json,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument(
        "--data", metavar="FOLDER", help="data sets, as in data_dir; default: made-up items"
    )
    parser.add_argument("--items", type=int, default=24, help="of a task")
    parser.add_argument(
        "--peer-items",
        type=int,
        default=2,
        help="that the other sides are given of them; four times as many without shots",
    )
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="of this scorer")
    parser.add_argument("--batch-size", type=int, default=8, help="of the harness")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=0, help="default: torch's")
    add_json_option(parser)
    return parser.parse_args()


def measure(
    arguments: argparse.Namespace, title: str, questions: list[Question], sides: dict[str, Side]
) -> list[Comparison]:
    count = arguments.peer_items * (1 if questions[0].shots else 4)
    given = {name: questions if name == "ipt" else questions[:count] for name in sides}
    scores: dict[str, Scores] = {}

    def work(name: str) -> None:
        scores[name] = sides[name](given[name])

    seconds = alternate({name: clocked(partial(work, name)) for name in sides}, arguments.passes)
    speeds = {name: [len(given[name]) / one for one in taken] for name, taken in seconds.items()}

    def against(peer: str) -> Comparison:
        apart = max(
            np.abs(np.subtract(a, b)).max()
            for a, b in zip(scores["ipt"], scores[peer], strict=False)
        )
        note = (
            f"{len(given['ipt'])} and {len(given[peer])} items, scores differ by at most "
            f"{apart:.1e}"
        )
        name = named(peer, "lm_eval") if peer == HARNESS else peer
        return Comparison(title, "examples/s", speeds["ipt"], name, speeds[peer], note=note)

    return [against("plain loop"), against(HARNESS)]


# Sides
# ----------------------------------------------------------------------------------------------


def our_side(scorer: Scorer) -> Side:
    return lambda questions: [
        row["published"] for row in multiple_choice.score(TASK, questions, scorer)
    ]


def loop(scorer: Scorer) -> Side:
    @torch.inference_mode()
    def score(prompt: str, option: str) -> float:
        tokenize, start = scorer.encoder.tokenizer, scorer.encoder.start
        before, whole = (
            [*start, *tokenize(text, add_special_tokens=False)["input_ids"]]
            for text in (prompt, prompt + option)
        )
        ids = torch.tensor([whole], device=scorer.model.device)
        logprobs_TV = scorer.model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        targets = ids[0, len(before) :, None]
        return float(logprobs_TV[len(before) - 1 : -1].gather(1, targets).mean())

    return lambda questions: [
        [score(question.prompt, option) for option in question.options] for question in questions
    ]


def harness(scorer: Scorer, batch_size: int) -> Side:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer: Any = scorer.encoder.tokenizer
    model = HFLM(
        pretrained=scorer.model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        add_bos_token=bool(scorer.encoder.start),
    )

    def score(questions: list[Question]) -> Scores:
        requests = [
            Instance("loglikelihood", {}, (question.prompt, option), place)
            for question in questions
            for place, option in enumerate(question.options)
        ]
        answers = iter(model.loglikelihood(requests, disable_tqdm=True))
        return [
            [
                next(answers)[0] / (tokens(question.prompt + option) - tokens(question.prompt))
                for option in question.options
            ]
            for question in questions
        ]

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return score


# Items
# ----------------------------------------------------------------------------------------------


def real_questions(arguments: argparse.Namespace) -> dict[str, list[Question]]:
    chemprot, arc = load_tasks(["chemprot_local", "arc_easy_local"], Path(arguments.data))
    own = replace(chemprot, fewshot={**chemprot.fewshot, "vary": True})
    alone = replace(arc, unconditional="")  # a figure that the other sides do not compute
    tasks = {
        "ChemProt, 13 demonstrations of its own": own,
        "ChemProt, 13 shared demonstrations": chemprot,
        "ARC-easy": alone,
    }
    return {
        title: subset(multiple_choice.read(task, None), arguments.items)
        for title, task in tasks.items()
    }


def made_up_questions(arguments: argparse.Namespace) -> dict[str, list[Question]]:
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubdklmnprst", k=draw.randint(3, 9))) for _ in range(2000)]
    answers = [" " + " ".join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(13)]

    def sentence(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    def demonstrations() -> str:
        return "".join(f"{sentence(20, 40)}\nAnswer:{answer}\n\n" for answer in answers)

    def question(number: int, before: str) -> Question:
        return Question(
            str(number),
            f"{before}{sentence(20, 40)}\nAnswer:",
            answers,
            number % 13,
            shots=len(before),
        )

    def short(number: int) -> Question:
        return Question(
            str(number),
            f"{sentence(10, 25)}?\nAnswer:",
            [f" {sentence(1, 5)}" for _ in range(4)],
            number % 4,
        )

    shared, numbers = demonstrations(), range(arguments.items)
    return {
        "13 options, 13 demonstrations of its own": [
            question(number, demonstrations()) for number in numbers
        ],
        "13 options, 13 shared demonstrations": [question(number, shared) for number in numbers],
        "4 options": [short(number) for number in numbers],
    }


if __name__ == "__main__":
    main()

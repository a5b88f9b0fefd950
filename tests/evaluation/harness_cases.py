"""A folder of task files for lm-evaluation-harness with data of its own: one task for each kind of
request, and groups.
"""

import json
from pathlib import Path

WORDS = ["heart", "lung", "liver", "nerve", "bone", "skin", "blood", "brain", "kidney", "muscle"]
CHOICE = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}, train: {file}}}}}
test_split: test
training_split: train
fewshot_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: options
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
  - {{metric: mcc, aggregation: matthews_corrcoef}}
"""
OTHERS = {
    "contexts": """
output_type: multiple_choice
doc_to_text: gold
doc_to_target: ending
doc_to_choice: beginnings
metric_list: [{metric: acc}]
""",
    "last_word": """
output_type: loglikelihood
doc_to_text: question
doc_to_target: "{{' ' + options[gold]}}"
metric_list: [{metric: acc}, {metric: perplexity, aggregation: perplexity}]
""",
    "documents": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{options[gold]}}"
generation_kwargs: {until: ["\\n", "the"], max_gen_toks: 7}
filter_list:
  - {name: all, filter: [{function: take_first}]}
  - {name: first, filter: [{function: regex, regex_pattern: "(\\\\w+)"}, {function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean}]
""",
}
GROUPS = """
group: organs
task:
  - group: inner
    task: [choice_long]
    aggregate_metric_list: [{{metric: acc, weight_by_size: true}}]
  - choice
aggregate_metric_list:
  - {{metric: acc, weight_by_size: {by_size}}}
"""


def write_harness_tasks(folder: Path, by_size: bool = True) -> Path:
    folder.mkdir()
    for name, rows in {"choice": 12, "choice_long": 19}.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(_row(number)) + "\n" for number in range(rows))
        )
        (folder / f"{name}.yaml").write_text(
            CHOICE.format(task=name, file=folder / f"{name}.jsonl")
        )
    for name, task in OTHERS.items():
        data = (
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: "
            f"{folder / 'choice.jsonl'}}}}}\ntest_split: test\n"
        )
        (folder / f"{name}.yaml").write_text(data + task)
    (folder / "organs.yaml").write_text(GROUPS.format(by_size=str(by_size).lower()))
    return folder


def _row(number: int) -> dict:
    options = [
        WORDS[(number * 3 + step) % len(WORDS)] + " tissue" * (step == 1)
        for step in range(2 + number % 2)
    ]
    question = f"What is number {number} of {', '.join(WORDS[: 1 + number % 9])}?"
    return {
        "question": question,
        "options": options,
        "gold": number % 2,
        "beginnings": [f"{question} It is the {option}, which" for option in options],
        "ending": "is part of the body.",
        "text": f"{question}  The {WORDS[number % 7]} is part of the body – as long as it lives.\n"
        * (1 + number % 3),
    }

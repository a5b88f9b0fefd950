"""Tasks of kind `pairs`: what a model is asked, and how what it writes is compared with the right
pairs.
"""

import csv
import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import CHRF

from ipt.config import EvaluationConfig, SynthesisConfig
from ipt.evaluation.backends.base import Generation
from ipt.evaluation.backends.encoding import Encoder
from ipt.evaluation.results import compare, groups_of, load_results
from ipt.evaluation.run import evaluate
from ipt.evaluation.task import load_tasks
from ipt.evaluation.task_types import qa_pairs
from ipt.evaluation.task_types.qa_pairs import (
    Item,
    Shot,
    Writer,
    best_matching,
    counts,
    metrics,
    read,
    score,
    similarity,
)
from ipt.models import load_tokenizer
from ipt.synthesis.chains import Parsed
from ipt.synthesis.formats.base import IptFormat, Vocabulary
from ipt.synthesis.formats.chat import ChatFormat
from ipt.synthesis.formats.tags import Pair, context_text, pairs_text

ROWS = (
    "kind: pairs\ndata: rows.jsonl\npairs: qa\nquestion: '{{ q }}'\nanswer: '{{ a "
    "}}'\nmax_new_tokens: 60\n"
)
DATA = [
    {
        "id": "heart",
        "context": "The heart pumps blood.",
        "qa": [{"q": "What pumps?", "a": "The heart"}, {"q": "What is pumped?", "a": "Blood"}],
    },
    {
        "id": "bone",
        "context": "The femur is the longest bone.",
        "qa": [{"q": "Which bone is longest?", "a": "The femur"}, {"q": "?", "a": " "}],
    },
    {"id": "none", "context": "Nothing is asked.", "qa": []},
    {
        "id": "lung",
        "context": "Lungs take in air.",
        "qa": [{"q": "What is taken in?", "a": "Air"}, {"q": "what is taken in?", "a": "Air"}],
    },
]
OPTIONS = "Is it?\nOptions:\n- yes\n- no"


@pytest.fixture
def make_task(tmp_path):
    def make(text=ROWS, rows=DATA):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "contexts.yaml").write_text(text)
        (task,) = load_tasks([str(tmp_path / "contexts.yaml")])
        return task

    return make


@pytest.fixture(scope="module")
def encoder():
    tokenizer = load_tokenizer("embedded:smollm2-135m")
    return Encoder(tokenizer, [], 2048)


def as_rows(*pairs):
    return [{"question": question, "answer": answer} for question, answer in pairs]


# Items
# ----------------------------------------------------------------------------------------------


def test_what_has_no_pairs_is_left_out_and_counted(make_task):
    items = read(make_task(), None)
    assert [(item.id, len(item.gold)) for item in items] == [("heart", 2), ("bone", 1), ("lung", 1)]
    assert items[0].left_out == {
        "empty_question_or_answer": 1,
        "doubled_question": 1,
        "context_without_pairs": 1,
    }
    assert (
        items[0].text
        == "The heart pumps blood.\n\nWhat pumps?\nThe heart\n\nWhat is pumped?\nBlood"
    )


def test_a_row_can_be_a_pair(make_task):
    text = "kind: pairs\ndata: rows.jsonl\nmeasure: responses\ncontext: '{{ t }}'\n"
    (item,) = read(make_task(text, [{"t": "A text.", "question": "Q?", "answer": 4}]), None)
    assert (item.context, item.gold) == ("A text.", (Pair("Q?", "4"),))


def test_demonstrations_are_the_same_for_all_and_never_the_item(make_task):
    items = read(make_task(ROWS + "num_fewshot: 2\n"), None)
    assert all(
        len(item.shots) == 2 and item.context not in [shot.context for shot in item.shots]
        for item in items
    )
    assert len({shot.context for item in items for shot in item.shots}) == 3
    with pytest.raises(ValueError, match="contexts: 2 demonstrations for item heart, expected 3"):
        read(make_task(ROWS + "num_fewshot: 3\n"), None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ROWS + "measure: answers\n", "measure is 'answers', expected pairs or responses"),
        (ROWS + "reader: squat\n", "reader is 'squat', expected adversarial_qa"),
        (
            ROWS + "measure: responses\npair_format: chat\n",
            "measure=responses needs pair_format=ipt, found chat",
        ),
        (
            ROWS + "num_fewshot: 1\npair_format: chat\n",
            "num_fewshot needs pair_format=ipt, found chat",
        ),
        (
            ROWS.replace("pairs: qa", "pairs: context"),
            r"rows.jsonl line 1: field context \(pairs of task contexts\) is",
        ),
        (
            ROWS + "where: {id: none}\n",
            "has no context with pairs .left out: {'context_without_pairs': 1}",
        ),
        (
            "kind: pairs\ndata: hub:owner/name\nreader: squad\n",
            "reader=squad needs a local file",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(make_task, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read(make_task(text), None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["parse: text", "prompt: x", "fewshot: {vary: true}"])
def test_keys_without_meaning_are_refused(make_task, key):
    with pytest.raises(ValueError, match=r"has no effect|unknown key"):
        make_task(ROWS + key + "\n")


# Prompts
# ----------------------------------------------------------------------------------------------


def test_prompts_are_those_of_the_synthesizer(make_task, encoder):
    """An oracle: the ids of a chain of two documents in synthesis."""
    task = make_task()
    form = IptFormat(Vocabulary(encoder.tokenizer), SynthesisConfig())
    item = Item(
        "i",
        "A text.",
        (Pair("Q one?", "a"), Pair("Q two?", "b")),
        {},
        (Shot("Before.", (Pair("X?", "Y."),)),),
    )
    history = form.finish(form.begin("Before."), [], "", Parsed([Pair("X?", "Y.")], {}))
    ((ids, shots, truncated),) = Writer(task, encoder).prompts(item)
    assert (ids, shots, truncated) == (form.follow(history, "A text.").ids, 1, False)
    asked = Writer(replace(task, measure="responses"), encoder).prompts(item)
    texts = [encoder.tokenizer.decode(one.ids) for one in asked]
    before = context_text("Before.") + pairs_text([Pair("X?", "Y.")])
    begin = f"<|im_start|>{before}<|im_end|><|im_start|>{context_text('A text.')}"
    assert texts == [f"{begin}<QUE> Q one? <ANS>", f"{begin}<QUE> Q two? <ANS>"]


def test_prompts_through_the_chat_template(make_task, encoder):
    task = make_task(ROWS + "pair_format: chat\n")
    items = read(task, None)
    form = ChatFormat(Vocabulary(encoder.tokenizer), SynthesisConfig(format="chat"))
    assert Writer(task, encoder).prompts(items[0])[0].ids == form.begin(items[0].context).ids
    said = json.dumps(
        {
            "questions": [{"question": "What pumps?", "answer": "The heart"}],
            "choices": [],
            "problems": [],
        }
    )
    rows = score(task, items, Backend(encoder, *[Generation(said, 9, "eos")] * 3))
    assert rows[0]["generated"] == as_rows(("What pumps?", "The heart"))


def test_what_does_not_fit_is_left_out_from_the_front_and_then_cut(make_task, encoder):
    task = replace(make_task(), measure="responses", max_new_tokens=10)
    shots = (Shot("First. " * 20, (Pair("X?", "Y."),)), Shot("Second.", (Pair("X?", "Y."),)))
    item = Item("i", "word " * 30 + "end", (Pair("Q?", "a"),), {}, shots)
    whole = Writer(task, encoder).prompts(item)[0]
    assert whole.shots == 2

    def asked(length):
        (one,) = Writer(task, replace(encoder, max_length=length)).prompts(item)
        assert len(one.ids) <= length - 10
        return one, encoder.tokenizer.decode(one.ids)

    assert asked(len(whole.ids) + 10)[0] == whole
    one, text = asked(len(whole.ids) + 9)
    assert one.shots == 1 and "First." not in text and "Second." in text and not one.truncated
    one, text = asked(50)
    assert (
        one.shots == 0
        and one.truncated
        and text.endswith("word </CON>\n\n<QUE> Q? <ANS>")
        and text.startswith("<|im_start|> <CON> word")
    )
    overhead = len(Writer(task, encoder).format.begin("").ids)
    with pytest.raises(ValueError, match="item i: a question leaves no tokens"):
        asked(overhead + 11)
    with pytest.raises(
        ValueError,
        match=f"max_new_tokens is 10, which leaves no tokens for a context in {overhead + 10}",
    ):
        asked(overhead + 10)


class Backend:
    """Says what it is told to."""

    def __init__(self, encoder, *generations):
        self.encoder, self.generations = encoder, list(generations)

    def generate(self, prompts, stop, max_new_tokens, description):
        assert len(prompts) == len(self.generations)
        return self.generations


def test_outputs_are_read_and_counted(make_task, encoder):
    task = make_task()
    said = [
        Generation(
            pairs_text([Pair("What pumps?", "The heart"), Pair("Why?", "So.")]) + "\n\n<QUE> What",
            60,
            "length",
        ),
        Generation("It is a bone.", 5, "eos"),
        Generation(pairs_text([Pair("A?", "b"), Pair("a?", "c")]), 9, "eos"),
    ]
    rows = score(task, read(task, None), Backend(encoder, *said))
    assert [row["generated"] for row in rows] == [
        as_rows(("What pumps?", "The heart"), ("Why?", "So.")),
        [],
        as_rows(("A?", "b")),
    ]
    assert counts(rows) == {
        "truncated_contexts": 0,
        "missing_demonstrations": 0,
        "unfinished_outputs": 1,
        "contexts_without_pairs": 1,
        "rejected_repeated_question": 1,
        "rejected_truncated": 2,
        "left_out_context_without_pairs": 1,
        "left_out_doubled_question": 1,
        "left_out_empty_question_or_answer": 1,
    }
    responses = score(
        replace(task, measure="responses"),
        read(task, None),
        Backend(encoder, *[Generation(" it", 2, "stop")] * 4),
    )
    assert [row["outputs"] for row in responses] == [[" it", " it"], [" it"], [" it"]]
    assert counts(responses)["contexts_without_pairs"] == 0


# Figures
# ----------------------------------------------------------------------------------------------


def test_similarity_by_hand():
    one, other = as_rows(("What pumps the blood?", "The heart"), ("What pumps air?", "A heart"))
    # articles do not count
    assert similarity(one, other) == similarity(other, one) == pytest.approx((2 * 2 / 6 + 1) / 2)
    assert similarity(one, one) == 1
    assert similarity(one, {"question": "Why?", "answer": "So"}) == 0


MATRICES = st.integers(0, 4).flatmap(
    lambda columns: st.lists(
        st.lists(st.floats(0, 1, allow_subnormal=False), min_size=columns, max_size=columns),
        max_size=4,
    )
)


@given(MATRICES)
def test_matching_is_the_best_of_all(matrix):
    columns = len(matrix[0]) if matrix else 0
    if len(matrix) > columns:
        matrix = [list(column) for column in zip(*matrix, strict=True)]
        columns = len(matrix[0]) if matrix else 0
    orders = permutations(range(columns), len(matrix))
    best = max(
        (
            sum(values[column] for values, column in zip(matrix, order, strict=True))
            for order in orders
        ),
        default=0,
    )
    assert best_matching(matrix) == pytest.approx(best)


def test_pairs_by_hand(make_task):
    gold = as_rows(("What pumps?", "The heart"), ("What is pumped?", "Blood"))
    rows = [
        # 2 of 3 written, 2 of 2 right; order does not matter
        {"gold": gold, "generated": [*reversed(gold), *as_rows(("Why?", "So"))]},
        {"gold": gold, "generated": []},
        # the question is right, the answer is not
        {"gold": gold[:1], "generated": as_rows(("What pumps?", "It"))},
    ]
    found = metrics(make_task(), rows)
    assert {name: round(metric.value, 4) for name, metric in found.items()} == {
        "correct": round(2 * 2.5 / (4 + 5), 4),
        "precision": round(2.5 / 4, 4),
        "recall": 0.5,
        "pairs_per_context": round(4 / 3, 4),
    }
    assert found["correct"].n == 3 and found["correct"].stderr > 0
    nothing = metrics(make_task(), rows[1:2])
    assert nothing["correct"].value == 0 and nothing["precision"].as_dict()["value"] is None


def test_responses_by_hand(make_task):
    task = replace(make_task(), measure="responses")
    rows = [
        {
            "gold": as_rows((OPTIONS, "yes"), (OPTIONS, "no")),
            "outputs": [" Yes.", " no, it is not"],
        },
        {"gold": as_rows(("Who?", "The old king")), "outputs": ["a king"]},
        {
            "gold": as_rows(("How many?", "Two and two.\nTherefore, the answer is 4")),
            "outputs": ["Count.\nTherefore, the answer is 4."],
        },
    ]
    found = metrics(task, rows)
    no, king = 2 * 1 / (4 + 1), 2 * 1 / (1 + 2)
    assert {name: round(metric.value, 4) for name, metric in found.items()} == {
        # of questions with options nothing but the right one counts
        "correct": round((1 + 0 + king + 1) / 4, 4),
        "exact_match": 0.5,
        "f1": round((1 + no + king + 1) / 4, 4),
        "contains": 0.75,
    }
    assert found["correct"].n == 3


def test_an_evaluation_of_a_synthesizer(make_task, tmp_path):
    """The tiny synthesizer answers every document with the same two pairs."""
    model = "embedded:tiny-synthesizer"
    asked = [{"q": "What is this page about?", "a": "A term and what belongs to it."}]
    # all that this model sees
    end = (
        " The heart is a muscle with four chambers that pumps blood through the whole body, day "
        "and night."
    )
    known = [{**row, "context": row["context"] + end, "qa": asked} for row in DATA]
    make_task(ROWS + "num_fewshot: 1\n", known)
    statistics = evaluate(
        EvaluationConfig(), model, [str(tmp_path / "contexts.yaml")], None, tmp_path / "a"
    )
    found = load_results(tmp_path / "a")["contexts"]
    assert (
        found["recall"]["value"],
        found["precision"]["value"],
        found["pairs_per_context"]["value"],
    ) == (1.0, 0.5, 2.0)
    assert found["correct"]["value"] == pytest.approx(2 / 3) and found["correct"]["n"] == 4
    assert statistics["tasks"]["contexts"]["missing_demonstrations"] == 0
    written = pq.read_table(tmp_path / "a" / "predictions" / "contexts.parquet")
    assert written.schema.remove_metadata() == qa_pairs.SCHEMA
    evaluate(
        EvaluationConfig(), "embedded:tiny", [str(tmp_path / "contexts.yaml")], None, tmp_path / "b"
    )
    difference = compare(tmp_path / "a", tmp_path / "b")["contexts"]["correct"]
    assert difference["difference"] > 0.6 and difference["p"] < 0.01


# What ships
# ----------------------------------------------------------------------------------------------


def test_the_group_has_no_average_and_the_published_figures():
    tasks = load_tasks(["synthesizer"])
    assert {task.measure for task in tasks} == {"pairs", "responses"} and len(tasks) == 10
    assert "synthesizer" not in groups_of(task.name for task in tasks)
    published = {task.name: sorted(task.published.values()) for task in tasks if task.published}
    assert published == {
        "fairytaleqa_responses": [30.6, 70.0],
        "xquad_pairs_few_shot": [21.8, 49.9],
    }


@pytest.mark.shared
def test_real_data(shared_data):
    sizes = {"fairytaleqa": (174, 653), "xquad": (240, 1185), "pubmedqa": (500, 500)}
    for task in load_tasks(["synthesizer"], shared_data):
        items = read(task, None)
        assert (len(items), sum(len(item.gold) for item in items)) == sizes[
            task.name.split("_")[0]
        ], task.name
        assert {len(item.shots) for item in items} == {2 if "few_shot" in task.name else 0}
        if task.reader:
            assert items[0].left_out == {
                "answer_not_in_context": 196,
                "context_with_few_pairs": 55,
                "long_context": 4,
            }


@pytest.mark.shared
def test_words_tell_rewordings_better_than_characters_do(shared_data):
    """Why `similarity` counts words: doctors' rewordings of medical questions against other
    questions on the same matter (MQP).
    """
    with (shared_data / "mqp" / "mqp.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    chrf = CHRF()

    def separation(measure):
        """How often a rewording scores higher than another question: area under the ROC curve."""
        values = {
            label: np.array([measure(a, b) for _, a, b, said in rows if said == label])
            for label in "01"
        }
        higher, equal = (
            order(values["1"][:, None], values["0"]).mean() for order in (np.greater, np.equal)
        )
        return round(float(higher + equal / 2), 3)

    found = {
        "words": separation(lambda a, b: similarity(*as_rows((a, ""), (b, "")))),
        "characters": separation(lambda a, b: chrf.sentence_score(a, [b]).score),
    }
    assert found == {"words": 0.774, "characters": 0.729}


@pytest.mark.shared
@pytest.mark.parametrize(("name", "floor"), [("fairytaleqa_pairs", 0.09), ("xquad_pairs", 0.07)])
def test_pairs_of_other_contexts_are_hardly_similar(shared_data, name, floor):
    """What docs/quality.md calls an anchor: each context is answered with the right pairs of one
    half a set away.
    """
    (task,) = load_tasks([name], shared_data)
    gold = [[pair._asdict() for pair in item.gold] for item in read(task, None)]
    others = [
        {"gold": pairs, "generated": gold[number - len(gold) // 2]}
        for number, pairs in enumerate(gold)
    ]
    assert round(metrics(task, others)["correct"].value, 2) == floor
    assert metrics(task, [{"gold": pairs, "generated": pairs[::-1]} for pairs in gold])[
        "correct"
    ].value == pytest.approx(1)

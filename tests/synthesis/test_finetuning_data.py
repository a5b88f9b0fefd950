"""Data that tunes a synthesizer: the published collection in its folders, and the recipe that
trains on it.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from ipt.config import SourceConfig, TokensConfig, conf_dir, to_config
from ipt.files import read_parts
from ipt.models import load_tokenizer
from ipt.pipeline.stages import Stages
from ipt.pipeline.validation import check_train
from ipt.stage import StageId
from ipt.synthesis.finetuning_data import build_tuning_texts, check_tuning_source
from ipt.synthesis.formats.base import Vocabulary
from ipt.synthesis.formats.tags import Pair, context_text, pairs_text
from ipt.tokens.encode import Encoder, encoding_of
from ipt.tokens.store import TokenStore


def row(context: str, *pairs: tuple[str, str]) -> dict:
    return {
        "context": context,
        "QA_list": [{"Q": q, "A": a} for q, a in pairs],
        "QA_type": "free",
        "rc_name": "some",
    }


def rows_of(data_set: str, contexts: int) -> list[dict]:
    """Contexts that name their data set, with one, two or three pairs."""
    return [
        row(
            f"{data_set} context {number}.",
            *(
                (f"{data_set} {number} asks {pair}?", f"answer {pair}")
                for pair in range(number % 3 + 1)
            ),
        )
        for number in range(contexts)
    ]


def write_shards(folder: Path, data_set: str, rows: list[dict]) -> None:
    shard = folder / data_set / "shard"
    shard.mkdir(parents=True)
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        lines = "".join(json.dumps(entry) + "\n" for entry in part)
        (shard / f"{number:05d}.jsonl").write_text(lines, encoding="utf-8")


def words(texts) -> list[int]:
    """A length for tests: words instead of tokens."""
    return [
        sum(len(shot["prompt"].split()) + len(shot["response"].split()) + 2 for shot in text)
        for text in texts
    ]


def built(config: SourceConfig, output: Path, lengths=words) -> tuple[list[dict], dict]:
    check_tuning_source("collection", config)
    stats = build_tuning_texts(config, "collection", output, 0, lengths)
    return list(read_parts(output / "texts")), stats


@pytest.fixture
def collection(tmp_path) -> SourceConfig:
    for data_set, contexts in (("squad", 40), ("bAbI", 25), ("unwanted", 9)):
        write_shards(tmp_path / "data", data_set, rows_of(data_set, contexts))
    (tmp_path / "data" / "json").mkdir()  # the loader lists of the published repository
    (tmp_path / "data" / "json" / "train.json").write_text("[]")
    return SourceConfig(
        str(tmp_path / "data"), "collection", shots=None, max_tokens=80, include=["squad", "bAbI"]
    )


def test_texts_hold_examples_of_one_data_set_up_to_the_limit(collection, tmp_path):
    texts, stats = built(collection, tmp_path / "out")
    shots = [shot for text in texts for shot in text["examples"]]
    expected = {
        (
            context_text(entry["context"]),
            pairs_text([Pair(qa["Q"], qa["A"]) for qa in entry["QA_list"]]),
        )
        for data_set, contexts in (("squad", 40), ("bAbI", 25))
        for entry in rows_of(data_set, contexts)
    }
    # each once
    assert {(shot["prompt"], shot["response"]) for shot in shots} == expected and len(shots) == 65
    assert stats["contexts"] == 65 and stats["texts"] == len(texts) and stats["dropped"] == {}
    assert stats["data_sets"]["bAbI"]["contexts"] == 25
    for text, after in zip(texts, [*texts[1:], None], strict=True):
        names = {
            name
            for name in ("squad", "bAbI")
            for shot in text["examples"]
            if name in shot["prompt"]
        }
        assert names == {text["id"].split("/")[0]}
        assert words([text["examples"]])[0] <= 80
        if after and after["id"].split("/")[0] in names:  # the next example would not have fitted
            assert words([[*text["examples"], after["examples"][0]]])[0] > 80
    assert len(texts) < 65 / 2


def test_shots_limit_a_text_and_lose_no_example(collection, tmp_path):
    texts, stats = built(replace(collection, shots=3, max_tokens=None), tmp_path / "out", None)
    assert {len(text["examples"]) for text in texts} == {1, 2, 3}
    assert sum(len(text["examples"]) for text in texts) == stats["contexts"] == 65


def test_contexts_with_most_pairs_are_preferred(collection, tmp_path):
    texts, stats = built(replace(collection, max_contexts=10), tmp_path / "out")
    pairs = [
        shot["response"].count("<QUE>")
        for text in texts
        for shot in text["examples"]
        if "squad" in shot["prompt"]
    ]
    assert pairs == [3] * 10
    assert stats["data_sets"]["squad"]["dropped"] == {"beyond_max_contexts": 30}
    assert stats["dropped"] == {"beyond_max_contexts": 30 + 15}


def test_what_is_left_out_is_counted_by_reason_and_data_set(tmp_path):
    rows = [
        row("Fine.", ("Q?", "A")),
        row("Long " * 90, ("Q?", "A")),
        row("No pairs.", ("", "A"), ("Q?", " ")),
        row("Twice.", ("Q?", "A"), ("q?", "B")),
        row("Tag.", ("What does </END> mean?", "A")),
        row(
            "",
            (
                "What is 2 + 2?\nOptions:\n- 3\n- 4\nLet's think step by step.",
                "Count on.\nTherefore, the answer is 4",
            ),
        ),
    ]
    write_shards(tmp_path / "data", "mixed", rows)
    texts, stats = built(
        SourceConfig(str(tmp_path / "data"), "collection", shots=None, max_tokens=80),
        tmp_path / "out",
    )
    assert stats["data_sets"]["mixed"] == {
        "texts": 1,
        "contexts": 3,
        "pairs": 3,
        "dropped": {
            "longer_than_max_tokens": 1,
            "context_without_pairs": 1,
            "empty_question_or_answer": 2,
            "doubled_question": 1,
            "pairs_hold_a_tag": 1,
        },
    }
    assert [shot["prompt"] for text in texts for shot in text["examples"]].count("") == 1


def test_of_an_example_without_context_only_bos_is_read():
    tokenizer = load_tokenizer("embedded:tiny")
    response = pairs_text([Pair("Q?", "A")])
    (document,) = Encoder(encoding_of(tokenizer, TokensConfig())).encode(
        [{"examples": [{"prompt": "", "response": response}]}]
    )
    said = tokenizer(response, add_special_tokens=False)["input_ids"]
    assert document.tokens.tolist() == [tokenizer.bos_token_id, *said, tokenizer.eos_token_id]
    assert document.is_target.tolist() == [0] + [1] * (len(said) + 1)


def test_what_is_learnt_is_what_synthesis_sends_and_reads():
    """Also with a tokenizer that puts a space before the first word of what it encodes, as
    Mistral's does.
    """
    spaced = Tokenizer(models.BPE(unk_token="<unk>"))
    spaced.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    context, pairs = context_text("A text."), pairs_text([Pair("Who?", "It.")])
    spaced.train_from_iterator(
        [context + pairs] * 5,
        trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>", "<s>", "</s>"]),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=spaced, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    for tokenizer in (fast, load_tokenizer("embedded:tiny")):
        vocabulary = Vocabulary(tokenizer)
        (document,) = Encoder(encoding_of(tokenizer, TokensConfig())).encode(
            [{"examples": [{"prompt": context, "response": pairs}], "fill_to": 200}]
        )
        said = [*vocabulary.encode_continuation(pairs), vocabulary.eos]
        assert document.tokens[document.is_target == 1].tolist() == said
        assert document.tokens.tolist()[: -(200 - document.is_target.argmax() - len(said))] == [
            *vocabulary.bos,
            *vocabulary.encode(context),
            *said,
        ]
        assert len(document.tokens) == 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"include": ["squad", "race"]}, "does not contain race .* only: bAbI, squad, unwanted"),
        ({"path": "nowhere"}, "path=nowhere: no such file or folder"),
        ({"path": ""}, "path=: no such file or folder"),
        ({"kind": "squad"}, "is a folder, but kind=squad reads a file"),
        (
            {"kind": "web"},
            "kind=web: must be texts, instructions, store or one of adversarial_qa, collection",
        ),
        (
            {"max_tokens": None},
            "shots=null: needs mixture.sources.collection.max_tokens",
        ),
        ({"max_contexts": 0}, "max_contexts=0: must be at least 1"),
    ],
)
def test_mistakes_in_a_source_are_one_line(collection, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_tuning_source("collection", replace(collection, **changes))


def test_a_row_of_another_schema_is_named(tmp_path):
    path = tmp_path / "wrong.jsonl"
    path.write_text(
        json.dumps(row("Fine.", ("Q?", "A"))) + "\n" + json.dumps({"context": "x", "qa": []}) + "\n"
    )
    with pytest.raises(ValueError, match=r"wrong.jsonl, line 2: expected `context`"):
        built(SourceConfig(str(path), "collection"), tmp_path / "out")


def test_short_paragraphs_of_an_article_are_one_context_in_squad_files(tmp_path):
    def paragraph(context: str, *asked: tuple[str, str]) -> dict:
        return {
            "context": context,
            "qas": [
                {"question": q, "answers": [{"text": a, "answer_start": context.index(a)}]}
                for q, a in asked
            ],
        }

    articles = [
        {
            "title": "Cells",
            "paragraphs": [
                paragraph(
                    "A cell has a wall. It has a core.",
                    ("What is inside?", "core"),
                    ("what has it outside?", "wall"),
                ),
                paragraph(
                    "Cells divide in hours.",
                    ("In what time do they divide?", "hours"),
                    ("How long does it take?", "Hours".lower()),
                ),
                paragraph("Long " * 270 + "end.", ("Where does it stop?", "end")),
            ],
        },
        {
            "title": "Bones",
            "paragraphs": [
                paragraph(
                    "Bones are hard. Age makes them thin.",
                    ("What are they?", "hard"),
                    ("Why thin?", "Age"),
                )
            ],
        },
    ]
    (tmp_path / "file.json").write_text(json.dumps({"data": articles}))
    texts, stats = built(
        SourceConfig(str(tmp_path / "file.json"), "squad", shots=1), tmp_path / "out"
    )
    shots = [shot for text in texts for shot in text["examples"]]
    assert sorted(shot["prompt"] for shot in shots) == [
        context_text("A cell has a wall. It has a core.\n\nCells divide in hours."),
        context_text("Bones are hard. Age makes them thin."),
    ]
    in_order = [
        Pair("What has it outside?", "Wall"),
        Pair("What is inside?", "Core"),
        Pair("In what time do they divide?", "Hours"),
    ]
    assert pairs_text(in_order) in [shot["response"] for shot in shots]
    assert {reason: n for reason, n in stats["dropped"].items() if n} == {
        "doubled_answer": 1,
        "context_with_few_pairs": 1,
    }


def test_questions_on_one_passage_are_gathered_from_their_prompts(tmp_path):
    def asked(
        question: str,
        context: str,
        answer: str,
        template: str = "adversarial_qa_dbert_question_context_answer",
    ) -> dict:
        prompt = f'Question: "{question}"\n\nContext: "{context}"\n\nAnswer:\n'
        return {"template": template, "prompt": prompt, "completion": f"{answer}<|endoftext|>"}

    passage = 'The "heart" pumps blood. It has four chambers.'
    rows = [
        asked("how many chambers?", passage, "four"),
        asked("What pumps?", passage, "heart"),
        asked("Alone?", "Another passage.", "yes"),
        asked("Of another kind?", passage, "yes", "quoref_Answer_Test"),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
        + json.dumps(rows[0] | {"prompt": "Context first"})
        + "\n"
    )
    texts, stats = built(SourceConfig(str(path), "adversarial_qa"), tmp_path / "out")
    ((shot,),) = [text["examples"] for text in texts]
    assert shot == {
        "prompt": context_text(passage),
        "response": pairs_text([Pair("What pumps?", "Heart"), Pair("How many chambers?", "Four")]),
    }
    dropped = {"other_template": 1, "prompt_not_understood": 1, "context_with_few_pairs": 1}
    assert {reason: n for reason, n in stats["dropped"].items() if n} == dropped


def recipe(*overrides: str):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_config(compose("train", ["experiment=synthesizer_mistral_7b", *overrides]))


def test_the_recipe_of_the_published_synthesizer():
    config = recipe()
    source = config.mixture.sources["collection"]
    assert len(set(source.include)) == 35
    assert (
        len({name.removesuffix("_yes_opt").removesuffix("_no_opt") for name in source.include})
        == 34
    )
    trainer = config.trainer
    assert (
        trainer.devices
        * trainer.micro_batch_size
        * trainer.accumulate_grad_batches
        * config.mixture.seq_len
        == 16_384
    )
    assert source.max_tokens == config.mixture.seq_len == 4096
    assert trainer.max_steps * 16_384 == pytest.approx(5 * 0.2e9, rel=0.01)
    assert (config.optimizer.lr, config.optimizer.betas, config.lr_scheduler.warmup_steps) == (
        5e-6,
        [0.9, 0.95],
        1000,
    )


def test_the_recipe_trains_on_a_collection_in_the_published_layout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    include = recipe().mixture.sources["collection"].include
    for data_set in include:
        write_shards(
            tmp_path / "data" / "ft-instruction-synthesizer-collection",
            data_set,
            rows_of(data_set, 6),
        )
    small = [
        "trainer=cpu",
        "trainer.devices=1",
        "trainer.accumulate_grad_batches=4",
        "trainer.max_steps=2",
        "mixture.seq_len=256",
    ]
    config = recipe("model=embedded:tiny", f"data_dir={tmp_path / 'data'}", *small)
    check_train(config)
    stages = Stages(config)
    training = stages.training(folder=tmp_path / "run")
    steps = [
        json.loads(line) for line in (training.folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert [step["step"] for step in steps] == [1, 2] and all(
        np.isfinite(step["loss"]) for step in steps
    )
    texts = stages.done[StageId("texts", "collection")]
    assert set(texts.stats["data_sets"]) == set(include)
    tokenizer = load_tokenizer("embedded:tiny")
    store = TokenStore(stages.done[StageId("tokens", "collection")].folder)
    # each sequence is one text, so packing cuts none
    assert set(np.diff(store.positions(np.arange(len(store) + 1)))) == {256}
    for number in range(len(store)):
        tokens, target = store.tokens(number), store.is_target(number)
        read, learnt = tokenizer.decode(tokens[~target]), tokenizer.decode(tokens[target])
        assert "<QUE>" in learnt and "<CON>" not in learnt and "<QUE>" not in read
        assert target.sum() > 60
        assert len([name for name in include if f"{name} context" in read]) == 1

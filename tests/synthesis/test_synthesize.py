"""The stage as a whole: with the oracle engine for exact expectations, and with plain transformers
on a tiny model.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from synthesis_cases import OracleEngine, write_documents

from ipt.config import SynthesisConfig
from ipt.files import note_hash, read_parts
from ipt.models import load_model, resolve_model
from ipt.synthesis import worker
from ipt.synthesis.engines import EngineDied, PromptRefused
from ipt.synthesis.formats.tags import parse
from ipt.synthesis.run import check_synthesis, synthesize
from ipt.synthesis.shards import SCHEMA

CONFIG = SynthesisConfig(
    model="embedded:tiny",
    engine="transformers",
    shots=3,
    max_model_len=400,
    max_new_tokens=80,
    shard_size=10,
    max_num_seqs=4,
)
TEXTS = [
    f"Document {number} tells about thing {number * 7}. It has a second sentence."
    for number in range(23)
]


@pytest.fixture
def oracle(monkeypatch, vocabulary, tokenizer):
    engine = OracleEngine(vocabulary)
    monkeypatch.setattr(
        worker, "start_engine", lambda config, model, vocabulary, prompt_format, seed: engine
    )
    monkeypatch.setattr("ipt.models.load_tokenizer", lambda name: tokenizer)
    return engine


def rows_of(output):
    return list(read_parts(output / "pairs"))


def test_rows_are_complete_sorted_and_typed(oracle, tmp_path):
    stats = synthesize(CONFIG, write_documents(tmp_path / "documents", TEXTS), tmp_path / "out", 0)
    parts = sorted((tmp_path / "out" / "pairs").iterdir())
    # and no journal
    assert [path.name for path in parts] == [
        "part-00000.parquet",
        "part-00001.parquet",
        "part-00002.parquet",
    ]
    assert all(pq.read_schema(path).remove_metadata() == SCHEMA for path in parts)
    rows = rows_of(tmp_path / "out")
    assert sorted(row["doc_id"] for row in rows) == sorted(f"d{number}" for number in range(23))
    assert {row["doc_id"]: row["text"] for row in rows} == {
        f"d{number}": text for number, text in enumerate(TEXTS)
    }
    assert [(row["chain_id"], row["round"]) for row in rows] == sorted(
        (row["chain_id"], row["round"]) for row in rows
    )
    assert all(
        [pair["question"] for pair in row["pairs"]]
        == [p.question for p in parse(row["raw_output"]).pairs]
        for row in rows
    )
    assert stats["rows"] == stats["documents"] == 23
    assert stats["documents_with_pairs"] == sum(bool(row["pairs"]) for row in rows) < 23
    assert (
        stats["prompt_tokens"]
        == sum(row["prompt_tokens"] for row in rows)
        == sum(map(len, oracle.prompts))
    )
    assert stats["cached_tokens"] == sum(len(prompt) // 2 for prompt in oracle.prompts)
    assert stats["session"]["generations"] == 23
    assert oracle.closed


def test_inheritance_is_what_the_prompts_say(oracle, tmp_path, vocabulary):
    synthesize(CONFIG, write_documents(tmp_path / "documents", TEXTS), tmp_path / "out", 0)
    rows = rows_of(tmp_path / "out")
    shots = {(row["chain_id"], row["round"]): row for row in rows}
    assert any(row["inherits_previous"] for row in rows) and any(row["round"] == 2 for row in rows)
    for prompt in oracle.prompts:
        text = vocabulary.decode_continuation(prompt)
        row = next(row for row in rows if text.endswith(f" <CON> {row['text']} </CON>\n\n"))
        previous = shots.get((row["chain_id"], row["round"] - 1))
        seen = previous is not None and f" {previous['text']} " in text
        assert row["inherits_previous"] == (seen and bool(row["pairs"]))
        if previous is not None and not previous["pairs"]:
            assert not seen
        if seen:
            assert all(
                f"<QUE> {pair['question']} <ANS> {pair['answer']} </END>" in text
                for pair in previous["pairs"]
            )


@pytest.mark.parametrize(("mode", "dropped", "long"), [
    ("split", {"empty": 1}, {"split": 1}),
    ("truncate", {"empty": 1}, {"truncated": 1}),
    ("skip", {"empty": 1, "too_long": 1}, {}),
])  # fmt: skip
def test_every_document_is_accounted_for(oracle, tmp_path, mode, dropped, long):
    texts = [*TEXTS[:6], " \n ", "A long document has many sentences. " * 150, TEXTS[7]]
    config = replace(CONFIG, long_documents=mode)
    stats = synthesize(config, write_documents(tmp_path / "documents", texts), tmp_path / "out", 0)
    rows = rows_of(tmp_path / "out")
    assert stats["dropped"] == dropped
    assert {key: value for key, value in stats["long_documents"].items() if key != "pieces"} == long
    assert (
        stats["documents"]
        == 9
        == stats["documents_with_pairs"] + stats["documents_without_pairs"] + sum(dropped.values())
    )
    pieces = {row["doc_id"]: row["text"] for row in rows if row["doc_id"].split("#")[0] == "d7"}
    assert all(row["prompt_tokens"] + config.max_new_tokens <= config.max_model_len for row in rows)
    if mode == "split":
        assert len(pieces) == stats["long_documents"]["pieces"] > 2
        assert "".join(pieces[f"d7#{number}"] for number in range(len(pieces))) == texts[7]
    elif mode == "truncate":
        assert texts[7].startswith(pieces["d7"]) and len(pieces["d7"]) > 500
    else:
        assert not pieces


def test_a_bound_on_documents_leaves_the_window_room_for_the_shots_before(
    oracle, tmp_path, caplog, vocabulary
):
    def continued(**changes):
        config = replace(CONFIG, **changes)
        stats = synthesize(
            config,
            write_documents(tmp_path / "documents", [sentence * 100] * 4),
            tmp_path / str(changes),
            0,
        )
        said = caplog.text
        caplog.clear()
        assert all(
            row["prompt_tokens"] + config.max_new_tokens <= config.max_model_len
            for row in rows_of(tmp_path / str(changes))
        )
        return (
            stats,
            [len(vocabulary.encode(row["text"])) for row in rows_of(tmp_path / str(changes))],
            said,
        )

    sentence = "Thing 21 has many sentences. "
    alone, lengths, said = continued()
    assert alone["joined"] == 0 and max(lengths) > 250
    assert (
        f"synthesis.shots=3: only 0 of {alone['rows'] * 2 // 3} later shots continue the earlier"
        in said
    )
    assert "they do not fit in synthesis.max_model_len=400" in said
    bounded, lengths, said = continued(max_document_tokens=40)
    assert bounded["joined"] > bounded["rows"] / 3 and "later shots" not in said
    assert 30 < max(lengths) <= 42  # its first and last space are tokens here, and none in a prompt
    assert continued(max_document_tokens=10_000)[0]["rows"] == alone["rows"]


def test_a_finished_run_starts_no_engine_and_a_missing_shard_is_the_only_one_redone(
    oracle, tmp_path
):
    documents, output = write_documents(tmp_path / "documents", TEXTS), tmp_path / "out"
    first = synthesize(CONFIG, documents, output, 0)
    whole = {path.name: path.read_bytes() for path in (output / "pairs").iterdir()}
    oracle.prompts.clear()
    again = synthesize(CONFIG, documents, output, 0)
    assert not oracle.prompts and again["session"] == {}
    assert {**again, "session": None} == {**first, "session": None}
    (output / "pairs" / "part-00001.parquet").unlink()
    (output / "pairs" / ".part-00001.parquet.torn").write_bytes(b"half")
    synthesize(CONFIG, documents, output, 0)
    assert len(oracle.prompts) == 10
    assert {path.name: path.read_bytes() for path in (output / "pairs").iterdir()} == whole


def test_a_refused_prompt_is_a_counted_failure(oracle, tmp_path, monkeypatch):
    generate = oracle.generate

    async def refuse_some(prompt, **options):
        if "thing 21." in oracle._vocabulary.decode_continuation(prompt.ids):
            raise PromptRefused("not this one")
        return await generate(prompt, **options)

    monkeypatch.setattr(oracle, "generate", refuse_some)
    stats = synthesize(
        replace(CONFIG, shots=1),
        write_documents(tmp_path / "documents", TEXTS[:6]),
        tmp_path / "out",
        0,
    )
    refused = next(row for row in rows_of(tmp_path / "out") if row["doc_id"] == "d3")
    assert (
        refused["pairs"],
        refused["finish_reason"],
        refused["output_tokens"],
        refused["raw_output"],
    ) == ([], "error", 0, "")
    assert stats["finish_reasons"]["error"] == stats["session"]["generations_refused"] == 1
    assert stats["rows"] == 6


def test_an_engine_that_dies_stops_the_run_and_what_is_finished_stays(
    oracle, tmp_path, monkeypatch
):
    generate = oracle.generate

    async def die(prompt, **options):
        if len(oracle.prompts) >= 14:
            raise EngineDied("gone")
        return await generate(prompt, **options)

    documents, output = write_documents(tmp_path / "documents", TEXTS), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(oracle, "generate", die)
        with pytest.raises(EngineDied, match="gone"):
            synthesize(CONFIG, documents, output, 0)
    assert oracle.closed
    assert (output / "pairs" / "part-00000.parquet").exists()
    assert not (output / "pairs" / "part-00002.parquet").exists()
    stats = synthesize(CONFIG, documents, output, 0)
    assert stats["rows"] == 23
    assert len(oracle.prompts) == 23  # 14 before, 9 after: nothing was generated twice
    assert stats["session"]["generations_replayed"] == 4


def test_a_shard_that_was_damaged_while_the_run_lay_still_is_made_again(oracle, tmp_path, caplog):
    documents = write_documents(tmp_path / "documents", TEXTS)
    synthesize(CONFIG, documents, tmp_path / "whole", 0)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "pairs").iterdir()}
    part = shutil.copytree(tmp_path / "whole", tmp_path / "out") / "pairs" / "part-00000.parquet"
    note_hash(part)
    (part.parent / "part-00002.parquet").unlink()
    part.write_bytes(part.read_bytes().replace(b"thing", b"thinG", 1))
    oracle.prompts.clear()
    synthesize(CONFIG, documents, tmp_path / "out", 0)
    assert {path.name: path.read_bytes() for path in part.parent.iterdir()} == whole
    assert "part-00000.parquet is damaged" in caplog.text


def test_plain_transformers_on_a_tiny_model(tmp_path):
    config = replace(CONFIG, shots=2, max_new_tokens=8)
    documents = write_documents(tmp_path / "documents", TEXTS[:12])
    stats = synthesize(config, documents, tmp_path / "out", 0)
    rows = rows_of(tmp_path / "out")
    assert len(rows) == stats["rows"] == 12
    assert {row["round"] for row in rows} == {0, 1}
    assert all(
        row["finish_reason"] == ("length" if row["output_tokens"] == 8 else "stop") for row in rows
    )
    assert stats["generated_tokens"] == sum(row["output_tokens"] for row in rows) > 12
    # padding changes no text
    single = synthesize(replace(config, max_num_seqs=1), documents, tmp_path / "one_by_one", 0)
    assert [row["raw_output"] for row in rows_of(tmp_path / "one_by_one")] == [
        row["raw_output"] for row in rows
    ]
    assert single["session"]["engine_load_seconds"] >= 0
    warm = replace(config, temperature=1.0)
    texts = []
    for folder in ("a", "b"):
        synthesize(warm, documents, tmp_path / folder, 3)
        texts.append([row["raw_output"] for row in rows_of(tmp_path / folder)])
    # sampled, and repeatable by its seed
    assert texts[0] == texts[1] != [row["raw_output"] for row in rows]
    synthesize(replace(warm, min_p=1.0), documents, tmp_path / "likeliest", 3)
    assert [row["raw_output"] for row in rows_of(tmp_path / "likeliest")] == [
        row["raw_output"] for row in rows
    ]


@pytest.mark.parametrize(("changes", "message"), [
    ({"engine": "llama"}, "synthesis.engine=llama: must be one of vllm, openai, transformers"),
    ({"format": "chat2"}, "synthesis.format=chat2: must be one of ipt, chat, rule_based"),
    ({"long_documents": "cut"}, (
        "synthesis.long_documents=cut: must be one of split, truncate, skip"
    )),
    ({"dtype": "fp4"}, "synthesis.dtype=fp4: must be one of auto"),
    ({"shots": 0}, "synthesis.shots=0: must be at least 1"),
    ({"max_document_tokens": 0}, "synthesis.max_document_tokens=0: must be at least 1"),
    ({"max_new_tokens": 400}, (
        "synthesis.max_new_tokens=400: must be less than synthesis.max_model_len=400"
    )),
    ({"min_p": 0.1}, (
        "synthesis.min_p=0.1: must be from 0 to 1, and needs synthesis.temperature above 0"
    )),
    ({"max_pairs": 0}, "synthesis.max_pairs=0: must be at least 1"),
    ({"max_pairs": 8, "format": "chat"}, "synthesis.max_pairs=8: only format=ipt has this grammar"),
    ({"temperature": 1.0, "prompt_lookup_num_tokens": 4}, (
        "synthesis.prompt_lookup_num_tokens=4: needs synthesis.temperature=0"
    )),
    ({"temperature": -0.1}, "synthesis.temperature=-0.1: must be at least 0"),
    ({"gpu_memory_utilization": 1.5}, "synthesis.gpu_memory_utilization=1.5"),
    ({"prompt_lookup_num_tokens": -1}, "synthesis.prompt_lookup_num_tokens=-1: must be at least 0"),
    ({"workers": 0}, "synthesis.workers=0: must be at least 1"),
    ({"cluster": "slurm"}, "synthesis.cluster=slurm: must be one of none, ray"),
    ({"kv_cache_memory_bytes": 0}, "synthesis.kv_cache_memory_bytes=0"),
])  # fmt: skip
def test_a_config_that_cannot_work_is_one_line(changes, message):
    check_synthesis(CONFIG)
    with pytest.raises(ValueError) as raised:
        check_synthesis(replace(CONFIG, **changes))
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_missing_engine_names_what_to_install(monkeypatch):
    monkeypatch.setattr("ipt.synthesis.engines.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"vllm is not installed: pip install 'ipt\[vllm\]'"):
        check_synthesis(replace(CONFIG, engine="vllm"))


@pytest.mark.parametrize(("changes", "message"), [
    ({"max_model_len": 8000}, "the model embedded:tiny supports at most 4096 tokens"),
    ({"max_model_len": 85}, "no space for a document"),
])  # fmt: skip
def test_a_window_that_does_not_fit_the_model_stops_before_the_engine_starts(
    oracle, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        synthesize(
            replace(CONFIG, **changes),
            write_documents(tmp_path / "documents", TEXTS),
            tmp_path / "out",
            0,
        )
    assert not oracle.prompts


def test_no_documents(tmp_path):
    with pytest.raises(FileNotFoundError, match="no documents"):
        synthesize(CONFIG, tmp_path, tmp_path / "out", 0)


def test_an_adapter_is_merged_into_the_model_once(tmp_path, tiny_model, monkeypatch):
    from peft import LoraConfig, get_peft_model  # slow to import

    base = load_model(tiny_model, torch.float32)
    adapted = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(100, 120)[None]
    expected = adapted(ids).logits
    with adapted.disable_adapter():
        assert (adapted(ids).logits - expected).abs().max() > 0.2  # the case: the adapter matters
    monkeypatch.setenv("IPT_CACHE", str(tmp_path / "cache"))
    merged = resolve_model(tiny_model, str(tmp_path / "adapter"))
    # merged weights are bfloat16
    torch.testing.assert_close(
        load_model(merged, torch.float32)(ids).logits, expected, atol=2e-2, rtol=2e-2
    )
    made = (Path(merged) / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(tiny_model, str(tmp_path / "adapter")) == merged
    assert (Path(merged) / "model.safetensors").stat().st_mtime_ns == made
    with pytest.raises(FileNotFoundError, match=r"the folder has no adapter_config\.json"):
        check_synthesis(replace(CONFIG, adapter=str(tmp_path)))

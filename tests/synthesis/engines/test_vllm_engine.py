"""The real engine with real weights: minutes on two cores."""

import asyncio
import json
import multiprocessing
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from synthesis_cases import write_documents

from ipt.config import SynthesisConfig
from ipt.files import read_parts
from ipt.models import resolve_model
from ipt.synthesis.engines import EngineDied, PromptRefused, start_engine
from ipt.synthesis.engines.vllm import CPU_BLOCK_SIZE
from ipt.synthesis.formats import registry
from ipt.synthesis.formats.base import IptFormat, Prompt
from ipt.synthesis.formats.prompt_file import SHIPPED
from ipt.synthesis.formats.tags import Pair, Parsed
from ipt.synthesis.run import synthesize
from tests.forked_engines import fork_engines

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
CONFIG = SynthesisConfig(
    model="embedded:smollm2-135m",
    engine="vllm",
    shots=2,
    max_model_len=512,
    max_new_tokens=12,
    max_num_seqs=3,
    kv_cache_memory_bytes=2**28,
    dtype="float32",
)
ORGANS = ["heart", "kidney", "liver", "lung", "stomach", "brain"]


class AnythingGoes(IptFormat):
    """The published prompts; but whatever the model says counts as one pair, so that an untuned
    model makes chains too.
    """

    def parse(self, output):
        return Parsed([Pair("?", output)], Counter())

    def finish(self, prompt, output_ids, output, parsed):
        return Prompt([*prompt.ids, *output_ids, *self.stop_ids])


def test_chains_on_the_real_engine(request, tmp_path, monkeypatch, vocabulary):
    fork_engines(request, monkeypatch)
    monkeypatch.setitem(registry.FORMATS, "ipt", AnythingGoes)
    # chains stay with their engine, and so with its cache
    config = replace(CONFIG, max_pairs=2, data_parallel_size=2)
    texts = [f"The {organ} is an organ. " * 12 for organ in ORGANS]
    documents, environment = write_documents(tmp_path / "documents", texts), dict(os.environ)
    stats = synthesize(config, documents, tmp_path / "vllm", 0)
    rows = list(read_parts(tmp_path / "vllm" / "pairs"))
    assert [(row["doc_id"], row["round"]) for row in rows] == [
        (f"d{n}", r) for n, r in ((0, 0), (3, 1), (1, 0), (4, 1), (2, 0), (5, 1))
    ]
    assert all(row["inherits_previous"] == (row["round"] == 1) for row in rows)
    # by the grammar
    assert all(
        0 < row["output_tokens"] <= 12 and row["raw_output"].startswith("<QUE> ") for row in rows
    )
    first, second = rows[0::2], rows[1::2]
    own = [len(vocabulary.encode(f" <CON> {row['text']} </CON>\n\n")) + 1 for row in second]
    for before, row, length in zip(first, second, own, strict=True):
        assert row["prompt_tokens"] >= before["prompt_tokens"] + before["output_tokens"] + length
    # The second shot finds every whole block of the first shot's prompt in the cache.
    reusable = sum(row["prompt_tokens"] // CPU_BLOCK_SIZE * CPU_BLOCK_SIZE for row in first)
    assert reusable <= stats["cached_tokens"] < stats["prompt_tokens"]
    assert stats["rows"] == stats["documents"] == stats["session"]["generations"] == 6
    assert stats["session"]["tokens_per_second"] > 0
    # library preloads and thread settings do not leak into later stages
    assert dict(os.environ) == environment

    synthesize(replace(config, engine="transformers"), documents, tmp_path / "transformers", 0)
    plain = list(read_parts(tmp_path / "transformers" / "pairs"))
    assert [row["prompt_tokens"] for row in plain] == [row["prompt_tokens"] for row in rows]
    assert [row["raw_output"] for row in plain] == [row["raw_output"] for row in rows]


def test_draws_have_the_chances_of_the_model():
    from ipt.synthesis.engines.seeded import draw

    logits = torch.tensor([2.0, 0.0, 1.0, -torch.inf, -1.5])
    chances = (logits / 0.7).softmax(-1)
    chances[chances < 0.1 * chances.max()] = 0
    draws = 4000

    def drawn(seed, number):
        left = torch.stack(
            [
                draw([0] * place, logits, seed=seed, temperature=0.7, min_p=0.1)
                for place in range(number)
            ]
        )
        assert (left.isfinite().sum(-1) == 1).all()
        return left.argmax(-1)

    counts = drawn(7, draws).bincount(minlength=5)
    expected = chances / chances.sum() * draws
    assert counts[expected == 0].sum() == 0
    assert ((counts - expected).abs() <= 4 * expected.sqrt()).all()
    assert drawn(7, 50).tolist() == drawn(7, 50).tolist() != drawn(8, 50).tolist()


def write_short_faq(path):
    """The shipped prompt, with little to write."""
    prompt = yaml.safe_load((SHIPPED / "faq.yaml").read_text(encoding="utf-8"))
    fields = prompt["schema"]["properties"]
    fields["title"]["maxLength"], fields["entries"]["maxItems"] = 40, 3
    for text in fields["entries"]["items"]["properties"].values():
        text["maxLength"] = 60
    path.write_text(yaml.safe_dump(prompt), encoding="utf-8")
    return str(path)


def test_a_chat_model_is_held_to_the_schema_and_guesses_by_lookup(tmp_path):
    """Its processes are spawned, as everywhere outside of tests; with look-up, forked ones were
    several times slower.
    """
    texts = [
        f"The {organ} is an organ. It has {number} parts and weighs {number * 50} grams."
        for number, organ in enumerate(ORGANS, 2)
    ]
    documents = write_documents(tmp_path / "documents", texts)
    config = replace(
        CONFIG,
        format="chat",
        prompt=write_short_faq(tmp_path / "faq.yaml"),
        shots=1,
        max_model_len=512,
        max_new_tokens=110,
        stop_at_repetition=False,
        prompt_lookup_num_tokens=3,
        max_num_seqs=6,
    )
    stats = synthesize(config, documents, tmp_path / "out", 0)
    rows = list(read_parts(tmp_path / "out" / "pairs"))
    ended = [row for row in rows if row["finish_reason"] == "stop"]
    assert len(ended) >= 3, "the fixture must end some by themselves"
    # what ends by itself parses, what is cut gives its whole items
    assert set(stats["rejected"]) <= {"repeated_question", "truncated"}
    for row in ended:
        json.loads(row["raw_output"])
        assert row["rewrite"]


def test_samples_come_again_bad_prompts_are_refused_and_a_killed_engine_is_reported(
    request, vocabulary, monkeypatch
):
    fork_engines(request, monkeypatch)
    config = replace(
        CONFIG, temperature=1.0, min_p=0.05, stop_at_repetition=False, max_num_batched_tokens=32
    )

    async def run():
        engine = start_engine(
            config, resolve_model(config.model), vocabulary, IptFormat(vocabulary, config), 0
        )
        options = {"priority": 0, "slot": 0}
        good = [*vocabulary.bos, *vocabulary.encode("The heart")]
        try:
            for bad in ([], good * 200, [10**6], [1] * 501):
                with pytest.raises(PromptRefused):
                    await engine.generate(Prompt(bad), **options)
            generation = await engine.generate(Prompt(good), **options)
            assert len(generation.token_ids) == 12 or generation.finish_reason == "stop"
            # read in several steps
            others = [
                engine.generate(Prompt([*good * 20, number]), **options)
                for number in range(100, 105)
            ]
            again, *others = await asyncio.gather(engine.generate(Prompt(good), **options), *others)
            assert again.token_ids == generation.token_ids
            assert len({tuple(other.token_ids) for other in others}) > 1
            waiting = asyncio.gather(
                *(engine.generate(Prompt([*good, number]), **options) for number in range(100, 110))
            )
            await asyncio.sleep(0.05)
            for child in multiprocessing.active_children():
                child.kill()
            with pytest.raises(EngineDied, match="finished work is kept") as raised:
                await asyncio.wait_for(waiting, 300)
        finally:
            engine.close()
        return str(raised.value)

    log = Path(re.search(r"its log is ([^)]+)\)", asyncio.run(run()))[1])
    assert log.exists()  # kept, because the error names it
    log.unlink()

"""The linter of the template pools: the shipped files pass it, and each kind of mistake is found and named."""

import copy
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ipt.rendering.pools import FOLDER, KINDS, LABELS, Pools, Template, load_pools, pools_digest

SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml"))
DEFAULT = yaml.safe_load((FOLDER / "default.yaml").read_text(encoding="utf-8"))
FIELDS = ("context", "question", "options", "reasoning", "answer", "option", "speaker", "turn", "asker", "answerer", *LABELS)


def all_strings(content) -> list[str]:
    """Every string of a pool file."""
    if isinstance(content, dict):
        return [text for key, value in content.items() if key != "separator" for text in all_strings(value)]
    if isinstance(content, list):
        return [text for value in content for text in all_strings(value)]
    return [content] if isinstance(content, str) else []


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_pools_are_complete_and_print_everything(name: str):
    pools = load_pools(name)
    values = {field: f"<{field} VALUE>" for field in FIELDS}
    for kind, (fields, _) in KINDS.items():
        for style in pools.pairs[kind]:
            filled = style.text.fill(**values)
            assert Counter(re.findall("<([a-z]+) VALUE>", filled)) == Counter(fields), style
            assert filled.index(values["question"]) < filled.index(values["answer"])
    for style in (*pools.inline_few_shot, *pools.next_turn):
        for template in (style.example, style.last):
            filled = template.fill(**values)
            assert filled.index(values["question"]) < filled.index(values["answer"])
    for style in pools.option_formats:
        labelled = [field for field in style.item.fields if field in LABELS]
        assert style.answer.fields == (tuple(labelled) or ("option",))
        assert style.answer.fill(**values) in style.item.fill(**values)
    for template in (*pools.starts, *pools.inverted_starts):
        assert values["context"] in template.fill(**values)


@pytest.mark.parametrize("name", SHIPPED)
def test_no_two_templates_of_a_shipped_pool_are_equal(name: str):
    pools = load_pools(name)
    texts = [style.text.source for styles in pools.pairs.values() for style in styles]
    texts += [template.source for template in (*pools.starts, *pools.hints, *pools.conclusions, *pools.explanations)]
    texts += [*pools.bridges, *pools.inverted_openings, *pools.options_headers]
    assert [text for text, count in Counter(texts).items() if count > 1] == []


def test_default_pools_are_large_enough():
    pools = load_pools("default")
    least = {"plain": 12, "options": 8, "reasoning": 8, "options_reasoning": 8}
    assert {kind: len(pools.pairs[kind]) >= size for kind, size in least.items()} == dict.fromkeys(least, True)
    assert len(pools.numbered) >= 11 and len(pools.next_turn) >= 15 and len(pools.inline_few_shot) >= 10
    assert len(pools.starts) >= 30 and len(pools.bridges) >= 30 and len(pools.speakers) >= 20
    assert pools.without["document_start"] == pools.without["bridge"] == 0.5


def test_what_may_stand_without_a_document_does_not_speak_of_it():
    """Pairs are also rendered apart from their document (arrangement=detached), where "the text above" would be untrue."""
    neutral = [DEFAULT[name] for name in ("pairs", "options", "reasoning", "dialogue", "numbered", "inline_few_shot", "next_turn")]
    pattern = re.compile(r"\b(passage|document|text|article|above|below|reading|excerpt)\b", re.IGNORECASE)
    assert [text for text in all_strings(neutral) if pattern.search(text)] == []


# Mistakes ------------------------------------------------------------------------------------------------------------


def changed(tmp_path: Path, change) -> str:
    content = copy.deepcopy(DEFAULT)
    change(content)
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML too
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["pairs"]["plain"].append("Only {question}"),
            r"pairs\.plain\[\d+\].*fields \{question\}, expected \{question\} \{answer\}",
        ),
        (lambda c: c["pairs"]["plain"].append("{question} {answer} {answer}"), "each once"),
        (lambda c: c["pairs"]["plain"].append("{answer} {question}"), "in the order"),
        (lambda c: c["pairs"]["options"].append("{question} {answer} {options}"), "in the order"),
        (lambda c: c["pairs"]["plain"].append(c["pairs"]["plain"][0]), r"equals pairs\.plain\[0\]"),
        (lambda c: c["pairs"]["plain"].append({"text": c["pairs"]["plain"][0], "separator": "\n"}), r"equals pairs\.plain\[0\]"),
        (lambda c: c["pairs"]["plain"].append("{question} {answer"), r"pairs\.plain\["),
        (lambda c: c["pairs"]["plain"].append("{question.x} {answer}"), "not a plain name"),
        (lambda c: c["pairs"]["plain"].append("{question!r} {answer}"), "not a plain name"),
        (lambda c: c["pairs"]["plain"].append({"text": "{question} {answer}", "seperator": "\n"}), "expected the keys text"),
        (lambda c: c["documents"]["starts"].append("No field"), r"documents\.starts\[\d+\].*none"),
        (lambda c: c["documents"].pop("bridges"), r"documents\.bridges is missing"),
        (lambda c: c["documents"].update(bridges=[]), "at least one entry"),
        (lambda c: c["documents"].update(brigdes=["a"]), r"unknown pool documents\.brigdes"),
        (lambda c: c["without"].update(bridge=1.5), r"without\.bridge is 1\.5"),
        (lambda c: c["options"]["formats"].append({"item": "{letter} {number} {option}", "answer": "{letter}"}), "at most one of"),
        (lambda c: c["options"]["formats"].append({"item": "{letter}! {option}", "answer": "{option}"}), r"expected \{letter\}"),
        (lambda c: c["options"]["formats"].append({"item": "{letter}! {option}", "answer": "<{letter}>"}), "not part of item"),
        (
            lambda c: c["numbered"].append({"questions": "", "question": "{question}", "answers": "", "answer": "{answer}"}),
            "must hold the same one",
        ),
        (lambda c: c["next_turn"].append({"opening": "", "example": "{question}", "last": "{question} {answer}"}), r"next_turn\["),
        (lambda c: c["dialogue"]["speakers"].append(["One", "One"]), "two different names"),
        (lambda c: c["dialogue"]["openings"].append("{context}"), "at most"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path: Path, change, message: str):
    with pytest.raises(ValueError, match=message) as error:
        load_pools(changed(tmp_path, change))
    assert "mine.yaml" in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_none(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"rendering\.templates=nothing: .*default"):
        load_pools("nothing")
    broken = tmp_path / "broken.yaml"
    broken.write_text("pairs: [", encoding="utf-8")
    with pytest.raises(ValueError, match="not a YAML file"):
        load_pools(str(broken))
    broken.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="is missing"):
        load_pools(str(broken))


def test_own_file_is_used_and_changes_the_digest(tmp_path: Path):
    name = changed(tmp_path, lambda content: content["documents"].update(bridges=["Fragen zum Text:"]))
    pools = load_pools(name)
    assert isinstance(pools, Pools) and pools.bridges == ("Fragen zum Text:",)
    assert pools_digest(name) != pools_digest("default")


# Templates -----------------------------------------------------------------------------------------------------------

PIECES = st.lists(st.sampled_from(["{question}", "{answer}", "{{", "}}", "text ", "%s", "\n", "$x"]), max_size=8)


@given(PIECES, st.text(max_size=20), st.text(max_size=20))
def test_filling_equals_the_standard_formatter(pieces, question: str, answer: str):
    """The standard formatter is the oracle; no stop follows a field in these templates."""
    source = "".join(pieces)
    assert Template(source).fill(question=question, answer=answer) == source.format(question=question, answer=answer)


@pytest.mark.parametrize(
    ("answer", "filled"),
    [
        ("four", "It is four. Right"),
        ("Four.", "It is Four. Right"),
        ("Four!", "It is Four! Right"),
        ('"Four."', 'It is "Four." Right'),
        ("(b)", "It is (b). Right"),
        ("四。", "It is 四。 Right"),
        ("", "It is . Right"),
    ],
)
def test_a_sentence_gets_no_second_full_stop(answer: str, filled: str):
    assert Template("It is {answer}. Right").fill(answer=answer) == filled

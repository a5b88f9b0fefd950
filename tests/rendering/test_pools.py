"""The linter of the template pools: the shipped files pass it, and each kind of mistake is found
and named.
"""

import copy
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ipt.config import RenderingConfig
from ipt.rendering import pools as pools_module
from ipt.rendering.layouts import LAYOUTS
from ipt.rendering.pairs import ChainRow
from ipt.rendering.pools import (
    FOLDER,
    KINDS,
    LABELS,
    OPTIONAL,
    Pools,
    Template,
    load_pools,
    pools_digest,
)
from ipt.rendering.render import Settings, render_chain
from ipt.synthesis.formats.tags import Pair

SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml"))
DEFAULT = yaml.load(
    (FOLDER / "default.yaml").read_text(encoding="utf-8"),
    getattr(yaml, "CSafeLoader", yaml.SafeLoader),
)
FIELDS = (
    "context",
    "question",
    "options",
    "reasoning",
    "answer",
    "option",
    "speaker",
    "turn",
    "asker",
    "answerer",
    *LABELS,
)
WHITESPACE = ("gaps", "separators")  # pools of what stands between parts
ABOUT_THE_DOCUMENT = (*WHITESPACE, "starts", "bridges", "inverted_openings", "inverted_starts")


def entries(pools: Pools) -> dict[str, list]:
    """Every pool with its entries, those of pairs by their kind."""
    result = {f"pairs.{kind}": list(styles) for kind, styles in pools.pairs.items()}
    result |= {
        field.name: list(getattr(pools, field.name))
        for field in fields(Pools)
        if field.name not in ("without", "pairs")
    }
    return result


def strings(entry) -> list[str]:
    """The texts of an entry, in their order, without its separator."""
    if isinstance(entry, str):
        return [entry]
    if isinstance(entry, Template):
        return [entry.source]
    parts = (
        entry
        if isinstance(entry, tuple)
        else [getattr(entry, field.name) for field in fields(entry) if field.name != "separator"]
    )
    return [text for part in parts for text in strings(part)]


def templates(entry) -> list[Template]:
    if isinstance(entry, Template):
        return [entry]
    return (
        []
        if isinstance(entry, str | tuple)
        else [part for field in fields(entry) for part in templates(getattr(entry, field.name))]
    )


def every_text(name: str, but: tuple[str, ...] = WHITESPACE) -> list[str]:
    return [
        text
        for pool, found in entries(load_pools(name)).items()
        if pool not in but
        for entry in found
        for text in strings(entry)
    ]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_pools_are_complete_and_print_everything(name: str):
    pools = load_pools(name)
    values = {field: f"<{field} VALUE>" for field in FIELDS}
    for kind, (names, _) in KINDS.items():
        for style in pools.pairs[kind]:
            filled = style.text.fill(**values)
            assert Counter(re.findall("<([a-z]+) VALUE>", filled)) == Counter(names), style
            order = [values[field] for field in ("question", "options", "answer") if field in names]
            assert sorted(order, key=filled.index) == order, style
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


def simplified(text: str) -> str:
    """Without case (but {letter} is not {LETTER}), and without the size of a white space."""
    text = "".join(
        part if part.startswith("{") else part.casefold() for part in re.split(r"(\{\w+\})", text)
    )
    return re.sub(r"\s+", lambda space: "\n" if "\n" in space[0] else " ", text.strip())


@pytest.mark.parametrize("name", SHIPPED)
def test_no_two_templates_of_a_shipped_pool_are_equal(name: str):
    """Not even apart from case and the size of white space."""
    for pool, found in entries(load_pools(name)).items():
        if pool not in WHITESPACE:
            alike = Counter(
                (
                    *map(simplified, strings(entry)),
                    "" if pool.startswith("pairs") else getattr(entry, "separator", ""),
                )
                for entry in found
            )
            assert [key for key, count in alike.items() if count > 1] == [], pool


def test_default_pools_are_as_large_as_the_published_ones():
    """Paper section 2.2; half of the published starts and bridges are empty, which is `without`
    here.
    """
    least = {
        "pairs.plain": 80,
        "pairs.options": 48,
        "pairs.reasoning": 210,
        "pairs.options_reasoning": 240,
        "numbered": 64,  # 11 templates, 64 ways to count
        "next_turn": 15,
        "inline_few_shot": 20,
        "starts": 100,
        "bridges": 84,
        "inverted_openings": 42,
        "inverted_starts": 60,
        "options_headers": 16,
        "option_formats": 63,
        "speakers": 50,
        "dialogue_openings": 15,
        "turns": 8,
        "hints": 20,
        "conclusions": 20,
        "explanations": 20,
    }
    pools = load_pools("default")
    sizes = {pool: len(found) for pool, found in entries(pools).items()}
    assert {pool: (sizes[pool], size) for pool, size in least.items() if sizes[pool] < size} == {}
    assert pools.without["document_start"] == pools.without["bridge"] == 0.5


DOCUMENT_WORDS = {
    "default": r"texts?|passages?|documents?|articles?|excerpts?|extracts?"
    r"|paragraphs?|pages?|chapters?"
    r"|stor(y|ies)|sources?|context"
    r"|material|lines|reading|read|above|below",
    "german": r"texte?s?|textes|dokumente?s?|artikel|auszug|abschnitte?s?|absatz|seiten?|kapitel"
    r"|quellen?|lektüre|zeilen"
    r"|lesen|gelesen|oben|unten|obige[nrs]?",
}


@pytest.mark.parametrize("name", DOCUMENT_WORDS)
def test_what_may_stand_without_a_document_does_not_speak_of_it(name: str):
    """Pairs are also rendered apart from their document (arrangement=detached), where "the text
    above" would be untrue.
    """
    pattern = re.compile(rf"\b({DOCUMENT_WORDS[name]})\b", re.IGNORECASE)
    assert [text for text in every_text(name, but=ABOUT_THE_DOCUMENT) if pattern.search(text)] == []
    # the pattern finds what it is for
    assert any(pattern.search(text) for text in load_pools(name).bridges)


def test_what_leads_to_pairs_or_from_them_fits_any_number_of_them():
    pools = load_pools("default")
    leads = [
        *pools.bridges,
        *pools.inverted_openings,
        *(start.source for start in pools.inverted_starts),
    ]
    pattern = re.compile(
        r"\b(few|some|several|many|both|two|three|(these|those|the) "
        r"(questions|answers|tasks|exercises))\b",
        re.IGNORECASE,
    )
    assert [lead for lead in leads if pattern.search(lead)] == []


@pytest.mark.parametrize("name", SHIPPED)
def test_white_space_braces_and_tags(name: str):
    for text in every_text(name):
        assert text == text.strip() and not re.search(r"[ \t]\n", text), text
        assert not re.search(r"[{}]", re.sub(r"\{\w+\}", "", text)), text
        assert not re.search(r" [.,;:!?](\s|$)", text), text
    for pool, found in entries(load_pools(name)).items():
        for entry in found:
            separator = entry if pool in WHITESPACE else getattr(entry, "separator", "\n")
            assert not re.search(r"[ \t]\n|\n[ \t]|\n[^\n]*[^\n]$", separator), (pool, entry)
            # before a space stands no tag but the name of a speaker
            source = "\n".join(strings(entry))
            assert Counter(re.findall(r"</(\w+)>", source)) == Counter(
                re.findall(r"<(\w+)>(?! )", source)
            ), (pool, entry)


DOUBLED = re.compile(r"[.,;:!?…][\"'“”’»)\]*]*[.,;:!?…]")


@pytest.mark.parametrize("name", SHIPPED)
def test_no_template_doubles_punctuation(name: str):
    for pool, found in entries(load_pools(name)).items():
        for end in ("", ".", "?", "!", '."', ".)"):
            values = {
                **dict.fromkeys(FIELDS, f"a value{end}"),
                **dict.fromkeys((*LABELS, "speaker", "asker", "answerer"), "B"),
            }
            for entry in found:
                filled = [template.fill(**values) for template in templates(entry)]
                filled += [getattr(entry, "separator", "").join((text, text)) for text in filled]
                assert [text for text in filled if DOUBLED.search(text)] == [], (pool, entry)
    assert (
        DOUBLED.search("one.. two")
        and DOUBLED.search('"one.", "two."')
        and not DOUBLED.search("**one.** (two?)")
    )


# Where each pool is seen: arrangement and layout. Pools that are not named are seen in every
# layout.
SEEN = dict.fromkeys(
    ("hints", "conclusions", "speakers", "turns", "dialogue_openings"), ("pairs_only", "dialogue")
)
SEEN |= {pool: ("pairs_only", pool) for pool in ("numbered", "inline_few_shot", "next_turn")}
SEEN |= {f"pairs.{kind}": ("pairs_only", "classic") for kind in KINDS}
SEEN |= dict.fromkeys(("starts", "bridges", *WHITESPACE), ("attached", "classic"))
SEEN |= dict.fromkeys(("inverted_openings", "inverted_starts"), ("pairs_first", "classic"))
SEEN |= {"explanations": ("pairs_only", "inline_few_shot")}


def only(pools: Pools, pool: str, entry) -> Pools:
    """These pools, with one entry in one of them, and no text without its optional parts."""
    changes = (
        {"pairs": {**pools.pairs, pool.partition(".")[2]: (entry,)}}
        if "." in pool
        else {pool: (entry,)}
    )
    return replace(pools, without=dict.fromkeys(OPTIONAL, 0.0), **changes)


def rows(name: str, end: str, kinds: tuple[str, ...]) -> list[ChainRow]:
    """Two documents with pairs of these kinds, whose texts end with `end`."""

    def pair(kind: str, number: str) -> Pair:
        question, answer = f"Ask {number}{end}", f"Say {number}{end}"
        options = f"\nOptions:\n- Other {number}{end}\n- {answer}" if "options" in kind else ""
        if "reasoning" not in kind:
            return Pair(question + options, answer)
        return Pair(
            f"{question}{options}\nLet's think step by step.",
            f"Muse {number}{end}\nTherefore, the answer is {answer}",
        )

    numbers = [str(index) for index in range(2)]
    return [
        ChainRow(
            f"{name}{n}",
            f"Tell {n}{end}",
            [pair(kind, f"{n}{index}") for index, kind in enumerate(kinds)],
        )
        for n in numbers
    ]


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("pool", entries(load_pools("default")))
def test_each_entry_renders_through_the_real_layouts(name: str, pool: str):
    settings = Settings.of(RenderingConfig(layouts={"classic": 1.0}, inversion=0.0, templates=name))
    kinds = ("reasoning", "options_reasoning") if pool == "explanations" else tuple(KINDS)
    arrangement, layout = SEEN.get(pool, ("pairs_only", ""))
    for index, entry in enumerate(entries(settings.pools)[pool]):
        chosen = layout or sorted(LAYOUTS)[index % len(LAYOUTS)]
        shown = replace(
            settings,
            arrangement=arrangement,
            layouts={chosen: 1.0},
            pools=only(settings.pools, pool, entry),
        )
        for end in ("", ".", "?"):
            chain = rows(f"{index}{end}", end, kinds)
            [text] = render_chain(chain, shown, 0)
            assert text.text == text.text.strip() and not DOUBLED.search(text.text), text.text
            assert (text.n_shots, text.n_pairs, text.layout) == (2, 2 * len(kinds), chosen)
            assert all(row.text in text.text for row in chain) == (arrangement != "pairs_only")
            for piece in (
                piece for source in strings(entry) for piece in re.split(r"\{\w+\}\.?", source)
            ):
                assert piece in text.text, (piece, text.text)
            for number in re.findall(r"Ask (\d+)", text.text):
                assert f"Say {number}{end}" in text.text
                assert (
                    f"Muse {number}{end}" in text.text or "reasoning" not in kinds[int(number[-1])]
                )


# Languages
# ----------------------------------------------------------------------------------------------


def words(texts) -> set[str]:
    return {
        word.casefold()
        for text in texts
        for word in re.findall(r"[^\W\d_]{2,}", re.sub(r"\{\w+\}", " ", text))
    }


def test_nothing_that_the_code_prints_is_english():
    """German pairs under German templates: no word of the English templates comes in from anywhere
    else.
    """
    questions = (
        "Was filtern die Nieren?\nOptions:\n- Blut.\n- Luft.",
        "Wozu atmet man?\nLet's think step by step.",
        "Wo sitzt das Herz?",
    )
    answers = (
        "Blut.",
        "Der Körper braucht Sauerstoff.\nTherefore, the answer is Sauerstoff.",
        "In der Brust.",
    )
    pairs = [Pair(question, answer) for question, answer in zip(questions, answers, strict=True)]
    german = words(every_text("german")) | words(
        ["Wozu atmet man Was filtern die Nieren", *answers[::2], answers[1].partition("\n")[0]]
    )
    english = words(every_text("default")) - german
    found = set()
    for arrangement in ("attached", "pairs_first", "detached"):
        layouts = dict.fromkeys(LAYOUTS, 1.0)
        settings = Settings.of(
            RenderingConfig(
                arrangement=arrangement, layouts=layouts, templates="german", versions=2
            )
        )
        for index in range(40):
            texts = render_chain(
                [ChainRow(f"{index}", "Die Nieren filtern das Blut.", pairs)], settings, 0
            )
            found |= words(text.text for text in texts)
    assert len(english) > 300 and len(found) > 150
    assert found & english == set()


def test_a_file_among_the_shipped_ones_is_found_by_its_name(tmp_path: Path, monkeypatch):
    for path in FOLDER.glob("*.yaml"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "quiz.yaml").write_text(
        'extends: default\noptions: {headers: ["Your call:"]}', encoding="utf-8"
    )
    monkeypatch.setattr(pools_module, "FOLDER", tmp_path)
    assert load_pools("quiz").options_headers[-1] == "Your call:"
    with pytest.raises(
        FileNotFoundError, match=r"rendering\.templates=quizz: .*default, german, quiz"
    ):
        load_pools("quizz")


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="needs the parser in C")
def test_reading_the_default_pools_is_quick():
    """PyYAML's own parser takes ten times as long as the one in C: all that is read takes less than
    it alone on the same file.
    """
    text = (FOLDER / "default.yaml").read_text(encoding="utf-8")
    assert min(_seconds(lambda: load_pools("default")) for _ in range(3)) < _seconds(
        lambda: yaml.load(text, yaml.SafeLoader)
    )


def _seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


# Products
# ----------------------------------------------------------------------------------------------


def extension(tmp_path: Path, content: str, name: str = "mine.yaml") -> str:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return str(path)


def test_a_product_stands_for_every_question_with_every_answer(tmp_path: Path):
    entry = {
        "questions": ["First {question}\n", "Next {question}"],
        "answers": [" I {answer}", " you {answer}", " we {answer}"],
    }
    content = {
        "extends": "default",
        "pairs": {
            "plain": [entry, "{question} last {answer}"],
            "options": [{**OPTIONS, "separator": "\n"}],
        },
    }
    pools = load_pools(extension(tmp_path, json.dumps(content)))
    assert [style.text.source for style in pools.pairs["plain"][-7:]] == [
        "First {question}\n I {answer}",
        "First {question}\n you {answer}",
        "First {question}\n we {answer}",
        "Next {question} I {answer}",
        "Next {question} you {answer}",
        "Next {question} we {answer}",
        "{question} last {answer}",
    ]
    assert {style.separator for style in pools.pairs["plain"][-7:]} == {"\n\n"}
    assert [(style.text.source, style.separator) for style in pools.pairs["options"][-1:]] == [
        ("{question}! {options}! {answer}", "\n")
    ]


OPTIONS = {"questions": ["{question}! "], "answers": ["{options}! {answer}"]}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"questions": ["{question} "], "answers": ["{answer} 1", "no field"]},
            r"plain\[0\] \{'text': '\{question\} no field'\}: has the",
        ),
        (
            {"questions": ["a {question} "], "answers": ["{answer} 1", "{answer} 1"]},
            r"plain\[0\].*equals pairs\.plain\[0\]: remove",
        ),
        (
            {"questions": ["{answer} "], "answers": ["{question}"]},
            r"plain\[0\].*in the order \{answer\} \{question\}",
        ),
        (
            {"questions": ["{question}\n"], "answers": ["{answer}"]},
            r"plain\[0\].*equals .*default\.yaml: pairs\.plain\[0\]: remove",
        ),
        (
            {"questions": ["{question} "]},
            "expected the keys questions, answers; optional: separator",
        ),
        (
            {"questions": ["{question} "], "answers": ["{answer} 1"], "text": "{question}"},
            "expected the keys questions, answers",
        ),
        ({"questions": ["{question} "], "answers": "{answer} 1"}, "answers must be a list"),
        ({"questions": [], "answers": ["{answer} 1"]}, "questions must be a list"),
        (
            {"questions": ["{question} ", 3], "answers": ["{answer} 1"]},
            "questions must be a list of texts",
        ),
        (
            {"questions": ["{question} "], "answers": ["{answer} 1"], "separator": ""},
            "expected a text that is not empty",
        ),
    ],
)
def test_mistakes_in_products_are_named_in_one_line(tmp_path: Path, entry, message: str):
    name = extension(tmp_path, json.dumps({"extends": "default", "pairs": {"plain": [entry]}}))
    with pytest.raises(ValueError, match=message) as error:
        load_pools(name)
    assert str(error.value).startswith(f"{name}: pairs.plain[0]") and "\n" not in str(error.value)


# Files that extend others
# ----------------------------------------------------------------------------------------------


def test_a_file_adds_its_pools_to_those_of_the_file_it_extends(tmp_path: Path):
    name = extension(
        tmp_path,
        "extends: german\nwithout: {bridge: 0.25}\ndocuments:\n  bridges: ['Zum Kern der Sache:']",
    )
    pools, german = load_pools(name), load_pools("german")
    assert pools.bridges == (*german.bridges, "Zum Kern der Sache:")
    assert pools.without == {**german.without, "bridge": 0.25}
    assert replace(pools, bridges=german.bridges, without=german.without) == german


def test_chains_of_files_are_read_from_the_last_and_hashed_as_a_whole(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    base = extension(
        tmp_path,
        "extends: default\nwithout: {hint: 0.1, bridge: 0.1}\noptions: {headers: [One]}",
        "base.yaml",
    )
    name = extension(
        tmp_path,
        "extends: ../base.yaml\nwithout: {hint: 0.2}\noptions: {headers: [Two]}",
        "folder/mine.yaml",
    )
    pools = load_pools(name)
    assert pools.options_headers == (*load_pools("default").options_headers, "One", "Two")
    assert (pools.without["hint"], pools.without["bridge"]) == (0.2, 0.1)
    digests = {pools_digest(name), pools_digest(base), pools_digest("default")}
    extension(tmp_path, "extends: default\noptions: {headers: [Three]}", "base.yaml")
    assert len(digests | {pools_digest(name)}) == 4


def test_files_that_extend_nothing_are_complete(tmp_path: Path):
    extension(tmp_path, "documents: {bridges: [One]}", "base.yaml")
    name = extension(tmp_path, json.dumps({**copy.deepcopy(DEFAULT), "extends": "base.yaml"}))
    with pytest.raises(
        ValueError, match=r"base\.yaml: without\.document_start is missing; .*extends: default"
    ):
        load_pools(name)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("extends: mine.yaml", ValueError, r"circle \(mine\.yaml -> mine\.yaml\)"),
        ("extends: other.yaml", ValueError, r"circle \(mine\.yaml -> other\.yaml -> mine\.yaml\)"),
        (
            "extends: nothing",
            FileNotFoundError,
            r"extends: nothing: no such file, and not among the shipped pools \(default",
        ),
        ("extends: [default]", ValueError, r"extends is \['default'\], expected the name"),
        ("extends: ''", ValueError, r"extends is '', expected the name"),
        ("- extends: default", ValueError, "holds a list, expected pools under their names"),
        (
            "extends: default\ndocuments: {brigdes: [One]}",
            ValueError,
            r"unknown pool documents\.brigdes",
        ),
        (
            "extends: default\ndocuments: {bridges: []}",
            ValueError,
            "bridges must be a list with at least one entry",
        ),
        (
            "extends: default\ndocuments: {bridges: [Review]}",
            ValueError,
            r"bridges\[0\] 'Review' equals .*default\.yaml: documents\.bridges\[",
        ),
        ("extends: default\nwithout: {bridge: 2}", ValueError, r"without\.bridge is 2"),
    ],
)
def test_mistakes_in_extensions_are_named_in_one_line(
    tmp_path: Path, content: str, error: type[Exception], message: str
):
    extension(tmp_path, "extends: mine.yaml", "other.yaml")
    name = extension(tmp_path, content)
    for call in (load_pools, pools_digest) if "circle" in message else (load_pools,):
        with pytest.raises(error, match=message) as raised:
            call(name)
        assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


# Mistakes
# ----------------------------------------------------------------------------------------------


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
        (
            lambda c: c["pairs"]["plain"].append(
                {"text": c["pairs"]["plain"][0], "separator": "\n"}
            ),
            r"equals pairs\.plain\[0\]",
        ),
        (lambda c: c["pairs"]["plain"].append("{question} {answer"), r"pairs\.plain\["),
        (lambda c: c["pairs"]["plain"].append("{question.x} {answer}"), "not a plain name"),
        (lambda c: c["pairs"]["plain"].append("{question!r} {answer}"), "not a plain name"),
        (
            lambda c: c["pairs"]["plain"].append(
                {"text": "{question} {answer}", "seperator": "\n"}
            ),
            "expected the keys text",
        ),
        (lambda c: c["documents"]["starts"].append("No field"), r"documents\.starts\[\d+\].*none"),
        (lambda c: c["documents"].pop("bridges"), r"documents\.bridges is missing"),
        (lambda c: c["documents"].update(bridges=[]), "at least one entry"),
        (lambda c: c["documents"].update(brigdes=["a"]), r"unknown pool documents\.brigdes"),
        (lambda c: c["without"].update(bridge=1.5), r"without\.bridge is 1\.5"),
        (
            lambda c: c["options"]["formats"].append(
                {"item": "{letter} {number} {option}", "answer": "{letter}"}
            ),
            "at most one of",
        ),
        (
            lambda c: c["options"]["formats"].append(
                {"item": "{letter}! {option}", "answer": "{option}"}
            ),
            r"expected \{letter\}",
        ),
        (
            lambda c: c["options"]["formats"].append(
                {"item": "{letter}! {option}", "answer": "<{letter}>"}
            ),
            "not part of item",
        ),
        (
            lambda c: c["numbered"].append(
                {"questions": "", "question": "{question}", "answers": "", "answer": "{answer}"}
            ),
            "must hold the same one",
        ),
        (
            lambda c: c["next_turn"].append(
                {"opening": "", "example": "{question}", "last": "{question} {answer}"}
            ),
            r"next_turn\[",
        ),
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
    name = changed(
        tmp_path, lambda content: content["documents"].update(bridges=["Fragen zum Text:"])
    )
    pools = load_pools(name)
    assert isinstance(pools, Pools) and pools.bridges == ("Fragen zum Text:",)
    assert pools_digest(name) != pools_digest("default")


# Templates
# ----------------------------------------------------------------------------------------------

PIECES = st.lists(
    st.sampled_from(["{question}", "{answer}", "{{", "}}", "text ", "%s", "\n", "$x"]), max_size=8
)


@given(PIECES, st.text(max_size=20), st.text(max_size=20))
def test_filling_equals_the_standard_formatter(pieces, question: str, answer: str):
    """The standard formatter is the oracle; no stop follows a field in these templates."""
    source = "".join(pieces)
    assert Template(source).fill(question=question, answer=answer) == source.format(
        question=question, answer=answer
    )


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

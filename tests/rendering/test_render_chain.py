from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt.config import RenderingConfig
from ipt.rendering.draws import Draws
from ipt.rendering.layouts import LAYOUTS
from ipt.rendering.pairs import ChainRow, read_document
from ipt.rendering.render import ARRANGEMENTS, Settings, Text, render_chain
from ipt.synthesis.formats.tags import Pair
from tests.examples import examples

PAPER = {"classic": 80, "dialogue": 5, "numbered": 5, "inline_few_shot": 5, "next_turn": 5}
EVEN = dict.fromkeys(LAYOUTS, 1.0)


def make(arrangement: str = "attached", layouts=EVEN, **changes) -> Settings:
    return Settings.of(RenderingConfig(arrangement=arrangement, layouts=dict(layouts), **changes))


ALL = {arrangement: make(arrangement) for arrangement in ARRANGEMENTS}


def chain(name: str = "doc", documents: int = 3, pairs: int = 3) -> list[ChainRow]:
    return [
        ChainRow(
            f"{name}#{document}",
            f"The text of {name} {document}.",
            [
                Pair(
                    f"Question {document}-{pair} on {name}?", f"answer {document}-{pair} on {name}"
                )
                for pair in range(pairs)
            ],
        )
        for document in range(documents)
    ]


# Properties
# ----------------------------------------------------------------------------------------------

MARKERS = [
    "\nOptions:\n- ",
    "\n- ",
    "\nLet's think step by step.",
    "\nTherefore, the answer is ",
    "{answer}",
    "{",
    "}",
    "{0}",
    "%s",
    "%(question)s",
    "$x",
    "\\n",
    ".",
    "{{question}}",
]
WRITING = st.lists(st.one_of(st.sampled_from(MARKERS), st.text(max_size=12)), max_size=5).map(
    "".join
)
OPTION_PAIRS = st.lists(
    st.text("abc{}", min_size=1, max_size=4), min_size=2, max_size=40, unique=True
).map(lambda options: Pair("Which?\nOptions:\n- " + "\n- ".join(options), options[0]))
REASONING_PAIRS = st.builds(
    lambda a, b, c: Pair(
        a + "?\nLet's think step by step.", f"{b}!\nTherefore, the answer is {c}?"
    ),
    *[st.text(max_size=9)] * 3,
)
PAIRS = st.one_of(st.builds(Pair, WRITING, WRITING), OPTION_PAIRS, REASONING_PAIRS)
CHAINS = st.lists(st.tuples(WRITING, st.lists(PAIRS, max_size=30)), min_size=1, max_size=4).map(
    lambda documents: [
        ChainRow(f"doc#{index}", text, pairs) for index, (text, pairs) in enumerate(documents)
    ]
)


@given(CHAINS, st.sampled_from(sorted(ARRANGEMENTS)), st.integers(0, 1000))
@examples(100)
def test_what_was_not_dropped_and_counted_is_in_the_text(rows, arrangement: str, seed: int):
    texts = render_chain(rows, ALL[arrangement], seed)
    documents = [read_document(row) for row in rows]
    usable = [document for document in documents if document.items]
    with_pairs = [text for text in texts if text.n_shots]
    raw = [text for text in texts if not text.n_shots]
    assert all(text.text.strip() for text in texts)
    assert len({text.id for text in texts}) == len(texts)
    joined = (
        [[document] for document in usable]
        if arrangement == "stitched"
        else [usable]
        if usable
        else []
    )
    assert [(text.n_shots, text.n_pairs) for text in with_pairs] == [
        (len(group), sum(len(d.items) for d in group)) for group in joined
    ]
    for group, text in zip(joined, with_pairs, strict=True):
        for document in group:
            for item in document.items:
                assert all(
                    part in text.text
                    for part in (item.question, item.reasoning, *(item.options or (item.answer,)))
                )
            if arrangement in ("attached", "pairs_first", "stitched"):
                assert document.text.strip() in text.text
    kept = {"detached": documents, "pairs_only": []}.get(
        arrangement, [document for document in documents if not document.items]
    )
    assert [text.text for text in raw] == [
        document.text for document in kept if document.text.strip()
    ]
    assert all(text.layout == "raw" and text.n_pairs == 0 for text in raw)


@given(CHAINS, st.sampled_from(sorted(ARRANGEMENTS)), st.integers(0, 1000))
@examples(50)
def test_rendering_twice_gives_the_same_good_texts_and_changes_nothing(
    rows, arrangement: str, seed: int
):
    before = [row._replace(pairs=list(row.pairs)) for row in rows]
    assert render_chain(rows, ALL[arrangement], seed) == render_chain(rows, ALL[arrangement], seed)
    assert rows == before


# Arrangements
# ----------------------------------------------------------------------------------------------


def order(text: str, parts: list[str]) -> bool:
    found = [text.index(part) for part in parts]
    return found == sorted(found)


@pytest.mark.parametrize(
    ("arrangement", "inversion"), [("attached", 0.0), ("pairs_first", 0.0), ("attached", 1.0)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_and_pairs_in_one_text(layout: str, arrangement: str, inversion: float):
    rows = chain()
    [text] = render_chain(rows, make(arrangement, {layout: 1}, inversion=inversion), 0)
    assert (text.id, text.source, text.n_shots, text.n_pairs, text.layout) == (
        "doc#0/0",
        "instruction",
        3,
        9,
        layout,
    )
    assert text.inverted == bool(inversion)
    pairs_come_first = inversion or arrangement == "pairs_first"
    parts = []
    for row in rows:
        pair = [row.pairs[0].question, row.pairs[-1].answer]
        parts += [*pair, row.text] if pairs_come_first else [row.text, *pair]
    assert order(text.text, parts)
    for row in rows:
        assert text.text.count(row.text) == 1 and all(
            text.text.count(part) == 1 for pair in row.pairs for part in pair
        )


def test_detached_and_pairs_only():
    rows = chain()
    detached, pairs_only = (
        render_chain(rows, make(arrangement), 0) for arrangement in ("detached", "pairs_only")
    )
    assert pairs_only == detached[:1]
    assert detached[0].id == "doc#0/0/pairs" and detached[0].n_shots == 3
    assert not any(row.text in detached[0].text for row in rows)
    assert detached[1:] == [
        Text(f"{row.doc_id}/0", row.text, "instruction", 0, 0, "raw") for row in rows
    ]


def test_arrangements_lay_out_the_same_pairs_alike():
    """So a comparison of arrangements compares nothing else."""
    for name in range(20):
        rows = chain(f"doc {name}", documents=1)
        [attached] = render_chain(rows, make("attached", inversion=0.0), 0)
        [pairs] = render_chain(rows, make("pairs_only"), 0)
        assert attached.text.endswith(pairs.text) and attached.layout == pairs.layout


def test_stitched_texts_hold_each_version_and_end_with_their_document():
    rows = [
        *chain(documents=2),
        ChainRow("bare", "A document without pairs.", []),
        ChainRow("new", "Old.", [], "Written anew."),
    ]
    texts = render_chain(rows, make("stitched", versions=3), 0)
    assert [(text.id, text.n_shots, text.n_pairs, text.layout) for text in texts] == [
        ("doc#0/0", 1, 9, "stitched"),
        ("doc#1/0", 1, 9, "stitched"),
        ("bare/0", 0, 0, "raw"),
        ("new/0", 0, 0, "stitched"),
    ]
    for row, text in zip(rows[:2], texts, strict=False):
        assert text.text.count(row.text) == 1 and all(
            text.text.count(part) == 3 for pair in row.pairs for part in pair
        )
        assert text.text.rindex(row.pairs[-1].answer) < text.text.index(row.text)
        blocks = [
            render_chain([row], make("pairs_only", versions=3), 0)[version].text
            for version in range(3)
        ]
        assert order(text.text, [*blocks, row.text])
    assert order(texts[3].text, ["Written anew.", "Old."])


def test_documents_without_usable_pairs_are_texts_of_their_own():
    rows = chain()
    rows[0] = rows[0]._replace(pairs=[Pair("Why?", " ")])
    rows[2] = rows[2]._replace(pairs=[])
    texts = render_chain(rows, make(), 0)
    assert [(text.id, text.n_shots, text.layout == "raw") for text in texts] == [
        ("doc#1/0", 1, False),
        ("doc#0/0", 0, True),
        ("doc#2/0", 0, True),
    ]
    assert rows[0].text not in texts[0].text and texts[1].text == rows[0].text
    assert [text.id for text in render_chain(rows, make("pairs_only"), 0)] == ["doc#1/0/pairs"]


def test_blank_documents_give_no_empty_text():
    assert [
        render_chain([ChainRow("d", " \n", [])], ALL[arrangement], 0)
        for arrangement in sorted(ARRANGEMENTS)
    ] == [[]] * 5
    for arrangement in ARRANGEMENTS:
        [text] = render_chain([ChainRow("d", " \n", [Pair("Why?", "so")])], make(arrangement), 0)
        assert "Why?" in text.text and text.text == text.text.strip()


def test_versions_are_different_renderings_of_everything():
    rows = chain(pairs=2)
    rows.append(ChainRow("raw", "A document without pairs.", []))
    texts = render_chain(rows, make(layouts=PAPER, versions=5), 0)
    assert len(texts) == 10 and len({text.id for text in texts}) == 10
    assert len({text.text for text in texts if text.n_shots}) == 5
    assert render_chain(rows, make(layouts=PAPER), 0) == texts[:2]


# Randomness
# ----------------------------------------------------------------------------------------------


def test_choices_are_the_same_on_any_machine():
    draws = Draws(7, "día 1", 2)
    assert draws.fraction("layout") == 0.6216316684060621
    assert draws.order("order/0/0", 5) == [1, 4, 2, 0, 3]
    assert draws.pick("x", range(1000)) == 70


def test_chains_and_seeds_differ():
    seeds = [render_chain(chain(), make(), seed)[0].text for seed in range(20)]
    names = [Draws(0, f"doc {index}").fraction("layout") for index in range(200)]
    assert len(set(seeds)) > 15 and len(set(names)) == 200


def test_a_pick_is_even_and_versions_go_through_the_pool():
    pool = range(8)
    counts = Counter(Draws(0, str(index)).pick("any", pool) for index in range(8000))
    # 1000 each; five standard deviations are 148
    assert min(counts.values()) > 850 and max(counts.values()) < 1150
    assert {Draws(0, "doc", version).pick("any", pool) for version in range(8)} == set(pool)


def dependence(table: Counter) -> float:
    """How far the two parts of the keys are from independent, in standard deviations (Pearson's
    chi-square, Wilson-Hilferty).
    """
    first, second = Counter(), Counter()
    for (row, column), count in table.items():
        first[row] += count
        second[column] += count
    expected = {
        (row, column): first[row] * second[column] / table.total()
        for row, column in product(first, second)
    }
    statistic = sum((table[key] - value) ** 2 / value for key, value in expected.items())
    freedom = (len(first) - 1) * (len(second) - 1)
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


def test_choices_are_independent_of_each_other():
    """The released code locks them together: there, only classic texts are inverted, and bridges go
    with certain starts.
    """
    pools = ALL["attached"].pools
    chosen = {
        "layout": lambda draws: int(5 * draws.fraction("layout")),
        "inversion": lambda draws: draws.fraction("inversion") < 0.25,
        "start": lambda draws: draws.fraction("without/document_start") < 0.5,
        "bridge": lambda draws: draws.fraction("without/bridge") < 0.5,
        "plain": lambda draws: draws.pick("pairs/plain", pools.pairs["plain"][:8]),
        "separator": lambda draws: draws.pick("separator", pools.separators),
        "first order": lambda draws: tuple(draws.order("order/0/0", 3)),
        "second order": lambda draws: tuple(draws.order("order/0/1", 3)),
    }
    ids = [f"document {index}" for index in range(4000)]
    choices = {
        name: [str(choose(Draws(3, doc_id))) for doc_id in ids] for name, choose in chosen.items()
    }
    choices["layout of the next version"] = [
        str(int(5 * Draws(3, doc_id, 1).fraction("layout"))) for doc_id in ids
    ]
    names = sorted(choices)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            table = Counter(zip(choices[one], choices[other], strict=True))
            assert dependence(table) < 4, (one, other)
    locked = Counter(zip(choices["start"], choices["start"], strict=True))
    assert dependence(locked) > 20  # what the test would see if two choices shared their stream


def test_inversion_happens_in_every_layout_at_its_rate():
    inverted, all_texts = Counter(), Counter()
    config = make(layouts=EVEN, inversion=0.2)
    for index in range(3000):
        [text] = render_chain(chain(f"doc {index}", documents=1, pairs=2), config, 0)
        all_texts[text.layout] += 1
        inverted[text.layout] += text.inverted
    assert set(all_texts) == set(LAYOUTS)
    for layout, total in all_texts.items():
        # five standard deviations
        assert 500 < total < 700 and abs(inverted[layout] / total - 0.2) < 0.08


# Settings
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrangement": "detatched"}, "rendering.arrangement=detatched: must be one of attached"),
        ({"layouts": {}}, "rendering.layouts: all weights are zero"),
        ({"layouts": {"classic": 0.0}}, "all weights are zero"),
        ({"layouts": {"classical": 1.0}}, "rendering.layouts.classical: no such layout"),
        ({"layouts": {"classic": 2.0, "dialogue": -1.0}}, "rendering.layouts.dialogue=-1.0"),
        ({"layouts": {"classic": float("nan")}}, "rendering.layouts.classic=nan"),
        ({"inversion": 1.5}, "rendering.inversion=1.5"),
        ({"versions": 0}, "rendering.versions=0"),
    ],
)
def test_settings_that_cannot_be(changes, message: str):
    with pytest.raises(ValueError, match=message):
        Settings.of(RenderingConfig(**{"layouts": dict(PAPER), **changes}))

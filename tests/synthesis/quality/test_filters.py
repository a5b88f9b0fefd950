from collections import Counter
from dataclasses import fields

import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from quality_cases import HEART, judge_server, verdict, write_chains

from ipt.config import Config, FilterConfig, JudgeConfig, ThresholdsConfig
from ipt.corpus.decontaminate import Overlap
from ipt.files import read_parts
from ipt.stage import hash_folder
from ipt.synthesis.quality.filters import (
    DOCUMENT_MEASURES,
    JUDGE_MEASURES,
    STREAM_MEASURES,
    check_filters,
    filter_pairs,
    filter_settings,
    is_active,
)
from ipt.synthesis.quality.statistics import PAIR_MEASURES, statistics
from ipt.synthesis.shards import read_account

KIDNEY = "The kidney filters blood."
GOOD, WRONG, LONG = (
    ("What pumps blood?", "The heart"),
    ("What is it?", "A purple cow"),
    ("How?", "through the body " * 20),
)


def write_corpus(folder):
    write_chains(
        folder,
        [
            [("a", HEART, [GOOD, WRONG]), ("b", KIDNEY, [WRONG]), ("c", HEART, [GOOD, LONG])],
            [
                ("d", HEART, [GOOD]),
                ("e", KIDNEY, [("What filters blood?", "The kidney")]),
                ("f", KIDNEY, []),
            ],
        ],
        dropped={"empty": 1},
    )
    return write_chains(
        folder, [[("g", HEART, [WRONG], "A rewrite."), ("h", HEART, [GOOD, GOOD])]], index=1
    )


def filters(thresholds=None, **settings):
    return FilterConfig(thresholds=ThresholdsConfig(**(thresholds or {})), **settings)


def run(tmp_path, name="out", against=None, **settings):
    pairs = tmp_path / "in"
    if not pairs.exists():
        write_corpus(pairs)
    stats = filter_pairs(filters(**settings), pairs, tmp_path / name, 0, against)
    rows = {row["doc_id"]: row for row in read_parts(tmp_path / name / "pairs")}
    return (
        stats,
        {doc_id: [pair["answer"] for pair in row["pairs"]] for doc_id, row in rows.items()},
        rows,
    )


def test_limits_remove_pairs_and_count_why(tmp_path):
    stats, answers, rows = run(
        tmp_path, thresholds={"grounded": [0.8, None], "answer_words": [1, 10]}
    )
    assert answers == {
        "a": ["The heart"], "b": [], "c": ["The heart"], "d": ["The heart"],
        "e": ["The kidney"], "f": [], "g": [], "h": ["The heart"] * 2,
    }  # fmt: skip
    assert stats["filtered"] == {"grounded": 3, "answer_words": 1}
    assert stats["pairs_before"] == stats["pairs"] + 4 == 10
    before = statistics(tmp_path / "in")
    assert stats["documents"] == before["documents"] == 9 and stats["dropped"] == before[
        "dropped"
    ] == {"empty": 1}
    assert (
        before["documents_with_pairs"],
        stats["documents_with_pairs"],
        stats["documents_without_pairs"],
    ) == (7, 5, 3)
    assert stats["grounded_rate"] == 1.0 > before["grounded_rate"]
    assert rows["g"]["rewrite"] == "A rewrite."


def test_rows_part_where_one_of_them_is_empty(tmp_path):
    _, _, before = run(tmp_path, thresholds={"grounded": [0, 1]})
    assert [name for name, row in before.items() if row["inherits_previous"]] == [
        "b",
        "c",
        "e",
        "h",
    ]
    _, _, after = run(tmp_path, "other", thresholds={"grounded": [0.8, None]})
    # b is empty; g still has its rewrite
    assert [name for name, row in after.items() if row["inherits_previous"]] == ["e", "h"]


def test_everything_else_stays_as_it_was(tmp_path):
    run(tmp_path, thresholds={"verbatim": [1, None]})
    for part in sorted((tmp_path / "in").glob("part-*")):
        old, new = pq.read_table(part), pq.read_table(tmp_path / "out" / "pairs" / part.name)
        assert old.schema.equals(new.schema)
        untouched = [
            name for name in old.column_names if name not in ("pairs", "inherits_previous")
        ]
        assert old.select(untouched).equals(new.select(untouched))
        accounts = read_account(part), read_account(tmp_path / "out" / "pairs" / part.name)
        assert accounts[1].pop("filtered") and "filtered" not in accounts[0]
        assert {**accounts[0], "documents_with_pairs": 0} == {
            **accounts[1],
            "documents_with_pairs": 0,
        }


def test_every_run_writes_the_same_bytes(tmp_path):
    limits = {
        "grounded": [0.8, None],
        "question_template_count": [None, 2],
        "duplicate_question": [None, 0],
    }
    run(tmp_path, "first", thresholds=limits)
    run(tmp_path, "second", thresholds=limits)
    torn = tmp_path / "second" / "pairs" / ".part-00000.parquet.torn"
    torn.write_bytes(b"half")
    run(tmp_path, "second", thresholds=limits)  # as after a kill
    assert hash_folder(tmp_path / "first") == hash_folder(tmp_path / "second") and not torn.exists()


def test_filtering_what_was_filtered_adds_up(tmp_path):
    run(tmp_path, thresholds={"grounded": [0.8, None]})
    stats = filter_pairs(
        filters({"grounded": [0.9, None], "answer_words": [None, 9]}),
        tmp_path / "out/pairs",
        tmp_path / "2",
        0,
        None,
    )
    assert stats["filtered"] == {"grounded": 3, "answer_words": 1}


@pytest.mark.parametrize(
    ("limits", "kept", "filtered"),
    [
        ({"question_words": [3, 3]}, [*"aabcdeghh"], {"question_words": 1}),
        ({"verbatim": [1, None]}, ["a", "c", "d", "e", "h", "h"], {"verbatim": 4}),
        ({"pairs": [2, None]}, ["a", "a", "c", "c", "h", "h"], {"pairs": 4}),
        ({"pairs": [2, None], "verbatim": [1, None]}, ["h", "h"], {"verbatim": 4, "pairs": 4}),
        ({"document_words": [None, 5]}, ["b", "e"], {"document_words": 8}),
        ({"duplicate_question": [None, 0]}, ["a", "a", "c", "e"], {"duplicate_question": 6}),
        ({"question_template_count": [None, 1]}, [*"aabcc"], {"question_template_count": 5}),
        ({"finished": [1, None]}, ["a", "a", "b", "c", "c", "d", "e", "g", "h", "h"], {}),
    ],
)  # fmt: skip
def test_each_measure(tmp_path, limits, kept, filtered):
    stats, answers, _ = run(tmp_path, thresholds=limits)
    assert [doc_id for doc_id, left in answers.items() for _ in left] == kept
    assert stats["filtered"] == filtered


def test_pieces_of_a_split_document_are_one_document(tmp_path):
    chains = [
        [("a#0", HEART, [GOOD]), ("b", HEART, [WRONG])],
        [("a#1", KIDNEY, [WRONG]), ("c#7", HEART, [GOOD])],
    ]
    write_chains(tmp_path / "in", chains, long_documents={"split": 1, "pieces": 2})
    stats, _, _ = run(tmp_path, thresholds={"grounded": [0.8, None]})
    assert (stats["documents"], stats["documents_with_pairs"]) == (3, 2)


ITEMS = {
    "anatomy": ["Which organ is it that pumps the blood of people all day and all night?"],
    "none": ["a b c d e f g h i j k l m n"],
}
COPIED = ("Which organ is it that pumps the blood of people all day and all night?", "The heart")


def test_overlap_with_evaluation_tasks_is_reported_and_removed(tmp_path):
    write_chains(tmp_path / "in", [[("a", HEART, [GOOD, COPIED])]])
    for mode, left in (("report", 2), ("remove", 1)):
        stats, answers, _ = run(tmp_path, mode, Overlap(ITEMS), overlap=mode)
        assert len(answers["a"]) == left
        assert (
            stats["overlap"]["anatomy"]["texts_that_overlap"] == 1
            and stats["overlap"]["none"]["texts_that_overlap"] == 0
        )
        assert stats["filtered"] == ({"overlap": 1} if mode == "remove" else {})
    with pytest.raises(ValueError, match=r"filters\.overlap=report"):
        run(tmp_path, "without", overlap="report")


def test_a_judge_as_filter_sees_what_the_other_limits_leave(tmp_path):
    def reply(request, _):
        prompt = request["messages"][-1]["content"]
        return (
            "no verdict"
            if "kidney" in prompt
            else verdict(right="body" not in prompt.partition("<answer>")[2])
        )

    with judge_server(reply) as server:
        judge = JudgeConfig(model="judge", base_url=server.url, sample=None, max_retries=0)
        settings = {
            "thresholds": {"grounded": [0.8, None], "judge_accuracy": [1, None]},
            "judge": judge,
        }
        stats, answers, rows = run(tmp_path, **settings)
        asked = Counter(
            request["messages"][-1]["content"].partition("<answer>")[2].split("\n")[1]
            for request in server.requests
        )
        assert asked["The heart"] == 5 and asked["A purple cow"] == 0
    assert stats["filtered"] == {"grounded": 3, "judge_failed": 1, "judge_accuracy": 1}
    assert (stats["judge"]["judged"], stats["judge"]["failed"], stats["judge"]["accuracy"]) == (
        6,
        {"malformed": 1},
        round(5 / 6, 4),
    )
    assert answers == {
        "a": ["The heart"],
        "b": [],
        "c": ["The heart"],
        "d": ["The heart"],
        "e": [],
        "f": [],
        "g": [],
        "h": ["The heart"] * 2,
    }
    assert not rows["e"]["inherits_previous"] and stats["pairs"] == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"thresholds": {"grounded": [0.8]}}, "filters.thresholds.grounded=[0.8]: must be"),
        ({"thresholds": {"pairs": [3, 2]}}, "the minimum is greater than the maximum"),
        ({"overlap": "drop"}, "filters.overlap=drop: must be one of null, report, remove"),
        ({"thresholds": {"judge_accuracy": [1, None]}}, (
            "judge_accuracy needs a judge: set filters.judge.model"
        )),
        ({"thresholds": {"judge_relevance": [1, 1]}, "judge": JudgeConfig("j")}, (
            "set filters.judge.sample=null"
        )),
        ({"judge": JudgeConfig("j", sample=0)}, "filters.judge.sample=0: must be at least 1"),
    ],
)  # fmt: skip
def test_wrong_filters_are_named_in_one_line(tmp_path, settings, message):
    with pytest.raises(ValueError) as error:
        check_filters(filters(**settings))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_filters_are_active_only_if_there_is_something_to_do():
    assert not is_active(FilterConfig())
    assert is_active(filters({"pairs": [1, None]})) and is_active(
        FilterConfig(judge=JudgeConfig("j"))
    )


def test_where_the_judge_stands_is_no_part_of_the_settings():
    here, there = (
        filter_settings(FilterConfig(judge=JudgeConfig("j", base_url=url)))
        for url in ("http://a/v1", "http://b/v1")
    )
    assert here == there != filter_settings(FilterConfig(judge=JudgeConfig("another")))


def test_limits_are_typed_and_a_misspelt_one_is_named():
    config = OmegaConf.merge(
        OmegaConf.structured(Config),
        {"filters": {"thresholds": {"grounded": [0.8, None], "pairs": [1, 9]}}},
    )
    limits = OmegaConf.to_object(config).filters.thresholds
    assert limits.grounded == [0.8, None] and limits.pairs == [1, 9] and limits.verbatim is None
    for wrong in ({"grouded": [0, 1]}, {"grounded": 0.8}, {"grounded": ["much", None]}):
        with pytest.raises(OmegaConfBaseException):
            OmegaConf.merge(OmegaConf.structured(Config), {"filters": {"thresholds": wrong}})


def test_every_limit_is_looked_at():
    assert {*PAIR_MEASURES, *STREAM_MEASURES, *DOCUMENT_MEASURES, *JUDGE_MEASURES} == {
        field.name for field in fields(ThresholdsConfig)
    }

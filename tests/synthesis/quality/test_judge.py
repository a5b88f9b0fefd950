import json
import threading

import pytest
from quality_cases import HEART, judge_server, verdict, write_chains

from ipt.config import JudgeConfig
from ipt.errors import UserError
from ipt.files import read_parts
from ipt.synthesis.engines import EngineDied
from ipt.synthesis.engines import server as server_module
from ipt.synthesis.quality.judge import check_judge, judge_pairs
from ipt.synthesis.quality.streaming import wilson_interval


def write_pairs(folder, documents=4, each=3):
    chains = [
        [(f"d{n}", f"{HEART} {{question}} {n}", [(f"Q{n}.{i}?", f"A{i}") for i in range(each)])]
        for n in range(documents)
    ]
    return write_chains(folder / "pairs", chains)


def config(server, **changes):
    return JudgeConfig(
        **{"model": "judge", "base_url": server.url, "sample": None, "max_retries": 3, **changes}
    )


def user_prompt(request):
    return request["messages"][-1]["content"]


def test_figures_and_verdicts_of_every_pair(tmp_path):
    def reply(request, _):
        prompt = user_prompt(request)
        return verdict(
            right="A0" not in prompt,
            relevant="Q3" not in prompt,
            task="Is_A" if "A1" in prompt else "definition",
        )

    with judge_server(reply) as server:
        figures = judge_pairs(config(server), write_pairs(tmp_path), tmp_path, 0)
    assert (figures["judged"], figures["failed"]) == (12, {})
    assert (figures["accuracy"], figures["relevance"]) == (round(8 / 12, 4), 0.75)
    assert figures["accuracy_ci95"] == wilson_interval(8, 12)
    assert figures["kinds_of_task"] == 2 and figures["tasks"] == {"definition": 8, "is a": 4}
    rows = list(read_parts(tmp_path / "judgements"))
    assert [row["number"] for row in rows] == list(range(12))
    assert [row["answer_is_right"] for row in rows] == [row["answer"] != "A0" for row in rows]
    assert [row["about_document"] for row in rows] == [row["doc_id"] != "d3" for row in rows]


def test_the_request_holds_document_question_answer_and_schema(tmp_path):
    with judge_server(lambda *_: verdict()) as server:
        judge_pairs(config(server), write_pairs(tmp_path, 1, 1), tmp_path, 0)
    (request,) = server.requests
    assert request["temperature"] == 0 and request["model"] == "judge"
    prompt = user_prompt(request)
    # braces of a document are text
    assert f"<document>\n{HEART} {{question}} 0\n</document>" in prompt
    assert "<question>\nQ0.0?\n</question>" in prompt and "<answer>\nA0\n</answer>" in prompt
    schema = request["response_format"]["json_schema"]["schema"]
    assert (
        set(schema["required"]) == set(json.loads(verdict()))
        and schema["properties"]["about_document"]["type"] == "boolean"
    )


def test_a_sample_is_seeded_and_in_order(tmp_path):
    pairs = write_pairs(tmp_path, 10, 5)

    def judged(name, seed):
        with judge_server(lambda *_: verdict()) as server:
            judge_pairs(config(server, sample=7), pairs, tmp_path / name, seed)
            assert len(server.requests) == 7
        return [row["number"] for row in read_parts(tmp_path / name / "judgements")]

    assert judged("a", 1) == judged("b", 1) == sorted(judged("c", 1)) != judged("d", 2)


def test_busy_and_failing_servers_are_asked_again(tmp_path):
    with judge_server(lambda _, number: (429, 500, 503, verdict())[min(number, 3)]) as server:
        figures = judge_pairs(
            config(server, concurrency=1), write_pairs(tmp_path, 1, 2), tmp_path, 0
        )
    assert len(server.requests) == 5 and (
        figures["judged"],
        figures["failed"],
        figures["accuracy"],
    ) == (2, {}, 1.0)


MALFORMED = [
    "",
    "no json",
    "[1]",
    "null",
    verdict()[:-5],
    json.dumps({"task": "x"}),
    verdict().replace("true", '"yes"'),
]


def test_failures_are_counted_and_in_no_share(tmp_path):
    answers = [*MALFORMED, 400, 500, 500, verdict(right=False), verdict()]
    with judge_server(lambda _, number: answers[number]) as server:
        figures = judge_pairs(
            config(server, concurrency=1, max_retries=1), write_pairs(tmp_path, 11, 1), tmp_path, 0
        )
    assert figures["failed"] == {"malformed": len(MALFORMED), "refused": 1, "unavailable": 1}
    assert (figures["judged"], figures["accuracy"], figures["relevance"]) == (2, 0.5, 1.0)
    failed = [row for row in read_parts(tmp_path / "judgements") if row["failure"]]
    assert len(failed) == len(MALFORMED) + 2 and all(
        row["answer_is_right"] is None for row in failed
    )


def test_an_interrupted_judge_goes_on_with_what_it_has(tmp_path):
    pairs = write_pairs(tmp_path)
    with (
        judge_server(lambda _, number: verdict() if number < 5 else 401) as server,
        pytest.raises(ValueError, match="OPENAI_API_KEY"),
    ):
        judge_pairs(config(server, concurrency=1), pairs, tmp_path, 0)
    journal = tmp_path / "judgements" / ".journal.jsonl"
    assert len(journal.read_text().splitlines()) == 5
    journal.write_text(journal.read_text() + '{"key": "torn')
    with judge_server(lambda *_: verdict()) as server:
        figures = judge_pairs(config(server), pairs, tmp_path, 0)
        assert len(server.requests) == 7 and figures["judged"] == 12
        assert judge_pairs(config(server), pairs, tmp_path, 0) == figures
        assert len(server.requests) == 7
    assert [path.name for path in (tmp_path / "judgements").iterdir()] == ["part-00000.parquet"]


def test_a_dead_server_ends_in_one_line(tmp_path):
    with judge_server(lambda *_: verdict()) as server:
        pass  # it is closed from here on
    with pytest.raises(EngineDied, match=r"filters\.judge\.base_url=http://127\.0\.0\.1") as error:
        judge_pairs(config(server, max_retries=0), write_pairs(tmp_path), tmp_path, 0)
    assert "\n" not in str(error.value)


def test_a_server_that_only_fails_stops_the_run(tmp_path):
    with (
        judge_server(lambda *_: 500) as server,
        pytest.raises(EngineDied, match="none of 12 requests"),
    ):
        judge_pairs(config(server, max_retries=0), write_pairs(tmp_path), tmp_path, 0)
    assert not list((tmp_path / "judgements").glob("part-*"))


def test_a_judge_that_says_nothing_is_not_waited_for(tmp_path):
    given_up = threading.Event()

    def reply(_, number):
        if number == 1:
            given_up.wait()
        return verdict()

    pairs = write_pairs(tmp_path, 3, 1)
    with judge_server(reply) as server:
        try:
            with pytest.raises(
                EngineDied, match=r"does not answer in time \(filters\.judge\.timeout=2 seconds\)"
            ):
                judge_pairs(
                    config(server, concurrency=1, max_retries=0, timeout=2), pairs, tmp_path, 0
                )
        finally:
            given_up.set()
        figures = judge_pairs(config(server, concurrency=1, max_retries=0), pairs, tmp_path, 0)
    assert (figures["judged"], figures["failed"], len(server.requests)) == (3, {}, 4)


def test_no_pairs_no_question(tmp_path):
    pairs = write_chains(tmp_path / "pairs", [[("d0", HEART, [])]])
    with judge_server(lambda *_: verdict()) as server:
        figures = judge_pairs(config(server), pairs, tmp_path, 0)
    assert not server.requests and (
        figures["judged"],
        figures["accuracy"],
        figures["accuracy_ci95"],
    ) == (0, None, None)


@pytest.mark.parametrize(
    ("key", "value"), [("sample", 0), ("concurrency", 0), ("max_retries", -1), ("max_tokens", 0)]
)
def test_wrong_settings_are_named(key, value):
    with pytest.raises(ValueError, match=rf"filters\.judge\.{key}={value}"):
        check_judge(JudgeConfig(**{key: value}))


def test_reasoning_before_a_verdict_is_ignored(tmp_path):
    draft, final = verdict(right=True), verdict(right=False)
    replies = [
        f"<think>Say {draft}.</think>{final}",
        f"{draft}</think>{final}",
        f"```json\n{final}\n```",
        f"<think>{draft} and",
    ]
    with judge_server(lambda _, number: replies[number]) as server:
        figures = judge_pairs(
            config(server, concurrency=1), write_pairs(tmp_path, 4, 1), tmp_path, 0
        )
    assert (figures["judged"], figures["failed"], figures["accuracy"]) == (3, {"malformed": 1}, 0.0)


def body(**fields):
    return {"error": {"message": "not now", **fields}}


@pytest.mark.parametrize(
    "answer",
    [body(code=429), body(code="rate_limit_exceeded"), body(), {"choices": []}, {"choices": None}],
)
def test_a_passing_fault_inside_a_200_is_retried_and_not_recorded(tmp_path, monkeypatch, answer):
    monkeypatch.setattr(server_module, "FIRST_PAUSE", 0.001)
    pairs = write_pairs(tmp_path, 1, 2)
    with judge_server(lambda _, number: verdict() if number % 2 else answer) as server:
        figures = judge_pairs(config(server, concurrency=1), pairs, tmp_path / "passes", 0)
    assert (figures["judged"], figures["failed"], len(server.requests)) == (2, {}, 4)
    with (
        judge_server(lambda *_: answer) as server,
        pytest.raises(EngineDied, match=r"answered none of 2 requests: .*(not now|choices)"),
    ):
        judge_pairs(config(server, max_retries=1), pairs, tmp_path / "stays", 0)
    assert not (tmp_path / "stays" / "judgements" / ".journal.jsonl").read_text()


def test_a_refused_pair_is_counted_in_the_servers_words(tmp_path):
    def reply(request, _):
        return (
            {"error": {"message": "flagged", "code": 403}}
            if "Q1.0?" in user_prompt(request)
            else verdict()
        )

    with judge_server(reply) as server:
        figures = judge_pairs(
            config(server, concurrency=1), write_pairs(tmp_path, 3, 1), tmp_path, 0
        )
    assert (figures["judged"], figures["failed"], figures["refused"]) == (
        2,
        {"refused": 1},
        {"flagged": 1},
    )


@pytest.mark.parametrize(
    ("answer", "error"), [(400, UserError), (402, UserError), (404, UserError)]
)
def test_a_judge_that_rejects_every_request_stops_the_run(tmp_path, answer, error):
    with (
        judge_server(lambda *_: answer) as server,
        pytest.raises(error, match=rf"filters\.judge\.base_url=.* answers {answer} \(no\)"),
    ):
        judge_pairs(config(server), write_pairs(tmp_path), tmp_path, 0)
    assert not (tmp_path / "judgements" / ".journal.jsonl").read_text()


def test_a_judge_that_flags_every_pair_stops_the_run(tmp_path):
    """It answers the probe, so the server is in order, but there is no verdict."""

    def reply(request, _):
        return (
            verdict()
            if "What does the heart pump?" in user_prompt(request)
            else {"error": {"message": "flagged", "code": 403}}
        )

    pairs = write_pairs(tmp_path)
    for _ in range(2):
        with (
            judge_server(reply) as server,
            pytest.raises(EngineDied, match="rejected all 12 requests: flagged"),
        ):
            judge_pairs(config(server), pairs, tmp_path, 0)
    with judge_server(lambda *_: verdict()) as server:
        assert judge_pairs(config(server), pairs, tmp_path, 0)["judged"] == 12


def test_a_judge_that_wants_max_completion_tokens(tmp_path):
    def reply(request, _):
        return (
            verdict()
            if "max_completion_tokens" in request
            else {"error": {"message": "use max_completion_tokens", "code": 400}}
        )

    with judge_server(reply) as server:
        assert (
            judge_pairs(config(server, concurrency=1), write_pairs(tmp_path, 1, 2), tmp_path, 0)[
                "judged"
            ]
            == 2
        )
    assert [request.get("max_completion_tokens") for request in server.requests] == [None, 300, 300]

"""Figures of sampled pairs: by a judge behind a server, by one that is loaded here, and by
rules.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pytest

from ipt.config import JudgeConfig
from ipt.evaluation.__main__ import main
from ipt.evaluation.corpus_quality import judge_corpus, verdict_rows
from ipt.evaluation.metrics.statistics import wilson
from ipt.files import read_parts, write_parquet
from ipt.synthesis.engines import EngineDied
from ipt.synthesis.quality.judge import FIELDS, Case, read_verdict, spelled_out

VERDICT = {"reason": "said", "about_document": True, "answer_is_right": False, "task": "Is_A"}
PAIRS = pa.list_(pa.struct([("question", pa.string()), ("answer", pa.string())]))


@pytest.fixture
def stage(tmp_path):
    """What the command reads of a finished synthesis stage: five pairs."""
    answers = ["The heart", "Blood through the body", "The body pumps", "A lung"], ["Nothing"]
    rows = [
        {
            "doc_id": f"d{number}",
            "text": "The heart pumps blood through the body.",
            "pairs": [{"question": "What?", "answer": a} for a in said],
        }
        for number, said in enumerate(answers)
    ]
    schema = pa.schema([("doc_id", pa.string()), ("text", pa.string()), ("pairs", PAIRS)])
    write_parquet(tmp_path / "stage" / "pairs" / "part-00000.parquet", rows, schema)
    return tmp_path / "stage"


@pytest.fixture
def server():
    """Speaks the protocol of chat completions; finds right what the prompt calls blood or heart."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said = request["messages"][-1]["content"].partition("<answer>")[2].lower()
            verdict = {**VERDICT, "answer_is_right": "blood" in said or "heart" in said}
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": json.dumps(verdict)},
                "finish_reason": "stop",
            }
            body = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": request["model"],
                "choices": [choice],
            }
            content = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(
        target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()
    http.server_close()
    thread.join()


def run(capsys, *arguments):
    main(["pairs", *map(str, arguments)])
    return capsys.readouterr().out


def test_a_server_judges_and_rules_stand_beside_it(stage, server, tmp_path, capsys):
    options = [stage, "--judge", "judge", "--base-url", server, "--output", tmp_path / "out"]
    found = json.loads(run(capsys, *options, "--json"))
    accuracy = found["judge"]["accuracy"]
    assert (accuracy["value"], accuracy["ci95"], accuracy["n"]) == (0.4, list(wilson(2, 5)), 5)
    assert accuracy["stderr"] == pytest.approx((0.4 * 0.6 / 4) ** 0.5)
    assert found["judge"]["relevance"]["value"] == 1 and found["judge"]["relevance"]["ci95"][1] == 1
    assert (found["judge"]["kinds_of_task"], found["judge"]["tasks"], found["judge"]["failed"]) == (
        1,
        {"is a": 5},
        {},
    )
    assert found["rules"]["grounded"]["value"] == 0.6, (
        "whose words are the document's: the first three"
    )
    assert found["rules"]["verbatim"]["value"] == 0.4, (
        "the third one's stand there in another order"
    )
    assert found["rules"]["kinds"] == {"fact": 5} and found["rules"]["kinds_by_rules"] == 1
    assert json.loads((tmp_path / "out" / "pair_quality.json").read_text()) == found
    table = " ".join(run(capsys, *options).split())
    assert "judge: answer right 40.0 ±24.5 11.8 to 76.9 5 77.5 86.2 69.8" in table
    assert "judge: relevant 100.0 ±0.0" in table and "rules: kinds of task 1" in table


def test_a_sample_is_drawn_by_the_seed(stage, server, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 0, 1):
        assert (
            json.loads(
                run(
                    capsys,
                    stage,
                    "--judge",
                    "judge",
                    "--base-url",
                    server,
                    "--sample",
                    2,
                    "--seed",
                    seed,
                    "--json",
                )
            )["judge"]["accuracy"]["n"]
            == 2
        )
    folders = list((tmp_path / "outputs" / "judged").iterdir())
    assert len(folders) == 2, (
        "the same question finds its verdicts again, another seed is another question"
    )
    assert all(len(list(read_parts(folder / "judgements"))) == 2 for folder in folders)


def test_a_model_here_is_asked_once(stage, tiny_model, tmp_path, capsys):
    """A random model gives no verdict, which is told; what it was asked is kept."""
    options = [stage, "--judge", tiny_model, "--sample", 2, "--output", tmp_path / "out"]
    for _ in range(2):
        with pytest.raises(SystemExit):
            run(capsys, *options)
        assert re.search(
            r"error: the judge gave no verdict on any pair .failed: {'malformed': 2}",
            capsys.readouterr().err,
        )
        shown = capsys.readouterr().err
    assert "judge" not in shown, "the second time the model is not loaded"
    rows = list(read_parts(tmp_path / "out" / "judgements"))
    assert [row["failure"] for row in rows] == ["malformed"] * 2 and rows[0]["question"] == "What?"


def test_replies_of_a_model_here():
    cases = [Case(number, "d", "Text.", "What?", "It.") for number in range(4)]
    replies = [
        json.dumps(VERDICT),
        f"Sure:\n```json\n{json.dumps(VERDICT)}\n```",
        "It is right.",
        None,
    ]
    rows = list(verdict_rows(cases, replies))
    assert [row["failure"] for row in rows] == ["", "", "malformed", "refused"]
    assert [(row["answer_is_right"], row["task"]) for row in rows] == [(False, "is a")] * 2 + [
        (None, None)
    ] * 2


def test_rules_need_no_judge(stage, tmp_path, capsys):
    found = json.loads(run(capsys, stage / "pairs", "--output", tmp_path / "out", "--json"))
    assert "judge" not in found and found["rules"]["grounded"]["n"] == 5
    assert (
        "judge" not in run(capsys, stage, "--output", tmp_path / "out").partition("right: the")[0]
    )


def test_mistakes_end_in_one_line(stage, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(capsys, tmp_path / "empty")
    assert re.search(
        r"error: .*/empty has no pairs/part-\*.parquet: give the folder of a finished synthesis",
        capsys.readouterr().err,
    )
    dead = JudgeConfig(model="x", base_url="http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(
        EngineDied, match=r"filters\.judge\.base_url=http://127\.0\.0\.1:9/v1 cannot be reached"
    ):
        judge_corpus(stage, dead, None, 0, tmp_path / "out")


def test_a_model_that_is_held_to_no_schema_is_told_the_fields():
    prompt = spelled_out(Case(0, "d", "The {question} text.", "What?", "It."))
    assert all(
        f"- {name} ({'text' if kind is str else 'true or false'}): " in prompt
        for name, kind in FIELDS.items()
    )
    assert "<document>\nThe {question} text.\n</document>" in prompt and prompt.index(
        "</answer>"
    ) < prompt.index("- reason")
    assert read_verdict(VERDICT) == {**VERDICT, "task": "is a", "failure": ""}
    assert (
        read_verdict({**VERDICT, "task": 3})["failure"]
        == read_verdict([])["failure"]
        == "malformed"
    )

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ipt.config import RenderingConfig
from ipt.errors import UserError
from ipt.files import read_parts, write_parts
from ipt.parallel import in_order
from ipt.rendering.pairs import ChainRow
from ipt.rendering.run import SCHEMA, PairsRow, check_rendering, plan_tasks, read_chains, render

PAIRS_SCHEMA = pa.schema(
    [
        ("doc_id", pa.string()),
        ("chain_id", pa.int64()),
        ("round", pa.int8()),
        ("text", pa.string()),
        ("pairs", pa.list_(pa.struct([("question", pa.string()), ("answer", pa.string())]))),
        ("inherits_previous", pa.bool_()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("output_tokens", pa.int32()),
        ("raw_output", pa.string()),
        ("rewrite", pa.string()),
    ]
)
EVEN = {"classic": 1.0, "dialogue": 1.0, "numbered": 1.0, "inline_few_shot": 1.0, "next_turn": 1.0}
ARRANGEMENTS = "attached", "pairs_first", "detached", "pairs_only", "stitched"


def synthesized(chains: int = 120) -> list[dict]:
    """Chains of up to three documents as synthesis writes them; every text names its own chain and
    document.
    """
    chance = random.Random(0)
    rows = []
    for chain in range(chains):
        previous = False
        for place in range(chance.randint(1, 3)):
            mark = f"<{chain}.{place}>"
            pairs = [
                {"question": f"Question {index} {mark}?", "answer": f"answer {index} {mark}"}
                for index in range(chance.randint(0, 4))
            ]
            if chance.random() < 0.3 and pairs:
                pairs[0] = {
                    "question": f"Choose {mark}\nOptions:\n- yes {mark}\n- no {mark}",
                    "answer": chance.choice([f"no {mark}", "maybe"]),
                }
            rows.append(
                {
                    "doc_id": f"doc-{chain}#{place}",
                    "chain_id": chain,
                    "round": place,
                    "text": f"Text {mark}. It says {{mark}} 100 %s.",
                    "pairs": pairs,
                    "inherits_previous": previous and bool(pairs),
                    "finish_reason": "stop",
                    "prompt_tokens": 1,
                    "output_tokens": 1,
                    "raw_output": "",
                    "rewrite": "",
                }
            )
            previous = bool(pairs)
    return rows


def run(
    folder: Path, rows: list[dict], rows_per_part: int = 50, seed: int = 0, **changes
) -> tuple[dict, list[dict]]:
    write_parts(folder / "pairs", rows, PAIRS_SCHEMA, rows_per_part)
    config = RenderingConfig(**{"layouts": dict(EVEN), **changes})
    statistics = render(config, folder / "pairs", folder / "out", seed)
    return statistics, list(read_parts(folder / "out" / "texts"))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_nothing_leaks_into_another_chain_and_all_is_accounted_for(
    tmp_path: Path, arrangement: str
):
    rows = synthesized()
    statistics, texts = run(tmp_path, rows, arrangement=arrangement, inversion=0.3)
    assert pq.read_schema(tmp_path / "out/texts/part-00000.parquet").equals(SCHEMA)
    assert json.loads(json.dumps(statistics)) == statistics

    groups = list(
        read_chains(
            PairsRow(row["chain_id"], row["inherits_previous"], ChainRow(row["doc_id"], "", []))
            for row in rows
        )
    )
    # the fixture has chains that are joined and some that are not
    assert max(map(len, groups)) == 3 and min(map(len, groups)) == 1
    group_of = {row.doc_id: index for index, group in enumerate(groups) for row in group}
    for text in texts:
        marks = {
            f"doc-{mark.split('>')[0].replace('.', '#')}"
            for mark in text["text"].split("<")[1:]
            if ">" in mark and mark[0].isdigit()
        }
        assert marks and len({group_of[mark] for mark in marks}) == 1, text

    read = sum(len(row["pairs"]) for row in rows)
    assert statistics["documents"] == len(rows) and statistics["pairs_read"] == read
    assert statistics["pairs_rendered"] + sum(statistics["dropped"].values()) == read
    assert set(statistics["dropped"]) == {"answer_not_among_options"} and set(
        statistics["kinds"]
    ) == {"plain", "options"}
    assert (
        sum(text["n_pairs"] for text in texts)
        == statistics["pairs_rendered"]
        == sum(statistics["kinds"].values())
    )
    assert sum(text["n_shots"] for text in texts) == statistics["documents_with_pairs"]
    assert (
        sum(int(shots) * count for shots, count in statistics["shots"].items())
        == statistics["documents_with_pairs"]
    )
    assert statistics["documents_with_pairs"] + statistics["documents_without_pairs"] + statistics[
        "documents_blank"
    ] == len(rows)
    assert statistics["layouts"] == Counter(text["layout"] for text in texts)
    assert ({"stitched"} if arrangement == "stitched" else set(EVEN)) <= set(statistics["layouts"])
    assert (statistics["inverted"] > 0) == (arrangement == "attached")
    raw = {"detached": len(rows), "pairs_only": 0}.get(
        arrangement, statistics["documents_without_pairs"]
    )
    assert statistics["layouts"].get("raw", 0) == raw and statistics["documents_without_pairs"] > 10
    assert len({text["id"] for text in texts}) == len(texts) == statistics["texts"]
    assert {text["source"] for text in texts} == {"instruction"}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS[:4])
def test_a_rewrite_is_a_text_of_its_own_and_stands_for_a_document_without_pairs(
    tmp_path: Path, arrangement: str
):
    rows = synthesized(60)
    _, before = run(tmp_path / "before", rows, arrangement=arrangement, versions=2)
    rewritten = rows[::2]
    for row in rewritten:
        row["rewrite"] = f" {row['doc_id']} in other {{words}}.\n"
    statistics, after = run(tmp_path / "after", rows, arrangement=arrangement, versions=2)

    texts = [text for text in after if text["layout"] == "rewrite"]
    assert [
        (text["id"], text["text"], text["source"], text["n_shots"], text["n_pairs"])
        for text in sorted(texts, key=lambda t: t["id"])
    ] == [
        (f"{doc_id}/{version}/rewrite", f"{doc_id} in other {{words}}.", "instruction", 0, 0)
        for doc_id in sorted(row["doc_id"] for row in rewritten)
        for version in range(2)
    ]
    # no usable pair
    bare = {
        row["doc_id"]
        for row in rewritten
        if all(pair["answer"] == "maybe" for pair in row["pairs"])
    }
    replaced = {f"{doc_id}/{version}" for doc_id in bare for version in range(2)}
    assert bare and bare != {row["doc_id"] for row in rewritten}  # the fixture has both kinds
    assert [text for text in after if text["layout"] != "rewrite"] == [
        text for text in before if text["layout"] != "raw" or text["id"] not in replaced
    ]
    assert statistics["rewrites"] == len(rewritten) and statistics["layouts"]["rewrite"] == len(
        texts
    )
    assert len({text["id"] for text in after}) == len(after) == statistics["texts"]


def test_any_order_and_any_parts_give_the_same_texts(tmp_path: Path):
    rows = synthesized()
    _, texts = run(tmp_path / "a", rows, inversion=0.3, versions=2)
    _, in_one_part = run(tmp_path / "b", rows, rows_per_part=10_000, inversion=0.3, versions=2)
    assert in_one_part == texts
    chains = [[row for row in rows if row["chain_id"] == chain] for chain in range(120)]
    random.Random(1).shuffle(chains)
    _, shuffled = run(
        tmp_path / "c", [row for chain in chains for row in chain], inversion=0.3, versions=2
    )
    assert shuffled != texts and sorted(shuffled, key=lambda text: text["id"]) == sorted(
        texts, key=lambda text: text["id"]
    )
    _, other_seed = run(tmp_path / "d", rows, seed=1, inversion=0.3, versions=2)
    assert other_seed != texts


def test_workers_and_chains_across_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tasks begin in the middle of chains, parts too: each chain is rendered once, by the task that
    it begins in.
    """
    rows = synthesized(1500)
    _, texts = run(tmp_path / "whole", rows, rows_per_part=100_000, inversion=0.3, workers=1)
    assert len(list((tmp_path / "whole/out/texts").iterdir())) == 1
    monkeypatch.setattr("ipt.rendering.run.TASK_ROWS", 200)
    parts = {}
    for workers in (1, 2, 3):
        statistics, rendered = run(
            tmp_path / str(workers), rows, rows_per_part=77, inversion=0.3, workers=workers
        )
        assert rendered == texts
        parts[workers] = (
            [
                path.read_bytes()
                for path in sorted((tmp_path / str(workers) / "out/texts").iterdir())
            ],
            statistics,
        )
    assert parts[1] == parts[2] == parts[3] and len(parts[1][0]) > 10


def test_a_task_holds_what_it_may_have_to_read_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Tasks are sent to workers: each with all the files would make work that grows with the square
    of their number.
    """
    monkeypatch.setattr("ipt.rendering.run.TASK_ROWS", 20)
    write_parts(tmp_path / "pairs", synthesized(1000)[:1000], PAIRS_SCHEMA, 10)
    tasks = plan_tasks(tmp_path / "pairs")
    assert [task.own for task in tasks] == [2] * 50 and sum(task.rows for task in tasks) == 1000
    # 13 groups hold the 127 rows that a chain may go on for
    assert {len(task.groups) for task in tasks[:40]} == {2 + 13}
    assert [task.is_last for task in tasks] == [False] * 43 + [True] * 7


def test_a_chain_longer_than_any_task_reads_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ipt.rendering.run.TASK_ROWS", 20)
    rows = [
        {**synthesized(1)[0], "inherits_previous": number > 0, "round": number % 128}
        for number in range(300)
    ]
    with pytest.raises(
        ValueError, match=r"part-\d+.parquet: a chain of more than 127 rows goes on here"
    ):
        run(tmp_path, rows, rows_per_part=10, workers=1)


def test_a_worker_that_is_killed_is_one_clear_error():
    with pytest.raises(UserError, match="a worker process was killed"):
        list(in_order(Killer, [1, 2, 3], 2))


class Killer:
    def __call__(self, task: int) -> int:
        if task == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return task


def test_another_process_writes_the_same_bytes(tmp_path: Path):
    run(tmp_path, synthesized(30))
    code = (
        "import sys; from pathlib import Path; from ipt.config import RenderingConfig; from "
        "ipt.rendering.run import render; "
        f"render(RenderingConfig(layouts={EVEN!r}), Path(sys.argv[1]), Path(sys.argv[2]), 0); "
        "assert not {'torch', 'transformers', 'vllm', 'datasets'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "4711", "LC_ALL": "C", "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-c", code, str(tmp_path / "pairs"), str(tmp_path / "again")]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    name = "texts/part-00000.parquet"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_an_interrupted_run_is_overwritten(tmp_path: Path):
    statistics, texts = run(tmp_path, synthesized(20))
    (tmp_path / "out/texts/part-00000.parquet").unlink()
    assert run(tmp_path, synthesized(20)) == (statistics, texts)


def test_a_row_that_continues_no_chain_is_an_error(tmp_path: Path):
    rows = synthesized(10)
    rows[0]["inherits_previous"] = True
    with pytest.raises(
        ValueError,
        match="document doc-0#0 of chain 0 inherits from the row before it, which is of chain None",
    ):
        run(tmp_path, rows)


def test_missing_pairs_and_bad_configs(tmp_path: Path):
    config = RenderingConfig(layouts={"classic": 1.0})
    check_rendering(config)
    with pytest.raises(FileNotFoundError, match=r"holds no part-\*\.parquet"):
        render(config, tmp_path, tmp_path / "out", 0)
    with pytest.raises(FileNotFoundError, match=r"rendering\.templates=mine\.yaml"):
        check_rendering(RenderingConfig(layouts={"classic": 1.0}, templates="mine.yaml"))
    with pytest.raises(ValueError, match=r"rendering\.arrangement"):
        check_rendering(RenderingConfig(arrangement="", layouts={"classic": 1.0}))

import json
from pathlib import Path

import pytest

from ipt.config import CorpusConfig, SourceConfig, compose_config
from ipt.corpus.build import build_corpus
from ipt.corpus.documents import LeftOut
from ipt.files import read_parts, write_parquet
from ipt.pipeline.stages import Stages, source_corpus
from ipt.pipeline.validation import check_train
from ipt.rendering.instructions import BLANK_TURN, NO_INSTRUCTION, NO_RESPONSE, instruction_text
from ipt.tokens.store import TokenStore

SAID = [{"from": "human", "value": "Name a river."}, {"from": "gpt", "value": " The Nile.\n"}]
ROWS = [
    # OpenOrca
    {
        "id": "niv.1",
        "system_prompt": "You are helpful.",
        "question": "Name a river.",
        "response": " The Nile.\n",
    },
    {"idx": "a", "conversations": SAID},  # WizardLM_evol_instruct_V2
    {"conversations": ["Name a river.", "The Nile."], "source": "wikihow"},  # LIMA
    {"instruction": "Name a river.", "output": "The Nile."},
    {"instruction": "Name", "input": "a river.", "output": "The Nile."},
    {"instruction": "Name a river.", "input": "", "output": "The Nile."},
    {"prompt": "Name a river.", "completion": "The Nile."},
    {"inputs": "Name a river.", "targets": "The Nile.", "task": "cot"},
    {
        "messages": [
            {"role": role, "content": said}
            for role, said in (
                ("system", "Be kind."),
                ("user", "Name a river."),
                ("x", "The Nile."),
            )
        ]
    },
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "+".join(row))
def test_an_instruction_and_its_response_are_joined_by_one_space(row):
    assert instruction_text(row).replace("\n", " ") == "Name a river. The Nile."


def test_all_turns_of_a_conversation_follow_one_another():
    assert instruction_text({"conversations": ["A?", "B.", "C?", "D."]}) == "A? B. C? D."


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (
            {
                "instruction": "When?",
                "context": "It began in 2000.",
                "response": "In 2000.",
                "category": "qa",
            },
            "When?\nIt began in 2000. In 2000.",
        ),
        (
            {"question": "When?", "context": "It began in 2000.", "answer": "In 2000."},
            "When?\nIt began in 2000. In 2000.",
        ),
        (
            {"instruction": "Answer.", "input": "A?", "context": "C.", "output": "B."},
            "Answer.\nA?\nC. B.",
        ),
        (
            {"instruction": "Answer truthfully.", "question": "A?", "response": "B."},
            "Answer truthfully.\nA? B.",
        ),
        (
            {
                "instruction": "C?",
                "input": None,
                "output": "D.",
                "system": "S",
                "history": [["A?", "B."]],
            },
            "A? B. C? D.",
        ),
        ({"instruction": "C?", "output": "D.", "history": []}, "C? D."),
        ({"prompt": "### A? ###", "instruction": "A?", "output": "B."}, "### A? ### B."),
        ({"input": "A?", "output": "B."}, "A? B."),
        ({"query": "A?", "response": "B."}, "A? B."),
        ({"Instruction": "A?", "Response": "B."}, "A? B."),
        ({"messages": None, "prompt": "A?", "completion": "B."}, "A? B."),
        ({"messages": [], "prompt": "A?", "completion": "B."}, "A? B."),
        (
            {
                "prompt": "A?",
                "prompt_id": "1",
                "messages": [{"role": "user", "content": "A?"}, {"role": "x", "content": "B."}],
            },
            "A? B.",
        ),
        (
            {
                "prompt": [{"role": "user", "content": "A?"}],
                "completion": [{"role": "assistant", "content": "B."}],
            },
            "A? B.",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "A?"}]},
                    {"role": "x", "content": "B."},
                ]
            },
            "A? B.",
        ),
        ({"instruction": "A?", "output": None, "response": "B."}, "A? B."),
        ({"instruction": "A?", "output": "B.", "response": "B. "}, "A? B."),
    ],
)
def test_no_column_with_text_is_lost(row, text):
    assert instruction_text(row) == text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "A?", "context": "", "response": "   "}, NO_RESPONSE),
        ({"instruction": "A?", "output": float("nan")}, NO_RESPONSE),
        ({"instruction": "A?", "output": "\u200b"}, NO_RESPONSE),
        ({"conversations": ["A?", "B.", "C?", " \n"]}, NO_RESPONSE),
        (
            {
                "messages": [
                    {"role": "user", "content": "A?"},
                    {"role": "assistant", "content": None, "tool_calls": []},
                ]
            },
            NO_RESPONSE,
        ),
        ({"instruction": " ", "input": "", "output": "B."}, NO_INSTRUCTION),
        ({"conversations": ["", "B."]}, NO_INSTRUCTION),
        ({"conversations": ["A?", "B.", "", "D."]}, BLANK_TURN),
    ],
)
def test_blank_sides_are_counted_by_reason(row, reason):
    with pytest.raises(LeftOut, match=reason):
        instruction_text(row)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": ["Only a question."]},
        {"question": "A?", "response": ""},
        {"question": "A?", "response": None},
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "A?"}]},
        {"messages": []},
    ],
)
def test_rows_without_a_response_are_left_out(row):
    with pytest.raises(LeftOut, match=NO_RESPONSE):
        instruction_text(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "A document."},
            "has the fields text, expected those of instruction data: conversations; ",
        ),
        ({"conversations": "A? B."}, "its conversation is str, expected a list of turns"),
        (
            {"messages": [{"speaker": "a", "content": "b"}]},
            "a turn has the fields speaker, content, expected one of from, role",
        ),
        ({"question": "A?", "response": 7}, "a response is not a string"),
        (
            {"instruction": "A?", "output": "B.", "response": "C."},
            r"has more than one response \(response, output\): kind=texts with a template",
        ),
        (
            {"context": "C.", "response": "B."},
            "has the fields context, response, expected those of instruction data",
        ),
        (
            {"instruction": "A?", "output": "B.", "history": "C"},
            "its history is str, expected a list of turns",
        ),
    ],
)
def test_rows_that_are_no_instruction_data(row, message: str):
    with pytest.raises(ValueError, match=message):
        instruction_text(row)


def test_files_of_instructions_become_texts_and_all_rows_are_accounted_for(tmp_path: Path):
    (tmp_path / "orca.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*ROWS, {"conversations": ["Only a question."]}])
    )
    config = source_corpus(
        "general", SourceConfig(kind="instructions", path=str(tmp_path / "orca.jsonl"))
    )
    stats = build_corpus(config, 0, tmp_path / "out", row_text=instruction_text)
    assert (stats["documents"], stats["dropped"], stats["held_out_documents"]) == (
        len(ROWS),
        {NO_RESPONSE: 1},
        0,
    )
    assert [row["text"] for row in read_parts(tmp_path / "out/documents")] == [
        instruction_text(row) for row in ROWS
    ]
    (tmp_path / "orca.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"orca\.jsonl, line 1: has the fields text"):
        build_corpus(config, 0, tmp_path / "again", row_text=instruction_text)


def test_a_parquet_file_of_conversations(tmp_path: Path):
    import pyarrow as pa

    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    write_parquet(
        tmp_path / "a.parquet",
        [{"idx": "1", "conversations": SAID}],
        pa.schema([("idx", pa.string()), ("conversations", pa.list_(turn))]),
    )
    config = CorpusConfig(kind="files", path=str(tmp_path / "a.parquet"), held_out_fraction=0)
    build_corpus(config, 0, tmp_path / "out", row_text=instruction_text)
    assert [row["text"] for row in read_parts(tmp_path / "out/documents")] == [
        "Name a river. The Nile."
    ]


def test_a_source_of_the_mixture(tmp_path: Path, tiny_model: str):
    (tmp_path / "lima.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sources = [
        f"+mixture.sources.general.{key}"
        for key in ("kind=instructions", f"path={tmp_path}/lima.jsonl")
    ]
    overrides = [
        "experiment=tiny",
        *sources,
        "mixture.ratios.instruction=0.75",
        "+mixture.ratios.general=0.25",
        f"stages_dir={tmp_path}/stages",
    ]
    config = compose_config("train", [*overrides, f"model={tiny_model}"])
    check_train(config)
    stage = Stages(config).store("general")
    assert len(TokenStore(stage.folder)) == len(ROWS)
    config.mixture.sources["general"].path = str(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        check_train(config)
    for source in (
        SourceConfig(kind="instructions"),
        SourceConfig(kind="instructions", path="a", dataset="b"),
    ):
        with pytest.raises(ValueError, match=r"mixture\.sources\.general: set either path"):
            source_corpus("general", source)
    hub = source_corpus("general", SourceConfig(kind="instructions", dataset="Open-Orca/OpenOrca"))
    assert (hub.kind, hub.dataset, hub.split, hub.held_out_fraction) == (
        "hub",
        "Open-Orca/OpenOrca",
        "train",
        0.0,
    )

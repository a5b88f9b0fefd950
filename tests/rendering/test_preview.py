import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ipt.config import RenderingConfig
from ipt.rendering.pairs import ChainRow
from ipt.rendering.preview import COLOURS, preview
from ipt.rendering.render import Settings, render_chain
from ipt.synthesis.formats.tags import Pair

OPTIONS = {"question": "Which?\nOptions:\n- red.\n- blue.", "answer": "blue."}
REASONED = {
    "question": "Why?\nLet's think step by step.",
    "answer": "It rains.\nTherefore, the answer is rain.",
}
ROW = {
    "text": "A \ue000document\ue001 of 'mine'.",
    "pairs": [{"question": "What [bold]is?", "answer": "This."}, OPTIONS, REASONED],
}


CLASSIC = RenderingConfig(layouts={"classic": 1})


def shown(
    path: Path, config: RenderingConfig = CLASSIC, colours: bool = False, number: int = 3
) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream, width=200, force_terminal=colours, color_system="standard" if colours else None
    )
    preview(path, config, 0, number, console)
    return stream.getvalue()


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "arrangement", ["attached", "pairs_first", "detached", "pairs_only", "stitched"]
)
@pytest.mark.parametrize(
    "layout", ["classic", "dialogue", "numbered", "inline_few_shot", "next_turn"]
)
def test_the_preview_is_what_training_will_see(tmp_path: Path, arrangement: str, layout: str):
    """Marks around parts change nothing, not even where a full stop is left out."""
    config = RenderingConfig(arrangement=arrangement, layouts={layout: 1}, versions=2)
    rows = [{**ROW, "doc_id": f"doc {index}", "text": "A document."} for index in range(6)]
    text = shown(write(tmp_path / "a.jsonl", *rows), config, number=6)
    inside = [line[2:-2].rstrip() for line in text.splitlines() if line.startswith("│")]
    settings, pairs = Settings.of(config), [Pair(**pair) for pair in ROW["pairs"]]
    expected = [
        text
        for row in rows
        for text in render_chain([ChainRow(row["doc_id"], row["text"], pairs)], settings, 0)
    ]
    assert inside == [line.rstrip() for text in expected for line in text.text.split("\n")]


def test_parts_have_colours_and_markup_means_nothing(tmp_path: Path):
    text = shown(write(tmp_path / "a.jsonl", ROW), colours=True)
    assert (
        "\x1b[1;36mWhat [bold]is?" in text
        and "\x1b[34mA �document� of 'mine'." in text
        and "\x1b[33mIt rains" in text
    )
    plain = shown(write(tmp_path / "a.jsonl", ROW))
    assert "\x1b" not in plain and "\ue000" not in plain and all(part in plain for part in COLOURS)


def test_files_that_it_reads(tmp_path: Path):
    published = {"context": "A text.", "QA_list": [{"Q": "What is it?", "A": "A text."}]}
    without = {"text": "Nothing to ask.", "pairs": []}
    assert "What is it?" in shown(write(tmp_path / "a.jsonl", without, published), number=1)
    bad = {
        "text": "B",
        "pairs": [*ROW["pairs"], {"question": "Which?\nOptions:\n- a\n- b", "answer": "c"}],
    }
    assert "dropped pairs: answer_not_among_options in 0" in shown(write(tmp_path / "a.jsonl", bad))
    for rows, message in (
        ([without], "no document in it has a pair"),
        (
            [{"text": "a"}],
            r"row 1: expected one of the fields text, context and one of pairs, QA_list",
        ),
        ([{"text": "a", "pairs": ["b"]}], "row 1: expected one of the fields"),
    ):
        with pytest.raises(ValueError, match=message):
            shown(write(tmp_path / "a.jsonl", *rows))
    (tmp_path / "a.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="line 1: not a line of JSON"):
        shown(tmp_path / "a.jsonl")


def test_the_command(tmp_path: Path):
    write(tmp_path / "a.jsonl", ROW)
    command = [
        sys.executable,
        "-m",
        "ipt.rendering",
        "preview",
        str(tmp_path / "a.jsonl"),
        "rendering=stitched",
        "rendering.versions=2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "stitched, 1 shots, 6 pairs" in done.stdout
    for arguments, message in (
        ([str(tmp_path / "b.jsonl")], "no such file"),
        (["a", "rendering=none"], "none"),
    ):
        failed = subprocess.run(
            [*command[:4], *arguments], capture_output=True, text=True, check=False
        )
        assert (
            failed.returncode == 1 and message in failed.stderr and "Traceback" not in failed.stderr
        )

"""The commands of the README and of docs/ run, one after the other as a reader would, but small.

Each runs with the overrides that are printed, and others behind them that make it short. Where a
command needs what a test has not (GPUs, a cluster, a server, weights from the hub), its dry run or
nothing takes its place.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.documented import ROOT, Documented, documented_commands, tutorial_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
COMMANDS = [command for command in dict.fromkeys(documented_commands()) if command.command]
NOT_HERE = {  # what a command has: what it needs
    r"base_url=": "a server",
    r"submitit_slurm": "a cluster",
    r"^playground": "a visitor; tests/playground has one",
    r"data_dir=data": "data sets to be fetched; test_recipe_runs.py has them",
    r"stages=\[evaluation": "what the other stages have made",
    r"VANILLA/export": "two trained models",
    r"tasks=\[synthesizer\]": "data sets to be fetched",
    r"my_task\.yaml|my/exam\.yaml": "a file of the reader's own",
}
REPLACED = {
    "OWNER/MODEL": "embedded:smollm2-135m",
    "outputs/…/export": "embedded:smollm2-135m-synthesizer",
    "outputs/a/export,outputs/b/export": "embedded:tiny,embedded:tiny-synthesizer",
}
CHAT = [
    "synthesis.engine=transformers",
    "synthesis.model=embedded:smollm2-135m",
    "synthesis.max_model_len=4096",
]
WRITING = ["corpus.max_documents=2", "synthesis.max_new_tokens=16"]
SMALL = [
    "corpus.max_documents=12",
    "trainer.max_steps=2",
    "trainer.accumulate_grad_batches=1",
    "evaluation.limit=4",
]
TRAINING = ["model=embedded:tiny", "synthesis=rule_based", *SMALL]
TEXT = (
    "The aorta is the largest artery. It carries blood from the heart. However, it has no valves "
    "on its way. "
)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory) -> Callable[[Path], Path]:
    """The reader's folder for each page, in which its commands run one after the other."""
    folders: dict[Path, Path] = {}

    def of(page: Path) -> Path:
        if page not in folders:
            folders[page] = tmp_path_factory.mktemp(page.stem)
            _write_files(folders[page])
        return folders[page]

    return of


def _write_files(folder: Path) -> None:
    """Documents in the formats that the pages use, and the tutorial's files."""
    texts = [f"{TEXT * 5}Page {number}." for number in range(30)]
    (folder / "docs").mkdir()
    (folder / "docs" / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    pq.write_table(pa.table({"text": texts}), folder / "docs.parquet")
    (folder / "notes.txt").write_text(texts[0])
    for name, content in tutorial_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    chapters = [
        {"id": f"{n}", "chapter": f"chapter {n % 6}", "text": f"{TEXT * 6}Section {n}."}
        for n in range(60)
    ]
    (folder / "books" / "docs.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in chapters)
    )
    terms = "".join(f"{n},term {n},meaning {n},chapter {n % 6}\n" for n in range(24))
    (folder / "books" / "terms.csv").write_text("id,term,meaning,chapter\n" + terms)


def _additions(command: Documented) -> list[str]:
    """Overrides that make the command short; those that it has itself stay."""
    text = " ".join(command.arguments)
    added = []
    if "dry_run" in text or command.command == "chat":
        added = []
    elif re.search(r"experiment=(?!handbook)|trainer=gpu", text):
        added = ["dry_run=true"] if command.command in ("train", "reproduce") else None
    elif command.command == "evaluate":
        added = ["evaluation.limit=4"]
    elif command.command == "synthesize":
        added = CHAT + WRITING if re.search(r"synthesis=(chat|paper)", text) else WRITING
    else:
        added = TRAINING
    if added is None:
        pytest.skip("needs weights from the hub")
    if "optuna" in text:
        added = [*added, "hydra.sweeper.n_trials=2", "hydra.launcher.n_jobs=1"]
    if "synthesis=paper" in text:
        added = [
            *added,
            "synthesis.model=embedded:smollm2-135m-synthesizer",
            "synthesis.max_model_len=2048",
        ]
    return added


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_it_runs(command, folder_of):
    text = f"{command.command} {' '.join(command.arguments)}"
    for pattern, need in NOT_HERE.items():
        if re.search(pattern, text):
            pytest.skip(f"needs {need}")
    arguments = [*command.arguments, *_additions(command)]
    for placeholder, value in REPLACED.items():
        arguments = [argument.replace(placeholder, value) for argument in arguments]
    python = [sys.executable, "-m", "ipt", command.command, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        python,
        cwd=folder_of(command.page),
        env=environment,
        capture_output=True,
        text=True,
        input="One?\n",
    )
    assert done.returncode == 0, f"{' '.join(python)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"

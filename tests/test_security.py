"""Hostile files: what they would run does not run, and what they would break ends in one line. See
docs/security.md.
"""

import ast
import gzip
import json
import pickle
import re
import shutil
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import yaml
import zstandard

import ipt
from ipt.config import CorpusConfig, SynthesisConfig
from ipt.corpus.documents import read_documents
from ipt.corpus.readers import streams
from ipt.evaluation.data import read_rows, render_prompt
from ipt.evaluation.task import Task, load_tasks
from ipt.files import parse_yaml
from ipt.playground.uploads import check_text
from ipt.rendering.pools import load_pools
from ipt.stage import run_stage
from ipt.synthesis.formats.base import Vocabulary
from ipt.synthesis.formats.chat import ChatFormat
from ipt.synthesis.formats.prompt_file import load_prompt
from ipt.synthesis.qa_readers import read_examples
from ipt.tokens.shards import parse_index
from ipt.tokens.store import TokenStore
from tests.tokens.tokens_cases import write

YAML_READERS = {
    "prompt": lambda path: load_prompt(str(path)),
    "task": lambda path: load_tasks([str(path)]),
    "pools": lambda path: load_pools(str(path)),
}
SUSPICIOUS = re.compile(r"eval\(|exec\(|\.system|popen|\.load\(|pickle|unsafe|shell|trust_remote")
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mkdir('X') }}",
    "{{ ''.format.__globals__['os'] }}",
]


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A folder that hostile files make if anything of them runs."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "canary"
    yield place
    assert not place.exists()


class _Mkdir:
    """What a pickle of this makes when it is read."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return Path.mkdir, (self.place,)


def _corpus(path: Path, **more) -> list:
    return list(read_documents(CorpusConfig(kind="files", path=str(path), **more)))


def _rows(path: Path) -> list:
    return read_rows(Task("t", "choice", path.name, folder=path.parent), None)


# Nothing in a file is run
# ----------------------------------------------------------------------------------------------


def test_the_pickle_of_these_tests_would_run(tmp_path):
    pickle.loads(pickle.dumps(_Mkdir(tmp_path / "made")))
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_in_place_of_weights_does_not_run(canary, tiny_model, tmp_path, name):
    import torch

    from ipt.models import load_model

    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    torch.save(_Mkdir(canary), folder / name)
    with pytest.raises(Exception, match=r"(?i)weights_only|header|safetensors"):
        load_model(str(folder), torch.float32)


def test_an_adapter_that_is_a_pickle_is_refused(canary, tmp_path):
    from ipt.models import adapter_identity

    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(_Mkdir(canary)))
    with pytest.raises(FileNotFoundError, match=r"no adapter_model.safetensors"):
        adapter_identity(str(tmp_path))


def test_a_pickle_in_a_token_store_does_not_run(canary, tmp_path):
    store = write(tmp_path / "store", [[1, 2], [3]], 10)
    offsets, index = store / "shard-00000/offsets.npy", store / "shard-00000/index.json"
    np.save(offsets, np.array([_Mkdir(canary)], dtype=object), allow_pickle=True)
    facts = json.loads(index.read_text())
    facts["files"]["offsets.npy"]["bytes"] = offsets.stat().st_size
    index.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="damaged"):
        TokenStore(store).tokens(0)


def test_code_of_a_model_folder_does_not_run(canary, tiny_model, tmp_path):
    from ipt.models import count_parameters, load_tokenizer

    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(canary)!r})\n")
    code = {
        "AutoConfig": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", None],
        "AutoModelForCausalLM": "evil.Evil",
    }
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text()) | {
            "model_type": "evil",
            "tokenizer_class": "Evil",
            "auto_map": code,
        }
        (folder / name).write_text(json.dumps(content))
    for read in (count_parameters, load_tokenizer):
        with pytest.raises(ValueError, match="trust_remote_code"):
            read(str(folder))


def test_code_of_a_data_set_does_not_run(canary, tmp_path):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/evil.py").write_text(f"import os; os.mkdir({str(canary)!r})\n")
    with pytest.raises(ValueError, match="cannot be read"):
        list(read_documents(CorpusConfig(kind="hub", dataset=str(tmp_path / "evil"))))


@pytest.mark.parametrize("read", YAML_READERS.values(), ids=YAML_READERS)
@pytest.mark.parametrize(
    "content",
    [
        "user: !!python/object/apply:os.mkdir [canary]",
        "!!bool nonsense",
        "user: 2020-99-99",
        "[" * 100_000,
        "&a [*a]",
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "\n".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]"
            for a, b in zip("abcdefg", "bcdefgh", strict=True)
        ),
    ],
    ids=["tag", "wrong tag", "no date", "deep", "itself", "bomb"],
)
def test_yaml_is_plain_data(canary, tmp_path, read, content):
    path = tmp_path / "file.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"file.yaml: not a YAML file"):
        read(path)


@pytest.mark.parametrize("template", ESCAPES)
def test_templates_stay_in_their_sandbox(canary, tmp_path, template):
    template = template.replace("X", str(canary))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n")
    with pytest.raises(ValueError, match="cannot be filled"):
        _corpus(path, template=template)
    task = Task("t", "choice", path.name, prompt=template, folder=tmp_path)
    with pytest.raises(ValueError, match="cannot fill"):
        render_prompt(task, read_rows(task, None)[0])


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_stays_in_its_sandbox(canary, tiny_model, template):
    from ipt.models import load_tokenizer

    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = template.replace("X", str(canary)) + "{{ messages }}"
    with pytest.raises(ValueError, match="cannot render a conversation"):
        ChatFormat(Vocabulary(tokenizer), SynthesisConfig(format="chat", prompt="pairs"))


def test_a_row_is_no_template(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "{{ 7 * 7 }} {% if %}"}) + "\n")
    assert _corpus(path, template="{{ text }}")[0].text == "{{ 7 * 7 }} {% if %}"


def test_the_project_calls_nothing_that_runs_data():
    """No eval, no shell, no pickle, no code of hubs, anywhere in the package."""
    found = []
    for path in Path(ipt.__file__).parent.rglob("*.py"):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)) if SUSPICIOUS.search(source) else ():
            if isinstance(node, ast.Call):
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                called = ast.unparse(node.func)
                bad = called in (
                    "eval",
                    "exec",
                    "os.system",
                    "os.popen",
                    "torch.load",
                    "pickle.load",
                    "pickle.loads",
                    "yaml.unsafe_load",
                )
                bad |= any(
                    keywords.get(name, "False") != "False"
                    for name in ("shell", "allow_pickle", "trust_remote_code")
                )
                # of ipt.stage, a safe one
                bad |= called == "yaml.load" and keywords.get("Loader") != "loader"
                found += [f"{path.name}:{node.lineno}: {called}"] * bad
    assert found == []


# Names
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        ";$(mkdir canary);.jsonl",
        "`mkdir canary`.jsonl",
        "a\nb.jsonl",
        "--help.jsonl",
        "[bold].jsonl",
        "%s{0}.jsonl",
    ],
)
def test_names_of_files_are_only_names(canary, tmp_path, name):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / name).write_text('{"text": "a"}\n')
    (document,) = _corpus(folder)
    assert document.source == name


def test_names_of_folders_are_no_markup(tmp_path):
    for _ in range(2):
        stage = run_stage("name", tmp_path / "[/red]", lambda _: {}, config={}, inputs={})
    assert stage.reused


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["files"].update({"../../outside": {"bytes": 1, "sha256": "0" * 64}}),
        lambda index: index["files"]["tokens.bin"].update(sha256="../../outside"),
        lambda index: index["files"]["tokens.bin"].update(sha256="0" * 64 + "\n"),
        lambda index: index.update(n_docs=-1),
        lambda index: index["files"].pop("offsets.npy"),
    ],
    ids=["file", "hash", "line break", "count", "missing"],
)
def test_an_index_of_tokens_names_its_own_files_only(tmp_path, change):
    """A store behind a URL is kept in files that are named by these hashes."""
    path = write(tmp_path, [[1]], 10) / "shard-00000/index.json"
    index = json.loads(path.read_text())
    parse_index(json.dumps(index), "here", "shard-00000")
    change(index)
    with pytest.raises(ValueError, match="not the index of a shard"):
        parse_index(json.dumps(index), "here", "shard-00000")


def test_an_error_holds_nothing_that_a_terminal_obeys(capsys):
    from ipt.cli import _fail

    with pytest.raises(SystemExit):
        _fail("a\x1b[2J\nb\u2028c")
    assert capsys.readouterr().err == "error: a [2J b c\n"


# Sizes and shapes
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_bomb_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(streams, "LINE_BYTES", 1 << 14)
    compress = gzip.compress if ending == "gz" else zstandard.compress
    path = tmp_path / f"rows.jsonl.{ending}"
    path.write_bytes(compress(b'{"text": "a"}\n' * 5_000))
    assert len(_corpus(path)) == 5_000  # more than the limit, but not in one line
    path.write_bytes(compress(b'{"text": "' + b"a" * (1 << 20) + b'"}\n'))
    for read in (_corpus, _rows, lambda path: list(read_examples("collection", path, None, {}))):
        with pytest.raises(ValueError, match=rf"rows.jsonl.{ending}.*without a line break"):
            read(path)


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"text": ' + b"9" * 5000 + b"}",
        b'{"text": "\\ud800"}',
        b"\0",
        b"[]",
        b'{"text": 1}',
    ],
    ids=[
        "no UTF-8",
        "deep",
        "deep objects",
        "long number",
        "half a pair",
        "zero",
        "list",
        "number",
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2"):
        _corpus(path)


def test_a_long_line_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "ab" * (5 << 20)}) + "\n")
    assert len(_corpus(path)[0].text) == 10 << 20


@pytest.mark.parametrize(
    "header",
    [
        b"{}" + b" " * 6,
        json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode(),
    ],
    ids=["length", "offsets"],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, tiny_model, header):
    import torch

    from ipt.models import load_model

    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    length = len(header) if b"w" in header else 2**62
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header)
    with pytest.raises(Exception, match=r"(?i)header"):
        load_model(str(folder), torch.float32)


def test_halves_of_characters_are_no_text():
    with pytest.raises(ValueError, match="unpaired surrogate at character 1"):
        check_text("a\ud800", 10)


def test_a_library_that_changes_the_loader_of_yaml_does_not_change_what_a_file_says(
    monkeypatch, tmp_path
):
    """One that vLLM imports does this, for the whole process."""
    constructors = yaml.SafeLoader.yaml_constructors
    monkeypatch.setitem(
        constructors, "tag:yaml.org,2002:timestamp", constructors["tag:yaml.org,2002:str"]
    )
    assert parse_yaml(b"day: 2026-11-30", tmp_path / "file.yaml") == {"day": date(2026, 11, 30)}

"""Every recipe runs from documents to scores with a tiny model, a few steps and a few documents.

What a recipe reads from the hub or from the user's files is made here in the same layout; the data
sets of the small medical recipes are the real ones, so these need the development data beside the
checkout.
"""

import json
from pathlib import Path

import pytest

from ipt.config import Config, compose_config, conf_dir
from tests.commands import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
RECIPES = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
REAL_DATA = ("mini_medicine", "mini_medicine_cpu", "synthesizer_smollm2")
SMALL = [
    "model=embedded:tiny",
    "mixture.seq_len=256",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.devices=1",
    "trainer.num_nodes=1",
    "trainer.max_steps=2",
    "trainer.micro_batch_size=1",
    "trainer.accumulate_grad_batches=2",
    "trainer.num_workers=0",
    "lr_scheduler.warmup_steps=1",
    "evaluation.limit=4",
    "evaluation.dtype=float32",
    "synthesis.format=rule_based",
    "synthesis.shots=1",
    "seeds=[]",
]
TINY = {
    "vocab_size": 49152,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TINY |= {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
TEXT = (
    "The {organ} is a large organ of the body with two halves. It consists of many cells, and each "
    "of them takes up oxygen "
    "from the blood. However, the {organ} rests at night when the body needs less oxygen. Because "
    "the {organ} takes up "
    "oxygen, it needs a constant flow of blood from the arteries. "
)
ORGANS = (
    "heart",
    "lung",
    "liver",
    "kidney",
    "spleen",
    "stomach",
    "bladder",
    "thyroid",
    "pancreas",
    "cerebellum",
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """A folder in the layout that the recipes of the paper's sizes expect."""
    folder = tmp_path_factory.mktemp("data")
    texts = [TEXT.format(organ=organ) for organ in ORGANS] * 4
    for name, field in (
        ("pubmed_abstracts", "text"),
        ("finance_news", "text"),
        ("refinedweb/converted", "content"),
        ("refinedweb/raw", "content"),
    ):
        rows = [{field: f"{text} Copy {number} of {name}."} for number, text in enumerate(texts)]
        _write(folder / name / "part.jsonl", rows)
    _write(
        folder / "flan" / "part.jsonl",
        [{"inputs": f"What is {n} + 1?", "targets": str(n + 1)} for n in range(500)],
    )
    _write(
        folder / "instructions.jsonl",
        [{"instruction": f"What is {n} + 1?", "output": str(n + 1)} for n in range(500)],
    )
    include = (
        compose_config("train", ["experiment=synthesizer_mistral_7b"])
        .mixture.sources["collection"]
        .include
    )
    for name in include:
        pairs = [
            {"Q": f"Of what does context {n} of {name} speak?", "A": f"of {organ}"}
            for n, organ in enumerate(ORGANS[:4])
        ]
        rows = [
            {"context": text[:120], "QA_list": pairs, "QA_type": "free", "rc_name": name}
            for text in texts[:10:2]
        ]
        _write(
            folder / "ft-instruction-synthesizer-collection" / name / "shard" / "00000.jsonl", rows
        )
    return folder


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _small(name: str, config: Config, data: Path) -> list[str]:
    """Overrides that make the recipe small, and take from files what it takes from the hub."""
    overrides = [f"experiment={name}", *SMALL]
    if config.data_dir is not None:
        overrides.append(f"data_dir={data}")
    if config.corpus.path is not None:
        overrides += (
            ["corpus.max_documents=30", "corpus.held_out_fraction=0.1"]
            if name not in REAL_DATA
            else []
        )
    else:
        overrides += ["corpus.max_documents=12", "corpus.questions=8"]
    if name == "synthesizer_smollm2":
        # contexts come first, and of the pairs behind them there must be some
        overrides.append("mixture.seq_len=1024")
    if config.architecture:
        overrides += [f"architecture.{key}={value}" for key, value in TINY.items()]
    for source, settings in config.mixture.sources.items():
        if settings.dataset:
            overrides += [
                f"++mixture.sources.{source}.dataset=null",
                f"++mixture.sources.{source}.path={data}/instructions.jsonl",
            ]
    if config.corpus.path is not None and name not in REAL_DATA:
        overrides.append("tasks=[held_out_perplexity]")  # theirs are on the hub
    return overrides


@pytest.mark.parametrize("name", RECIPES)
def test_it_runs(name, data_dir, request, tmp_path):
    data = request.getfixturevalue("shared_data") if name in REAL_DATA else data_dir
    config = compose_config("reproduce", [f"experiment={name}"])
    command = "reproduce" if config.arms else "train"
    result = run("-m", "ipt", command, *_small(name, config, data), cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    stages = (tmp_path / "outputs" / "stages").glob("training-*/metrics.jsonl")
    steps = [json.loads(line) for path in stages for line in path.read_text().splitlines()]
    # arms that are the same when so small share a training
    assert len(steps) >= 2 and len(steps) % 2 == 0
    assert [step["loss"] for step in steps if not 0 < step["loss"] < 20] == []

"""Training steps on a CPU: this project's against Hugging Face Trainer's and litgpt's, on the same
weights and documents.

    python benchmarks/training.py                       # fp32 and bf16
    python benchmarks/training.py --quick               # fp32, small steps, without litgpt
    python benchmarks/training.py --texts 'data/*.parquet' --seq-len 1024 --precision bf16-mixed
    python benchmarks/training.py --model FOLDER --litgpt ''   # without litgpt

On two cores the first command takes about ten minutes, and longer the first time; `--quick` takes
two minutes. litgpt accepts only models that it has a name for, so leave it out for others.

Each side is a process of its own that trains with its own loop, as its users run it, and is held
behind each step: `ipt` (the training stage of train.py, twice: as it comes, and with
trainer.activation_checkpointing=full), the Trainer with DataCollatorWithFlattening and with padded
batches, and litgpt's `pretrain`, in an environment that is made for it once. All have fp32 weights,
AdamW (fused, but for litgpt, which has it so on GPUs only), a constant rate, clipping to 1, and as
many tokens in a step; bf16 is autocast. Documents are whole: their lengths are log-normal and their
words those of this project's docs, or they come from --texts. ipt packs them by best fit, and the
Trainer gets the documents of the same micro-batches. So both train on the same targets, packed ones
keep documents apart, and their losses must agree before anything is timed. litgpt has no document
mask: it gets the same documents as one text, in rows, and its loss must be what transformers
computes for those.

Tokens/s count tokens of documents, no padding. Memory is what a micro-batch takes at its peak
beyond weights, gradients and the optimizer's state, all in place. Sides take turns; a side that
waits sleeps. Ratios are medians over neighbouring passes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from environments import environment

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.results import Comparison, add_json_option, alternate, named, report  # noqa: E402
from ipt.config import CorpusConfig, compose_config  # noqa: E402
from ipt.corpus.documents import read_documents  # noqa: E402
from ipt.mixture.plan import Plan, make_plan  # noqa: E402
from ipt.models import load_tokenizer, resolve_model  # noqa: E402
from ipt.tokens.store import EncodedDocument, TokenStore, write_store  # noqa: E402

SIDES = Path(__file__).with_name("sides")
OURS, RECOMPUTED, PACKED, PADDED, LITGPT = (
    "ipt",
    "ipt, recomputed",
    "Trainer, packed",
    "Trainer, padded",
    "litgpt",
)
TOLERANCE = {
    "32-true": 1e-4,
    "bf16-mixed": 2e-2,
}  # nats/token by which losses of the same targets may differ: bf16 logits are coarse
LR, BETAS = 1e-5, [0.9, 0.95]
SEQUENCES = (
    256  # of the plan, most of which are not trained on: best fit needs a choice of documents
)
MEAN_LENGTH = 200  # tokens of a made-up document

Answer = dict[str, Any]  # of sides/stepping.py
MicroBatch = list[list[int]]  # tokens of its documents


def main() -> None:
    arguments = parse_arguments()
    found = []
    missing = litgpt_missing(arguments)
    if missing:
        arguments.litgpt = ""
        found.append(Comparison("all precisions", peer=LITGPT, missing=missing))
    for precision in arguments.precision:
        with tempfile.TemporaryDirectory() as folder:
            found += measure(arguments, precision, Path(folder))
    report(found, arguments.json)


def measure(arguments: argparse.Namespace, precision: str, folder: Path) -> list[Comparison]:
    """Prints the losses of the first step."""
    data = prepare(arguments, folder)
    with ExitStack() as running:
        sides = []
        for name, job in make_jobs(
            arguments, data, precision
        ).items():  # one after another: the first steps take the most memory
            sides.append(Side(name, job, folder))
            running.callback(sides[-1].stop)
            print(
                f"{precision}: {name} has begun, loss of its first step {sides[-1].warm_up():.5f}",
                flush=True,
            )
        check_agreement(sides, data, precision)
        seconds = alternate(
            {side.name: partial(side.take, arguments.steps) for side in sides}, arguments.passes
        )
    return list(
        comparisons(arguments, data, {side.name: side.memory for side in sides}, seconds, precision)
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument(
        "--litgpt",
        default="SmolLM2-135M-Instruct",
        metavar="NAME",
        help="litgpt's name for it; '': without litgpt",
    )
    parser.add_argument("--texts", help="Parquet, JSON lines or text files to read documents from")
    parser.add_argument(
        "--precision",
        nargs="+",
        default=["32-true", "bf16-mixed"],
        choices=("32-true", "bf16-mixed"),
    )
    parser.add_argument("--seq-len", type=int, default=384)
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences of a micro-batch")
    parser.add_argument(
        "--accumulate", type=int, default=2, help="micro-batches of a step, at least 2"
    )
    parser.add_argument("--steps", type=int, default=1, help="steps of a pass")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="fp32, sequences of 256, two passes, without litgpt"
    )
    add_json_option(parser)
    arguments = parser.parse_args()
    if arguments.accumulate < 2:
        parser.error(
            f"--accumulate {arguments.accumulate}: must be at least 2, memory is measured in the "
            "second micro-batch"
        )
    if arguments.quick:
        arguments.precision, arguments.seq_len, arguments.passes, arguments.litgpt = (
            ["32-true"],
            256,
            2,
            "",
        )
    return arguments


# Data
# ----------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """What all sides train on: a token store and the settings that make ipt's plan of it, and the
    plan's first micro-batches.
    """

    store: Path
    overrides: list[str]
    micro_batches: list[MicroBatch]
    rows: list[
        MicroBatch
    ]  # the same documents as one text, in rows of a token more than are inputs
    rows_loss: (
        float | None
    )  # what transformers computes for those of the first step; None without litgpt


def prepare(arguments: argparse.Namespace, folder: Path) -> Data:
    steps = 2 + arguments.steps * arguments.passes
    per_step = arguments.micro_batch * arguments.accumulate
    overrides = [
        f"model={arguments.model}",
        "mixture=vanilla",
        "mixture.packing=best_fit",
        f"mixture.seq_len={arguments.seq_len}",
        f"trainer.max_steps={max(steps, -(-SEQUENCES // per_step))}",
        f"trainer.micro_batch_size={arguments.micro_batch}",
        f"trainer.accumulate_grad_batches={arguments.accumulate}",
        "checkpoint.every_n_minutes=null",
        f"optimizer.lr={LR}",
        f"optimizer.betas={BETAS}",
        "optimizer.weight_decay=0",
        "lr_scheduler=constant",
        "lr_scheduler.warmup_steps=0",
    ]
    documents = (
        EncodedDocument(np.array(tokens, np.uint32)) for tokens in make_documents(arguments)
    )
    write_store(folder / "store", documents, "benchmark", 10**9)
    config = compose_config("train", overrides)
    store = TokenStore(folder / "store")
    plan = make_plan(
        {"raw": store}, config.mixture, config.trainer.max_steps * per_step, config.seed
    )
    micro_batches = first_micro_batches(
        plan, store, steps * arguments.accumulate, arguments.micro_batch
    )
    rows = as_rows(micro_batches, arguments.micro_batch, arguments.seq_len)
    rows_loss = (
        reference_loss(arguments.model, rows[: arguments.accumulate]) if arguments.litgpt else None
    )
    return Data(folder / "store", overrides, micro_batches, rows, rows_loss)


def make_documents(arguments: argparse.Namespace) -> Iterator[list[int]]:
    """Token ids of documents that fit into a sequence, enough for the plan."""
    tokenizer = load_tokenizer(arguments.model)
    if arguments.texts:
        for document in read_documents(CorpusConfig(kind="files", path=arguments.texts)):
            tokens = tokenizer(document.text)["input_ids"]
            yield from (
                tokens[start : start + arguments.seq_len]
                for start in range(0, len(tokens), arguments.seq_len)
            )
        return
    words = tokenizer(
        "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    )["input_ids"]
    random = np.random.default_rng(0)
    for _ in range(2 * SEQUENCES * arguments.seq_len // MEAN_LENGTH):
        length = int(
            np.clip(random.lognormal(np.log(MEAN_LENGTH) - 0.5, 1.0), 8, arguments.seq_len)
        )
        start = random.integers(len(words) - length)
        yield words[start : start + length]


def first_micro_batches(
    plan: Plan, store: TokenStore, count: int, sequences: int
) -> list[MicroBatch]:
    def tokens_of(index: int) -> MicroBatch:
        pieces = plan.sequence(index)
        assert all(piece.start == 0 and piece.end == piece.length for piece in pieces), (
            "best fit has cut a document"
        )
        return [store.tokens(piece.document).tolist() for piece in pieces]

    return [
        [document for row in range(sequences) for document in tokens_of(number * sequences + row)]
        for number in range(count)
    ]


def as_rows(micro_batches: list[MicroBatch], sequences: int, seq_len: int) -> list[MicroBatch]:
    """As many micro-batches of rows without padding; since packing leaves a little room, the text
    begins anew for the last ones.
    """
    text = [token for documents in micro_batches for document in documents for token in document]
    rows = np.resize(np.array(text), (len(micro_batches), sequences, seq_len + 1))
    return rows.tolist()


def reference_loss(model_name: str, batches: list[MicroBatch]) -> float:
    import torch

    from ipt.models import load_model

    model = load_model(model_name, torch.float32)
    with torch.inference_mode():
        losses = [
            model(input_ids=batch, labels=batch).loss.item() for batch in map(torch.tensor, batches)
        ]
    return statistics.mean(losses)


# Sides
# ----------------------------------------------------------------------------------------------


class Side:
    """A process that trains when it is asked to. Raises SystemExit with its last words if it ends
    before that.
    """

    def __init__(self, name: str, job: dict[str, Any], folder: Path) -> None:
        self.name, self.loss, self.memory = name, 0.0, 0
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**job, "output": str(folder / name)}), encoding="utf-8")
        self._log = (folder / f"{name}.log").open("w+", encoding="utf-8")
        command = [job["python"], str(SIDES / job["script"]), str(path)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
        )

    def warm_up(self) -> float:
        """Take two steps, the second with memory measured. Gives the loss of the first."""
        self._answer()
        answer = self._ask(1, memory=True)
        self.loss, self.memory = answer["losses"][0], answer["memory"]
        return self.loss

    def take(self, steps: int) -> float:
        """Seconds of so many steps."""
        return self._ask(steps)["seconds"]

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, steps: int, memory: bool = False) -> Answer:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"steps": steps, "memory": memory}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit(
                f"{self.name} has ended with code "
                f"{self._process.wait()}:\n{self._log.read()[-2000:]}"
            )
        return json.loads(line)


def make_jobs(
    arguments: argparse.Namespace, data: Data, precision: str
) -> dict[str, dict[str, Any]]:
    """What each side is told, by its name."""
    shared = {
        "python": sys.executable,
        "model": resolve_model(arguments.model),
        "precision": precision,
        "accumulate": arguments.accumulate,
        "lr": LR,
        "betas": BETAS,
    }
    overrides = [*data.overrides, f"trainer.precision={precision}"]
    ours = {**shared, "script": "with_ipt.py", "store": str(data.store)}
    trainer = {**shared, "script": "with_trainer.py", "micro_batches": data.micro_batches}
    jobs = {
        OURS: {**ours, "overrides": overrides},
        RECOMPUTED: {**ours, "overrides": [*overrides, "trainer.activation_checkpointing=full"]},
        PACKED: {**trainer, "packed": True},
        PADDED: {**trainer, "packed": False},
    }
    if arguments.litgpt:
        from transformers import AutoConfig

        python, tied = (
            environment(SIDES / "litgpt.txt"),
            AutoConfig.from_pretrained(shared["model"]).tie_word_embeddings,
        )
        litgpt = {
            "script": "with_litgpt.py",
            "python": str(python),
            "name": arguments.litgpt,
            "tied": tied,
            "rows": data.rows,
        }
        jobs[LITGPT] = {**shared, **litgpt}
    return jobs


def litgpt_missing(arguments: argparse.Namespace) -> str:
    """Why there will be no litgpt; empty if its environment is there, which is made if need be."""
    if not arguments.litgpt:
        return "left out by --quick or --litgpt ''"
    try:
        environment(SIDES / "litgpt.txt")
    except subprocess.CalledProcessError:
        return "pip could not install what benchmarks/sides/litgpt.txt lists"
    return ""


def check_agreement(sides: list[Side], data: Data, precision: str) -> None:
    """Raises SystemExit if two sides that train on the same targets have found different losses for
    them.
    """
    losses = {side.name: side.loss for side in sides}
    expected = dict.fromkeys((RECOMPUTED, PACKED, PADDED), losses[OURS])
    if data.rows_loss is not None:
        expected[LITGPT] = data.rows_loss
    for name, loss in expected.items():
        if abs(losses[name] - loss) > TOLERANCE[precision]:
            raise SystemExit(
                f"{name}: the loss of its first step is {losses[name]:.5f}, not {loss:.5f}, so it "
                "does not do the same work"
            )


# Result
# ----------------------------------------------------------------------------------------------


def comparisons(
    arguments: argparse.Namespace,
    data: Data,
    memory: dict[str, int],
    seconds: dict[str, list[float]],
    precision: str,
) -> Iterator[Comparison]:
    """Speed and memory of ours against each peer's, and of ours with recomputation against the
    Trainer's packing.
    """
    what = (
        f"{precision}, {arguments.accumulate} x {arguments.micro_batch} x {arguments.seq_len} "
        "tokens a step"
    )
    speeds = {
        name: speeds_of(arguments, data, taken, full=name == LITGPT)
        for name, taken in seconds.items()
    }
    steps = {
        name: f"{statistics.median(taken) / arguments.steps:.2f} s"
        for name, taken in seconds.items()
    }
    for own, peer in ((OURS, PACKED), (OURS, PADDED), (OURS, LITGPT), (RECOMPUTED, PACKED)):
        if peer not in speeds:
            continue
        name = (
            (SIDES / "litgpt.txt").read_text(encoding="utf-8").split()[0]
            if peer == LITGPT
            else named(peer, "transformers")
        )
        note = f"a step {steps[own]}, of the peer {steps[peer]}"
        yield Comparison(f"{own}: {what}", "tokens/s", speeds[own], name, speeds[peer], note=note)
        mib = [memory[side] / 2**20 for side in (own, peer)]
        yield Comparison(
            f"{own}: a micro-batch, {what}", "MiB", mib[:1], name, mib[1:], less_is_better=True
        )


def speeds_of(
    arguments: argparse.Namespace, data: Data, seconds: list[float], full: bool
) -> list[float]:
    """Tokens/s of each pass. Full rows, which are litgpt's, have no room left; micro-batches hold
    what the documents have.
    """
    size = (
        arguments.steps * arguments.accumulate
    )  # micro-batches of a pass, after those of the two first steps
    starts = range(2 * arguments.accumulate, len(data.micro_batches), size)
    tokens = [
        sum(
            len(document)
            for batch in data.micro_batches[start : start + size]
            for document in batch
        )
        for start in starts
    ]
    room = size * arguments.micro_batch * arguments.seq_len
    return [(room if full else count) / one for count, one in zip(tokens, seconds, strict=True)]


if __name__ == "__main__":
    main()

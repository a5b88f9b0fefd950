"""Llama-3-8B's shapes with random weights on one card, through the real training stage: tokens/s,
MFU and peak memory of each choice.

First one run at full depth with what should be best, so that there is a headline; then a model of
four layers, which ranks attention, compilation and checkpointing; then what ranked best at full
depth, at 4,096 and 8,192 tokens. Full depth needs bf16 weights to fit one card: with bitsandbytes
AdamW's moments are in 8 bits, without in fp32. MFU counts full attention over the sequence,
whatever its documents are: so a run with one document a sequence is there too, in which attention
does what comparable figures elsewhere do.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.jobs import OUT_OF_MEMORY, Job, Outcome, config_of, make_stores, run_job
from benchmarks.gpu.piece import Piece, run
from ipt.config import TrainerConfig
from ipt.training.attention import resolve_attention
from ipt.training.memory_estimate import GIB, RESERVE, memory_model, training_memory
from ipt.training.metrics import CONVENTION, named_peak

LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
TINY = LLAMA_3_8B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY |= {"num_hidden_layers": 3}
GOAL = 0.55
FULL_STEPS, RANKING_STEPS = 4, 5  # the first one, in which blocks are compiled, does not count
FULL_TOKENS, RANKING_TOKENS = 65_536, 32_768  # of an optimizer step
KERNELS = (
    "varlen",
    "flash_attention_4",
    "flash_attention_3",
    "flash_attention_2",
    "sdpa",
    "packed",
)


@dataclass(frozen=True)
class Choice:
    """What a run is made of; its micro-batch is the largest that is predicted to fit."""

    layers: int
    seq_len: int
    attention: str
    compile: bool = True
    checkpointing: str = "none"
    precision: str = "bf16-true"
    optimizer: str = "adamw"
    masked: bool = True  # documents do not see each other

    @property
    def label(self) -> str:
        compiled, documents = (
            "compiled" if self.compile else "eager",
            "" if self.masked else ", one document a sequence",
        )
        how = f"{self.attention}, {compiled}, checkpointing {self.checkpointing}"
        return (
            f"{self.layers} layers, {self.seq_len} tokens, {how}, {self.precision}, "
            f"{self.optimizer}{documents}"
        )

    def cells(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "tokens": self.seq_len,
            "attention": self.attention,
            "compiled": self.compile,
            "checkpointing": self.checkpointing,
            "documents": "apart" if self.masked else "one a sequence",
            "precision": self.precision,
            "optimizer": self.optimizer,
        }


class Trainings:
    """Runs choices, and remembers how fast each was and how long it took."""

    def __init__(self, piece: Piece, folder: Path) -> None:
        self.piece, self.folder = piece, folder
        self.shapes = TINY if piece.smoke else LLAMA_3_8B
        self.depth: int = self.shapes["num_hidden_layers"]
        self.optimizer = "adamw_8bit" if find_spec("bitsandbytes") else "adamw"
        self.stores = make_stores(
            folder / "stores", self.shapes["vocab_size"], 20_000 if piece.smoke else 2_000_000
        )
        self.speeds: dict[Choice, float] = {}
        self.longest = {
            True: 0.0,
            False: 0.0,
        }  # seconds of a run at full depth, and with few layers

    def run(self, choice: Choice) -> None:
        """Train it, if there is time and the dry run says that it fits, and tell what came of it. A
        choice runs once.
        """
        full = choice.layers == self.depth
        if choice in self.speeds or not self.piece.reach(
            choice.label, (self.longest[full] or (100 if full else 45)) + 5
        ):
            return
        fitting = self.fitted(choice)
        if fitting is None:
            self.piece.row(title(full), choice.cells() | {"tokens/s": "predicted not to fit"})
            return
        micro_batch, predicted = fitting
        clock = time.monotonic()
        job = Job(
            self.settings(choice, micro_batch), self.stores, str(self.folder / f"run-{clock:.2f}")
        )
        outcome = run_job(job, self.piece.left)
        self.longest[full] = max(self.longest[full], time.monotonic() - clock)
        known = choice.cells() | {"micro-batch": micro_batch, "predicted GiB": predicted}
        if outcome.code == 0:
            self.tell(choice, known, outcome)
            return
        if outcome.code is None:
            self.piece.not_reached.append(choice.label)
            return
        self.piece.row(
            title(full),
            known | {"tokens/s": "out of memory" if outcome.code == OUT_OF_MEMORY else "failed"},
        )
        self.piece.check(
            f"{choice.label}: ended with an error, though it was predicted to fit", 1, 0
        )
        print(outcome.error, flush=True)

    def tell(self, choice: Choice, known: dict[str, Any], outcome: Outcome) -> None:
        """A row of the table, and checks of FLOPs and memory against what was computed before."""
        steps = sorted(outcome.steps[1:], key=lambda step: step["tokens_per_second"])
        median, memory = steps[len(steps) // 2], outcome.steps[-1]["memory"]
        self.speeds[choice] = speed = median["tokens_per_second"]
        flops = flops_by_hand(self.architecture(choice), choice.seq_len)
        peak = None if self.piece.smoke else named_peak(torch.cuda.get_device_name())
        figures = {
            "tokens/s": speed,
            "MFU": median["mfu"],
            "MFU by hand": flops * speed / peak if peak else None,
            "peak GiB": memory,
        }
        self.piece.row(
            title(choice.layers == self.depth),
            known | figures | {"reserved GiB": outcome.facts.get("reserved")},
        )
        counted = (
            f"{choice.layers} layers, {choice.seq_len} tokens: FLOPs a token against those by hand"
        )
        if all(check["check"] != counted for check in self.piece.checks):
            self.piece.check(counted, abs(outcome.facts["flops_per_token"] / flops - 1), 1e-6)
        if not self.piece.smoke:
            self.piece.check(
                f"{choice.label}: GiB beyond the dry run's",
                memory - known["predicted GiB"],
                RESERVE / GIB,
            )

    def fitted(self, choice: Choice) -> tuple[int, float] | None:
        """The largest micro-batch that the dry run says fits, and GiB of its peak; None if none
        does.
        """
        room = GIB << 20 if self.piece.smoke else torch.cuda.get_device_properties(0).total_memory
        tokens = 128 if self.piece.smoke else 16_384
        for micro_batch in halves(tokens // choice.seq_len):
            config = config_of(self.settings(choice, micro_batch))
            peak = training_memory(memory_model(config), config).peak
            if peak + RESERVE <= room:
                return micro_batch, peak / GIB
        return None

    def architecture(self, choice: Choice) -> dict[str, Any]:
        return self.shapes | {"num_hidden_layers": choice.layers}

    def settings(self, choice: Choice, micro_batch: int) -> dict[str, Any]:
        full = choice.layers == self.depth
        tokens = 256 if self.piece.smoke else FULL_TOKENS if full else RANKING_TOKENS
        return {
            "architecture": self.architecture(choice),
            "mixture.ratios": {"raw": 0.5, "instruction": 0.5},
            "mixture.seq_len": choice.seq_len,
            "mixture.intra_document_mask": choice.masked,
            "optimizer.name": choice.optimizer,
            "trainer.accelerator": "cpu" if self.piece.smoke else "gpu",
            "trainer.strategy": "fsdp2",
            "trainer.precision": choice.precision,
            "trainer.attn_implementation": choice.attention,
            "trainer.compile": choice.compile,
            "trainer.activation_checkpointing": choice.checkpointing,
            "trainer.micro_batch_size": micro_batch,
            "trainer.accumulate_grad_batches": max(1, tokens // (micro_batch * choice.seq_len)),
            "trainer.max_steps": FULL_STEPS if full else RANKING_STEPS,
            "trainer.num_workers": 0 if self.piece.smoke else 1,
            "checkpoint.every_n_minutes": None,
            "checkpoint.keep_after_training": False,
        }


def measure(piece: Piece) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainings = Trainings(piece, Path(folder))
        short, long = (64, 128) if piece.smoke else (4096, 8192)
        kernels = list(available(piece))
        layers = 2 if piece.smoke else 4
        first = Choice(
            trainings.depth,
            short,
            kernels[0],
            compile=not piece.smoke,
            optimizer=trainings.optimizer,
        )
        headline(trainings, first)
        best = rank(trainings, replace(first, layers=layers), kernels)
        for choice in at_full_depth(replace(best, layers=trainings.depth), long):
            headline(trainings, choice)
        rank(trainings, replace(best, seq_len=long), kernels)
    reached = [float(row["MFU"]) for row in piece.tables.get(title(True), []) if row.get("MFU")]
    piece.note(f"MFU: {CONVENTION}")
    piece.note(
        f"goal at full depth: {GOAL:.0%} MFU; best here: "
        f"{f'{max(reached):.1%}' if reached else 'none'}"
    )


def available(piece: Piece) -> Iterator[str]:
    for name in KERNELS:
        try:
            trainer = TrainerConfig(
                accelerator="cpu" if piece.smoke else "gpu",
                precision="bf16-mixed",
                attn_implementation=name,
            )
            yield resolve_attention(trainer)
        except ValueError as error:
            piece.note(f"not here: {error}")


def headline(trainings: Trainings, choice: Choice) -> None:
    """At full depth, with as little recomputation as fits."""
    for checkpointing in dict.fromkeys((choice.checkpointing, "selective", "full")):
        if trainings.fitted(replace(choice, checkpointing=checkpointing)):
            trainings.run(replace(choice, checkpointing=checkpointing))
            return
    trainings.piece.note(f"predicted not to fit, whatever is recomputed: {choice.label}")


def rank(trainings: Trainings, base: Choice, kernels: list[str]) -> Choice:
    """The fastest of `base` and what differs from it in attention, checkpointing or compilation."""
    # `packed` cannot be compiled: its documents are a list, and each new list would be a new
    # program.
    options = [
        replace(base, attention=name, compile=base.compile and name != "packed") for name in kernels
    ]
    options += [replace(base, checkpointing=mode) for mode in ("selective", "full")]
    options += (
        [replace(base, compile=False), replace(base, checkpointing="budget")]
        if base.compile
        else []
    )
    for option in options:
        trainings.run(option)
    return max([base, *options], key=lambda option: trainings.speeds.get(option, 0.0))


def at_full_depth(best: Choice, longer: int) -> Iterator[Choice]:
    """What ranked best, and what may be asked of it, the most telling first."""
    yield best
    yield replace(best, seq_len=longer)
    yield replace(best, masked=False)
    yield replace(best, seq_len=longer, masked=False)
    yield replace(best, precision="bf16-mixed")
    for checkpointing in ("selective", "full", "none"):
        yield replace(best, checkpointing=checkpointing)


def title(full: bool) -> str:
    return "Full depth" if full else "Few layers, to rank"


def flops_by_hand(shapes: dict[str, Any], seq_len: int) -> float:
    """6 x parameters but the input embedding, and 12 x layers x width x sequence, from the numbers
    of the architecture alone.
    """
    width, layers, inner = (
        shapes["hidden_size"],
        shapes["num_hidden_layers"],
        shapes["intermediate_size"],
    )
    of_keys = width * shapes["num_key_value_heads"] // shapes["num_attention_heads"]
    block = 2 * width * width + 2 * width * of_keys + 3 * width * inner + 2 * width
    return (
        6.0 * (layers * block + width + shapes["vocab_size"] * width)
        + 12.0 * layers * width * seq_len
    )


def halves(number: int) -> Iterator[int]:
    while number:
        yield number
        number //= 2


if __name__ == "__main__":
    run("training", measure)

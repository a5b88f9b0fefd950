"""A judge: a model behind an OpenAI-compatible server that says of each pair whether it is right
(measures of the paper's Table 6).
"""

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from ipt.config import JudgeConfig
from ipt.console import Progress, progress
from ipt.corpus.words import words_of
from ipt.errors import UserError
from ipt.files import hash_json, read_parts, write_parquet
from ipt.synthesis.chains import run_bounded
from ipt.synthesis.engines import EngineDied, PromptRefused
from ipt.synthesis.engines.answers import read_answer
from ipt.synthesis.engines.server import CHAT, PROBE, Request, Server, ServerFails
from ipt.synthesis.formats.json_output import read_json
from ipt.synthesis.quality.streaming import DistinctCount, FrequentCount, share, wilson_interval

PROMPT = Path(__file__).with_name("judge_prompt.yaml")
SCHEMA = pa.schema(
    [
        ("number", pa.int64()),  # of the pair among all pairs of the stage, in order
        ("doc_id", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("answer_is_right", pa.bool_()),  # null where the judge failed
        ("about_document", pa.bool_()),
        ("task", pa.string()),
        ("reason", pa.string()),  # of a refused one the server's words
        ("failure", pa.string()),  # "", or one of FAILURES
    ]
)
Verdict = dict[str, Any]  # the fields of a reply, and its failure
FAILURES = ("malformed", "refused", "unavailable")
FIELDS = {"reason": str, "about_document": bool, "answer_is_right": bool, "task": str}
TYPES, WORDS = {str: "string", bool: "boolean"}, {str: "text", bool: "true or false"}
PAIRS_PER_PART = 10_000
SECTION = "filters.judge"
SHOWN_TASKS = 60
SHOWN_REFUSALS = 20


def judge_pairs(config: JudgeConfig, pairs: Path, output: Path, seed: int) -> dict[str, Any]:
    """Judge a sample of the pairs in `pairs/part-*.parquet`, write
    `output/judgements/part-*.parquet` and return the figures.

    accuracy: the answer is right, given the document and the question; relevance: the pair is about
    its document; each with its 95% interval (Wilson). `kinds_of_task` is how many different kinds
    the judge named, `tasks` the most frequent ones. Pairs on which the judge failed are in `failed`
    by reason and in none of the shares: malformed (the reply is no verdict), refused (the server
    rejects the request), unavailable (it answers with errors only). Verdicts are kept as they come:
    the same call goes on from there. Raises UserError where the server wants another key, model or
    address, EngineDied if it cannot be reached or never answers.
    """
    number, cases = sample_cases(pairs, config.sample, seed)
    folder = output / "judgements"
    folder.mkdir(parents=True, exist_ok=True)
    with progress("judge", number) as bar:
        asyncio.run(_work_off(config, cases, folder, bar))
    return figures(folder)


def check_judge(config: JudgeConfig) -> None:
    """Raise a one-line UserError for a config that `judge_pairs` cannot work with. Asks no server."""
    for key, least in (("sample", 1), ("concurrency", 1), ("max_retries", 0), ("max_tokens", 1)):
        value = getattr(config, key)
        if value is not None and value < least:
            raise UserError(f"filters.judge.{key}={value}: must be at least {least}")
    if config.timeout <= 0:
        raise UserError(f"filters.judge.timeout={config.timeout}: must be more than 0")


# Asking
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One pair to judge."""

    number: int
    doc_id: str
    text: str
    question: str
    answer: str

    @property
    def key(self) -> str:
        return hash_json([self.doc_id, self.question, self.answer])[:32]


def sample_cases(pairs: Path, sample: int | None, seed: int) -> tuple[int, Iterator[Case]]:
    """How many pairs of `pairs/part-*.parquet` are to be judged, and these in order: `sample` of
    them drawn by `seed`, or all.
    """
    total = sum(len(row["pairs"]) for row in read_parts(pairs, ["pairs"]))
    chosen = (
        None
        if sample is None or sample >= total
        else set(random.Random(seed).sample(range(total), sample))
    )
    return total if chosen is None else len(chosen), _cases(pairs, chosen)


def _cases(pairs: Path, chosen: set[int] | None) -> Iterator[Case]:
    number = 0
    for row in read_parts(pairs, ["doc_id", "text", "pairs"]):
        for pair in row["pairs"]:
            if chosen is None or number in chosen:
                yield Case(number, row["doc_id"], row["text"], pair["question"], pair["answer"])
            number += 1


async def _work_off(
    config: JudgeConfig, cases: Iterator[Case], folder: Path, bar: Progress
) -> None:
    probe = Case(0, "", PROBE, "What does the heart pump?", "Blood.")
    server = Server(config, SECTION, Request(CHAT, _request(config, probe)))
    try:
        await Judge(config, server, folder, bar).work_off(cases)
    finally:
        await server.close()


class Judge:
    """Works off pairs part by part. Parts that are there are not asked for again, nor are verdicts
    in the journal of an unfinished one.
    """

    def __init__(self, config: JudgeConfig, server: Server, folder: Path, bar: Progress) -> None:
        self._config, self._server, self._folder, self._bar = config, server, folder, bar
        self._last_error: ServerFails | None = None
        self._journal = folder / ".journal.jsonl"

    async def work_off(self, cases: Iterator[Case]) -> None:
        part = 0
        while block := list(islice(cases, PAIRS_PER_PART)):
            path = self._folder / f"part-{part:05d}.parquet"
            if path.exists():
                self._bar.advance(len(block))
            else:
                verdicts = await self._judge_block(block)
                write_parquet(
                    path, [verdict_row(case, verdicts[case.key]) for case in block], SCHEMA
                )
                self._journal.unlink()
            part += 1
        if not part:  # no pairs, no verdicts, but a file that says so
            write_parquet(self._folder / "part-00000.parquet", [], SCHEMA)

    async def _judge_block(self, block: list[Case]) -> dict[str, Verdict]:
        verdicts = _read_journal(self._journal)
        with self._journal.open("a", encoding="utf-8") as journal:

            async def judge(case: Case, _: int) -> None:
                if case.key not in verdicts:
                    verdict = verdicts[case.key] = await self._ask(case)
                    if verdict["failure"] != "unavailable":  # the next run tries those again
                        journal.write(json.dumps({"key": case.key, "verdict": verdict}) + "\n")
                        journal.flush()
                self._bar.advance()

            await run_bounded((partial(judge, case) for case in block), self._config.concurrency)
        self._stop_without_verdict([verdicts[case.key] for case in block])
        return verdicts

    async def _ask(self, case: Case) -> Verdict:
        try:
            content = await self._server.ask(
                Request(CHAT, _request(self._config, case)), self._send
            )
        except PromptRefused as refusal:
            self._server.say_once(
                f"the server refuses a pair; further ones are only counted: {refusal}", "refused"
            )
            return {**failure("refused"), "reason": str(refusal)}
        except ServerFails as error:
            self._last_error = error
            return failure("unavailable")
        return read_reply(content)

    async def _send(self, request: Request) -> str:
        answer = read_answer(await self._server.whole(request))
        self._server.read_end(answer)
        return answer.text

    def _stop_without_verdict(self, verdicts: list[Verdict]) -> None:
        """Raise EngineDied if the server gave no reply at all for the pairs of a part."""
        failures = Counter(verdict["failure"] for verdict in verdicts)
        if failures.keys() <= {"refused"} and not any(self._folder.glob("part-*.parquet")):
            self._journal.unlink()  # else the next run would refuse them again without a request
            raise EngineDied(
                f"judge: {self._config.base_url} refuses all of {len(verdicts)} requests: "
                f"{verdicts[0]['reason']}"
            )
        if failures.keys() <= {"refused", "unavailable"} and failures["unavailable"]:
            raise EngineDied(
                f"judge: {self._config.base_url} answered none of {len(verdicts)} requests: "
                f"{self._last_error}"
            )


def _request(config: JudgeConfig, case: Case) -> dict[str, Any]:
    shape = {"name": "verdict", "strict": True, "schema": _reply_schema()}
    return {
        "model": config.model,
        "messages": messages(case),
        "temperature": 0,
        "max_tokens": config.max_tokens,
        "response_format": {"type": "json_schema", "json_schema": shape},
    }


def messages(case: Case) -> list[dict[str, str]]:
    """The prompt with the case filled in; braces in a document are text."""
    values = {"{document}": case.text, "{question}": case.question, "{answer}": case.answer}
    parts = re.split("({document}|{question}|{answer})", _prompt()["user"])
    return [
        {"role": "system", "content": _prompt()["system"]},
        {"role": "user", "content": "".join(values.get(part, part) for part in parts)},
    ]


def spelled_out(case: Case) -> str:
    """All of the prompt as one text, for a model that is not held to the schema of the reply: the
    fields are told in words.
    """
    fields = [
        f"- {name} ({WORDS[kind]}): {' '.join(_prompt()['fields'][name].split())}"
        for name, kind in FIELDS.items()
    ]
    texts = [message["content"] for message in messages(case)]
    return "\n\n".join([*texts, "\n".join([_prompt()["reply"], *fields])])


def _reply_schema() -> dict[str, Any]:
    fields = {
        name: {"type": TYPES[kind], "description": _prompt()["fields"][name]}
        for name, kind in FIELDS.items()
    }
    return {
        "type": "object",
        "properties": fields,
        "required": list(FIELDS),
        "additionalProperties": False,
    }


def read_reply(content: str) -> Verdict:
    """The verdict in a model's reply, after reasoning or other text; a failure without a verdict."""
    found = read_json(content, _reply_schema())
    return read_verdict(found.value) if found.whole and not found.reason else failure("malformed")


def read_verdict(reply: Any) -> Verdict:
    """The verdict in a reply's JSON."""
    if not isinstance(reply, dict) or not all(
        isinstance(reply.get(name), kind) for name, kind in FIELDS.items()
    ):
        return failure("malformed")
    task = " ".join(words_of(reply["task"]))
    return {**{name: reply[name] for name in FIELDS}, "task": task, "failure": ""}


def failure(reason: str) -> Verdict:
    """No verdict, for one of FAILURES."""
    return {**dict.fromkeys(FIELDS), "failure": reason}


def verdict_row(case: Case, verdict: Verdict) -> dict[str, Any]:
    """A row of SCHEMA."""
    return {
        "number": case.number,
        "doc_id": case.doc_id,
        "question": case.question,
        "answer": case.answer,
        **verdict,
    }


def _read_journal(path: Path) -> dict[str, Verdict]:
    """The verdicts of an unfinished part; a torn last line is cut off."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    with path.open("rb+") as file:
        file.truncate(len(whole))
    try:
        entries = [json.loads(line) for line in whole.splitlines()]
        return {entry["key"]: entry["verdict"] for entry in entries}
    except (ValueError, LookupError, TypeError, RecursionError):
        raise UserError(
            f"{path} is damaged: remove it, and what it held is asked for again"
        ) from None


@cache
def _prompt() -> dict[str, Any]:
    prompt = yaml.safe_load(PROMPT.read_text(encoding="utf-8"))
    assert isinstance(prompt, dict)
    return prompt


# Figures
# ----------------------------------------------------------------------------------------------


def figures(folder: Path) -> dict[str, Any]:
    """What the verdicts in `folder/part-*.parquet` amount to: see `judge_pairs`."""
    counts: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    refused = FrequentCount()
    tasks = FrequentCount()
    different = DistinctCount()
    for row in read_parts(folder):
        if row["failure"]:
            failed[row["failure"]] += 1
            if row["failure"] == "refused" and row["reason"]:
                refused.add(row["reason"])
            continue
        counts["judged"] += 1
        counts["right"] += row["answer_is_right"]
        counts["relevant"] += row["about_document"]
        tasks.add(row["task"])
        different.add(row["task"])
    judged = counts["judged"]
    return {
        "judged": judged,
        "failed": dict(failed),
        "refused": dict(refused.most_common(SHOWN_REFUSALS)),
        "accuracy": share(counts["right"], judged),
        "accuracy_ci95": wilson_interval(counts["right"], judged),
        "relevance": share(counts["relevant"], judged),
        "relevance_ci95": wilson_interval(counts["relevant"], judged),
        "kinds_of_task": different.result(),
        "tasks": dict(tasks.most_common(SHOWN_TASKS)),
    }

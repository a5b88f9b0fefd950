"""Finished runs as a report reads them, and its page as a browser's parser sees it."""

import json
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ipt.evaluation.task import Task
from ipt.evaluation.task_types import multiple_choice, perplexity
from ipt.evaluation.task_types.registry import KINDS

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """The page as a browser's parser would see it, and whether its tags are balanced."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self._region = ""
        self.feed(self.source)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if attributes.get("class") == "table":
            self._region = attributes["aria-label"]
            self.tables[self._region] = []
        if tag == "tr":
            self.tables[self._region].append([])
        if tag in ("td", "th"):
            self.tables[self._region][-1].append(("", attributes.get("data-value")))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts.setdefault(tag, []).append(data)
        if "td" in self.open or "th" in self.open:
            text, value = self.tables[self._region][-1][-1]
            self.tables[self._region][-1][-1] = (" ".join(f"{text} {data}".split()), value)

    def text(self, tag: str = "body") -> str:
        return " ".join("".join(self.texts.get(tag, [])).split())

    def rows(self, region: str) -> list[list[tuple[str, str | None]]]:
        return self.tables[region][1:]


def choice_predictions(right: list[bool], margin: float) -> list[dict]:
    rows = []
    for number, is_right in enumerate(right):
        gold = -1.0 - 0.01 * number
        scores = [gold, gold - margin if is_right else gold + margin, -9.0, -9.0]
        common = {
            "id": f"q{number}",
            "prompt_hash": str(number),
            "options": [" a", " b", " c", " d"],
            "gold": 0,
            "right": [0],
        }
        figures = {
            "scores": scores,
            "published": scores,
            "sums": scores,
            "per_byte": [s / 2 for s in scores],
            "unconditional": None,
        }
        rows.append({**common, **figures, "group": None, "tokens": [1] * 4, "truncated": False})
    return rows


def document_predictions(nll: float) -> list[dict]:
    return [
        {
            "id": f"d{i}",
            "prompt_hash": str(i),
            "nll": (nll + 0.1 * (i % 3)) * 100,
            "tokens": 100,
            "bytes": 400,
            "windows": 1,
        }
        for i in range(30)
    ]


def evaluation(folder: Path, right: float, nll: float) -> Path:
    """Recall depends on `right`; generalisation is the same for every arm; documents depend on
    `nll`.
    """
    tasks = {
        "definition_to_term_recall": (
            multiple_choice,
            choice_predictions([i < right * 40 for i in range(40)], margin=0.3),
        ),
        "definition_to_term_generalisation": (
            multiple_choice,
            choice_predictions([i % 2 == 0 for i in range(40)], margin=0.3),
        ),
        "held_out_perplexity": (perplexity, document_predictions(nll)),
    }
    return write_evaluation(folder, tasks)


def write_evaluation(
    folder: Path, tasks: dict[str, tuple], published: Mapping[str, dict[str, float]] | None = None
) -> Path:
    """A finished evaluation of these predictions: task -> (its kind, rows)."""
    results = {}
    for task, (kind, rows) in tasks.items():
        name = next(name for name, module in KINDS.items() if module is kind)
        definition = Task(task, name, published=(published or {}).get(task, {}))
        results[task] = {
            measure: metric.as_dict() for measure, metric in kind.metrics(definition, rows).items()
        }
        schema = kind.SCHEMA.with_metadata({"task": json.dumps(definition.definition)})
        (folder / "predictions").mkdir(parents=True, exist_ok=True)
        pq.write_table(
            pa.Table.from_pylist(rows, schema=schema), folder / "predictions" / f"{task}.parquet"
        )
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def training(folder: Path, sources: dict[str, float], steps: int = 40) -> Path:
    folder.mkdir(parents=True)
    curve = [
        {
            "step": n,
            "tokens": n * 64,
            "loss": 4 - n / 40,
            **{f"loss/{s}": 4 - n / 50 for s in sources},
            "tokens_per_second": 100.0 + n,
            "mfu": None,
            "skipped": 0,
        }
        for n in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in curve))
    table = {
        name: {
            "unique_tokens": 1000,
            "requested": share,
            "realised": share,
            "tokens": round(steps * 64 * share),
            "repeats": 2.56 * share,
            "truncated": 3,
        }
        for name, share in sources.items()
    }
    summary = {
        "tokens": steps * 64,
        "steps": steps,
        "seconds": 75.0,
        "sources": table,
        "final_loss": 3.0,
        "parameters": 12345,
        "flops": 1.5e9,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder

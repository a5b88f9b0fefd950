"""`python -m ipt.evaluation COMMAND`: list, show and export tasks, compare finished evaluations."""

import argparse
import json
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ipt.cli import exit_on_user_error
from ipt.config import EvaluationConfig, JudgeConfig
from ipt.console import make_console, setup_logging, use_utf8
from ipt.errors import UserError
from ipt.evaluation.export import export
from ipt.evaluation.odd_rows import OddRows
from ipt.evaluation.results import average, compare, load_results
from ipt.evaluation.tables import differences_table, scores_table
from ipt.evaluation.task import Task, load_tasks, read_group, sources, task_names
from ipt.evaluation.task_types.multiple_choice import Question
from ipt.evaluation.task_types.registry import kind_of
from ipt.places import check_writable


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    with exit_on_user_error():
        options.run(options)


def _parser() -> argparse.ArgumentParser:
    """The options of a command have an attribute `run`, the function that runs it."""
    parser = argparse.ArgumentParser(
        prog="python -m ipt.evaluation", description="Tasks, and results of finished evaluations."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], what: str) -> Any:
        added = commands.add_parser(name, help=what)
        added.set_defaults(run=run)
        return added.add_argument

    add = command("tasks", _tasks, "list tasks and groups, and whether their data exist")
    names = "tasks, groups or .yaml files"
    add("names", nargs="*", metavar="NAME", help=f"{names} (default: the shipped ones)")
    _add_data_dir(add)

    add = command("show", _show, "print items of a task as the model reads them, with the answers")
    add("task", metavar="TASK", help="name of a task, or path of its .yaml file")
    add("number", metavar="N", nargs="?", type=int, default=3, help="items (default: 3)")
    _add_corpus(add)
    _add_data_dir(add)

    what = "write tasks as files for lm-evaluation-harness (lm_eval --include_path FOLDER)"
    add = command("export", _export, what)
    add("names", nargs="+", metavar="NAME", help=names)
    add("folder", metavar="FOLDER", type=Path, help="output folder")
    _add_corpus(add)
    _add_data_dir(add)

    finished = "folder of a finished evaluation"
    as_json = "print all metrics as JSON"
    add = command("table", _table, "print the main metrics of one or several evaluations")
    add("folders", nargs="+", type=Path, metavar="FOLDER", help=finished)
    add("--json", action="store_true", help=as_json)

    add = command("compare", _compare, "print the paired differences of two evaluations")
    add("folders", nargs=2, type=Path, metavar="FOLDER", help=f"{finished}: first minus second")
    add("--json", action="store_true", help=as_json)

    add = command("average", _average, "print scores averaged over evaluations or training runs")
    what = f"{finished}, or of a training run with scores"
    add("folders", nargs="+", type=Path, metavar="FOLDER", help=what)
    what = "number of newest scores of each training run (default: 5)"
    add("--last", type=int, default=5, metavar="K", help=what)
    add("--json", action="store_true", help=as_json)

    _add_pairs(command("pairs", _pairs, "judge sampled pairs of an augmented corpus"))
    return parser


def _add_data_dir(add: Any) -> None:
    what = "folder with downloaded data sets (default: data)"
    add("--data-dir", type=Path, default=Path("data"), help=what)


def _add_corpus(add: Any) -> None:
    what = "folder of a finished corpus stage, for tasks that read it"
    add("--corpus", type=Path, help=what)


def _add_pairs(add: Any) -> None:
    what = "folder of a finished synthesis or filters stage"
    add("folder", type=Path, metavar="FOLDER", help=what)
    what = "with --base-url the server's name of the model, else a model to load"
    add("--judge", metavar="MODEL", help=what)
    add("--base-url", metavar="URL", help="a server with OpenAI's protocol")
    what = "environment variable with the server's key"
    add("--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help=what)
    what = "number of random pairs (default: 500)"
    add("--sample", type=int, default=500, metavar="N", help=what)
    add("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    backends, dtypes = ["hf", "vllm"], ["float32", "bfloat16", "float16"]
    what = "backend of a model to load (default: hf)"
    add("--backend", default="hf", choices=backends, help=what)
    what = "dtype of a model to load (default: float32)"
    add("--dtype", default="float32", choices=dtypes, help=what)
    what = "folder of the verdicts (default: outputs/judged/KEY)"
    add("--output", type=Path, metavar="DIR", help=what)
    add("--json", action="store_true", help="print all figures as JSON")


# Tasks
# ----------------------------------------------------------------------------------------------


def _tasks(options: argparse.Namespace) -> None:
    """Files are marked ✓ if they exist, else ✗. Hub data sets, URLs and the harness's data are not
    checked.
    """
    console = make_console()
    names = options.names or task_names()
    for task in load_tasks(names, options.data_dir):
        _print_entry(console, task.name, f"{task.kind}, {_place(task)}", task.description)
    for group in filter(None, map(read_group, names)):
        _print_entry(console, group.name, f"group: {', '.join(group.tasks)}", group.description)


def _show(options: argparse.Namespace) -> None:
    """The right option is green and marked ✓; demonstrations are dim."""
    console = make_console()
    for task in load_tasks([options.task], options.data_dir):
        odd = OddRows()
        items = kind_of(task).read(task, options.corpus, odd)
        title = f"{task.name}: {len(items):,} items of kind {task.kind}"
        console.print(title, style="bold", highlight=False)
        odd.report(task)
        for item in islice(items, options.number):
            console.print(Panel(_shown(item), title=f"{item.id}", title_align="left"))


def _export(options: argparse.Namespace) -> None:
    check_writable("FOLDER", Path(options.folder))
    names = export(options.names, options.folder, options.corpus, options.data_dir)
    print(
        f"lm_eval --include_path {options.folder} --tasks {','.join(names)} --model hf "
        "--model_args pretrained=MODEL"
    )


def _place(task: Task) -> str:
    """What the task reads, and whether its files exist."""
    if task.kind == "harness":
        return f"harness:{task.harness}"
    places = []
    for source in sources(task):
        exists = source.path is not None and source.path.exists()
        mark = " ✓" if exists else " ✗"
        places.append(source.data + mark if source.path else source.data)
    return ", ".join(dict.fromkeys(places))


def _print_entry(console: Console, name: str, facts: str, description: str) -> None:
    console.print(Text(name, style="bold") + Text(f"  {facts}", style="default"))
    console.print(Padding(Text(description, style="dim"), (0, 0, 0, 4)))


def _shown(item: Any) -> Text:
    """The prompt of an item, then its options or answer."""
    prompt = getattr(item, "prompt", None)
    if not isinstance(prompt, str):
        return Text(item.text)
    text = Text(prompt[: item.shots], style="dim") + Text(prompt[item.shots :], style="default")
    if not isinstance(item, Question):
        return text.append(item.text[len(prompt) - item.shots :], style="bold green")
    contexts = item.contexts or [""] * len(item.options)
    for index, (context, option) in enumerate(zip(contexts, item.options, strict=True)):
        mark, style = (" ", "default")
        if index in (item.right or (item.gold,)):
            mark, style = ("✓", "green")
        text.append(f"\n{mark} {context}{option!r}", style=style)
    return text


# Results
# ----------------------------------------------------------------------------------------------


def _table(options: argparse.Namespace) -> None:
    folders = [folder.resolve() for folder in options.folders]
    common = os.path.commonpath(folders) if len(set(folders)) > 1 else "."
    found = {os.path.relpath(folder, common): load_results(folder) for folder in folders}
    _print(found, scores_table(found), options.json)


def _compare(options: argparse.Namespace) -> None:
    found = compare(*options.folders)
    _print(found, differences_table(found), options.json)


def _average(options: argparse.Namespace) -> None:
    if options.last < 1:
        raise UserError(f"--last is {options.last}, expected 1 or more")
    found = average(options.folders, options.last)
    _print(found, scores_table({"average": found}), options.json)


def _pairs(options: argparse.Namespace) -> None:
    from ipt.evaluation.corpus_quality import default_output, judge_corpus, judged_table

    judge = JudgeConfig(model=options.judge, sample=options.sample, api_key_env=options.api_key_env)
    local: EvaluationConfig | None = None
    if options.base_url:
        judge.base_url = options.base_url
    else:
        local = EvaluationConfig(backend=options.backend, dtype=options.dtype)
    output = options.output or default_output(options.folder, judge, local, options.seed)
    check_writable("--output", output)
    found = judge_corpus(options.folder, judge, local, options.seed, output)
    _print(found, judged_table(found), options.json)


def _print(found: Any, table: Table, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        make_console().print(table)


if __name__ == "__main__":
    use_utf8()
    setup_logging()
    main()

"""`python -m ipt.evaluation COMMAND ...`: which tasks there are, what a model reads of them, and
what finished evaluations say.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ipt.cli import exit_on_user_error
from ipt.console import make_console, use_utf8
from ipt.errors import UserError
from ipt.places import check_writable


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    with exit_on_user_error():
        options.run(options)


def _parser() -> argparse.ArgumentParser:
    """Each command is a subparser whose default `run` takes the parsed options."""
    parser = argparse.ArgumentParser(
        prog="python -m ipt.evaluation", description="Tasks, and what finished evaluations say."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tasks = commands.add_parser(
        "tasks", help="list tasks and groups, and say whether their data is there"
    )
    tasks.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="tasks, groups or .yaml files (default: all that ship)",
    )
    tasks.set_defaults(run=_tasks)
    show = commands.add_parser(
        "show", help="print items of a task as a model reads them, the right answer marked"
    )
    show.add_argument("task", metavar="TASK", help="name of a task, or path of its .yaml file")
    show.add_argument(
        "number", metavar="N", nargs="?", type=int, default=3, help="items (default: 3)"
    )
    show.add_argument(
        "--corpus", type=Path, help="folder of a finished corpus stage, for tasks that ask about it"
    )
    show.set_defaults(run=_show)
    export = commands.add_parser(
        "export",
        help="write tasks as files that lm-evaluation-harness runs (lm_eval --include_path FOLDER)",
    )
    export.add_argument("names", nargs="+", metavar="NAME", help="tasks, groups or .yaml files")
    export.add_argument("folder", metavar="FOLDER", type=Path, help="where the files go")
    export.add_argument(
        "--corpus", type=Path, help="folder of a finished corpus stage, for tasks that ask about it"
    )
    export.set_defaults(run=_export)
    _add_results(commands)
    _add_pairs(commands)
    for command in (tasks, show, export):
        command.add_argument(
            "--data-dir",
            type=Path,
            default=Path("data"),
            help="where data sets lie that you fetched (default: data)",
        )
    return parser


def _add_results(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Commands that read the folders of finished evaluations."""
    table = commands.add_parser(
        "table", help="print the main figures of one or several evaluations side by side"
    )
    compare = commands.add_parser(
        "compare", help="print the differences of two evaluations, paired over the items of both"
    )
    average = commands.add_parser(
        "average", help="print scores averaged over evaluations or training runs, with their spread"
    )
    table.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="of a finished evaluation"
    )
    compare.add_argument(
        "folders",
        nargs=2,
        type=Path,
        metavar="FOLDER",
        help="of a finished evaluation: the first minus the second",
    )
    average.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="of an evaluation, or of a run that was scored in training",
    )
    average.add_argument(
        "--last",
        type=int,
        default=5,
        metavar="K",
        help="of a training run, so many of the newest scores (default: 5)",
    )
    for command, run in ((table, _table), (compare, _compare), (average, _average)):
        command.add_argument(
            "--json", action="store_true", help="all metrics as JSON instead of a table"
        )
        command.set_defaults(run=run)


def _add_pairs(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command that looks at pairs instead of a model."""
    pairs = commands.add_parser(
        "pairs", help="judge sampled pairs of an augmented corpus, beside the paper's figures"
    )
    pairs.add_argument(
        "folder", type=Path, metavar="FOLDER", help="of a finished synthesis or filters stage"
    )
    pairs.add_argument(
        "--judge",
        metavar="MODEL",
        help="with --base-url the server's name for it, else a model that is loaded here",
    )
    pairs.add_argument("--base-url", metavar="URL", help="a server that speaks OpenAI's protocol")
    pairs.add_argument(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable that holds the server's key",
    )
    pairs.add_argument(
        "--sample", type=int, default=500, metavar="N", help="pairs, drawn at random (default: 500)"
    )
    pairs.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    pairs.add_argument(
        "--backend",
        default="hf",
        choices=["hf", "vllm"],
        help="what loads a model here (default: hf)",
    )
    pairs.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of a model here (default: fp32)",
    )
    pairs.add_argument(
        "--output", type=Path, metavar="DIR", help="where verdicts go (default: outputs/judged/KEY)"
    )
    pairs.add_argument("--json", action="store_true", help="all figures as JSON instead of a table")
    pairs.set_defaults(run=_pairs)


def _tasks(options: argparse.Namespace) -> None:
    from ipt.evaluation.preview import list_tasks

    list_tasks(options.names, options.data_dir, make_console())


def _show(options: argparse.Namespace) -> None:
    from ipt.evaluation.preview import show_task

    show_task(options.task, options.number, options.data_dir, options.corpus, make_console())


def _export(options: argparse.Namespace) -> None:
    from ipt.evaluation.export import export

    check_writable("FOLDER", Path(options.folder))
    names = export(options.names, options.folder, options.corpus, options.data_dir)
    print(
        f"lm_eval --include_path {options.folder} --tasks {','.join(names)} --model hf "
        "--model_args pretrained=MODEL"
    )


def _table(options: argparse.Namespace) -> None:
    from ipt.evaluation.results import load_results
    from ipt.evaluation.tables import scores_table

    folders = [folder.resolve() for folder in options.folders]
    common = os.path.commonpath(folders) if len(set(folders)) > 1 else "."
    found = {os.path.relpath(folder, common): load_results(folder) for folder in folders}
    _print(found, scores_table(found), options.json)


def _compare(options: argparse.Namespace) -> None:
    from ipt.evaluation.results import compare
    from ipt.evaluation.tables import differences_table

    found = compare(*options.folders)
    _print(found, differences_table(found), options.json)


def _average(options: argparse.Namespace) -> None:
    from ipt.evaluation.results import average
    from ipt.evaluation.tables import scores_table

    if options.last < 1:
        raise UserError(f"--last is {options.last}, expected 1 or more")
    found = average(options.folders, options.last)
    _print(found, scores_table({"average": found}), options.json)


def _pairs(options: argparse.Namespace) -> None:
    from ipt.config import EvaluationConfig, JudgeConfig
    from ipt.evaluation.corpus_quality import default_output, judge_corpus, judged_table

    judge = JudgeConfig(model=options.judge, sample=options.sample, api_key_env=options.api_key_env)
    here: EvaluationConfig | None = None
    if options.base_url:
        judge.base_url = options.base_url
    else:
        here = EvaluationConfig(backend=options.backend, dtype=options.dtype)
    output = options.output or default_output(options.folder, judge, here, options.seed)
    check_writable("--output", output)
    found = judge_corpus(options.folder, judge, here, options.seed, output)
    _print(found, judged_table(found), options.json)


def _print(found: Any, table: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        make_console().print(table)


if __name__ == "__main__":
    use_utf8()
    main()
